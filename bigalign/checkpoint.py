"""Checkpoints, by orbax: {path: array} in named parts, and JSON; frozen parameters once per run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from bigalign import checks, tree
from bigalign.data.files import checksums, storage
from bigalign.private_apis import (
  ignore_preemption,
  is_lost_process,
  is_out_of_memory,
  quiet_orbax,
  tensorstore_status,
)

quiet_orbax()

# Only large arrays are split over the replicas for writing. By default orbax slices every bias over
# all devices, one compiled slice at a time, which took seconds per checkpoint.
ocp.type_handlers.register_type_handler(
  jax.Array,
  ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20),
  override=True,
)

Arrays = Mapping[str, Any]  # {path: array}, or {path: jax.ShapeDtypeStruct with a sharding}
SEALED = {"checksums": checksums.FILE}  # in the metadata of each part that has checksums
# Errors of a store that say nothing about the bytes in it.
_NOT_DAMAGE = (
  *("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"),
  *("PERMISSION_DENIED", "UNAUTHENTICATED"),
)
# Orbax writes it again when it commits; it holds times and the class that wrote a part.
_LATER = ("_CHECKPOINT_METADATA",)


class SealedArrays(ocp.StandardCheckpointHandler):
  """Orbax's handler of arrays, which also writes the checksum of each file.

  Orbax has no checksums. Those that tensorstore offers (CRC-32C per chunk, in zarr 3) cover neither
  the description of an array, where one bit turns its byte order, nor orbax's own files, and orbax
  has no option for them. Each process reads back what it wrote; the first one adds the few files
  that describe the whole.
  """

  async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Also records the checksums, before the checkpoint is committed."""
    writes = await super().async_save(directory, *args, **kwargs)
    folder = getattr(directory, "path", directory)  # it may not exist yet

    def record() -> None:
      own = f"ocdbt.process_{jax.process_index()}"
      if (folder / own).exists():
        files = checksums.list_files(folder, own)
        checksums.record(folder, files, jax.process_index())

    return [ocp.future.ChainedFuture(writes or [], record)]

  def finalize(self, directory: Any) -> None:
    """Called in one process, once all have written their files."""
    super().finalize(directory)
    checksums.seal_folder(directory, without=_LATER)


