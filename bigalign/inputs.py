"""The inputs of a run: its source, opened as config.data says, and its train batches by stage."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign import stages, tree
from bigalign.data.fields import texts
from bigalign.data.fields.base import Field
from bigalign.data.files import fingerprints
from bigalign.data.loader.extra_fields import open_fields
from bigalign.data.loader.options import DataOptions, MixturePart
from bigalign.data.loader.pairs import Pairs, pair_batches
from bigalign.data.loader.training import train_batches
from bigalign.data.loader.workers import Batches
from bigalign.data.order.schedule import check_sizes
from bigalign.data.sources.base import Source, open_source
from bigalign.data.sources.mixture import Mixture, Prefixed
from bigalign.data.sources.views import View
from bigalign.data.stores.one_side import OneSide
from bigalign.data.text.captions import fields
from bigalign.data.text.code_switch import read_dictionary
from bigalign.data.text.tokenizers import Tokenizer


class Inputs(NamedTuple):
  """What a run reads.

  options: config.data; if captions come from a store, `captions` and `second_captions` are the
  field names "text" and "second".
  source: the samples, or the stores of both sides.
  stored: the stores of one side, if there are any.
  fields: what batches have besides image and text.
  """

  options: DataOptions
  source: Source | Pairs
  stored: OneSide | None
  fields: tuple[Field, ...] = ()

  @property
  def stores(self) -> Pairs | OneSide | None:
    """The opened stores of one side or of both; None if there are none."""
    return self.source if isinstance(self.source, Pairs) else self.stored

  @property
  def fingerprint(self) -> str:
    """Hex digits that change with the samples, and with the stores that are joined to them."""
    joined = (self.stored, *self.fields)
    names = [x for part in joined if (x := getattr(part, "fingerprint", ""))]
    if not names:
      return self.source.fingerprint
    return fingerprints.of_names(self.source.fingerprint, *names)

  def batches(self, *, rejected_log: str, **where: Any) -> Batches:
    """Train batches; `where`: the other arguments of training.train_batches."""
    if isinstance(self.source, Pairs):
      return pair_batches(self.source, self.options, **where)
    return train_batches(
      self.source,
      self.options,
      rejected_log=rejected_log,
      stored=self.stored,
      fields=self.fields,
      **where,
    )


def open_data(options: DataOptions) -> Inputs:
  """Opens the source and the stores of config.data.

  Raises:
    FileNotFoundError: for missing files.
    ValueError: for an empty source, and for options that exclude each other.
  """
  options.make_tokenizer()  # here, where an error is easier to read than from a worker
  options.check_augment()
  if options.code_switch:
    read_dictionary(options.code_switch.dictionary)
  if options.second_columns and options.captions is None:
    raise ValueError(
      f"config.data.second_captions={options.second_captions}: name the fields of the first"
      " captions in config.data.captions too"
    )
  sides = options.stores.sides
  _check_ignored(options)
  _check_images(options)
  if options.prefix_tokens and (not options.mixture or "text" in sides):
    raise ValueError(
      "config.data.prefix_tokens names a token for each source of config.data.mixture, whose texts"
      " the text tower reads; "
      + ("config.data.stores.text gives vectors" if options.mixture else "there is no mixture")
    )
  if len(sides) == 2:
    _check_no_fields(options)
    stores = options.stores
    pairs = Pairs(
      stores.image, stores.text, second=stores.second, least=stores.least, keep=stores.keep
    )
    return Inputs(options, pairs, None)
  if bool(options.source) == bool(options.mixture):
    raise ValueError("config.data needs either source or mixture, and not both")
  stored = None
  if sides or options.stores.second:
    stored = OneSide(**options.stores.one_side())
    if stored.text:
      second = ("text" if stored.second_is_text else "second",) if stored.second else ()
      # The source need not have captions, and bad ones reject nothing, because none is read.
      parts = tuple(dataclasses.replace(part, captions=None) for part in options.mixture)
      source = _open_source(dataclasses.replace(options, mixture=parts), ())
      options = dataclasses.replace(options, captions=("text",), second_captions=second)
      return _with_fields(Inputs(options, source, stored))
  wanted = None
  if options.captions is not None:
    wanted = fields(options.first_columns, options.second_columns)
  return _with_fields(Inputs(options, _open_source(options, wanted), stored))


def _with_fields(inputs: Inputs) -> Inputs:
  """The inputs with the fields that their options ask for."""
  return inputs._replace(fields=open_fields(inputs.options, inputs.source))


def _check_no_fields(options: DataOptions) -> None:
  """Raises ValueError for an option that reads samples, where both sides come from stores."""
  for name in ("teachers", "columns", "views", "text_pairs", "regions", "locations"):
    if getattr(options, name):
      raise ValueError(
        f"config.data.{name} reads each sample, but config.data.stores has both image and text, so"
        " no sample is read; leave it out, or leave one of the two stores out"
      )
  texts.check(options.texts, None, stored=True)


def _check_images(options: DataOptions) -> None:
  """Raises ValueError for an option about images, where samples have none."""
  given = dict(
    augment=not options.augment.is_default,
    views=bool(options.views),
    frames=bool(options.frames),
    **{f"teachers.{name}.image": bool(x.image) for name, x in options.teachers.items()},
    **{"stores.image": bool(options.stores.image)},
  )
  for name in [name for name, is_set in given.items() if is_set and not options.images]:
    raise ValueError(
      f"config.data.{name} is about images, but config.data.images=False; leave one of them out"
    )


def _check_ignored(options: DataOptions) -> None:
  """Raises ValueError for an option that has no effect, because its side comes from a store."""
  sides = options.stores.sides
  default = DataOptions.__dataclass_fields__
  ignored: dict[str, tuple[str, ...]] = {
    "image": ("augment", "frames"),
    "text": () if "image" in sides else ("captions",),
    "both": ("view", "schedule"),
  }
  for side in [*sorted(sides), *(["both"] if len(sides) == 2 else [])]:
    for name in ignored[side]:
      value = getattr(options, name)
      unset = value.is_default if name == "augment" else value == default[name].default
      if not unset:
        raise ValueError(
          f"config.data.{name} has no effect, because embeddings are read from config.data.stores;"
          " leave it out, or make the stores with `bigalign embed` and this option"
        )


def _open_source(options: DataOptions, captions: Sequence[str] | None) -> Source:
  """The source, mixture or view of config.data; captions: the fields that are read."""
  source: Source
  if options.mixture:
    if options.source_options:
      raise ValueError(
        "config.data.source_options apply to a single source; set them in each part of the mixture"
      )
    if options.view:
      raise ValueError(
        "config.data.view applies to a single source; set it in each part of the mixture"
      )
    return _open_mixture(options, captions)
  if options.schedule:
    raise ValueError(
      "config.data.schedule changes mixture weights, but config.data.mixture is not set"
    )
  source = open_source(
    options.source,
    captions=captions,
    images=options.images,
    frames=options.frames is not None,
    **options.source_options or {},
  )
  if options.pure_batches:
    raise ValueError("config.data.pure_batches=True, but config.data.mixture is not set")
  if options.view:
    source = View(source, options.view)
  if not len(source):
    raise ValueError(f"config.data.source={options.source!r} has no samples")
  return source


def _open_mixture(options: DataOptions, captions: Sequence[str] | None) -> Mixture:
  """The sources of config.data.mixture, and their weights over time."""
  sources: dict[str, Source] = {}
  weights: dict[str, float] = {}
  for i, part in enumerate(options.mixture):
    if part.name in sources:
      raise ValueError(
        f"config.data.mixture[{i}].name={part.name!r} is the name of another source too"
      )
    source, weight = _open_part(part, captions, options)
    sources[part.name], weights[part.name] = source, weight
  phases = [(start, dict(some)) for start, some in options.schedule]
  # A schedule may give the weights of the start itself.
  at_start = [start for start, _ in phases if str(start).split()[0] == "0"]
  phases = [*([] if at_start else [(0, weights)]), *phases]
  mixture = Mixture(sources, phases, pure=options.pure_batches)
  if not at_start:
    _check_weights(options.mixture)
  return mixture


def _check_weights(parts: Sequence[MixturePart]) -> None:
  """Raises ValueError if some parts have a weight and others do not, because units would differ."""
  without = [part.name for part in parts if part.weight is None]
  if without and len(without) < len(parts):
    raise ValueError(
      f"config.data.mixture: {len(without)} of {len(parts)} sources have no weight"
      f" ({tree.shown(map(repr, without), sep=', ')}). A"
      " weight is a share of the stream. Without one a source counts by its samples, so the two"
      " cannot be compared. Give each source a weight, or none; upsampling changes the latter"
    )


def _open_part(
  part: MixturePart, captions: Sequence[str] | None, options: DataOptions
) -> tuple[Source, float]:
  """One source of a mixture and its weight; captions: the fields of config.data.captions."""
  if part.captions is not None and captions is not None:
    raise ValueError(
      f"config.data.mixture: {part.name!r} names captions, and config.data.captions does too; give"
      " one"
    )
  source: Source = open_source(
    part.source,
    captions=captions if part.captions is None else part.captions,
    images=options.images,
    frames=options.frames is not None,
    **part.source_options or {},
  )
  if not len(source):
    raise ValueError(f"config.data.mixture: {part.name!r}, source={part.source!r}, has no samples")
  if part.view:
    source = View(source, part.view)
  if part.prefix:
    source = Prefixed(source, part.prefix)
  factor = 1.0 if part.upsampling is None else part.upsampling
  return source, len(source) * factor if part.weight is None else part.weight


def check_tokenizer(text_tower: Any, data: DataOptions) -> None:
  """Raises ValueError if config.data.tokenizer does not fit the text tower; see `check_ids`."""
  name = "config.data.tokenizer"
  if data.prefix_tokens:
    if getattr(getattr(text_tower, "options", None), "pool", "") == "argmax":
      raise ValueError(
        "config.model.text.pool='argmax' reads the token with the highest id, which is that of"
        " config.data.prefix_tokens; set pool='eos' and eos"
      )
    name = f"config.data.prefix_tokens ({len(data.prefix_tokens.names)} more ids) and {name}"
  check_ids(text_tower, data.make_tokenizer(), "config.model.text", name)


def check_ids(text_tower: Any, tokenizer: Tokenizer, tower: str, name: str) -> None:
  """Raises ValueError if the text tower's token table or positions are too small for the tokenizer.

  On the device an index past the end is not an error: it reads the last row.

  Args:
    text_tower: the tower; one without such options takes any ids.
    tokenizer: of its texts.
    tower: where the options of the tower are, for the error.
    name: what the tokenizer is called in the error.
  """
  options = getattr(text_tower, "options", None)
  for option, needed in (("length", tokenizer.length), ("vocab_size", tokenizer.vocab_size)):
    available = getattr(options, option, needed)
    if available < needed:
      raise ValueError(
        f"{tower}.{option}={available} is too small for {name} {tokenizer.name!r}, which needs"
        f" {needed}"
      )


def check_stages(run_stages: Sequence[stages.Stage], inputs: Inputs, text_tower: Any) -> None:
  """Raises ValueError or TypeError, naming the stage, if a stage does not fit the data."""
  check_stored(run_stages)
  stop = 0
  for stage in run_stages:
    start, stop = stop, stop + stage.samples(stage.begin, stage.end)
    with stages.named(stage):
      check_sizes(
        inputs.source,
        batch_size=stage.batch_size,
        lane_rows=run_stages[0].batch_size,  # as in the run
        span=(start, stop),
      )
      check_tokenizer(text_tower, stage.config.data)
      stage.config.data.check_augment()


def check_stored(run_stages: Sequence[stages.Stage]) -> None:
  """Raises ValueError, naming the stage, if a stage changes an option of what a store holds."""
  last = run_stages[-1].config.data
  options = {"image": ("image_size", "augment"), "text": ("tokenizer",)}
  stored = [name for side in sorted(last.stores.sides) for name in options[side]]
  for stage in run_stages:
    for name in stored:
      if getattr(stage.config.data, name) != getattr(last, name):
        raise ValueError(
          f"{stage.where}.data.{name} has no effect, because embeddings are read from"
          " config.data.stores; leave it out"
        )


def with_stage_weights(inputs: Inputs, run_stages: Sequence[stages.Stage]) -> Inputs:
  """The inputs with the weights of a mixture that the stages of the run give."""
  phases = stages.mixture_phases(run_stages)
  if not phases:
    return inputs
  mixture = inputs.source
  assert isinstance(mixture, Mixture)
  (_, weights), *_ = mixture.phases
  changes: list[tuple[int | str, Mapping[str, float]]] = [
    (f"{first} samples" if first else 0, weights if own is None else own) for first, own in phases
  ]
  start: list[tuple[int | str, Mapping[str, float]]] = [] if phases[0][0] == 0 else [(0, weights)]
  sources = dict(zip(mixture.names, mixture.sources))
  return inputs._replace(source=Mixture(sources, [*start, *changes], pure=mixture.pure))


def staged_batches(
  run_stages: Sequence[stages.Stage],
  inputs: Inputs,
  *,
  rows: Sequence[Mapping[int, np.ndarray]],
  step: int,
  start: int,
  **where: Any,
) -> Generator[tuple[stages.Stage, int, dict[str, np.ndarray]], None, None]:
  """(stage, batch size, train batch) of every update after the first `step` ones, up to the end.

  The first stage's batches are read ahead at once, those of later stages when the stage begins.
  Close the iterator to end the workers.

  Args:
    run_stages: the stages of the run.
    inputs: what the run reads.
    rows: per stage, {batch size: the rows of the global batch that this host owns}.
    step: updates that are done.
    start: position in the data of the first sample; a stage continues where the one before it
      stopped.
    where: other arguments of Inputs.batches.
  """
  batches = _staged(run_stages, inputs, rows, step, start, where)
  next(batches, None)  # makes the first stage's batches, and reads ahead
  return batches


def _staged(
  run_stages: Sequence[stages.Stage],
  inputs: Inputs,
  rows: Sequence[Mapping[int, np.ndarray]],
  step: int,
  start: int,
  where: Mapping[str, Any],
) -> Generator[Any, None, None]:
  first = True
  for stage, own_rows in zip(run_stages, rows):
    if stage.end <= step:
      continue
    stop = start + stage.samples(step, stage.end)
    options = _of_stage(inputs.options, stage.config.data)
    staged = inputs._replace(options=options)
    if options != inputs.options and inputs.fields:
      staged = _with_fields(staged)
    more: dict[str, Any] = dict(step=step) if stage.schedule else {}
    batches = staged.batches(
      batch_size=stage.batch_size,
      rows=own_rows if stage.schedule else own_rows[stage.batch_size],
      start=start,
      stop=stop,
      **more,
      **where,
    )
    with contextlib.closing(batches):
      if first:  # staged_batches runs the generator up to here, so that reading ahead begins
        yield
      first = False
      for number, batch in enumerate(batches, step):
        yield stage, stage.batch_size_at(number), batch
    step, start = stage.end, stop


def _of_stage(options: DataOptions, stage: DataOptions) -> DataOptions:
  """The options with what a stage may change."""
  names = ("image_size", "tokenizer", "augment", "views")
  return dataclasses.replace(options, **{name: getattr(stage, name) for name in names})
