"""Checkpoints, by orbax: {path: array} in named parts, and JSON; frozen parameters once per run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from bigalign import checks, tree
from bigalign.private_apis import ignore_preemption, quiet_orbax

quiet_orbax()

# Only large arrays are split over the replicas for writing. By default orbax slices every bias over
# all devices, one compiled slice at a time, which took seconds per checkpoint.
ocp.type_handlers.register_type_handler(
  jax.Array,
  ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20),
  override=True,
)

Arrays = Mapping[str, Any]  # {path: array}, or {path: jax.ShapeDtypeStruct with a sharding}


class Checkpoints:
  """The checkpoints of one run, in <workdir>/checkpoints/<step>.

  Saving is asynchronous: the arrays are copied, the loop continues, and a rename commits the
  checkpoint. If the process dies while it writes one, the folder has no final name (in a bucket: no
  commit marker) and is never read.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    last: int = 2,
    every: int | None = None,
    best: str | None = None,
    mode: str = "max",
    read_only: bool = False,
  ) -> None:
    """
    Args:
      workdir: folder of the run, or its address gs://…
      last: number of newest checkpoints to keep.
      every: also keep the checkpoints at multiples of this many steps.
      best: name of an evaluation metric; also keep the checkpoint with its best value.
      mode: "max" or "min": which value of `best` is the best.
      read_only: for programs that only read: nothing is created or deleted.

    Raises:
      ValueError: for an unknown mode.
    """
    checks.known("config.keep.mode", mode, ("max", "min"))
    address = os.fspath(workdir)
    root = epath.Path(address if "://" in address else os.path.abspath(address))
    self.folder = root / "checkpoints"
    self._frozen = root / "frozen"
    self._best = best
    keep: list[Any] = [policies.LatestN(last)]
    if every:
      keep.append(policies.EveryNSteps(every))
    if best:
      worst = float("-inf") if mode == "max" else float("inf")
      keep.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics.get(best, worst),
          reverse=mode == "min",
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=(lambda metrics: metrics.get(best, worst)) if best else None,
        best_mode=mode,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
      ),
    )
    ignore_preemption(self._manager)

  def save(
    self,
    step: int,
    parts: Mapping[str, Arrays],
    meta: Mapping[str, Any],
    metrics: Mapping[str, float],
  ) -> None:
    """Starts to write a checkpoint.

    Args:
      step: number of updates done.
      parts: {part: {path: array}}; empty parts are left out.
      meta: anything that JSON can hold.
      metrics: the evaluation metrics of this step, empty if it was not evaluated.
    """
    items = {
      name: ocp.args.StandardSave(tree.unflatten(arrays))
      for name, arrays in parts.items()
      if arrays
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(meta=ocp.args.JsonSave(dict(meta)), **items),
      metrics=dict(metrics) if metrics else None,
    )

  def check_best(self, metrics: Mapping[str, float]) -> None:
    """Checks that config.keep.best is one of the metrics that evaluation returns.

    Raises:
      ValueError: if it is not; lists the metrics.
    """
    if self._best and self._best not in metrics:
      raise ValueError(
        f"config.keep.best: no metric {self._best!r}.{tree.nearest(self._best, metrics)} Known:"
        f" {sorted(metrics)}"
      )

  def latest(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    step: int | None = self._manager.latest_step()
    return step

  def find(self, step: int | str = "latest") -> int:
    """Returns the step of a checkpoint.

    Args:
      step: "latest", "best" or a number.

    Raises:
      FileNotFoundError: if the run has no such checkpoint; lists the existing ones.
      ValueError: for "best" without config.keep.best.
    """
    existing = sorted(self._manager.all_steps())
    if step == "best":
      if not self._best:
        raise ValueError("no checkpoint is 'best': the run's config.keep.best names no metric")
      number: int | None = self._manager.best_step()
    else:
      number = self._manager.latest_step() if step == "latest" else int(step)
    if number is None or number not in existing:
      raise FileNotFoundError(f"no checkpoint {step!r} in {self.folder}; there are {existing}")
    return number

  def meta(self, step: int) -> dict[str, Any]:
    """Returns the JSON of a checkpoint.

    Raises:
      RuntimeError: if the checkpoint is damaged.
    """
    with _name_damaged(self.folder / str(step)):
      restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    meta: dict[str, Any] = restored["meta"]
    return meta

  def restore(self, step: int, parts: Mapping[str, Arrays]) -> dict[str, dict[str, jax.Array]]:
    """Restores arrays directly into their shardings, whatever mesh they were written from.

    Args:
      step: of the checkpoint.
      parts: {part: {path: shape, dtype and sharding to restore}}.

    Returns:
      {part: {path: array}}.

    Raises:
      ValueError: for another model's checkpoint; names the first path that differs.
      RuntimeError: if the checkpoint is damaged: files were lost or cut since it was written.
    """
    wanted = {name: arrays for name, arrays in parts.items() if arrays}
    for name, arrays in wanted.items():
      folder = self.folder / str(step) / name
      if not folder.exists():
        raise ValueError(f"{folder.parent} has no {name!r}, which this config needs")
      with _name_damaged(folder.parent):
        stored = _shapes(folder)
      _compare(stored, arrays, folder)
    items = {name: ocp.args.StandardRestore(tree.unflatten(x)) for name, x in wanted.items()}
    with _name_damaged(self.folder / str(step)):
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return {name: tree.flatten(restored[name]) if name in wanted else {} for name in parts}

  def save_frozen(self, arrays: Arrays) -> None:
    """Writes the frozen parameters, once per run, when it starts.

    Replaces those of an earlier start that was killed before its first checkpoint.
    """
    if arrays:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(self._frozen, tree.unflatten(arrays), force=True)

  def restore_frozen(self, arrays: Arrays) -> dict[str, jax.Array]:
    """Restores the frozen parameters into the given shardings.

    Raises:
      FileNotFoundError: if the run has none.
      ValueError: if they belong to another model.
    """
    if not arrays:
      return {}
    if not self._frozen.exists():
      raise FileNotFoundError(f"{self._frozen} is missing; it holds this run's frozen parameters")
    _compare(_shapes(self._frozen), arrays, self._frozen)
    with ocp.StandardCheckpointer() as checkpointer:
      return tree.flatten(checkpointer.restore(self._frozen, tree.unflatten(arrays)))

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
    # If one host fails, the others do not reach the barriers of a common close.
    if kind is None or jax.process_count() == 1:
      self.close()

  def close(self) -> None:
    """Waits for pending writes and closes."""
    self._manager.wait_until_finished()
    self._manager.close()


@contextlib.contextmanager
def _name_damaged(folder: epath.Path) -> Iterator[None]:
  """Names a damaged checkpoint in orbax's error, which can be of any type, and says what to do."""
  try:
    yield
  except Exception as error:
    raise RuntimeError(
      f"{folder} was committed but cannot be read: {type(error).__name__}: {error}\n"
      "Move this folder away; the run then resumes from the checkpoint before it."
    ) from error


def _shapes(folder: epath.Path) -> dict[str, Any]:
  """{path: metadata with shape and dtype} of the arrays in a folder."""
  with ocp.StandardCheckpointer() as checkpointer:
    return tree.flatten(checkpointer.metadata(folder).item_metadata.tree)


def _compare(stored: Mapping[str, Any], wanted: Arrays, folder: epath.Path) -> None:
  for path in sorted({*stored, *wanted}):
    here = (tuple(wanted[path].shape), str(wanted[path].dtype)) if path in wanted else "nothing"
    there = (tuple(stored[path].shape), str(stored[path].dtype)) if path in stored else "nothing"
    if here != there:
      raise ValueError(
        f"{folder} belongs to another model. First difference: {path}: stored {there}, this config"
        f" has {here}. Use the config that wrote it, or another --workdir."
      )


def revision() -> str:
  """Returns the git commit of the code, with "-dirty" for uncommitted changes, or "unknown"."""
  here = pathlib.Path(__file__).parent
  command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    described = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
  except (OSError, subprocess.SubprocessError):
    return "unknown"
  return described.stdout.strip()
