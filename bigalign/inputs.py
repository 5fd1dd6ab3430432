"""What a config's `data` says, as a source and the way to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign import config as configs
from bigalign.data import order, pipeline, transforms
from bigalign.data.captions import columns, fields
from bigalign.data.sources import Source, open_source
from bigalign.data.tokenizers import TOKENIZERS, Tokenizer


def open_data(
  *,
  source: str,
  image_size: int,
  tokenizer: Mapping[str, Any],
  augment: Mapping[str, Any] | None = None,
  resize: str = "squash",
  captions: Sequence[Any] | None = None,
  second_captions: Sequence[Any] = (),
  source_options: Mapping[str, Any] | None = None,
  captions_per_image: int = pipeline.CAPTIONS_PER_IMAGE,
  shuffle: bool = True,
  workers: int = 0,
) -> tuple[Source, dict[str, Any]]:
  """What config.data says: the source, and how training reads it.

  Args:
    source: "glyphs", shards ("DIR/{00000..00099}.tar"), Parquet, ArrayRecord, tables of image
      files, "tfds:NAME:SPLIT"; lists joined by "::".
    image_size: pixels per side.
    tokenizer: name, length and options of a tokenizer.
    augment: options of transforms.train_image.
    resize: of evaluation, which does not augment: "squash", or "shortest" edge and centre crop.
    captions: fields to take captions from, the first that a record has; the source's own if None.
      With weights, (("json.recap", 3), ("txt", 1)), they are drawn: see data/captions.py.
    second_captions: fields of a second caption of each image, another one than the first where
      there is another, for losses that read two; written as `captions` is, which must be given too.
    source_options: others of the source, such as image= for the column of the images, or data_dir=
      of TFDS.
    captions_per_image: room for captions in the ids of texts, and in what a loss remembers of each.
    shuffle: another order in each epoch; without, that of the source.
    workers: processes that read and decode; they have no influence on the batches.
  """
  del resize  # the evaluators'
  open_tokenizer(tokenizer)  # a wrong option is better heard of here than from a worker
  configs.call(
    transforms.train_image, augment or {}, "config.data.augment",
    image=np.zeros((2, 2, 3), np.uint8), rng=order.philox(0, 0), size=2,
  )
  first = columns(captions, "config.data.captions")
  second = columns(second_captions, "config.data.second_captions")
  if second and captions is None:
    raise ValueError(f"config.data.second_captions={second_captions}: name the fields of the first"
                     " in config.data.captions too")
  opened = open_source(source, captions=None if captions is None else fields(first, second),
                       **source_options or {})
  if not len(opened):
    raise ValueError(f"config.data.source={source!r} holds no sample")
  return opened, dict(
    image_size=image_size, tokenizer=tokenizer, augment=augment, shuffle=shuffle, workers=workers,
    captions=first, second_captions=second, captions_per_image=captions_per_image,
  )


def open_tokenizer(options: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer of config.data.tokenizer.

  Raises:
    ValueError, TypeError: for an unknown name or option, with the nearest known one.
  """
  where, rest = "config.data.tokenizer", dict(options)
  made: Tokenizer = configs.call(
    configs.choose(TOKENIZERS, rest.pop("name", "(absent)"), f"{where}.name"), rest, where
  )
  return made


def check_tokenizer(text_tower: Any, options: Mapping[str, Any]) -> None:
  """Raises ValueError if the text tower has no row for some token, or no place for the last one.

  On the device an index past the end is no error: it reads the last row.
  """
  tokenizer = open_tokenizer(options)
  for ours, theirs in (("length", tokenizer.length), ("vocab_size", tokenizer.vocab_size)):
    room = getattr(text_tower, ours, theirs)
    if room < theirs:
      raise ValueError(
        f"config.model.text.{ours}={room} is too small for config.data.tokenizer"
        f" {options['name']!r}, which needs {theirs}"
      )
