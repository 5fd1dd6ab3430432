"""Image-text retrieval: recall at 1, 5, 10 and ranks, both ways, several captions per image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange, repeat
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import sharding
from bigalign.evals.embed import Context, Embedded, embedder, open_data, prefix

RECALL_AT = (1, 5, 10)
CHUNK = 2**26  # similarities alive at a time, over all devices: 256 MB


def ranks(
  query: jax.Array,
  owner: jax.Array,
  gallery: jax.Array,
  gallery_owner: jax.Array,
  gallery_valid: jax.Array,
  *,
  mesh: Mesh | None = None,
) -> jax.Array:
  """The place of each query's best positive in the sorted gallery, from 1.

  Of equal similarities the earlier entry of the gallery comes first (a stable sort), so that a
  collapsed model scores chance; a similarity that is NaN comes after all numbers.

  Args:
    query: [Q, E] embeddings, taken in chunks so that Q x gallery is never whole.
    owner: [Q] int32; a gallery entry with the same owner is a positive.
    gallery: [N, B, C, E] embeddings; may be split over B.
    gallery_owner: [N, B] int32.
    gallery_valid: [N, B, C] bool; the other entries are not there.
    mesh: over whose batch axes the gallery is split.

  Returns:
    [Q] int32; 0 for a query without a positive.
  """
  entries = gallery_valid.size
  place = jnp.arange(entries, dtype=jnp.int32).reshape(gallery_valid.shape)

  def rank(one: tuple[jax.Array, jax.Array]) -> jax.Array:
    z, mine = one
    # At a TPU's default precision the products are bfloat16, which ties what is not equal.
    sims = jnp.einsum("e,nbce->nbc", z, gallery, precision=jax.lax.Precision.HIGHEST)
    if mesh is not None:
      # Else GSPMD sends all similarities around, to count those of a query on one device.
      sims = jax.lax.with_sharding_constraint(sims, NamedSharding(mesh, P(None, sharding.BATCH)))
    sims = jnp.where(jnp.isnan(sims), -jnp.inf, sims)
    positive = gallery_valid & (gallery_owner == mine)[:, :, None]
    best = jnp.max(jnp.where(positive, sims, -jnp.inf))
    first = jnp.min(jnp.where(positive & (sims == best), place, entries))
    before = gallery_valid & ((sims > best) | ((sims == best) & (place < first)))
    return jnp.where(positive.any(), 1 + before.sum(dtype=jnp.int32), 0)

  chunk = min(len(query), max(1, CHUNK // entries))
  return jax.lax.map(rank, (query, owner), batch_size=chunk)


def both_ways(embedded: Embedded, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
  """Ranks [N, B] of each image's best caption and [N, B, C] of each caption's image; 0: none."""
  zimg, ztxt, _, ordinal, valid, texts_valid, _ = embedded
  captions = ztxt.shape[2]
  texts_valid = texts_valid & valid[:, :, None]
  images_valid = texts_valid.any(2, keepdims=True)
  images = rearrange(zimg, "n b e -> n b 1 e")

  def one_batch(batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    # The queries go to every device, each of which holds its part of the gallery.
    zi, zt, owner = jax.lax.with_sharding_constraint(batch, sharding.replicated_sharding(mesh))
    image_to_text = ranks(zi, owner, ztxt, ordinal, texts_valid, mesh=mesh)
    text_to_image = ranks(
      rearrange(zt, "b c e -> (b c) e"),
      repeat(owner, "b -> (b c)", c=captions),
      images,
      ordinal,
      images_valid,
      mesh=mesh,
    )
    return image_to_text, rearrange(text_to_image, "(b c) -> b c", c=captions)

  found_texts, found_images = jax.lax.map(one_batch, (zimg, ztxt, ordinal))
  return jnp.where(valid, found_texts, 0), jnp.where(texts_valid, found_images, 0)


def recalls(direction: str, found: np.ndarray) -> dict[str, float]:
  """[Q] ranks from 1 -> the five figures of one direction, as open_clip names and rounds them."""
  return {
    **{f"{direction}_R@{k}": float((found <= k).mean()) for k in RECALL_AT},
    f"{direction}_mean_rank": float(found.mean()),
    f"{direction}_median_rank": float(np.floor(np.median(found))),
  }


def retrieval(
  context: Context,
  *,
  source: str,
  captions: int | None = None,
  fields: Sequence[str] | None = None,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Retrieval among all the pairs of a source.

  An image's query is a hit if any of its captions is among the first k; each caption is a query.

  Args:
    source: what open_source reads.
    captions: the most captions that an image has; None looks through the source for it.
    fields: where the captions come from, as in config.data.captions, which holds if None.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {metric: value}. When samples were left out, because they were rejected or
    have no caption, "rejected" is among them and the log gives the reasons.
  """
  data = open_data(context, source, batch_size=batch_size, captions=captions, fields=fields)
  embed = embedder(context, data)
  find = jax.jit(
    functools.partial(both_ways, mesh=context.mesh),
    out_shardings=sharding.replicated_sharding(context.mesh),
  )

  def run(params: Any) -> dict[str, float]:
    embedded = embed(params)
    texts, images = (np.asarray(found) for found in find(embedded))
    samples = len(data.source)
    found = int((texts > 0).sum())
    if not found:
      raise ValueError(
        f"config.evals.{context.name}.source={source!r}: none of the {samples} samples can be used;"
        " the log gives the reasons"
      )
    metrics = {
      **recalls("image_to_text", texts[texts > 0]),
      **recalls("text_to_image", images[images > 0]),
      "num_samples": found,
      "num_captions": int((images > 0).sum()),
    }
    if found < samples:
      logging.warning(
        "evaluation %r uses %d of %d samples; the others were rejected or have no caption",
        context.name,
        found,
        samples,
      )
      metrics["rejected"] = samples - found
    return {prefix(context.name) + name: value for name, value in metrics.items()}

  return run
