"""Retrieval within one modality: images by images, texts by texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from jax.sharding import Mesh

from bigalign import sharding, tree
from bigalign.data.samples import members
from bigalign.data.samples.rejects import REASONS, Rejected
from bigalign.data.sources import base
from bigalign.data.sources.base import open_source
from bigalign.evals.caption_languages import captions_of
from bigalign.evals.embed import (
  Context,
  embedded_images,
  log_rejects,
  open_data,
  prefix,
  round_batch,
  texts_embedder,
  to_host,
)
from bigalign.evals.retrieval import precision_at_r, ranks, recalls


def measure(
  query: np.ndarray,
  owner: np.ndarray,
  gallery: np.ndarray,
  gallery_owner: np.ndarray,
  own: np.ndarray,
  mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
  """The rank of the best positive of each query, from 1, and its average precision at R.

  Queries are on every device, the gallery is split over them.

  Args:
    query: [Q, E].
    owner: [Q] int32; a gallery entry with the same owner is a positive.
    gallery: [G, E].
    gallery_owner: [G] int32.
    own: [Q] int32, the place of the query itself in the gallery, which does not count; -1: none.
    mesh: to compute on.

  Returns:
    [Q] int32, 0 for a query without a positive; [Q] float32.
  """
  size = round_batch(mesh, len(gallery))
  rows = sharding.host_rows(mesh, size)
  there = rows < len(gallery)
  chosen = np.where(there, rows, 0)
  given = dict(z=gallery[chosen], owner=gallery_owner[chosen], there=there)
  split = sharding.global_batch(mesh, given, rows, size)
  # No query has more positives than the most frequent owner has entries.
  most = int(np.unique(gallery_owner, return_counts=True)[1].max(initial=1))
  replicated = sharding.replicated_sharding(mesh)

  @functools.partial(jax.jit, out_shardings=replicated)
  def find(query: jax.Array, owner: jax.Array, own: jax.Array, gallery: Mapping[str, Any]) -> Any:
    among = (
      *(query, owner, rearrange(gallery["z"], "b e -> 1 b 1 e")),
      *(rearrange(gallery["owner"], "b -> 1 b"), rearrange(gallery["there"], "b -> 1 b 1")),
    )
    return (
      ranks(*among, own=own, mesh=mesh),
      precision_at_r(*among, most=most, own=own, mesh=mesh),
    )

  found = find(jnp.asarray(query), jnp.asarray(owner), jnp.asarray(own), split)
  rank, precision = map(np.asarray, sharding.block_on_cpu(found))
  return rank, precision


def _metrics(
  name: str, direction: str, rank: np.ndarray, precision: np.ndarray
) -> dict[str, float]:
  """The metrics of the queries that have a positive.

  Raises:
    ValueError: if none has.
  """
  has = rank > 0
  if not has.any():
    raise ValueError(
      f"config.evals.{name}: none of {len(rank)} queries has another entry that belongs to it"
    )
  metrics = recalls(direction, rank[has])
  metrics[f"{direction}_mAP@R"] = float(precision[has].mean())
  metrics["num_queries"] = int(has.sum())
  if without := int((~has).sum()):
    logging.warning(
      "evaluation %r leaves out %d of %d queries, to which no other entry belongs",
      *(name, without, len(rank)),
    )
    metrics["without_positive"] = without
  return metrics


def image_retrieval(
  context: Context,
  *,
  source: str,
  gallery: str = "",
  same: str = "",
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Retrieval of images by images: those of the same class, or with the same value of a field.

  The query of an image is a hit if any image that belongs to it is among the first k. mAP@R is that
  of https://arxiv.org/abs/2003.08505. Of equal similarities the earlier image comes first. NaN
  comes last, and is never a hit of mAP@R.

  Args:
    context: model, mesh and data options.
    source: of the queries, as in config.data.source.
    gallery: source of the images that are found; "": the queries, of which none finds itself.
    same: field whose equal values say that images belong together, such as "json.product"; "": the
      labels.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>/image_to_image_R@1": fraction, …} at 1, 5 and 10, mean_rank,
    median_rank and mAP@R, num_samples of the gallery, num_queries, and "without_positive", the
    number of queries to which no other image belongs, which are left out.

  Raises:
    ValueError: when run, for images without a label or value, and if no query has a positive.
  """
  where = f"config.evals.{context.name}"
  parts = [
    open_data(context, one, batch_size=batch_size, captions=0) for one in (source, gallery) if one
  ]
  values = [_values(part.source, same, where) if same else None for part in parts]

  def embedded(params: Any, which: int) -> tuple[np.ndarray, list[Any], np.ndarray]:
    """The images of a source that can be read, what they belong to, and the sum of rejects."""
    z, owner, rejects = [], list[Any](), np.zeros(len(REASONS), np.int64)
    for zimg, batch in embedded_images(context, parts[which], params):
      fields = ("valid", "index", "label", "rejects")
      valid, index, label, rejected = (to_host(batch[name]) for name in fields)
      z.append(to_host(zimg)[valid])
      own = values[which]
      owner += [own[i] for i in index[valid]] if own is not None else label[valid].tolist()
      rejects = rejects + rejected.sum(0)
    missing = sum(one is None or one == -1 for one in owner)
    if missing or not owner:
      raise ValueError(
        f"{where}: {missing} of {len(owner)} images have no {repr(same) if same else 'label'}"
      )
    return np.concatenate(z), owner, rejects

  def run(params: Any) -> dict[str, float]:
    both = [embedded(params, which) for which in range(len(parts))]
    (zq, queries, _), (zg, entries, _) = both[0], both[-1]
    number = {value: i for i, value in enumerate(dict.fromkeys([*queries, *entries]))}
    owners = [np.array([number[x] for x in some], np.int32) for some in (queries, entries)]
    own = np.full(len(zq), -1, np.int32) if gallery else np.arange(len(zq), dtype=np.int32)
    found = measure(zq, owners[0], zg, owners[1], own, context.mesh)
    metrics = _metrics(context.name, "image_to_image", *found) | {"num_samples": len(zg)}
    if rejected := log_rejects(context.name, np.sum([x[2] for x in both], 0)):
      metrics["rejected"] = rejected
    return {prefix(context.name) + name: value for name, value in metrics.items()}

  return run


