"""A run of ours as a pretrained checkpoint: its options, its parameters, its logit scale."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.checkpoint import Checkpoints, Stored, check_folders, read_arrays
from bigalign.data.image.reading import ImageReading
from bigalign.run import copies
from bigalign.run.provenance import digest, read_config
from bigalign.run.workdir import Workdir
from bigalign.weights import Checkpoint
from bigalign.weights.files import Entry, Tensors, read_json
from bigalign.weights.layout import Layout
from bigalign.weights.table import Row
from bigalign.weights.views import View

KIND = "run"
_LAYER = re.compile(r"/block_(\d+)/")
_READING = ("resize", "resize_edge", "interpolation")
_AT_ONCE = 2**28  # bytes of arrays that are read together
_FILES = ("path", "vocabulary")  # options of a tokenizer that name a file


class _Arrays(Tensors):
  """The parameters of a checkpoint of a run; small ones are read several at a time."""

  def __init__(self, path: pathlib.Path, stored: Mapping[str, Stored]):
    # An entry of a member is not copied when it is read: these arrays are no views of a file.
    entries = {k: Entry(path, x.shape, x.dtype, member=k) for k, x in stored.items()}
    super().__init__(path, entries)
    self._stored = stored
    self._group: dict[str, list[str]] = {}  # {key: the keys that are read with it}
    self._read: dict[str, np.ndarray] = {}
    groups: list[list[str]] = []
    size = 0
    for key, x in stored.items():
      size += math.prod(x.shape) * x.dtype.itemsize
      if not groups or size > _AT_ONCE or stored[groups[-1][-1]].folder != x.folder:
        groups.append([])
        size = math.prod(x.shape) * x.dtype.itemsize
      groups[-1].append(key)
      self._group[key] = groups[-1]
    self._checked = False

  def read(self, key: str) -> np.ndarray:
    """The array."""
    if not self._checked:
      check_folders(self._stored)
      self._checked = True
    if key not in self._read:
      self._read = {}
      self._read = read_arrays({k: self._stored[k] for k in self._group[key]})
    return self._read[key]


def is_run(address: str) -> bool:
  """Whether an address is that of a run: in a bucket, or a folder with checkpoints or a record."""
  if "://" in address:
    return True
  folder = pathlib.Path(address).expanduser()
  record = folder / "config.json"
  if (folder / "checkpoints").is_dir():
    return True
  return record.is_file() and isinstance(read_json(record).get("config"), dict)


def describe(
  address: str, *, step: int | str = "latest", ema: bool = False, parts: str = ""
) -> Checkpoint:
  """A checkpoint of a run, which may still be training. Reads no array.

  Args:
    address: the --workdir of the run, local or gs://…
    step: a number, "latest" or "best".
    ema: its running averages instead of its parameters.
    parts: regular expression of the paths that are read, "model/…", "loss/…" and "heads/…"; "":
      all.

  Returns:
    The checkpoint. The rows of its layout are those of the model, "image_tower/…"; its tensors also
    hold the scalars of its losses, "loss/…", and the layers of heads, "heads/…". layout.data holds
    config.data and config.loss of the run, the number of the step, and whether these are averages.

  Raises:
    FileNotFoundError: for a folder that is not a run, or a step without a checkpoint.
    ValueError: for averages of a run that keeps none.
  """
  folder = Workdir(address, reader=True)
  folder.download()
  record = read_config(folder.local)
  if record is None:
    raise FileNotFoundError(f"{folder.root} holds no config.json, so it is not a training run")
  config = copies.used(record["config"], record.get("copies", {}), folder.local)
  with Checkpoints(folder.root, **config["keep"], read_only=True) as checkpoints:
    number = checkpoints.find(step)
    stored = checkpoints.parameters(number, ema=ema)
  if parts:
    stored, _ = tree.partition(stored, parts, f"parts, in {folder.root}")
  data, where = config["data"], f"{folder.local / 'config.json'}: config.data"
  options = {x: data.get(x, getattr(ImageReading, x)) for x in _READING}
  return Checkpoint(
    folder.local,
    KIND,
    _Arrays(folder.local, stored),
    Layout(
      model=config["model"],
      rows=_rows(stored),
      unused="^(loss|heads|teacher)/",
      data={"data": data, "loss": config["loss"], "step": number, "ema": ema},
    ),
    View(where, options, data["image_size"], where),
  )


def _rows(stored: Mapping[str, Stored]) -> tuple[Row, ...]:
  """The rows of the model: layers by themselves or stacked, on either side."""
  rows: dict[str, Row] = {}
  for key, x in stored.items():
    path = key.removeprefix("model/")
    if path == key:
      continue
    if tree.is_stacked(path):
      rows[key] = Row(path.replace("/blocks/", "/block_{}/"), key, layers=x.shape[0])
    elif layer := _LAYER.search(path):
      before = rows.get(name := _LAYER.sub("/block_{}/", path))
      layers = max(int(layer[1]) + 1, before.layers if before else 0)
      rows[name] = Row(name, _LAYER.sub("/block_{}/", key), layers=layers)
    elif path.endswith("image_tower/positions") and len(x.shape) == 3:
      rows[key] = Row(path, key, "1 n d -> 1 n d", resize="bilinear_antialias")
    else:
      rows[key] = Row(path, key)
  return tuple(rows.values())


def tokenizer(
  checkpoint: Checkpoint, given: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
  """The options of a tokenizer with those of a run where they are lacking, and what differs.

  Args:
    checkpoint: of the run.
    given: options of the tokenizer; None for none. With another name or file than that of the run,
      they are complete.

  Returns:
    The options, and a text for each option that differs from that of the run.
  """
  theirs = {k: v for k, v in checkpoint.layout.data["data"]["tokenizer"].items() if v is not None}
  ours = {k: v for k, v in (given or {}).items() if v is not None}
  differences = [
    f"config.data.tokenizer.{k} is {v!r}, but the run {checkpoint.path} has {theirs.get(k)!r}"
    for k, v in ours.items()
    if k not in theirs or _content(k, v) != _content(k, theirs[k])
  ]
  other = ours.get("name", theirs["name"]) != theirs["name"] or bool({*_FILES} & {*ours})
  return ours if other else {**theirs, **ours}, differences


def _content(option: str, value: Any) -> Any:
  """The value of an option of a tokenizer; of a file, a digest of its content."""
  return digest({"file": value}) if option in _FILES else value


def scalars(checkpoint: Checkpoint, loss: Mapping[str, Any], paths: list[str]) -> dict[str, str]:
  """{our path: path in the run} of the scalars of losses that both have.

  A scalar of a loss that the run has too comes from there. Of another loss, `t`, the log of the
  logit scale, and `b`, the bias, are those of the run's first loss that has them. An initial value
  in the config, t_init or b_init, takes precedence if it is not the run's own.

  Args:
    checkpoint: of the run.
    loss: config.loss as written.
    paths: of our scalars, "loss/NAME/…".
  """
  stored = [path for path in checkpoint.tensors if path.startswith("loss/")]
  found = {}
  for path in paths:
    _, name, leaf = path.split("/", 2)
    given = loss.get(name) or {}
    same = path in stored
    other = next((x for x in stored if x.split("/", 2)[2] == leaf), None)
    chosen = path if same else other if leaf in ("t", "b") else None
    theirs = checkpoint.layout.data["loss"].get(name, {}) if same else {}
    option = f"{leaf.rpartition('/')[2]}_init"
    is_ours = given.get(option) is not None and given[option] != theirs.get(option)
    if chosen is not None and not is_ours:
      found[path] = chosen
  return found
