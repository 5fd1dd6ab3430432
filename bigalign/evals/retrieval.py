"""Image-text retrieval in both directions: recall at 1, 5, 10 and ranks."""

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
CHUNK = 2**26  # similarities at a time in one memory: 256 MB


def ranks(
  query: jax.Array,
  owner: jax.Array,
  gallery: jax.Array,
  gallery_owner: jax.Array,
  gallery_valid: jax.Array,
  *,
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
    mesh: the mesh over whose batch axes the gallery is split, if it is.

  Returns:
    [Q] int32; 0 for a query without a positive.
  """
  entries = gallery_valid.size
  position = jnp.arange(entries, dtype=jnp.int32).reshape(gallery_valid.shape)

  def rank(one: tuple[jax.Array, jax.Array]) -> jax.Array:
    z, mine = one
    # At the default precision of TPUs products are bfloat16, which makes different values equal.
    sims = jnp.einsum("e,nbce->nbc", z, gallery, precision=jax.lax.Precision.HIGHEST)
    if mesh is not None:
      # Otherwise GSPMD communicates all similarities, to count those of a query on one device.
      sims = jax.lax.with_sharding_constraint(sims, NamedSharding(mesh, P(None, sharding.BATCH)))
    sims = jnp.where(jnp.isnan(sims), -jnp.inf, sims)
    positive = gallery_valid & (gallery_owner == mine)[:, :, None]
    best = jnp.max(jnp.where(positive, sims, -jnp.inf))
    first = jnp.min(jnp.where(positive & (sims == best), position, entries))
    before = gallery_valid & ((sims > best) | ((sims == best) & (position < first)))
    return jnp.where(positive.any(), 1 + before.sum(dtype=jnp.int32), 0)

  chunk = at_once(len(query), entries, mesh)
  by_query: jax.Array = jax.lax.map(rank, (query, owner), batch_size=chunk)
  return by_query


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


def both_directions(embedded: Embedded, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
  """Returns ranks of each image's best caption [N, B] and of each caption's image [N, B, C].

  The rank is 0 for entries that are not valid.
  """
  zimg, ztxt, _, ordinal, valid, texts_valid, _ = embedded
  captions = ztxt.shape[2]
  texts_valid = texts_valid & valid[:, :, None]
  images_valid = texts_valid.any(2, keepdims=True)
  images = rearrange(zimg, "n b e -> n b 1 e")

  def one_batch(batch: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    # Every device gets all queries and holds its part of the gallery.
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

  text_ranks, image_ranks = jax.lax.map(one_batch, (zimg, ztxt, ordinal))
  return jnp.where(valid, text_ranks, 0), jnp.where(texts_valid, image_ranks, 0)


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


def retrieval(
  context: Context,
  *,
  source: str = "",
  captions: int | None = None,
  fields: Sequence[str] | None = None,
  image_store: str = "",
  text_store: str = "",
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Retrieval among all pairs of a source.

  The query of an image is a hit if any of its captions is among the first k. Each caption is a
  query.

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
    image_store: folder of the vectors of images, for a model whose image tower is `features`, or to
      save the time of the tower.
    text_store: folder of the vectors of captions, likewise. The source gives the other side.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {metric: value}. If samples were left out, because they were rejected or have no
    caption, "rejected" is their number, and the log gives the reasons.
  """
  data = open_data(
    context,
    source,
    batch_size=batch_size,
    captions=captions,
    fields=fields,
    image_store=image_store,
    text_store=text_store,
  )
  embed = embedder(context, data)
  find = jax.jit(
    functools.partial(both_directions, mesh=context.mesh),
    out_shardings=sharding.replicated_sharding(context.mesh),
  )

  def run(params: Any) -> dict[str, float]:
    embedded = embed(params)
    texts, images = (np.asarray(ranks) for ranks in find(embedded))
    samples = len(data.source)
    used = int((texts > 0).sum())
    if not used:
      raise ValueError(
        f"config.evals.{context.name}: none of the {samples} samples of {source or image_store} can"
        " be used; the log gives the reasons"
      )
    metrics = {
      **recalls("image_to_text", texts[texts > 0]),
      **recalls("text_to_image", images[images > 0]),
      "num_samples": used,
      "num_captions": int((images > 0).sum()),
    }
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