@ocp.args.register_with_handler(SealedArrays, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
  """Arrays to write with checksums."""


@ocp.args.register_with_handler(SealedArrays, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.StandardRestore):
  """Arrays to restore."""


class Stored(NamedTuple):
  """An array in a checkpoint: the folder of its part, its shape and its dtype."""

  folder: epath.Path
  shape: tuple[int, ...]
  dtype: Any


class Keep(NamedTuple):
  """Which checkpoints are kept; also orbax's policy. Orbax's own one sorts by NaN.

  last, every, best, mode: as of Checkpoints.
  """

  last: int = 2
  every: int | None = None
  best: str | None = None
  mode: str = "max"

  def steps(self, scores: Mapping[int, Any]) -> set[int]:
    """The steps of the checkpoints to keep.

    Args:
      scores: {step: evaluation metrics of its checkpoint, None or empty if it has none}.
    """
    return {*sorted(scores)[-self.last :], *self.lasting(scores)}

  def lasting(self, scores: Mapping[int, Any]) -> set[int]:
    """Those that later checkpoints do not replace; as long as no metric is `best`, all that may be.

    Arguments as of `steps`.
    """
    kept = {step for step in scores if self.every and step % self.every == 0}
    if not self.best:
      return kept
    evaluated = {step for step, metrics in scores.items() if metrics}
    if not any(self.best in scores[step] for step in evaluated):
      return kept | evaluated
    best = self.best_step(scores)
    return kept if best is None else kept | {best}

  def best_step(self, scores: Mapping[int, Any]) -> int | None:
    """The step with the best value, the newest of equal ones; None if no value is a number."""
    sign = 1 if self.mode == "max" else -1
    values = {step: (metrics or {}).get(self.best, math.nan) for step, metrics in scores.items()}
    numbers = [(sign * value, step) for step, value in values.items() if not math.isnan(value)]
    return max(numbers)[1] if numbers else None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Orbax's interface: whether to keep each checkpoint."""
    kept = self.steps({one.step: one.metrics for one in checkpoints})
    return [one.step in kept for one in checkpoints]

  def __str__(self) -> str:
    return f"dict({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"


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
      ValueError: for an unknown mode, and for `last` below 1.
      RuntimeError: if the metrics of a checkpoint, which decide whether it is kept, are damaged.
    """
    checks.known("config.keep.mode", mode, ("max", "min"))
    if last < 1:
      raise ValueError(f"config.keep.last={last}: at least 1")
    address = os.fspath(workdir)
    if "://" in address:
      storage.forget_listings()
    root = epath.Path(address if "://" in address else os.path.abspath(address))
    self.folder = root / "checkpoints"
    self._frozen = root / "frozen"
    self._best = best
    if best:
      self._check_metrics()
    self._keep = Keep(last, every, best, mode)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._keep,
        best_fn=(lambda metrics: 0.0) if best else None,  # orbax writes metrics only with one
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
      name: _Save(tree.unflatten(arrays), custom_metadata=SEALED)
      for name, arrays in parts.items()
      if arrays
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(meta=ocp.args.JsonSave(checksums.seal(meta)), **items),
      metrics=checksums.seal(metrics) if metrics else None,
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

  def knows_best(self) -> bool:
    """Whether config.keep.best is None, or a metric of one of the checkpoints."""
    return not self._best or any(self._best in x for x in self._scores().values() if x)

  def check_deletions(self, previous: Mapping[str, Any]) -> None:
    """Checks that the next checkpoint deletes no lasting one because config.keep has changed.

    Args:
      previous: config.keep of the last start: last, every, best, mode.

    Raises:
      ValueError: if it deletes the best one so far, or one that `every` kept; lists them.
    """
    old, scores = Keep(**previous), self._scores()
    lost = sorted(old.lasting(scores) - self._keep.steps(scores))
    if lost:
      raise ValueError(
        f"config.keep was {old}, and is now {self._keep}. The next checkpoint would delete"
        f" {tree.shown((str(self.folder / str(x)) for x in lost), sep=', ', width=300)}. Copy them"
        " and pass"
        " --allow_config_change, or restore the old config.keep."
      )

  def add_scores(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds the evaluation metrics of a checkpoint that was written before its evaluation.

    Every process must call it.

    Args:
      step: of the checkpoint.
      metrics: the evaluation metrics of this step.
    """
    if not (self._best and metrics):
      return
    if jax.process_index() == 0:
      path = self.folder / str(step) / "metrics" / "metrics"
      path.parent.mkdir(exist_ok=True)
      text = json.dumps(checksums.seal(metrics))
      if "://" in os.fspath(path):  # an object appears whole, and not every bucket can rename one
        path.write_text(text)
      else:
        with storage.atomic_write(path) as file:
          file.write(text.encode())
    multihost_utils.sync_global_devices(f"metrics of checkpoint {step}")
    self._manager.reload()

  def _scores(self) -> dict[int, Any]:
    """{step: its evaluation metrics, None if it has none}"""
    return {step: self._manager.metrics(step) for step in self._manager.all_steps()}

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
      number = self._keep.best_step(self._scores())
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
    with self._name_damaged(step):
      return checksums.read_json(self.folder / str(step) / "meta" / "metadata")

  def restore(self, step: int, parts: Mapping[str, Arrays]) -> dict[str, dict[str, jax.Array]]:
    """Restores arrays directly into their shardings, whatever mesh they were written from.

    Args:
      step: of the checkpoint.
      parts: {part: {path: shape, dtype and sharding to restore}}.

    Returns:
      {part: {path: array}}.

    Raises:
      ValueError: for another model's checkpoint; names the first path that differs.
      RuntimeError: if the checkpoint is damaged: files were lost, cut or changed since it was
        written. Names the file, and the checkpoint before it.
    """
    wanted = {name: arrays for name, arrays in parts.items() if arrays}
    for name, arrays in wanted.items():
      folder = self.folder / str(step) / name
      if not folder.exists():
        raise ValueError(f"{folder.parent} has no {name!r}, which this config needs")
      with self._name_damaged(step):
        _check_sums(folder)
        stored = _shapes(folder)
      _compare(stored, arrays, folder)
    items = {name: _Restore(tree.unflatten(x)) for name, x in wanted.items()}
    with self._name_damaged(step):
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return {name: tree.flatten(restored[name]) if name in wanted else {} for name in parts}

  def save_frozen(self, arrays: Arrays) -> None:
    """Writes the frozen parameters, once per run, when it starts.

    Replaces those of an earlier start that was killed before its first checkpoint.
    """
    if arrays:
      with ocp.Checkpointer(SealedArrays()) as checkpointer:
        saved = _Save(tree.unflatten(arrays), custom_metadata=SEALED)
        checkpointer.save(self._frozen, args=saved, force=True)

  def restore_frozen(self, arrays: Arrays) -> dict[str, jax.Array]:
    """Restores the frozen parameters into the given shardings.

    Raises:
      FileNotFoundError: if the run has none.
      ValueError: if they belong to another model.
      RuntimeError: if they are damaged.
    """
    if not arrays:
      return {}
    if not self._frozen.exists():
      raise FileNotFoundError(f"{self._frozen} is missing; it holds this run's frozen parameters")
    way_on = (
      "It holds the frozen parameters, which are written once per run. Copy the folder from a"
      " backup, or from another run with the same config.model and config.seed."
    )
    with _name_damaged(self._frozen, lambda: way_on):
      _check_sums(self._frozen)
      stored = _shapes(self._frozen)
    _compare(stored, arrays, self._frozen)
    with (
      _name_damaged(self._frozen, lambda: way_on),
      ocp.Checkpointer(SealedArrays()) as checkpointer,
    ):
      args = _Restore(tree.unflatten(arrays))
      return tree.flatten(checkpointer.restore(self._frozen, args=args))

  def parameters(self, step: int, *, ema: bool = False) -> dict[str, Stored]:
    """Where each parameter of a checkpoint is; no array is read.

    Args:
      step: of the checkpoint.
      ema: the running averages, and the parameters that have none.

    Raises:
      ValueError: if the run keeps no averages.
      RuntimeError: if the checkpoint is damaged.
    """
    checkpoint = self.folder / str(step)
    learned = checkpoint / ("ema" if ema else "trainable")
    if not learned.exists():
      raise ValueError(f"{checkpoint} has no {learned.name!r}: its run keeps no averages")
    stored: dict[str, Stored] = {}
    with self._name_damaged(step):
      for folder in (self._frozen, checkpoint / "frozen", learned):
        if folder.exists():
          shapes = _shapes(folder).items()
          stored |= {k: Stored(folder, tuple(x.shape), np.dtype(x.dtype)) for k, x in shapes}
    return stored

  def _check_metrics(self) -> None:
    """Raises RuntimeError for damaged metrics; those of older versions have no checksum."""
    steps = self.folder.iterdir() if self.folder.exists() else ()
    for folder in steps:
      path = folder / "metrics" / "metrics"
      if folder.name.isdecimal() and path.exists():
        with self._name_damaged(int(folder.name)):
          checksums.read_json(path)

  def _name_damaged(self, step: int) -> contextlib.AbstractContextManager[None]:
    """Names the checkpoint in an error of reading it, and the one before it."""

    def way_on() -> str:
      names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
      before = [int(name) for name in names if name.isdecimal() and int(name) < step]
      older = f"the run then resumes from {self.folder / str(max(before, default=0))}."
      without = "it is the oldest one, so the run then starts again."
      return f"Move this folder away; {older if before else without}"

    return _name_damaged(self.folder / str(step), way_on)

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


def check_folders(stored: Mapping[str, Stored]) -> None:
  """Raises checksums.Damaged if a file of the arrays was damaged; every process calls it."""
  for folder in dict.fromkeys(x.folder for x in stored.values()):
    _check_sums(folder)


def read_arrays(stored: Mapping[str, Stored]) -> dict[str, np.ndarray]:
  """Some arrays of one folder of a checkpoint, on the host."""
  (folder,) = {x.folder for x in stored.values()}
  shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in stored.items()}
  kinds = dict.fromkeys(stored, ocp.RestoreArgs(restore_type=np.ndarray))
  args = ocp.args.PyTreeRestore(
    item=tree.unflatten(shapes), restore_args=tree.unflatten(kinds), partial_restore=True
  )
  restored = tree.flatten(ocp.PyTreeCheckpointHandler().restore(folder, args=args))
  return {path: np.asarray(restored[path]) for path in stored}


