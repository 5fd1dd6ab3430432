"""Several texts of each image, and hard negatives: config.data.texts.

The first text is drawn as without this option, so a count of 1 gives the same batches to the bit.
The others are drawn without replacement; an image that has fewer captions has absent texts. Hard
negatives come after them.

A batch has, besides `text` [B, L], the first one:

  text_others, text_others_mask   [B, M - 1, L]: the ids of the other texts and their mask, or with
                                  stored captions [B, M - 1, D] and [B, M - 1, 1]
  texts_kind                      [B, M] int32 of all texts: ABSENT, POSITIVE or NEGATIVE
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigalign import checks
from bigalign.data.fields.base import Draws, Spec
from bigalign.data.files.draws import draw
from bigalign.data.samples.members import strings
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import Source, value
from bigalign.data.text.captions import Columns, choose_others
from bigalign.data.text.code_switch import CodeSwitch
from bigalign.data.text.kinds import ABSENT, NEGATIVE, POSITIVE
from bigalign.data.text.negatives import RULES
from bigalign.options import DEFAULTS

NAMES = ("text_others", "text_others_mask", "texts_kind")
_PROBES = 64  # samples that are read when a field of hard negatives is opened


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativesOptions:
  """Hard negatives: texts that are almost a caption of the image, but wrong.

  Args:
    count: how many each image has.
    field: where they are stored: the name of a text or of a list of texts, as in
      config.data.captions, of which `count` are drawn.
    rule: instead, how negative k is made of text k (of the first ones again, if there are more
      negatives): "swap" exchanges two words, "shuffle" mixes all words.
  """

  count: int = 0
  field: str = ""
  rule: str = ""

  def __post_init__(self) -> None:
    if self.count < 0 or (self.count > 0) != (bool(self.field) != bool(self.rule)):
      raise ValueError(
        f"config.data.texts.negatives: count={self.count}, field={self.field!r},"
        f" rule={self.rule!r}; give a count above 0, and either a field or a rule"
      )
    if self.rule:
      checks.known("config.data.texts.negatives.rule", self.rule, RULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextsOptions:
  """Several texts of each image.

  Args:
    count: texts of an image, drawn without replacement from the fields of config.data.captions.
    negatives: hard negatives, which come after them.
  """

  count: int = 1
  negatives: NegativesOptions = DEFAULTS

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f"config.data.texts.count={self.count}: at least 1")

  @property
  def total(self) -> int:
    """M, with the hard negatives."""
    return self.count + self.negatives.count


class Texts(NamedTuple):
  """The texts of one image, M each.

  texts: captions or rows of a store; for an absent one "" or row 0.
  places: of a caption among those of the sample; -1 for another text.
  kinds: ABSENT, POSITIVE or NEGATIVE.
  """

  texts: tuple[Any, ...]
  places: tuple[int, ...]
  kinds: tuple[int, ...]


def spec(options: TextsOptions | None, length: int) -> Spec:
  """The arrays of the texts; length: L."""
  if options is None:
    return {}
  others = options.total - 1
  arrays: dict[str, Any] = {"texts_kind": ((options.total,), np.dtype(np.int32))}
  if others:
    arrays["text_others"] = ((others, length), np.dtype(np.int32))
    arrays["text_others_mask"] = ((others, length), np.dtype(bool))
  return arrays


def check(options: TextsOptions | None, source: Source | None, *, stored: bool) -> None:
  """Raises ValueError if the negatives cannot be read or made, of all samples that are drawn.

  Args:
    options: config.data.texts.
    source: of the samples; None: both sides are stored.
    stored: whether captions are rows of a store.
  """
  if options is None or not options.negatives.count:
    return
  if stored:
    raise ValueError(
      "config.data.texts.negatives needs texts, but config.data.stores.text gives vectors"
    )
  field = options.negatives.field
  if not field:
    return
  where = f"config.data.texts.negatives.field={field!r}"
  if source is None or not hasattr(source, "fields"):
    raise ValueError(f"{where}: {source!r} stores nothing by name; use a rule")
  probes = draw(len(source), _PROBES)
  if not any(_stored(source, i, field) for i in probes):
    raise ValueError(
      f"{where}: none of {len(probes)} samples drawn from {source!r} has a text there; name the"
      " field as in config.data.captions, or use a rule"
    )


def _stored(source: Source, index: int, field: str) -> tuple[str, ...]:
  """The hard negatives of a sample; () of one that cannot be read, which is rejected later."""
  try:
    return strings(value(source, index, field))
  except Rejected:
    return ()


def read(
  options: TextsOptions | None,
  captions: Mapping[str, Sequence[Any]],
  columns: Columns,
  draws: Draws,
  *,
  first: int,
  source: Source,
  index: int,
  switch: CodeSwitch | None = None,
) -> Texts:
  """The texts of one image.

  Args:
    options: config.data.texts; None for one text.
    captions: {field: captions} of the sample.
    columns: to draw from.
    draws: of its position.
    first: the place of the first caption among all.
    source, index: of the sample, to read negatives from a field.
    switch: replaces words of captions.
  """
  every = [text for column in captions.values() for text in column]
  if switch:
    rng = draws.of("code_switch")
    every = [switch(text, rng) if isinstance(text, str) else text for text in every]
  if options is None:
    return Texts((every[first],), (first,), (POSITIVE,))
  others = choose_others(captions, columns, draws.of("texts"), first=first, count=options.count - 1)
  places = [first, *others]
  missing = options.count - len(places)
  absent: Any = "" if isinstance(every[first], str) else every[first]
  texts = [*(every[place] for place in places), *[absent] * missing]
  kinds = [POSITIVE] * len(places) + [ABSENT] * missing
  for negative in _negatives(options.negatives, [every[p] for p in places], draws, source, index):
    texts.append("" if negative is None else negative)
    kinds.append(ABSENT if negative is None else NEGATIVE)
  return Texts(tuple(texts), (*places, *[-1] * (options.total - len(places))), tuple(kinds))


def _negatives(
  options: NegativesOptions, positives: Sequence[str], draws: Draws, source: Source, index: int
) -> list[str | None]:
  """`options.count` hard negatives; None for one that there is not."""
  if not options.count:
    return []
  rng = draws.of("negatives")
  if options.rule:
    rule = RULES[options.rule]
    return [rule(positives[k % len(positives)], rng) for k in range(options.count)]
  stored = strings(value(source, index, options.field))
  order = rng.permutation(len(stored))[: options.count]
  return [*(stored[i] for i in order), *[None] * (options.count - len(order))]
