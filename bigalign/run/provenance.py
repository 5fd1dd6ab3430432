"""Checks that a run matches its folder, its data and the other processes."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from bigalign import tree
from bigalign.data.files import checksums, storage
from bigalign.options import plain

# Options that may change between two starts in one workdir, because they do not affect what is
# learned.
HARMLESS = re.compile(
  r"^(mesh|topology|rules|evals|writer|runtime|keep|profile|logits)(/|$)"
  r"|^(log_every|checkpoint_every|eval_every|diagnose_every|(stages/\d+/)?microbatches|patience)$"
  # Paths of data; its content has a fingerprint.
  r"|^data/(workers|source)$|^data/stores/(image|text|second|keep)$|^data/tokenizer/(path|vocabulary)$"
)


_UNKNOWN = "unknown"  # what checkpoint.revision returns without git


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
  """Compares two configs, without options that do not affect what is learned (HARMLESS).

  Args:
    old: a config, as nested mappings.
    new: another one.

  Returns:
    {path: (old value, new value)} of each difference; "(absent)" for a missing key.
  """
  a, b = (dict(_leaves(_by_name(plain(x)))) for x in (old, new))
  return {
    path: (a.get(path, "(absent)"), b.get(path, "(absent)"))
    for path in sorted({*a, *b})
    if a.get(path, "(absent)") != b.get(path, "(absent)") and not HARMLESS.search(path)
  }


def _by_name(one: Mapping[str, Any]) -> dict[str, Any]:
  """A config whose stages are a mapping, and whose model has no empty groups.

  The model is compared as the user wrote it, where an empty group has the meaning of a missing one.
  """
  named = {name: x for name, x in one.items() if name != "stages"}
  if one.get("stages"):
    named["stages"] = {str(i): stage for i, stage in enumerate(one["stages"])}
  if isinstance(one.get("model"), Mapping):
    named["model"] = tree.unflatten(tree.flatten(one["model"]))
  return named


def _leaves(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(path, value) of nested mappings; unlike tree.flatten, an empty mapping is a value.

  It can stand for something: a loss with its defaults, or no augmentation in one stage.
  """
  for name, value in nested.items():
    if isinstance(value, Mapping) and value:
      yield from _leaves(value, f"{prefix}{name}/")
    else:
      yield f"{prefix}{name}", value


def digest(options: Mapping[str, Any]) -> str:
  """Returns 16 hex digits that identify a tokenizer.

  Args:
    options: the tokenizer's options. The content of a file that one of them names counts, its path
      does not.
  """
  sha = hashlib.sha256()
  for name, value in sorted(options.items()):
    path = pathlib.Path(os.path.expandvars(str(value)))
    is_file = isinstance(value, str) and path.is_file()
    sha.update(name.encode() + (path.read_bytes() if is_file else repr(value).encode()))
  return sha.hexdigest()[:16]


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """Returns the content of workdir/config.json, or None if the folder holds no run.

  Raises:
    ValueError: if the file is damaged, was edited, or lacks a part of the record.
  """
  path = workdir / "config.json"
  if not path.exists():
    return None
  try:
    recorded = checksums.read_json(path)
    if not isinstance(recorded.get("config"), dict):
      raise checksums.Damaged(f"{path} is not the record of a run: it has no object 'config'")
  except checksums.Damaged as error:
    raise ValueError(
      f"{error}\nEach checkpoint holds the same record: copy checkpoints/STEP/meta/metadata of this"
      f' run to {path}. If you edited the file on purpose, delete its line "{checksums.KEY}".'
    ) from error
  return recorded


