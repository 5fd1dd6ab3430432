"""What `bigalign export` can write: the families and the files of each format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bigalign.export import (
  families,
  hugging_face,
  sentence_transformers,
  tokenizer_files,
  torch_module,
)
from bigalign.export.check import READERS
from bigalign.export.fit import Family, Fitted, Subject, fit, hides_padding, pads_unseen
from bigalign.model import PIXELS


class Files(NamedTuple):
  """What goes into a folder.

  family: whose model it is. tensors: {file of weights: what makes them}. files: {name: text, or
  JSON} of the others.
  """

  family: str
  tensors: Mapping[str, Callable[[], dict[str, np.ndarray]]]
  files: dict[str, Any]


Reasons = dict[str, list[str]]  # {family: why it is not the model}


def _tokenizer(it: Subject) -> dict[str, Any]:
  unseen = pads_unseen(it)
  mask = hides_padding(it) and not unseen
  return tokenizer_files.files(it.tokenizer, pads_unseen=unseen, mask=mask)


def _hf(fitted: Fitted, it: Subject) -> dict[str, Any]:
  size, resize = it.data.image_size, it.data.resize
  kinds: dict[str, dict[str, Any]] = {
    "squash": dict(image_processor_type="SiglipImageProcessor", size=dict(height=size, width=size)),
    "shortest": dict(
      image_processor_type="CLIPImageProcessor",
      size=dict(shortest_edge=it.data.edge),
      do_center_crop=True,
      crop_size=dict(height=size, width=size),
    ),
  }
  if resize not in kinds:
    raise ValueError(f"config.data.resize={resize!r}, there {' or '.join(kinds)}")
  mean, std = PIXELS[it.model.pixels]
  images = dict(
    do_convert_rgb=True,
    do_resize=True,
    resample=3,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=mean,
    image_std=std,
    **kinds[resize],
  )
  return {"config.json": fitted.config, "preprocessor_config.json": images, **_tokenizer(it)}


def _open_clip(fitted: Fitted, it: Subject) -> dict[str, Any]:
  mean, std = PIXELS[it.model.pixels]
  size = it.data.image_size
  if it.data.resize == "shortest" and it.data.edge != size:
    raise ValueError(
      f"config.data: images are resized to {it.data.edge} pixels and cropped to {size}; open_clip"
      " resizes to the size of the crop"
    )
  images = dict(
    size=size,
    mode="RGB",
    mean=mean,
    std=std,
    interpolation="bicubic",
    resize_mode=it.data.resize,
    fill_color=0,
  )
  config = {"model_cfg": fitted.config, "preprocess_cfg": images}
  own = {} if it.tokenizer.spec["name"] == "clip" else _tokenizer(it)
  spaced, plain = it.tokenizer.encode_batch(["  a \t b ", "a b"])[0]
  if (spaced != plain).any():
    raise ValueError(
      f"config.data.tokenizer {it.tokenizer.spec['name']!r} tells white space apart, of which"
      " open_clip makes single spaces first"
    )
  return {"open_clip_config.json": config, **own}


def _torch(it: Subject) -> Files | Reasons:
  family = "the PyTorch module in model.py"
  wrong = torch_module.reasons(it)
  if wrong:
    return {family: wrong}
  try:
    tokenizer = {} if it.vectors else _tokenizer(it)
  except ValueError as error:
    return {family: [str(error)]}
  files = {
    "model.py": torch_module.SOURCE.read_text(),
    "config.json": torch_module.config(it),
    **tokenizer,
  }
  return Files(family, {"model.safetensors": functools.partial(torch_module.state, it)}, files)


def _sentence(it: Subject) -> Files | Reasons:
  made = sentence_transformers.folder(it)
  if isinstance(made, list):
    return {sentence_transformers.NAME: made}
  files, tensors = made
  try:
    tokenizer = _tokenizer(it)
  except ValueError as error:
    return {sentence_transformers.NAME: [str(error)]}
  return Files(sentence_transformers.NAME, tensors, files | tokenizer)


def _fitted(
  candidates: tuple[Family, ...],
  weights: str,
  describe: Callable[[Fitted, Subject], dict[str, Any]],
  it: Subject,
) -> Files | Reasons:
  """The first of the families that the model fits, or why it fits none."""
  reasons = {}
  for family in candidates:
    fitted = fit(family, it)
    if isinstance(fitted, list):
      reasons[family.name] = fitted
      continue
    try:
      files = describe(fitted, it)
    except ValueError as error:
      reasons[family.name] = [str(error)]
      continue
    return Files(family.name, {weights: fitted.tensors}, files)
  return reasons


FORMATS: dict[str, Callable[[Subject], Files | Reasons]] = {
  "hf": functools.partial(_fitted, hugging_face.FAMILIES, "model.safetensors", _hf),
  "open_clip": functools.partial(
    _fitted, families.OPEN_CLIP, "open_clip_model.safetensors", _open_clip
  ),
  "npz": functools.partial(
    _fitted, families.BIG_VISION, "model.npz", lambda fitted, it: _tokenizer(it)
  ),
  "torch": _torch,
  "sentence-transformers": _sentence,
}


def prepare(name: str, it: Subject) -> Files:
  """The folder's content in a format.

  Raises:
    ValueError: if no family of the format is this model; with each one's reasons, the keys of the
      config, and the formats that can.
  """
  found = FORMATS[name](it)
  if isinstance(found, Files):
    return found
  others = [
    x if READERS[x].what == "logits" else f"{x} (the text side)"
    for x in FORMATS
    if x != name and isinstance(FORMATS[x](it), Files)
  ]
  reasons = "\n".join(f"  {family}: {'; '.join(why)}" for family, why in found.items())
  raise ValueError(
    f"--format={name} cannot hold this model.\n{reasons}\n"
    + (f"Formats that can: {', '.join(others)}" if others else "No other format can.")
  )
