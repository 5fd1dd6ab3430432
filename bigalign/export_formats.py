"""What `bigalign export` can write: the families and the files of each format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bigalign.model import PIXELS
from bigalign.weights import hugging_face, tokenizer_files, two_towers
from bigalign.weights.fit import Family, Fitted, Subject, fit, pads_unseen
from bigalign.weights.layout import Layout


class Files(NamedTuple):
  """What goes into a folder.

  family: whose model it is. weights: the file that transfer.write(layout, arrays) fills. files:
  {name: text, or JSON} of the others.
  """

  family: str
  weights: str
  layout: Layout
  arrays: dict[str, np.ndarray]
  files: dict[str, Any]


class Format(NamedTuple):
  """One --format: the families that are tried in turn, and what lies beside the weights."""

  families: tuple[Family, ...]
  weights: str
  files: Callable[[Fitted, Subject], dict[str, Any]]


def _tokenizer(fitted: Fitted, it: Subject) -> dict[str, Any]:
  unseen = pads_unseen(it)
  mask = it.model.text_tower.mask_padding and not unseen
  return tokenizer_files.files(it.tokenizer, pads_unseen=unseen, mask=mask)


def _hf(fitted: Fitted, it: Subject) -> dict[str, Any]:
  size, resize = it.data["image_size"], it.data.get("resize", "squash")
  kinds: dict[str, dict[str, Any]] = {
    "squash": dict(image_processor_type="SiglipImageProcessor", size=dict(height=size, width=size)),
    "shortest": dict(
      image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=size),
      do_center_crop=True, crop_size=dict(height=size, width=size),
    ),
  }
  if resize not in kinds:
    raise ValueError(f"config.data.resize={resize!r}, there {' or '.join(kinds)}")
  mean, std = PIXELS[it.model.pixels]
  images = dict(
    do_convert_rgb=True, do_resize=True, resample=3, do_rescale=True, rescale_factor=1 / 255,
    do_normalize=True, image_mean=mean, image_std=std, **kinds[resize],
  )
  return {
    "config.json": fitted.config, "preprocessor_config.json": images, **_tokenizer(fitted, it)
  }


def _open_clip(fitted: Fitted, it: Subject) -> dict[str, Any]:
  mean, std = PIXELS[it.model.pixels]
  size = it.data["image_size"]
  images = dict(
    size=size, mode="RGB", mean=mean, std=std, interpolation="bicubic",
    resize_mode=it.data.get("resize", "squash"), fill_color=0,
  )
  config = {"model_cfg": fitted.config, "preprocess_cfg": images}
  own = {} if it.tokenizer.spec["name"] == "clip" else _tokenizer(fitted, it)
  return {"open_clip_config.json": config, **own}


FORMATS = {
  "hf": Format(hugging_face.FAMILIES, "model.safetensors", _hf),
  "open_clip": Format(two_towers.OPEN_CLIP, "open_clip_model.safetensors", _open_clip),
  "npz": Format(two_towers.BIG_VISION, "model.npz", _tokenizer),
}


def prepare(name: str, it: Subject) -> Files:
  """The folder's content in a format.

  Raises:
    ValueError: if no family of the format is this model; with each one's reasons, the keys of the
      config, and the formats that can.
  """
  found = _prepared(name, it)
  if isinstance(found, Files):
    return found
  others = [x for x in FORMATS if x != name and isinstance(_prepared(x, it), Files)]
  reasons = "\n".join(f"  {family}: {'; '.join(why)}" for family, why in found.items())
  raise ValueError(
    f"--format={name} cannot hold this model.\n{reasons}\n"
    + (f"Formats that can: {', '.join(others)}" if others else "No other format can.")
  )


def _prepared(name: str, it: Subject) -> Files | dict[str, list[str]]:
  """The content, or {family: reasons}."""
  format_, reasons = FORMATS[name], {}
  for family in format_.families:
    fitted = fit(family, it)
    if isinstance(fitted, list):
      reasons[family.name] = fitted
      continue
    try:
      files = format_.files(fitted, it)
    except ValueError as error:
      reasons[family.name] = [str(error)]
      continue
    return Files(family.name, format_.weights, fitted.layout, fitted.arrays, files)
  return reasons
