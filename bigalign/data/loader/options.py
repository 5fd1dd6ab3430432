"""The options of config.data."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from bigalign.data.fields.columns import ColumnOptions
from bigalign.data.fields.locations import LocationOptions
from bigalign.data.fields.regions import RegionOptions
from bigalign.data.fields.teachers import TeacherOptions
from bigalign.data.fields.text_pairs import TextPairsOptions
from bigalign.data.fields.texts import TextsOptions
from bigalign.data.fields.views import Views
from bigalign.data.image import frames, naflex
from bigalign.data.image.reading import ImageReading
from bigalign.data.image.transforms import Part, part_of_view, shrink, train_image
from bigalign.data.order.lengths import LengthSchedule
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import Watch
from bigalign.data.text.captions import Columns, columns, fields
from bigalign.data.text.code_switch import CodeSwitchOptions
from bigalign.data.text.prefix_tokens import PrefixTokens, WithPrefix
from bigalign.data.text.tokenizers import TOKENIZERS, Tokenizer
from bigalign.options import DEFAULTS, Call, Choose, Component, plain, resolve

CAPTIONS_PER_IMAGE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart:
  """One source of a mixture.

  Args:
    name: of the source, in schedules, metrics and errors.
    source: as config.data.source.
    weight: share of the stream, relative to the other weights. Give one to all sources, or to none.
    upsampling: instead of a weight, passes over this source during one pass over a source with
      upsampling 1: open_clip's --train-data-upsampling-factors. 1 if neither is given.
    view: of this source, as config.data.view.
    prefix: text before each of its captions: a language, "de: ".
    captions: fields of its captions by preference, instead of config.data.captions.
    source_options: as config.data.source_options.
  """

  name: str
  source: str
  weight: float | None = None
  upsampling: float | None = None
  view: str = ""
  prefix: str = ""
  captions: Sequence[str] | None = None
  source_options: Mapping[str, Any] | None = None

  def __post_init__(self) -> None:
    if self.weight is not None and self.upsampling is not None:
      raise ValueError(
        f"config.data.mixture: {self.name!r} has both a weight and an upsampling; give one"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stores:
  """Embedding stores that `bigalign embed` made of the source.

  Args:
    image: folder of the vectors of images; "" for none.
    text: folder of the vectors of captions; "" for none.
    second: folder of the vectors of second captions, or that of `text` once more; "" for none.
    least: share of the images that must have captions, where both sides come from stores.
    keep: an .npy file of sample ids, ascending, as `bigalign curate` writes: only these samples are
      read, where both sides come from stores.
  """

  image: str = ""
  text: str = ""
  second: str = ""
  least: float = 0.99
  keep: str = ""

  @property
  def sides(self) -> set[str]:
    """Of "image" and "text", those with a store."""
    return {side for side in ("image", "text") if getattr(self, side)}

  def one_side(self) -> dict[str, str]:
    """The options of stores of one side.

    Raises:
      ValueError: for an option that only stores of both sides have.
    """
    default = Stores()
    for name in ("least", "keep"):
      if getattr(self, name) != getattr(default, name):
        raise ValueError(f"config.data.stores.{name} needs stores of both sides, image and text")
    return {"image": self.image, "text": self.text, "second": self.second}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(ImageReading):
  """What a run reads, and how.

  Args:
    source: "glyphs", shards ("DIR/{00000..00099}.tar"), Parquet, ArrayRecord, tables of image
      files, "tfds:NAME:SPLIT"; several joined by "::", of which an epoch holds each sample once.
    tokenizer: name, length and options of a tokenizer. What is left out comes from the pretrained
      checkpoint of the text tower, if there is one.
    mixture: several sources with shares, instead of `source`.
    schedule: ((start, {name: weight}), …): other weights for a mixture from there on; start is
      "1e6 samples", "1000 steps" or "2 epochs". Sources that are not named are not read then.
    pure_batches: whether all samples of a batch come from one source of the mixture, whose weights
      are then shares of the batches; for losses and prefixes that could tell sources apart.
    prefix_tokens: a learnt token in each text for the kind of its source, such as captions or names
      of classes; None for none.
    stores: vectors of frozen towers. With both sides, neither the source nor its captions are read;
      with one side, the source is read for the other side, which is trained.
    images: whether samples have images. False: texts alone, for losses that read no image; a batch
      has none, the image tower is neither run nor trained, and the source needs no images.
    view: of the source, made by `bigalign view`: only the samples that it keeps.
    augment: random views of images in training; None: the defaults.
    captions: fields to take captions from, the first that a record has; the source's own if None.
      With weights, (("json.recap", 3), ("txt", 1)), a field is drawn for each sample.
    second_captions: fields of a second caption of each image, different from the first if the image
      has another, for losses that read two; written like `captions`, which must be given too.
    source_options: other options of the source, such as image= for the column of the images, or
      data_dir= of TFDS.
    texts: several texts of each image, and hard negatives, for losses that read them.
    code_switch: words of captions that are replaced by translations in training; None for none.
    teachers: {name: stores} of vectors of other models, for losses that learn from them; a batch
      holds those of all teachers side by side, in this order.
    columns: {name: field} of numbers or small arrays of each sample, which become fields of the
      batch with these names, such as noise_prob="json.noise".
    views: {name: options} of more crops of the same image, count of each and size next to the
      options of `augment`, such as local=dict(count=8, size=96, scale=(0.05, 0.4)).
    text_pairs: pairs of texts of another source, which batches hold beside the images and their
      texts, for the loss text_pairs.
    regions: boxes of each image with phrases, for the loss region_phrase.
    locations: texts with boxes that a decoder predicts, for the loss caption with tasks=True.
    captions_per_image: room for captions in the ids of texts and in the per-sample state of a
      loss.
    shuffle: a new order in each epoch; without it, the order of the source.
    order: "exact", a shuffle of all samples; "block", of blocks of consecutive samples, for sources
      that read many at a time; "auto": "block" for sources that ask for it.
    workers: processes that read and decode; their number does not change the batches.
    rejects: shares of rejected samples at which to warn and to stop.
    stop_at_bad_shard: after a rejected sample, read other samples of its shard, drawn at random. If
      all of them are rejected too, the shard counts as bad, and the log names it. The run stops if
      bad shards hold a larger share of the source than `rejects.stop`.
  """

  tokenizer: Annotated[Component, Choose(TOKENIZERS)]
  source: str = ""
  mixture: Sequence[MixturePart] = ()
  schedule: Sequence[Any] = ()
  pure_batches: bool = False
  prefix_tokens: PrefixTokens | None = None
  stores: Stores = DEFAULTS
  images: bool = True
  view: str = ""
  augment: Annotated[Component, Call(train_image, fixed=("image", "rng", "size"))] = DEFAULTS
  captions: Sequence[Any] | None = None
  second_captions: Sequence[Any] = ()
  source_options: Mapping[str, Any] | None = None
  texts: TextsOptions | None = None
  code_switch: CodeSwitchOptions | None = None
  teachers: Mapping[str, TeacherOptions] = DEFAULTS
  columns: Mapping[str, ColumnOptions] = DEFAULTS
  views: Views = DEFAULTS
  text_pairs: TextPairsOptions | None = None
  regions: RegionOptions | None = None
  locations: LocationOptions | None = None
  captions_per_image: int = CAPTIONS_PER_IMAGE
  shuffle: bool = True
  order: str = "auto"
  workers: int = 0
  rejects: Annotated[Component, Call(Watch, fixed=("names",))] = DEFAULTS
  stop_at_bad_shard: bool = True

  @property
  def text_length(self) -> int:
    """L, the number of token ids of a text."""
    return int(self.tokenizer.option("length"))

  def make_tokenizer(self) -> Tokenizer:
    """The tokenizer, which reads its files."""
    tokenizer: Tokenizer = self.tokenizer.make()
    return WithPrefix(tokenizer, self.prefix_tokens) if self.prefix_tokens else tokenizer

  def training_view(self, image: np.ndarray | list[np.ndarray], rng: np.random.Generator) -> Any:
    """uint8 [H, W, 3] -> [image_size, image_size, 3], or Patches, augmented by draws of `rng`.

    All frames of a list have the same draws, and become [F, image_size, image_size, 3].
    """
    if isinstance(image, list):
      return frames.same_view(self.training_view, image, rng)
    if self.naflex:
      pixels = self.augment.make(image, rng, size=self.naflex.fit)
      return naflex.cut(pixels, patch=self.naflex.patch, most=self.naflex.length)
    if self.augment.option("crop") == "evaluation":
      image = self.evaluation_view(image)
    return self.augment.make(image, rng, size=self.image_size)

  def part_of_view(self, image: np.ndarray, rng: np.random.Generator) -> Part:
    """What `training_view` shows of an image, with the same draws; the draws are not taken."""
    height, width = image.shape[:2]
    return part_of_view(height, width, copy.deepcopy(rng), **self.augment.options)

  def shrink(self, height: int, width: int) -> int:
    """By how much a JPEG may be reduced when it is decoded for `training_view`: 8, 4, 2 or 1."""
    size = self.naflex.side if self.naflex else self.image_size
    return shrink(height, width, size=size, natural=bool(self.naflex), **self.augment.options)

  def of_length(self, length: int) -> DataOptions:
    """The same with `length` patches of an image; 0 for batches without images."""
    if not self.naflex or length in (0, self.naflex.eval_length):
      return self
    return dataclasses.replace(self, naflex=dataclasses.replace(self.naflex, eval_length=length))

  def length_schedule(self, batch_size: int, seed: int) -> LengthSchedule | None:
    """The patches of an image and the pairs of a batch of each step; None without patches.

    Args:
      batch_size: config.batch_size.
      seed: config.seed.
    """
    options = self.naflex
    if not options or not self.images or "image" in self.stores.sides:
      return None
    lengths = tuple(options.lengths)
    sizes = (batch_size,) * len(lengths)
    if options.tokens_per_batch is not None:
      if self.pure_batches:
        raise ValueError(
          "config.data.pure_batches needs batches of one size; leave out"
          " config.data.naflex.tokens_per_batch"
        )
      if batch_size % options.multiple:
        raise ValueError(
          f"config.batch_size={batch_size}, the most pairs of a batch, is not a multiple of"
          f" config.data.naflex.multiple={options.multiple}"
        )
      count = functools.partial(naflex.batch_size, options.tokens_per_batch)
      sizes = tuple(
        min(batch_size, count(n, self.text_length, multiple=options.multiple)) for n in lengths
      )
    weights = options.weights or (1.0,) * len(lengths)
    return LengthSchedule(seed, lengths, tuple(map(float, weights)), sizes)

  def check_augment(self) -> None:
    """Raises ValueError, naming the option, for a bad value in `augment`."""
    image, rng = np.zeros((2, 2, 3), np.uint8), philox(0, 0)
    for nested in self.augment.options.values():
      if isinstance(nested, Component):
        nested.make(image, rng)
    small = dataclasses.replace(self, image_size=2, resize_edge=None).of_length(1)
    small.training_view(image, rng)

  @property
  def first_columns(self) -> Columns:
    """The fields of captions with their weights."""
    return columns(self.captions, "config.data.captions")

  @property
  def second_columns(self) -> Columns:
    """The fields of second captions with their weights; () if there are none."""
    return columns(self.second_captions, "config.data.second_captions")

  @property
  def caption_fields(self) -> tuple[str, ...] | None:
    """The fields that a source is opened with for its first captions; None: the source's own."""
    return None if self.captions is None else fields(self.first_columns)

  @property
  def has_second_text(self) -> bool:
    """Whether a batch has a second text of each image."""
    return bool(self.stores.second if "text" in self.stores.sides else self.second_captions)

  @property
  def text_count(self) -> int:
    """M, the number of texts of an image; 0 if config.data.texts is not set."""
    return self.texts.total if self.texts else 0

  @property
  def sources(self) -> list[str]:
    """The patterns of all sources."""
    return [part.source for part in self.mixture] or [self.source]


def resolve_data(values: Any) -> DataOptions:
  """config.data with every default filled in; errors as of options.resolve."""
  options: DataOptions = resolve(DataOptions, plain(values), "config.data")
  return options
