"""Checkpoints by orbax: {path: array} in named parts, the frozen half once, JSON beside it."""

from __future__ import annotations

import contextlib
import logging
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

# orbax says in thirty lines per checkpoint that all is well, and warns of read_only, which is
# meant, and of a file that the parts of a checkpoint do not have. Other warnings come through.
_EXPECTED = (
  "read_only=True",
  "directory is read only",
  "Metadata file does not exist",
  "overriding",
)
logging.getLogger("absl").addFilter(
  lambda record: (
    "/orbax/" not in record.pathname
    or (record.levelno > logging.INFO and not any(w in record.getMessage() for w in _EXPECTED))
  )
)

# Replicas share the writing of large arrays only: by default every bias would be sliced over all
# devices, one compiled slice at a time, which took seconds per checkpoint.
ocp.type_handlers.register_type_handler(
  jax.Array,
  ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20),
  override=True,
)

Arrays = Mapping[str, Any]  # {path: array}, or {path: jax.ShapeDtypeStruct with a sharding}


class Checkpoints:
  """The checkpoints of one run, in <workdir>/checkpoints/<step>.

  Saving is asynchronous: the arrays are copied, the loop goes on, a commit by renaming ends it. A
  checkpoint that was being written when the process died has no final name, in a bucket no marker,
  and is never read.
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
      workdir: folder of the run, or its address, gs://…
      last: how many of the newest are kept.
      every: those at multiples of this many steps are kept for good.
      best: name of an evaluation metric; the checkpoint with its best value is kept too.
      mode: "max" or "min": which value of it is best.
      read_only: for programs that only look: nothing is created or deleted.
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
    # Its threads ask for steps that the loop has left behind, while the hosts agree on where to end
    # from the last step that each asked for: survival.Notice alone asks.
    self._manager.reached_preemption = lambda step: False  # type: ignore[method-assign]

  def save(
    self,
    step: int,
    parts: Mapping[str, Arrays],
    meta: Mapping[str, Any],
    metrics: Mapping[str, float],
  ) -> None:
    """Starts to write {part: {path: array}} and JSON; `metrics` are those of this very step."""
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
    """Raises ValueError if config.keep.best is none of the metrics that evaluation gives."""
    if self._best and self._best not in metrics:
      raise ValueError(
        f"config.keep.best: no metric {self._best!r}.{tree.nearest(self._best, metrics)} There are"
        f" {sorted(metrics)}"
      )

  def latest(self) -> int | None:
    """The newest complete step, None if there is none."""
    return self._manager.latest_step()

  def find(self, step: int | str = "latest") -> int:
    """A step from "latest", "best" or a number.

    Raises:
      FileNotFoundError: if the run has no such checkpoint; names those it has.
    """
    there = sorted(self._manager.all_steps())
    if step == "best":
      if not self._best:
        raise ValueError("no checkpoint is 'best': the run's config.keep.best names no metric")
      found = self._manager.best_step()
    else:
      found = self._manager.latest_step() if step == "latest" else int(step)
    if found is None or found not in there:
      raise FileNotFoundError(f"no checkpoint {step!r} in {self.folder}; there are {there}")
    return found

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON beside the arrays."""
    with _damage(self.folder / str(step)):
      restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    return restored["meta"]

  def restore(self, step: int, parts: Mapping[str, Arrays]) -> dict[str, dict[str, jax.Array]]:
    """{part: {path: array}}, each array born in the sharding asked for, whatever wrote it.

    Raises:
      ValueError: for another model's checkpoint; names the first path that differs.
      RuntimeError: for one that lost files, or parts of them, since it was written.
    """
    wanted = {name: arrays for name, arrays in parts.items() if arrays}
    for name, arrays in wanted.items():
      folder = self.folder / str(step) / name
      if not folder.exists():
        raise ValueError(f"{folder.parent} has no {name!r}, which this config asks for")
      with _damage(folder.parent):
        stored = _shapes(folder)
      _compare(stored, arrays, folder)
    items = {name: ocp.args.StandardRestore(tree.unflatten(x)) for name, x in wanted.items()}
    with _damage(self.folder / str(step)):
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return {name: tree.flatten(restored[name]) if name in wanted else {} for name in parts}

  def save_frozen(self, arrays: Arrays) -> None:
    """Writes the parameters that never change: once, when a run is born.

    What a birth before left, one that was killed before its first checkpoint, is replaced.
    """
    if arrays:
      with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(self._frozen, tree.unflatten(arrays), force=True)

  def restore_frozen(self, arrays: Arrays) -> dict[str, jax.Array]:
    """The parameters that never change, in the shardings asked for."""
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
    # After a failure on one host the others will not come to the barriers of a common end.
    if kind is None or jax.process_count() == 1:
      self.close()

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


@contextlib.contextmanager
def _damage(folder: epath.Path) -> Iterator[None]:
  """Gives what orbax says of a damaged checkpoint, which can be anything, a name and a way on."""
  try:
    yield
  except Exception as error:
    raise RuntimeError(
      f"{folder} is complete by its name, but cannot be read: {type(error).__name__}: {error}\n"
      "Move this folder away, and the run goes on from the checkpoint before it."
    ) from error


def _shapes(folder: epath.Path) -> dict[str, Any]:
  """{path: metadata with shape and dtype} of what is stored in a folder."""
  with ocp.StandardCheckpointer() as checkpointer:
    return tree.flatten(checkpointer.metadata(folder).item_metadata.tree)


def _compare(stored: Mapping[str, Any], wanted: Arrays, folder: epath.Path) -> None:
  for path in sorted({*stored, *wanted}):
    here = (tuple(wanted[path].shape), str(wanted[path].dtype)) if path in wanted else "nothing"
    there = (tuple(stored[path].shape), str(stored[path].dtype)) if path in stored else "nothing"
    if here != there:
      raise ValueError(
        f"{folder} is of another model. First difference: {path}: stored {there}, this config has"
        f" {here}. Give the config that wrote it, or another --workdir."
      )


def revision() -> str:
  """The commit of the code with "-dirty" if it was changed since, "unknown" outside of git."""
  here = pathlib.Path(__file__).parent
  command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
  except (OSError, subprocess.SubprocessError):
    return "unknown"
  return found.stdout.strip()