def check_config(
  workdir: pathlib.Path,
  recorded: Mapping[str, Any] | None,
  meta: Mapping[str, Any],
  allow_config_change: bool,
) -> None:
  """Creates the folder of a run, or compares the config with that of the run in it.

  Args:
    workdir: local folder of the run; an existing config.json is not changed.
    recorded: the content of config.json, with the defaults of newer options; None for a new run.
    meta: what `write_config` will record of this run.
    allow_config_change: accept another config.

  Raises:
    ValueError: if the folder belongs to a run that learns something else; lists the differences.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  if recorded is None:
    return
  # Compares the model options as the user wrote them, not those filled in from a checkpoint.
  was, now = (
    {**x["config"], "model": x["model"], **({"teacher": x["teacher"]} if "teacher" in x else {})}
    for x in (recorded, meta)
  )
  changed = differences(was, now)
  if changed and not allow_config_change:
    listed = "\n".join(f"  config.{k}: was {a!r}, now {b!r}" for k, (a, b) in changed.items())
    raise ValueError(
      f"{workdir} belongs to a run with another config:\n{listed}\nChoose another --workdir, or"
      " pass --allow_config_change to resume with the new one."
    )
  if recorded["versions"] != meta["versions"]:
    logging.warning(
      "Package versions changed since this run began: %s -> %s",
      recorded["versions"],
      meta["versions"],
    )


def write_config(workdir: pathlib.Path, meta: Mapping[str, Any]) -> None:
  """Writes `meta` to workdir/config.json; call it once it is certain that the run can start."""
  if jax.process_index() == 0:
    with storage.atomic_write(workdir / "config.json") as file:  # other processes may be reading it
      file.write((json.dumps(checksums.seal(meta), indent=1) + "\n").encode())


def check_data(
  recorded: Mapping[str, Any], meta: Mapping[str, Any], workdir: pathlib.Path, allow: bool
) -> None:
  """Checks that samples and tokenizer are those that the run was trained on.

  Only fingerprints are compared; files may have moved.

  Args:
    recorded: the JSON of the checkpoint to resume from.
    meta: the same of this start.
    workdir: for the message.
    allow: accept other data.

  Raises:
    ValueError: if they changed, because the run could not resume exactly.
  """
  for key, what in (("data", "config.data.source"), ("tokenizer", "config.data.tokenizer")):
    if recorded[key] != meta[key] and not allow:
      raise ValueError(
        f"{what}: not what {workdir} was trained on (fingerprint {meta[key]}, was {recorded[key]});"
        " choose another --workdir, or pass --allow_config_change to resume with the new"
      )
  changed = changed_ids(recorded, meta)
  if changed and not allow:
    raise ValueError(
      f"{changed}. Restore the files that {workdir} was trained with, choose another --workdir, or"
      " pass --allow_config_change to resume with other ids"
    )


def changed_ids(recorded: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
  """Says what the files next to the tokenizer give now and did not give when a run was recorded.

  Args:
    recorded: the JSON of a checkpoint; older ones do not hold it.
    meta: the same of this start.

  Returns:
    Both values of all that differ; "" if nothing does.
  """
  was, now = (x.get("tokenizer_files") or {} for x in (recorded, meta))
  changed = [f"{k}: was {was[k]!r}, now {now[k]!r}" for k in was if k in now and was[k] != now[k]]
  if not changed:
    return ""
  return (
    "config.data.tokenizer: files next to its own file (such as tokenizer_config.json) give other"
    f" ids: {tree.shown(changed, sep='; ', width=400)}"
  )


def check_hosts_agree(meta: Mapping[str, Any]) -> None:
  """Checks that all processes have the same values.

  Args:
    meta: {name: value that JSON can hold}, such as config, code version, packages and data.

  Raises:
    RuntimeError: if they differ; names the value and the processes. A process that does not know
      its value ("unknown", without git or the repository) agrees with any.
  """
  if jax.process_count() == 1:
    return

  def digest_of(value: Any) -> np.ndarray:
    encoded = json.dumps(value, sort_keys=True).encode()
    return np.frombuffer(hashlib.sha256(encoded).digest()[:8], np.uint32)

  digests = {name: digest_of(value) for name, value in meta.items()}
  unknown = digest_of(_UNKNOWN)
  for name, every in multihost_utils.process_allgather(digests).items():
    known = np.flatnonzero((every != unknown).any(1))
    other = known[(every[known] != every[known[:1]]).any(1)]
    if other.size:
      raise RuntimeError(
        f"processes {tree.shown(other.tolist())} have another {name} than process {known[0]}."
        f" Process {jax.process_index()} has {tree.cut(json.dumps(meta[name]), 1000)}; the logs of"
        " the others show theirs. Start all of them with the same command, code, packages and"
        " files."
      )