def text_retrieval(
  context: Context,
  *,
  source: str,
  fields: Sequence[str] | None = None,
  among: Sequence[str] | None = None,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Retrieval of texts by texts: those of the same sample.

  A caption finds the other captions of its sample; or those of other fields, such as the captions
  of one language by those of another. Equal similarities and NaN are as of image_retrieval.

  Args:
    context: model, mesh and data options.
    source: as in config.data.source; its images are not read.
    fields: of the texts that are queries; None: config.data.captions.
    among: fields of the texts that are found, such as ("json.de",); None: the queries, of which
      none finds itself.
    batch_size: texts at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>/text_to_text_R@1": fraction, …}, as of image_retrieval.

  Raises:
    ValueError: if no query has another text that belongs to it.
  """
  where = f"config.evals.{context.name}"
  queries = tuple(fields or context.data.caption_fields or ())
  names = (*queries, *(among or ()))
  if len({*names}) < len(names):
    raise ValueError(f"{where}: fields={queries} and among={tuple(among or ())} overlap")
  opened = open_source(source, captions=names or None, images=False)
  sides: tuple[list[str], ...] = ([], [])
  owners: tuple[list[int], ...] = ([], [])
  rejected = 0
  for i in range(len(opened)):
    try:
      texts = captions_of(base.read(opened, i), names or None)
    except Rejected as error:
      rejected += 1
      logging.warning("%s: sample %d of %s is left out: %s", where, i, source, error)
      continue
    for field, own in texts.items():
      side = int(bool(among) and field in (among or ()))
      sides[side].extend(own)
      owners[side].extend([i] * len(own))
  for some, of_side in zip(sides, (queries, among)):
    if not some and of_side is not None:
      raise ValueError(f"{where}.source={source!r}: no text in {tree.shown(of_side)}")
  embed = texts_embedder(context, [*sides[0], *sides[1]], batch_size=batch_size)
  owner = [np.array(some, np.int32) for some in owners if some]

  def run(params: Any) -> dict[str, float]:
    z = [x for x in np.split(np.asarray(embed(params)), [len(sides[0])]) if len(x)]
    count = len(z[0])
    own = np.full(count, -1, np.int32) if among else np.arange(count, dtype=np.int32)
    found = measure(z[0], owner[0], z[-1], owner[-1], own, context.mesh)
    metrics = _metrics(context.name, "text_to_text", *found) | {"num_samples": len(z[-1])}
    metrics |= {"rejected": rejected} if rejected else {}
    return {prefix(context.name) + name: value for name, value in metrics.items()}

  return run


def _values(source: Any, field: str, where: str) -> list[Any]:
  """The value of a field of each sample; None for one that has none."""
  values: list[Any] = []
  for i in range(len(source)):
    try:
      value = base.value(source, i, field)
    except Rejected:  # counted when the batches are made
      value = None
    texts = members.strings(value)
    values.append(texts[0] if len(texts) == 1 else value if isinstance(value, int) else None)
  if all(value is None for value in values):
    raise ValueError(f"{where}.same={field!r}: no sample has such a value")
  return values