@contextlib.contextmanager
def _name_damaged(folder: epath.Path, way_on: Callable[[], str]) -> Iterator[None]:
  """Names a damaged checkpoint in orbax's error, which can be of any type, and says what to do.

  Errors with another cause pass unchanged, so that users do not move a good checkpoint away.
  """
  try:
    yield
  except Exception as error:
    if _is_elsewhere(error):
      raise
    kind = "" if isinstance(error, checksums.Damaged) else f"{type(error).__name__}: "
    text = str(error)
    raise RuntimeError(
      f"{folder} was committed but cannot be read: {kind}{text[:1000]}"
      f"{'…' if len(text) > 1000 else ''}\n{way_on()}"
    ) from error


def _is_elsewhere(error: Exception) -> bool:
  """Whether the cause is not the checkpoint: memory, another process, rights, the connection."""
  return (
    isinstance(error, MemoryError | PermissionError | ConnectionError | TimeoutError)
    or is_out_of_memory(error)
    or is_lost_process(error)
    or (isinstance(error, ValueError) and tensorstore_status(error) in _NOT_DAMAGE)
  )


def _check_sums(folder: epath.Path) -> None:
  """Checks the files of a folder of arrays; every process calls it, and reads its share.

  Raises:
    checksums.Damaged: in every process, if one of them finds a damaged file.
  """
  if not (folder / checksums.FILE).exists():
    if b'"checksums"' in (folder / "_METADATA").read_bytes():
      raise checksums.Damaged(f"{folder / checksums.FILE} is missing")
    logging.info("%s has no checksums: an older version wrote it, so it is not checked", folder)
    return
  error = ""
  try:
    error = checksums.damaged_file(folder, jax.process_index(), jax.process_count())
  except checksums.Damaged as damaged:
    error = str(damaged)
  failed = np.array(bool(error))
  if jax.process_count() > 1:  # all of them end, because restoring is a common operation
    failed = np.asarray(multihost_utils.process_allgather(failed))
  if failed.any():
    who = np.flatnonzero(failed).tolist()
    raise checksums.Damaged(error or f"the logs of processes {who} name a damaged file")


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
