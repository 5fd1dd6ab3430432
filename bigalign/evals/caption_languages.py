"""Retrieval with captions in several languages, as XM3600, XTD and Multi30k have them.

https://arxiv.org/abs/2205.12522, https://arxiv.org/abs/2012.05107. Each language is measured with
its own captions and their images. Images and captions are embedded once for all languages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import sharding, tree
from bigalign.data.samples import members
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import base
from bigalign.data.sources.base import open_source
from bigalign.evals.embed import Embedded

SHOWN = 10  # languages with the lowest recall that the log and the report name


class Spoken(NamedTuple):
  """Which captions of each sample are in which language.

  Attributes:
    names: of L languages.
    places: [L, S, C] int32, the places of the captions of S samples in each language among all of
      their captions; -1 for none.
    most: the largest number of captions of a sample, of all languages together.
    fields: the caption fields.
  """

  names: tuple[str, ...]
  places: np.ndarray
  most: int
  fields: tuple[str, ...] | None


def captions_of(
  record: Mapping[str, Any], fields: Sequence[str] | None
) -> Mapping[str, tuple[str, ...]]:
  """{field: captions} of a record, in the order of the fields; "" if the source names none."""
  texts = record.get("texts")
  if texts is None:
    return {(fields or ("",))[0]: record["captions"]}
  return {field: tuple(texts.get(field, ())) for field in fields or texts}


def all_captions(record: Mapping[str, Any], fields: Sequence[str] | None) -> tuple[str, ...]:
  """The captions of all fields of a record, one field after the other."""
  return tuple(text for own in captions_of(record, fields).values() for text in own)


def read(
  source: str,
  languages: Mapping[str, str] | Sequence[str],
  language: str,
  fields: Sequence[str] | None,
  where: str,
) -> Spoken:
  """Reads which languages the captions of a source have; decodes no image.

  Args:
    source: as in config.data.source.
    languages: {language: the field of its captions}; or the names of those to read, () for all.
    language: the field of the language of a sample, or of a list with that of each caption.
    fields: caption fields, with `language`.
    where: the evaluator, for errors.

  Raises:
    ValueError: for a language in which no sample has a caption, and for a sample whose captions and
      languages are not equally many.
  """
  of_fields = languages if isinstance(languages, Mapping) else None
  by_field = of_fields is not None
  if of_fields is not None and language:
    raise ValueError(
      f"{where}: languages={dict(of_fields)} gives the field of each language, so"
      f" language={language!r} has no effect; leave one of them out"
    )
  if not by_field and not language:
    raise ValueError(
      f"{where}.languages={list(languages)}: give {{language: field of its captions}}, or the field"
      " of the language of each sample as `language`"
    )
  own = {field: name for name, field in (of_fields or {}).items()}
  if of_fields is not None and len(own) < len(of_fields):
    raise ValueError(f"{where}.languages={dict(of_fields)} names a field more than once")
  names = tuple(own) or (None if fields is None else tuple(fields))
  opened = open_source(source, captions=names)
  every: list[list[str]] = []  # the language of each caption of each sample
  for i in range(len(opened)):
    try:
      texts = captions_of(base.read(opened, i), names)
      if by_field:
        every.append([own[field] for field, texts in texts.items() for _ in texts])
      else:
        count = sum(map(len, texts.values()))
        every.append(_stated(opened, i, language, count, f"{where}.source"))
    except Rejected:  # logged and counted when the batches are made
      every.append([])
  known: dict[str, int] = {}
  for spoken in every:
    for name in dict.fromkeys(spoken):
      known[name] = known.get(name, 0) + (name != "")
  known.pop("", None)
  wanted = tuple(languages) or tuple(sorted(known))
  if missing := [name for name in wanted if name not in known]:
    there = ", ".join(f"{name} ({known[name]:,} samples)" for name in sorted(known))
    stored = "" if there else f"; a sample stores {_stored(opened)}"
    field = "" if by_field else f" by {language!r}"
    raise ValueError(
      f"{where}.languages: no sample has a caption in {tree.shown(missing)}{field}; there are"
      f" {there or 'none'}{stored}"
    )
  if not wanted:
    raise ValueError(
      f"{where}.language={language!r}: no caption has a language; a sample stores {_stored(opened)}"
    )
  if without := sum("" in spoken or not spoken for spoken in every):
    logging.warning("%s: %d of %d samples lack a language", where, without, len(every))
  return Spoken(wanted, _places(every, wanted), max(map(len, every)), names)


def _stated(source: Any, i: int, field: str, captions: int, what: str) -> list[str]:
  """The language of each caption of a sample; "" for those that have none."""
  stated = members.strings(base.value(source, i, field))
  if len(stated) <= 1:
    return [*(stated or ("",))] * captions
  if len(stated) != captions:
    raise ValueError(
      f"{what}: sample {base.key(source, i)} has {captions} captions, but {len(stated)} languages"
      f" in {field!r}"
    )
  return list(stated)


def _stored(source: Any) -> str:
  """What the first sample stores, for errors."""
  try:
    stored = base.fields(source, 0)
    names = [name for name in stored if name != "json"]
    if isinstance(data := stored.get("json"), bytes):
      names += [f"json.{name}" for name in members.read_json(data, key="the first sample")]
  except Rejected:
    return "nothing that can be read"
  return tree.shown(sorted(names)) if names else "nothing by name"


def _places(every: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
  """[L, S, C] int32, see Spoken."""
  counts = {(i, name): spoken.count(name) for i, spoken in enumerate(every) for name in {*spoken}}
  most = max((n for (_, name), n in counts.items() if name in {*names}), default=1)
  places = np.full((len(names), len(every), most), -1, np.int32)
  number = {name: k for k, name in enumerate(names)}
  for i, spoken in enumerate(every):
    filled: dict[str, int] = {}
    for place, name in enumerate(spoken):
      if name in number:
        filled[name] = filled.get(name, 0) + 1
        places[number[name], i, filled[name] - 1] = place
  return places


def measure(
  embedded: Embedded,
  spoken: Spoken,
  measures: Callable[[Embedded], dict[str, float]],
  mesh: Mesh,
  name: str,
) -> dict[str, float]:
  """{metric: value} of each language, and their means over languages.

  Args:
    embedded: all captions.
    spoken: their languages.
    measures: the metrics of the captions of one language; {} without any.
    mesh: that the embeddings are split over.
    name: of the evaluator.

  Raises:
    ValueError: for a language of which no sample is left.
  """
  chosen = _chooser(mesh)
  metrics: dict[str, float] = {}
  used: Any = False
  for language, places in zip(spoken.names, spoken.places):
    ztxt, there, images = chosen(embedded, places)
    own = measures(embedded._replace(ztxt=ztxt, texts_valid=there))
    if not own:
      raise ValueError(
        f"config.evals.{name}: no sample with a caption in {language!r} can be used; the log gives"
        " the reasons"
      )
    metrics |= {f"{language}-{metric}": value for metric, value in own.items()}
    used = used | np.asarray(images)
  averaged = [metric for metric in own if not metric.startswith("num_")]
  for metric in averaged:
    every = [metrics[f"{language}-{metric}"] for language in spoken.names]
    metrics[f"mean_{metric}"] = float(np.mean(every))
  low = {language: metrics[f"{language}-text_to_image_R@1"] for language in spoken.names}
  worst = sorted(low, key=lambda language: low[language])[:SHOWN]
  logging.info(
    "evaluation %r: lowest text_to_image_R@1 of %d languages: %s",
    *(name, len(low), ", ".join(f"{language} {low[language]:.4f}" for language in worst)),
  )
  return metrics | {"num_languages": len(low), "num_samples": int(np.sum(used))}


@functools.cache
def _chooser(mesh: Mesh) -> Callable[[Embedded, jax.Array], tuple[jax.Array, ...]]:
  """(embeddings, places [S, C]) -> the captions of a language, over the mesh."""
  split = NamedSharding(mesh, P(None, sharding.BATCH))

  @functools.partial(jax.jit, out_shardings=(split, split, sharding.replicated_sharding(mesh)))
  def chosen(embedded: Embedded, places: jax.Array) -> tuple[jax.Array, ...]:
    """The captions [N, B, C, E], which of them count [N, B, C], and which images do [N, B]."""
    place = places[jnp.minimum(embedded.ordinal, len(places) - 1)]
    among = jnp.maximum(place, 0)
    ztxt = jnp.take_along_axis(embedded.ztxt, among[..., None], axis=2)
    there = (place >= 0) & jnp.take_along_axis(embedded.texts_valid, among, axis=2)
    return ztxt, there, (there & embedded.valid[..., None]).any(2)

  return chosen
