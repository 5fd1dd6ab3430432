"""Image-text retrieval in both directions: recall at 1, 5, 10, ranks, and mAP@R."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange, repeat
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import sharding
from bigalign.evals import caption_languages
from bigalign.evals.embed import Context, Embedded, embedder, open_data, prefix

RECALL_AT = (1, 5, 10)
CHUNK = 2**26  # similarities at a time in one memory: 256 MB
ROWS = 8  # of them, that a CPU compares at a time: they stay in its cache


def ranks(
  query: jax.Array,
  owner: jax.Array,
  gallery: jax.Array,
  gallery_owner: jax.Array,
  gallery_valid: jax.Array,
  *,
  own: jax.Array | None = None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Returns the rank of the best positive of each query in the sorted gallery, from 1.

  Of equal similarities the earlier entry of the gallery comes first (a stable sort), so that a
  collapsed model scores chance. NaN similarities come after all numbers.

  Args:
    query: [Q, E] embeddings, processed in chunks, so that Q x gallery is never formed completely.
    owner: [Q] int32; a gallery entry with the same owner is a positive.
    gallery: [N, B, C, E] embeddings; may be split over B.
    gallery_owner: [N, B] int32.
    gallery_valid: [N, B, C] bool; other entries do not count.
    own: [Q] int32, the position of the query itself in the gallery, which does not count; -1: it
      is not in it. None: none is.
    mesh: the mesh over whose batch axes the gallery is split, if it is.

  Returns:
    [Q] int32; 0 for a query without a positive.
  """
  entries = gallery_valid.size
  position = jnp.arange(entries, dtype=jnp.int32).reshape(gallery_valid.shape)

  def rank(sims: jax.Array, valid: jax.Array, positive: jax.Array) -> jax.Array:
    best = jnp.max(jnp.where(positive, sims, -jnp.inf))
    first = jnp.min(jnp.where(positive & (sims == best), position, entries))
    before = valid & ((sims > best) | ((sims == best) & (position < first)))
    return jnp.where(first < entries, 1 + before.sum(dtype=jnp.int32), 0)

  return _by_query(rank, query, owner, gallery, gallery_owner, gallery_valid, own, mesh)


