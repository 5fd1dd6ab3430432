"""Embeds a dataset by both towers over the whole mesh; the embeddings stay on their devices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange, reduce
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import sharding
from bigalign.data.loader import evaluation
from bigalign.data.loader.options import DataOptions
from bigalign.data.samples.rejects import REASONS, Rejected
from bigalign.data.sources.base import open_source, read
from bigalign.run.progress import track
from bigalign.towers.padding import UsedLengths, all_positions, cut


class Context(NamedTuple):
  """The model and the data options that every evaluator gets in addition to its own options.

  Attributes:
    name: of the evaluator in config.evals.
    embed_image: (params, image [B, S, S, 3] uint8) -> [B, E], unit norm, float32; jitted.
    embed_text: (params, ids [B, L] int32, mask [B, L] bool) -> [B, E], unit norm, float32; jitted.
    mesh: to evaluate on.
    data: config.data; images and texts are preprocessed in the same way.
    text_lengths: how many positions of each text embed_text reads; the others are cut off. By
      default it reads all.
  """

  name: str
  embed_image: Callable[[Any, jax.Array], jax.Array]
  embed_text: Callable[[Any, jax.Array, jax.Array], jax.Array]
  mesh: Mesh
  data: DataOptions
  text_lengths: UsedLengths = all_positions


class EvalData(NamedTuple):
  """An opened source and its batches.

  Attributes:
    source: the samples.
    batch_size: global.
    batches: starts an iteration from the first sample. With classes=K, batches also have
      label_set and has_label_set, see evaluation.eval_batches.
  """

  source: Any
  batch_size: int
  batches: Callable[..., Iterable[Mapping[str, np.ndarray]]]


class Embedded(NamedTuple):
  """N batches of B samples with C captions each, in source order, as global arrays split over B.

  Attributes:
    zimg: [N, B, E], unit norm, float32.
    ztxt: [N, B, C, E], unit norm, float32.
    label: [N, B] int32, the class.
    ordinal: [N, B] int32, the position in the source.
    valid: [N, B] bool, False for padding and rejected samples.
    texts_valid: [N, B, C] bool, False also for captions that a sample does not have.
    rejects: [R], number of rejected samples per reason, on every device.
  """

  zimg: jax.Array
  ztxt: jax.Array
  label: jax.Array
  ordinal: jax.Array
  valid: jax.Array
  texts_valid: jax.Array
  rejects: jax.Array


def prefix(name: str) -> str:
  """Returns the prefix of the metrics: "val/" for "val", else "val/<name>/", as in open_clip."""
  return "val/" if name == "val" else f"val/{name}/"


def round_batch(mesh: Mesh, batch_size: int) -> int:
  """Returns the batch size rounded up to fit the mesh; no metric depends on it."""
  parts: int = mesh.shape["data"] * mesh.shape["fsdp"]
  return math.ceil(batch_size / parts) * parts


def open_data(
  context: Context,
  source: str,
  *,
  batch_size: int,
  captions: int | None,
  fields: Sequence[str] | None = None,
) -> EvalData:
  """Opens a source as evaluation batches, preprocessed as in config.data without augmentation.

  Args:
    context: of the evaluator.
    source: as in config.data.source.
    batch_size: global; rounded up to fit the mesh.
    captions: C, captions per image in a batch; 0 reads none, None counts them first.
    fields: caption fields; None: config.data.captions.

  Raises:
    ValueError: if the source has no samples.
  """
  if captions == 0:
    fields = ()
  elif fields is None:
    fields = context.data.caption_fields
  opened = open_source(source, captions=fields)
  if not len(opened):
    raise ValueError(f"config.evals.{context.name}.source={source!r} has no samples")
  if captions is None:
    captions = most_captions(opened)
  size = round_batch(context.mesh, batch_size)
  rows = sharding.host_rows(context.mesh, size)

  def batches(classes: int = 0) -> Iterable[Mapping[str, np.ndarray]]:
    return evaluation.eval_batches(
      opened, context.data, batch_size=size, rows=rows, captions=captions, classes=classes
    )

  return EvalData(opened, size, batches)


def most_captions(source: Any) -> int:
  """Returns the largest number of captions of a sample; reads all samples, decodes no image."""
  most = 1
  for i in range(len(source)):
    try:
      most = max(most, len(read(source, i)["captions"]))
    except Rejected:  # logged and counted when the batches are made
      continue
  return most


def over_mesh(context: Context, data: EvalData, **more: Any) -> Iterator[dict[str, jax.Array]]:
  """Yields each batch as global arrays, split over the batch axes.

  Every process must iterate to the end.

  Args:
    context: of the evaluator.
    data: the source and its batches.
    **more: arguments of data.batches.
  """
  rows = sharding.host_rows(context.mesh, data.batch_size)
  total = -(-len(data.source) // data.batch_size)
  for batch in track(data.batches(**more), context.name, total, unit="batches"):
    cut_batch = _without_padding(context, batch)
    yield sharding.global_batch(context.mesh, cut_batch, rows, data.batch_size)


def _without_padding(context: Context, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """The batch without the positions of its texts that the tower does not read.

  Several processes keep them: the arrays must have one shape on all, and each knows its rows only.
  """
  if jax.process_count() > 1:
    return batch
  ids, mask, there = (batch[name] for name in ("texts", "texts_mask", "texts_valid"))
  length = cut(context.text_lengths(ids[there], mask[there]), ids.shape[-1])
  return {**batch, "texts": ids[..., :length], "texts_mask": mask[..., :length]}


def embedder(context: Context, data: EvalData) -> Callable[[Any], Embedded]:
  """Returns embed(params) -> Embedded for all images and captions; compiled once for all calls."""

  @jax.jit
  def embed_texts(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, C, L] -> [B, C, E]."""
    flat = context.embed_text(
      params, rearrange(ids, "b c l -> (b c) l"), rearrange(mask, "b c l -> (b c) l")
    )
    return rearrange(flat, "(b c) e -> b c e", c=ids.shape[1])

  def stack(batches: list[Embedded]) -> Embedded:
    # Stacking on a new first axis needs no communication, unlike a concatenation.
    z: Embedded = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    return z._replace(rejects=reduce(z.rejects, "n b r -> r", "sum"))

  split = NamedSharding(context.mesh, P(None, sharding.BATCH))
  layout: Any = (*[split] * 6, sharding.replicated_sharding(context.mesh))
  stack_jit = jax.jit(stack, out_shardings=Embedded(*layout))

  def embed(params: Any) -> Embedded:
    embedded: Embedded = sharding.block_on_cpu(
      stack_jit(
        [
          Embedded(
            zimg=context.embed_image(params, batch["image"]),
            ztxt=sharding.block_on_cpu(embed_texts(params, batch["texts"], batch["texts_mask"])),
            label=batch["label"],
            ordinal=batch["index"],
            valid=batch["valid"],
            texts_valid=batch["texts_valid"],
            rejects=batch["rejects"],
          )
          for batch in over_mesh(context, data)
        ]
      )
    )
    log_rejects(context.name, embedded.rejects)
    return embedded

  return embed


