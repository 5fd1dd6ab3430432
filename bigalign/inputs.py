"""What a config's `data` says, as a source and the way to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign import config as configs
from bigalign.data.files import fingerprints
from bigalign.data.image import augment as augmentation
from bigalign.data.image import transforms
from bigalign.data.loader import training
from bigalign.data.loader.pairs import Pairs, stored_sides
from bigalign.data.order.order import philox
from bigalign.data.sources.base import Source, open_source
from bigalign.data.sources.mixture import Mixture, Prefixed
from bigalign.data.sources.views import View
from bigalign.data.stores.one_side import Stored
from bigalign.data.text.captions import columns, fields
from bigalign.data.text.tokenizers import TOKENIZERS, Tokenizer


def open_data(
  *,
  source: str = "",
  image_size: int,
  tokenizer: Mapping[str, Any],
  mixture: Sequence[Mapping[str, Any]] = (),
  schedule: Sequence[Any] = (),
  stores: Mapping[str, Any] | None = None,
  view: str = "",
  augment: Mapping[str, Any] | None = None,
  resize: str = "squash",
  apply_exif: bool = False,
  captions: Sequence[Any] | None = None,
  second_captions: Sequence[Any] = (),
  source_options: Mapping[str, Any] | None = None,
  captions_per_image: int = training.CAPTIONS_PER_IMAGE,
  shuffle: bool = True,
  order: str = "auto",
  workers: int = 0,
  rejects: Mapping[str, Any] | None = None,
  stop_at_bad_shard: bool = True,
) -> tuple[Source | Pairs, dict[str, Any]]:
  """What config.data says: the source, and how training reads it.

  Args:
    source: "glyphs", shards ("DIR/{00000..00099}.tar"), Parquet, ArrayRecord, tables of image
      files, "tfds:NAME:SPLIT"; lists joined by "::", of which an epoch holds each sample once.
    mixture: instead of `source`, several by their shares: options of mixture_part each.
    schedule: ((start, {name: weight}), …): other weights for a mixture from there on; start is
      "1e6 samples", "1000 steps" or "2 epochs". Sources that are not named are not read then.
    stores: vectors of frozen towers that `bigalign embed` made of the source, which is then not
      read, nor its captions, nor mixed by weights: options of pairs.Pairs, dict(image=DIR,
      text=DIR). Of one side alone, options of stored.Stored: the source is read, and the other
      side is learned from it. None, or one without paths: no store.
    image_size: pixels per side.
    tokenizer: name, length and options of a tokenizer.
    view: of the source, made by `bigalign view`: only the samples that it keeps.
    augment: options of transforms.train_image.
    resize: of evaluation, which does not augment: "squash", or "shortest" edge and centre crop.
    apply_exif: turn images as their EXIF orientation says, in training and evaluation. Off, as in
      img2dataset, open_clip and big_vision: what it wrote has lost the tag or is compared with
      theirs; right for photos as cameras write them.
    captions: fields to take captions from, the first that a record has; the source's own if None.
      With weights, (("json.recap", 3), ("txt", 1)), they are drawn: see data/captions.py.
    second_captions: fields of a second caption of each image, another one than the first where
      there is another, for losses that read two; written as `captions` is, which must be given too.
    source_options: others of the source, such as image= for the column of the images, or data_dir=
      of TFDS.
    captions_per_image: room for captions in the ids of texts, and in what a loss remembers of each.
    shuffle: another order in each epoch; without, that of the source.
    order: "exact", a shuffle of all samples; "block", of blocks of consecutive ones, for stores
      that read many at a time; "auto": "block" for sources that say so.
    workers: processes that read and decode; they have no influence on the batches.
    rejects: options of rejects.Watch: shares of bad samples at which to warn and to stop.
    stop_at_bad_shard: stop where no sample of a shard seems to be usable.
  """
  del resize, rejects  # the evaluators', the loop's
  open_tokenizer(tokenizer)  # a wrong option is better heard of here than from a worker
  check_augment(augment or {})
  first = columns(captions, "config.data.captions")
  second = columns(second_captions, "config.data.second_captions")
  if second and captions is None:
    raise ValueError(
      f"config.data.second_captions={second_captions}: name the fields of the first"
      " in config.data.captions too"
    )
  sides = stored_sides(stores)
  ignored: dict[str, dict[str, Any]] = {
    "image": dict(augment=augment),
    "text": dict(captions=None if "image" in sides else captions),
    "both": dict(view=view, schedule=schedule),
  }
  for side in [*sides, *(["both"] if len(sides) == 2 else [])]:
    for name in (name for name, x in ignored[side].items() if x):
      raise ValueError(
        f"config.data.{name} has no effect on what is in config.data.stores; embed"
        " what it says, or leave it out"
      )
  if len(sides) == 2:
    pairs: Pairs = configs.call(Pairs, stores or {}, "config.data.stores")
    return pairs, dict(shuffle=shuffle, kind=order, captions_per_image=captions_per_image)
  if bool(source) == bool(mixture):
    raise ValueError("config.data needs either source or mixture, and not both")
  stored: Stored | None = None
  given = {name: x for name, x in (stores or {}).items() if x}
  if sides or "second" in given:
    stored = configs.call(Stored, given, "config.data.stores")
    assert stored is not None
    if stored.text:
      first = columns(("text",), "")
      second = columns(("text" if stored.again else "second",), "") if stored.second else ()
  wanted = None if captions is None else fields(first, second)
  opened: Source
  if mixture and source_options:
    raise ValueError("config.data.source_options are of one source; in a mixture each has its own")
  if mixture and view:
    raise ValueError("config.data.view is of one source; in a mixture each part names its own")
  if mixture:
    opened = open_mixture(mixture, schedule, captions=wanted)
  else:
    opened = open_source(source, captions=wanted, **source_options or {})
    if schedule:
      raise ValueError("config.data.schedule is of the weights of a mixture; there is none")
    if view:
      opened = View(opened, view)
    if not len(opened):
      raise ValueError(f"config.data.source={source!r} holds no sample")
  return opened, dict(
    image_size=image_size,
    tokenizer=tokenizer,
    augment=augment,
    shuffle=shuffle,
    kind=order,
    workers=workers,
    captions=first,
    second_captions=second,
    captions_per_image=captions_per_image,
    stop_at_bad_shard=stop_at_bad_shard,
    apply_exif=apply_exif,
    stored=stored,
  )


def held(source: Source | Pairs, reading: Mapping[str, Any]) -> Pairs | Stored | None:
  """The stores that open_data opened, of either kind; None if there are none."""
  return source if isinstance(source, Pairs) else reading["stored"]


def fingerprint(source: Source | Pairs, reading: Mapping[str, Any]) -> str:
  """Hex digits that change with the samples, and with the stores beside them."""
  stored = held(source, reading)
  if stored is None or stored is source:
    return source.fingerprint
  return fingerprints.of_names(source.fingerprint, stored.fingerprint)


def open_mixture(
  mixture: Sequence[Mapping[str, Any]], schedule: Sequence[Any], *, captions: Sequence[str] | None
) -> Mixture:
  """The sources of config.data.mixture, and their weights over time."""
  sources: dict[str, Source] = {}
  weights: dict[str, float] = {}
  for i, options in enumerate(mixture):
    where = f"config.data.mixture[{i}]"
    name, opened, weight = configs.call(mixture_part, options, where, shared_captions=captions)
    if name in sources:
      raise ValueError(f"{where}.name={name!r}: the name of another source too")
    sources[name], weights[name] = opened, weight
  phases = [(start, dict(some)) for start, some in schedule]
  # A schedule may say itself how it begins.
  at_start = [start for start, _ in phases if str(start).split()[0] == "0"]
  return Mixture(sources, [*([] if at_start else [(0, weights)]), *phases])


def mixture_part(
  *,
  name: str,
  source: str,
  weight: float | None = None,
  upsampling: float | None = None,
  view: str = "",
  prefix: str = "",
  captions: Sequence[str] | None = None,
  source_options: Mapping[str, Any] | None = None,
  shared_captions: Sequence[str] | None,
) -> tuple[str, Source, float]:
  """One source of a mixture: its name, itself and its weight.

  Args:
    name: of the source, in schedules, metrics and errors.
    source: as config.data.source.
    weight: share of the stream, relative to the other weights.
    upsampling: instead of a weight, passes over this source while one with 1 is passed over once:
      open_clip's --train-data-upsampling-factors. 1 where neither is given.
    view: of this source, as config.data.view.
    prefix: begins each of its captions: a language, "de: ".
    captions: fields of its captions by preference, in place of config.data.captions.
    source_options: as config.data.source_options.
    shared_captions: those of config.data.captions.
  """
  if weight is not None and upsampling is not None:
    raise ValueError(f"config.data.mixture: {name!r} has both a weight and an upsampling; give one")
  if captions is not None and shared_captions is not None:
    raise ValueError(
      f"config.data.mixture: {name!r} names captions, and config.data.captions does too; give one"
    )
  opened = open_source(
    source, captions=shared_captions if captions is None else captions, **source_options or {}
  )
  if not len(opened):
    raise ValueError(f"config.data.mixture: {name!r}, source={source!r}, holds no sample")
  if view:
    opened = View(opened, view)
  if prefix:
    opened = Prefixed(opened, prefix)
  factor = 1.0 if upsampling is None else upsampling
  return name, opened, len(opened) * factor if weight is None else weight


def check_augment(options: Mapping[str, Any]) -> None:
  """Raises TypeError or ValueError, naming the option, for what `train_image` cannot do."""
  where, view = "config.data.augment", dict(image=np.zeros((2, 2, 3), np.uint8), rng=philox(0, 0))
  for function in (augmentation.rand_augment, augmentation.color_jitter):
    name = function.__name__
    if isinstance(options.get(name), Mapping):
      configs.call(function, options[name], f"{where}.{name}", **view)
  configs.call(transforms.train_image, options, where, **view, size=2)


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