def _by_query(
  measure: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  query: jax.Array,
  owner: jax.Array,
  gallery: jax.Array,
  gallery_owner: jax.Array,
  gallery_valid: jax.Array,
  own: jax.Array | None,
  mesh: Mesh | None,
) -> jax.Array:
  """[Q]: a measure of each query, (similarities, entries that count, positives), [N, B, C] each."""
  entries = gallery_valid.size
  position = jnp.arange(entries, dtype=jnp.int32).reshape(gallery_valid.shape)
  parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
  on_one_cpu = mesh is not None and parts == 1 and mesh.devices.flat[0].platform == "cpu"
  # As a matrix, because a product of more axes takes 1.5 times as long on CPUs.
  matrix = rearrange(gallery, "n b c e -> (n b c) e") if parts == 1 else gallery

  def one(of_query: tuple[jax.Array, ...]) -> jax.Array:
    sims, mine, *itself = of_query
    valid = gallery_valid & (position != itself[0]) if itself else gallery_valid
    positive = valid & (gallery_owner == mine)[:, :, None]
    return measure(jnp.where(jnp.isnan(sims), -jnp.inf, sims), valid, positive)

  def some(chunk: tuple[jax.Array, ...]) -> jax.Array:
    z, *rest = chunk
    # At the default precision of TPUs products are bfloat16, which makes different values equal.
    form = "qe,ge->qg" if parts == 1 else "qe,nbce->qnbc"
    sims = jnp.einsum(form, z, matrix, precision=jax.lax.Precision.HIGHEST)
    sims = sims.reshape(len(z), *gallery_valid.shape)
    if mesh is not None:
      # Otherwise GSPMD communicates all similarities, to count those of a query on one device.
      split = NamedSharding(mesh, P(None, None, sharding.BATCH))
      sims = jax.lax.with_sharding_constraint(sims, split)
    if on_one_cpu and len(z) > ROWS:
      by_row: jax.Array = jax.lax.map(one, (sims, *rest), batch_size=ROWS)
      return by_row
    return jax.vmap(one)((sims, *rest))

  queries = (query, owner) if own is None else (query, owner, own)
  count = len(query)
  chunks = -(-count // at_once(count, entries, mesh))
  size = -(-count // chunks)
  padded = [
    rearrange(
      jnp.pad(x, [(0, chunks * size - count), *[(0, 0)] * (x.ndim - 1)]),
      "(k q) ... -> k q ...",
      k=chunks,
    )
    for x in queries
  ]
  by_query: jax.Array = jax.lax.map(some, tuple(padded))
  return rearrange(by_query, "k q -> (k q)")[:count]


def precision_at_r(
  query: jax.Array,
  owner: jax.Array,
  gallery: jax.Array,
  gallery_owner: jax.Array,
  gallery_valid: jax.Array,
  *,
  most: int,
  own: jax.Array | None = None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Returns the average precision of each query among its first R entries; its mean is mAP@R.

  R is the number of positives of the query. The precision at each positive among the first R
  entries of the sorted gallery is summed and divided by R (https://arxiv.org/abs/2003.08505). Of
  equal similarities the earlier entry comes first; NaN is never a hit.

  >>> z = jnp.eye(4)[:, None, None]  # a gallery of 4 batches of one entry
  >>> query = jnp.array([[0.9, 0.8, 0.7, 0.6]])  # the positives are the first and the third
  >>> owners, valid = jnp.array([[1], [0], [1], [0]]), jnp.ones((4, 1, 1), bool)
  >>> precision_at_r(query, jnp.array([1]), z, owners, valid, most=2).tolist()
  [0.5]

  Args:
    query, owner, gallery, gallery_owner, gallery_valid, own, mesh: as of `ranks`.
    most: the largest R of a query; a larger one only costs time.

  Returns:
    [Q] float32; 0 for a query without a positive.
  """
  most = min(most, gallery_valid.size)

  def average(sims: jax.Array, valid: jax.Array, positive: jax.Array) -> jax.Array:
    best, place = jax.lax.top_k(jnp.where(valid, sims, -jnp.inf).ravel(), most)
    count = positive.sum(dtype=jnp.int32)
    among = jnp.arange(1, most + 1)
    hit = positive.ravel()[place] & (best > -jnp.inf) & (among <= count)
    return jnp.sum(hit * jnp.cumsum(hit) / among) / jnp.maximum(count, 1)

  return _by_query(average, query, owner, gallery, gallery_owner, gallery_valid, own, mesh)


def at_once(queries: int, entries: int, mesh: Mesh | None = None) -> int:
  """Returns how many queries are compared with a gallery at a time.

  Args:
    queries: in all.
    entries: of the gallery.
    mesh: over whose batch axes the gallery is split. Each accelerator has a memory for its part, so
      that many of them are not slowed down by the communication of many small chunks.
  """
  on_accelerators = mesh is not None and mesh.devices.flat[0].platform != "cpu"
  memories = mesh.shape["data"] * mesh.shape["fsdp"] if mesh and on_accelerators else 1
  return min(queries, max(1, CHUNK * memories // entries))


def both_directions(
  embedded: Embedded, mesh: Mesh, map_at_r: bool = False
) -> tuple[jax.Array, ...]:
  """Returns ranks of each image's best caption [N, B] and of each caption's image [N, B, C].

  The rank is 0 for entries that are not valid. With map_at_r also the average precision of each
  image among its first R captions, [N, B].
  """
  zimg, ztxt, _, ordinal, valid, texts_valid, _ = embedded
  captions = ztxt.shape[2]
  texts_valid = texts_valid & valid[:, :, None]
  images_valid = texts_valid.any(2, keepdims=True)
  images = rearrange(zimg, "n b e -> n b 1 e")

  def one_batch(batch: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    # Every device gets all queries and holds its part of the gallery.
    zi, zt, owner = jax.lax.with_sharding_constraint(batch, sharding.replicated_sharding(mesh))
    among = (zi, owner, ztxt, ordinal, texts_valid)
    image_to_text = ranks(*among, mesh=mesh)
    precision = precision_at_r(*among, most=captions, mesh=mesh) if map_at_r else None
    text_to_image = ranks(
      rearrange(zt, "b c e -> (b c) e"),
      repeat(owner, "b -> (b c)", c=captions),
      images,
      ordinal,
      images_valid,
      mesh=mesh,
    )
    return image_to_text, rearrange(text_to_image, "(b c) -> b c", c=captions), precision

  text_ranks, image_ranks, precision = jax.lax.map(one_batch, (zimg, ztxt, ordinal))
  both = jnp.where(valid, text_ranks, 0), jnp.where(texts_valid, image_ranks, 0)
  return (*both, precision) if map_at_r else both


def recalls(direction: str, ranks: np.ndarray) -> dict[str, float]:
  """Returns the metrics of one direction, named and rounded as in open_clip.

  >>> recalls("image_to_text", np.array([1, 4, 2, 9]))["image_to_text_R@5"]
  0.75

  Args:
    direction: "image_to_text" or "text_to_image".
    ranks: [Q], from 1.
  """
  return {
    **{f"{direction}_R@{k}": float((ranks <= k).mean()) for k in RECALL_AT},
    f"{direction}_mean_rank": float(ranks.mean()),
    f"{direction}_median_rank": float(np.floor(np.median(ranks))),
  }


def measures(embedded: Embedded, found: Sequence[jax.Array]) -> dict[str, float]:
  """Returns the metrics of both directions; {} if no image has a caption.

  Args:
    embedded: the images and captions.
    found: of both_directions, on every host.
  """
  texts, images, *precision = (np.asarray(x) for x in found)
  if not (texts > 0).any():
    return {}
  metrics = {
    **recalls("image_to_text", texts[texts > 0]),
    **recalls("text_to_image", images[images > 0]),
    "num_samples": int((texts > 0).sum()),
    "num_captions": int((images > 0).sum()),
  }
  if precision:
    metrics["image_to_text_mAP@R"] = float(precision[0][texts > 0].mean())
    metrics["text_to_image_mAP@R"] = metrics["text_to_image_R@1"]  # a caption has one image
  return metrics


def retrieval(
  context: Context,
  *,
  source: str = "",
  captions: int | None = None,
  fields: Sequence[str] | None = None,
  languages: Mapping[str, str] | Sequence[str] | None = None,
  language: str = "",
  image_store: str = "",
  text_store: str = "",
  map_at_r: bool = False,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Retrieval among all pairs of a source, of each language if its captions have several.

  The query of an image is a hit if any of its captions is among the first k. Each caption is a
  query. With languages, the images of a language are those that have a caption in it, and its
  captions are compared with them only, as in XM3600 (https://arxiv.org/abs/2205.12522).

  >>> import jax.numpy as jnp
  >>> from bigalign import sharding
  >>> from bigalign.data.loader.options import resolve_data
  >>> def embed(params, batch, mask=None):  # a collapsed model: all embeddings are equal
  ...   return jnp.full((len(batch), 4), 0.5)
  >>> data = resolve_data(dict(image_size=32, tokenizer=dict(name="byte", length=48)))
  >>> context = Context("val", embed, embed, sharding.make_mesh(), data)
  >>> run = retrieval(context, source="glyphs:heldout_dev", captions=1)
  >>> metrics = run(params=None)
  >>> metrics["val/num_samples"], metrics["val/text_to_image_R@1"] == 1 / 1148  # chance
  (1148, True)

  Args:
    context: model, mesh and data options.
    source: as in config.data.source; "" if both sides come from stores.
    captions: largest number of captions of an image; None: count them in the source first.
    fields: caption fields; None: config.data.captions.
    languages: {language: the field of its captions}, such as de="json.de.caption". With `language`
      the names of those to evaluate; None: all that are there.
    language: the field of the language of each sample, or of a list with that of each caption.
    image_store: folder of the vectors of images, for a model whose image tower is `features`, or to
      save the time of the tower.
    text_store: folder of the vectors of captions, likewise. The source gives the other side.
    map_at_r: whether to measure mAP@R too, the mean average precision among the first R, of queries
      with R positives.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {metric: value}. If samples were left out, because they were rejected or have no
    caption, "rejected" is their number, and the log gives the reasons. With languages, the metrics
    of each, "de-text_to_image_R@1", and their means over languages, "mean_text_to_image_R@1".

  Raises:
    ValueError: for a language in which no sample has a caption; names those that are there.
  """
  where = f"config.evals.{context.name}"
  spoken = None
  if languages or language:
    if text_store or captions is not None or not source:
      raise ValueError(f"{where}: languages need a source, and neither text_store nor captions")
    spoken = caption_languages.read(
      source, languages or (), language, fields or context.data.caption_fields, where
    )
    captions, fields = spoken.most, spoken.fields
  data = open_data(
    context,
    source,
    batch_size=batch_size,
    captions=captions,
    fields=fields,
    image_store=image_store,
    text_store=text_store,
    captions_of=functools.partial(caption_languages.all_captions, fields=fields)
    if spoken
    else None,
  )
  embed = embedder(context, data)
  find = jax.jit(
    functools.partial(both_directions, mesh=context.mesh, map_at_r=map_at_r),
    out_shardings=sharding.replicated_sharding(context.mesh),
  )

  def run(params: Any) -> dict[str, float]:
    embedded = embed(params)
    samples = len(data.source)
    if spoken:
      metrics = caption_languages.measure(
        embedded, spoken, lambda part: measures(part, find(part)), context.mesh, context.name
      )
    else:
      metrics = measures(embedded, find(embedded))
    used = int(metrics.get("num_samples", 0))
    if not used:
      raise ValueError(
        f"config.evals.{context.name}: none of the {samples} samples of {source or image_store} can"
        " be used; the log gives the reasons"
      )
    if used < samples:
      logging.warning(
        "evaluation %r uses %d of %d samples; the others were rejected or have no caption",
        context.name,
        used,
        samples,
      )
      metrics["rejected"] = samples - used
    return {prefix(context.name) + name: value for name, value in metrics.items()}

  return run