def mean_embedder(
  context: Context,
  embed: Callable[[Any, Mapping[str, jax.Array]], jax.Array],
  arrays: Mapping[str, np.ndarray],
  *,
  group: int,
  batch_size: int,
  lengths: np.ndarray | None = None,
) -> Callable[[Any], jax.Array]:
  """Returns run(params) -> [N / group, E] on every device: unit means over groups of rows.

  Args:
    context: of the evaluator.
    embed: (params, batch) -> [B, E], unit norm; a batch holds rows of `arrays`, over the mesh.
    arrays: {name: [N, …]}, equal on every host.
    group: number of consecutive rows to average.
    batch_size: rows at a time, over all devices; rounded up to fit the mesh.
    lengths: [N], positions on axis 1 of `arrays` that decide the embedding of each row. Rows of
      similar lengths then share a batch, and the other positions are cut off.
  """
  count = len(next(iter(arrays.values())))
  batch_size = round_batch(context.mesh, min(batch_size, count))
  rows = sharding.host_rows(context.mesh, batch_size)
  order = np.arange(count) if lengths is None else np.argsort(lengths, kind="stable")
  places = rearrange(np.argsort(order), "(n g) -> n g", g=group)

  def mean(batches: list[jax.Array], places: jax.Array) -> jax.Array:
    z = jnp.concatenate(batches)[places].mean(1)
    return z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)

  mean_jit = jax.jit(mean, out_shardings=sharding.replicated_sharding(context.mesh))

  def run(params: Any) -> jax.Array:
    embedded = []
    starts = range(0, count, batch_size)
    for start in track(starts, context.name, len(starts), unit="batches of texts"):
      # The last batch is padded with the first rows, which have no place.
      chosen = order[(start + rows) % count]
      batch = {name: x[chosen] for name, x in arrays.items()}
      if lengths is not None:  # those of the whole batch, so that all hosts cut to one length
        longest = lengths[order[start : start + batch_size]]
        batch = {name: x[:, : cut(longest, x.shape[1])] for name, x in batch.items()}
      on_mesh = sharding.global_batch(context.mesh, batch, rows, batch_size)
      embedded.append(embed(params, on_mesh))
    means: jax.Array = sharding.block_on_cpu(mean_jit(embedded, places))
    return means

  return run


def log_rejects(name: str, rejects: jax.Array | np.ndarray) -> int:
  """Logs the numbers of rejected samples per reason, [R], and returns their sum."""
  counts = np.asarray(rejects)
  if counts.any():
    listed = ", ".join(f"{n} {reason}" for reason, n in zip(REASONS, counts) if n)
    logging.warning("evaluation %r leaves out rejected samples: %s", name, listed)
  return int(counts.sum())


def to_host(x: jax.Array) -> np.ndarray:
  """Returns a complete global array on every host; every process must call it."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
