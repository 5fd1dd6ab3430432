"""Region retrieval: phrases find the boxes that they describe, among the boxes of all images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import sharding, tree
from bigalign.data.fields.regions import regions_of
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import key
from bigalign.evals.embed import Context, log_rejects, of_patches, open_data
from bigalign.evals.retrieval import RECALL_AT, ranks
from bigalign.evals.zeroshot import class_weights
from bigalign.losses.heads import prompter
from bigalign.losses.heads.region_phrase import pooling
from bigalign.sphere import unit


def region_retrieval(
  context: Context, *, source: str, field: str = "json.regions", batch_size: int = 64
) -> Callable[[Any], dict[str, float]]:
  """Retrieval of regions by phrases, and of phrases by regions, as CLOC reports it.

  https://arxiv.org/abs/2410.02746. A region is the mean of the projected patches that its box
  covers, weighted by the area; with loss.region_phrase.pooling="prompter", it is what the trained
  Prompter gives for the box. A phrase finds a region if any region with this phrase is among the
  first k. Images are squashed to the square, so that the boxes of all of them are seen.

  Args:
    context: model, mesh and data options.
    source: as in config.data.source, whose samples have regions.
    field: of the list of regions, as in config.data.regions.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-regions-text_to_region_R@1": fraction, …}, and of region_to_text; at
    1, 5 and 10.

  Raises:
    ValueError: for a source without regions, or with one that is not as config.data.regions says;
      for a projector that does not take single patches.
  """
  where = f"config.evals.{context.name}"
  context, embed = of_patches(context)
  data = open_data(context, source, batch_size=batch_size, captions=0)
  every = [_stored(data.source, i, field, where) for i in range(len(data.source))]
  phrases = list(dict.fromkeys(phrase for regions in every for _, phrase in regions))
  if not phrases:
    raise ValueError(f"{where}.source={source!r}: no sample has a region in {field!r}")
  number = {phrase: i for i, phrase in enumerate(phrases)}
  most = max(map(len, every))
  weigh = class_weights(context, classnames=phrases, templates=["{c}"], batch_size=batch_size)
  rows = sharding.host_rows(context.mesh, data.batch_size)
  replicated = sharding.replicated_sharding(context.mesh)

  @functools.partial(jax.jit, out_shardings=replicated)
  def gathered(
    layers: Any, patches: jax.Array, boxes: jax.Array, owner: jax.Array, rejects: jax.Array
  ) -> tuple[jax.Array, ...]:
    """[B, N, K], [B, M, 4], … -> the regions [B, M, K], unit norm; owner; the sum of rejects.

    With the layers of a Prompter, patches are those of the tower, and K is E.
    """
    if layers:
      return unit(prompter.regions(layers, patches, boxes)), owner, rejects.sum(0)
    side = round(patches.shape[1] ** 0.5)
    z = jnp.einsum("bmn,bnk->bmk", pooling(boxes, (side, side)), patches)
    return unit(z), owner, rejects.sum(0)

  def run(params: Any) -> dict[str, float]:
    found, owners = [], []
    rejects: Any = 0
    output = context.image_output
    layers = tree.unflatten(tree.subtree(params, "heads/region_phrase/")) if output else {}
    for batch in data.batches():
      boxes = np.zeros((len(batch["valid"]), most, 4), np.float32)
      owner = np.full((len(boxes), most), -1, np.int32)
      for row, (i, valid) in enumerate(zip(batch["index"].tolist(), batch["valid"])):
        for m, (box, phrase) in enumerate(every[i] if valid else ()):
          boxes[row, m], owner[row, m] = box, number[phrase]
      given = dict(image=batch["image"], boxes=boxes, owner=owner, rejects=batch["rejects"])
      on_mesh = sharding.global_batch(context.mesh, given, rows, data.batch_size)
      rest = (on_mesh[name] for name in ("boxes", "owner", "rejects"))
      image = on_mesh["image"]
      patches = output(params, image).tokens if layers and output else embed(params, image)
      z, there, rejected = map(np.asarray, sharding.block_on_cpu(gathered(layers, patches, *rest)))
      found.append(z[there >= 0])
      owners.append(there[there >= 0])
      rejects = rejects + rejected
    regions, owner = np.concatenate(found), np.concatenate(owners)
    texts = np.asarray(weigh(params))
    texts = np.asarray(unit(jnp.asarray(texts[:, -regions.shape[-1] :])))
    metrics = {
      **_recalls("text_to_region", texts, np.arange(len(texts)), regions, owner),
      **_recalls("region_to_text", regions, owner, texts, np.arange(len(texts))),
      "num_regions": len(regions),
      "num_phrases": len(phrases),
    }
    count = log_rejects(context.name, rejects)
    metrics |= {"rejected": count} if count else {}
    return {f"val/{context.name}-regions-{name}": x for name, x in metrics.items()}

  return run


def _stored(source: Any, i: int, field: str, where: str) -> Sequence[tuple[np.ndarray, str]]:
  """The regions of a sample; ValueError naming it."""
  try:
    return regions_of(source, i, field)
  except Rejected as error:
    raise ValueError(f"{where}.source: sample {key(source, i)}: {error}") from error


def _recalls(
  name: str, query: np.ndarray, owner: np.ndarray, gallery: np.ndarray, of_gallery: np.ndarray
) -> dict[str, float]:
  """The share of queries with a positive among the first k; of those that have one at all."""
  found = ranks(
    jnp.asarray(query),
    jnp.asarray(owner, jnp.int32),
    jnp.asarray(gallery)[None, :, None],
    jnp.asarray(of_gallery, jnp.int32)[None],
    jnp.ones((1, len(gallery), 1), bool),
  )
  places = np.asarray(found)
  places = places[places > 0]
  return {f"{name}_R@{k}": float((places <= k).mean()) for k in RECALL_AT}
