"""Whether a run is what its folder, its data and the other processes take it for."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from bigalign import config as configs
from bigalign.data.files import storage


def digest(options: Mapping[str, Any]) -> str:
  """16 hex digits of a tokenizer's options and of the files that they name, not of their paths."""
  found = hashlib.sha256()
  for name, value in sorted(options.items()):
    path = pathlib.Path(os.path.expandvars(str(value)))
    is_file = isinstance(value, str) and path.is_file()
    found.update(name.encode() + (path.read_bytes() if is_file else repr(value).encode()))
  return found.hexdigest()[:16]


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What config.json says of the run that is in a folder; None if there is none."""
  path = workdir / "config.json"
  return json.loads(path.read_text()) if path.exists() else None


def check_config(workdir: pathlib.Path, meta: Mapping[str, Any], allow_config_change: bool) -> None:
  """Makes the folder of the run, or compares with the run that is in it; changes nothing there.

  Raises:
    ValueError: if the workdir belongs to a run that learns something else; lists the differences.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  before = read_config(workdir)
  if before is None:
    return
  # As they were written: a checkpoint's own options are no matter of the config.
  was, now = ({**x["config"], "model": x["model"]} for x in (before, meta))
  changed = configs.differences(was, now)
  if changed and not allow_config_change:
    listed = "\n".join(f"  config.{k}: was {a!r}, now {b!r}" for k, (a, b) in changed.items())
    raise ValueError(
      f"{workdir} belongs to a run with another config:\n{listed}\nChoose another --workdir, or"
      " pass --allow_config_change to go on with the new one."
    )
  if before["versions"] != meta["versions"]:
    logging.warning(
      "Package versions changed since this run began: %s -> %s",
      before["versions"],
      meta["versions"],
    )


def write_config(workdir: pathlib.Path, meta: Mapping[str, Any]) -> None:
  """Writes workdir/config.json, once it is known that this run can go on there."""
  if jax.process_index() == 0:
    with storage.whole(workdir / "config.json") as file:  # other processes may be reading it
      file.write((json.dumps(meta, indent=1) + "\n").encode())


def check_data(
  before: Mapping[str, Any], meta: Mapping[str, Any], workdir: pathlib.Path, allow: bool
) -> None:
  """Raises ValueError if samples or tokenizer changed under a run, which could not go on exactly.

  Where they lie may change: what counts is their fingerprint.
  """
  for key, what in (("data", "config.data.source"), ("tokenizer", "config.data.tokenizer")):
    if before[key] != meta[key] and not allow:
      raise ValueError(
        f"{what}: not what {workdir} was trained on (fingerprint {meta[key]}, was {before[key]});"
        " choose another --workdir, or pass --allow_config_change to go on with the new"
      )


def check_hosts_agree(meta: Mapping[str, Any]) -> None:
  """Raises RuntimeError if config, code, packages or data differ between the processes."""
  if jax.process_count() == 1:
    return
  digests = {
    name: np.frombuffer(
      hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:8], np.uint32
    )
    for name, value in meta.items()
  }
  for name, every in multihost_utils.process_allgather(digests).items():
    other = np.flatnonzero((every != every[:1]).any(1))
    if other.size:
      raise RuntimeError(
        f"processes {other.tolist()} have another {name} than process 0, which has {meta[name]}"
      )
