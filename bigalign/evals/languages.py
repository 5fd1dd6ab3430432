"""Zero-shot classification with class names in several languages, as Babel-ImageNet does it.

https://arxiv.org/abs/2306.08658. Each language names some of the classes, and is measured on the
images of these classes only. Images are embedded once for all languages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from bigalign import sharding, tree
from bigalign.evals.embed import Context, EvalData, embedded_images, log_rejects

SHOWN = 10  # languages with the lowest accuracy that the log names


class LabelSet(NamedTuple):
  """The class names of one language.

  Attributes:
    names: of K classes.
    labels: their labels in the source; each differs from the others.
  """

  names: tuple[str, ...]
  labels: tuple[int, ...]


def label_set(value: Any, what: str) -> LabelSet:
  """The names of a language.

  >>> label_set([[3, 1], ["Hund", "Katze"]], "german.json")
  LabelSet(names=('Hund', 'Katze'), labels=(3, 1))

  Args:
    value: of JSON: a list of names in the order of the labels, or [labels, names].
    what: names the value in errors.

  Raises:
    ValueError: for another form, a blank name, or a label that is named twice.
  """
  pair = isinstance(value, list) and len(value) == 2 and all(isinstance(x, list) for x in value)
  labels, names = value if pair else (None, value)
  if not isinstance(names, list) or not all(isinstance(x, str) for x in names) or not names:
    raise ValueError(f"{what} must hold a list of class names, or [[labels], [names]]")
  blank = [i for i, name in enumerate(names) if not name.strip()]
  if blank:
    raise ValueError(
      f"{what}: {len(blank)} of {len(names)} class names are blank, the first at {blank[0]}"
    )
  if labels is None:
    labels = [*range(len(names))]
  known = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in labels)
  if not known or len({*labels}) != len(names) or len(labels) != len(names):
    raise ValueError(
      f"{what}: expected as many different labels, from 0, as there are names; there are"
      f" {len(labels)} labels, {len({*map(str, labels)})} of them different, and {len(names)} names"
    )
  return LabelSet(tuple(names), tuple(labels))


def languages(
  context: Context,
  data: EvalData,
  sets: Mapping[str, LabelSet],
  weigh: Mapping[str, Callable[[Any], jax.Array]],
  measure: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Any],
) -> Callable[[Any], dict[str, float]]:
  """Returns run(params) -> {metric: value} of each language, and their means.

  Each device holds the classes of all languages, as float32 [L, K, E] with the K of the language
  that has most: 1.2 GB for Babel-ImageNet's 298 languages, K=1000 and E=1024. While they are
  stacked it holds them twice.

  Args:
    context: of the evaluator.
    data: the images.
    sets: {language: its class names}.
    weigh: {language: weigh(params) -> [K, E]}, the classes.
    measure: (images [B, E], classes [K, E], label [B], valid [B]) -> a collection of hits.
  """
  where = f"config.evals.{context.name}"
  table = np.full((len(sets), 1 + max(max(own.labels) for own in sets.values())), -1, np.int32)
  for row, own in zip(table, sets.values()):
    row[list(own.labels)] = np.arange(len(own.labels))
  most = max(len(own.names) for own in sets.values())
  replicated = sharding.replicated_sharding(context.mesh)

  @functools.partial(jax.jit, out_shardings=replicated)
  def stacked(weights: Sequence[jax.Array]) -> jax.Array:
    """[L, K, E]; classes that a language does not have are NaN, which no image prefers."""
    pad = [jnp.pad(w, ((0, most - len(w)), (0, 0)), constant_values=jnp.nan) for w in weights]
    return jnp.stack(pad)

  @functools.partial(jax.jit, out_shardings=replicated)
  def count(zimg: jax.Array, weights: jax.Array, batch: dict[str, jax.Array]) -> Any:
    label, valid = batch["label"], batch["valid"]
    inside = (label >= 0) & (label < table.shape[1])
    place = jnp.clip(label, 0, table.shape[1] - 1)

    def one(of_language: tuple[jax.Array, jax.Array]) -> Any:
      classes, number = of_language
      own = jnp.where(inside, number[place], -1)
      return measure(zimg, classes, own, valid & (own >= 0))

    hits = jax.lax.map(one, (weights, jnp.asarray(table)))
    named = inside & (jnp.asarray(table)[:, place] >= 0).any(0)
    return hits, (batch["rejects"].sum(0), valid.sum(), (valid & ~named).sum())

  @functools.partial(jax.jit, out_shardings=replicated)
  def add(a: Any, b: Any) -> Any:
    return a[0].merge(b[0]), jax.tree.map(jnp.add, a[1], b[1])

  def run(params: Any) -> dict[str, float]:
    weights = stacked([weigh[language](params) for language in sets])
    total: Any = None
    for zimg, batch in embedded_images(context, data, params):
      kept = {name: batch[name] for name in ("label", "valid", "rejects")}
      counted = sharding.block_on_cpu(count(zimg, weights, kept))
      total = counted if total is None else sharding.block_on_cpu(add(total, counted))
    hits, (rejects, samples, unnamed) = jax.tree.map(np.asarray, total)
    rejected = log_rejects(context.name, rejects)
    if not samples:
      raise ValueError(f"{where}: all {rejected} samples are rejected; the log gives the reasons")
    if unnamed:
      raise ValueError(
        f"{where}: {unnamed} of {samples} samples have no label, or one that no language names;"
        f" {len(sets)} languages name labels up to {table.shape[1] - 1}"
      )
    empty = [name for name, n in zip(sets, hits.top1.count) if not n]
    if empty:
      raise ValueError(
        f"{where}: the classes that {tree.shown(empty)} names have no image; leave these languages"
        " out"
      )
    metrics = _metrics(hits, sets)
    top1 = {language: metrics[f"{language}-top1"] for language in sets}
    worst = sorted(top1, key=lambda language: top1[language])[:SHOWN]
    logging.info(
      "evaluation %r: lowest top1 of %d languages: %s",
      *(context.name, len(sets), ", ".join(f"{name} {top1[name]:.4f}" for name in worst)),
    )
    metrics |= {"num_languages": len(sets), "num_samples": int(samples)}
    metrics |= {"rejected": rejected} if rejected else {}
    return {f"val/{context.name}-zeroshot-val-{name}": x for name, x in metrics.items()}

  return run


def _metrics(hits: Any, sets: Mapping[str, LabelSet]) -> dict[str, float]:
  """The metrics of each language, and their means over languages, of hits with an axis of them."""
  metrics: dict[str, float] = {}
  for n, (language, own) in enumerate(sets.items()):
    one = jax.tree.map(lambda x: x[n], hits)  # noqa: B023
    values = {name: float(x) for name, x in one.compute().items() if name != "unlabelled"}
    if len(own.names) < 5:
      del values["top5"]
    sizes = dict(num_classes=len(own.names), num_samples=int(one.top1.count))
    if missing := int((one.mean_per_class_recall.count[: len(own.names)] == 0).sum()):
      sizes["num_empty_classes"] = missing
    metrics |= {f"{language}-{name}": x for name, x in (values | sizes).items()}
  for name in ("top1", "top5", "mean_per_class_recall", "macro_f1"):
    every = [metrics.get(f"{language}-{name}") for language in sets]
    if None not in every:
      metrics[f"mean_{name}"] = float(np.mean([x for x in every if x is not None]))
  return metrics
