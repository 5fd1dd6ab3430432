"""Embeds a dataset by both towers over the whole mesh; the embeddings stay on their devices."""

from __future__ import annotations

import collections
import dataclasses
import functools
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

from bigalign import sharding, tree
from bigalign.data.image import naflex
from bigalign.data.loader import evaluation
from bigalign.data.loader.options import DataOptions
from bigalign.data.samples.rejects import REASONS, Rejected
from bigalign.data.sources.base import WithCaptions, open_source, read
from bigalign.data.stores.one_side import OneSide
from bigalign.data.stores.reader import Store
from bigalign.losses.logit_head import LogitHead
from bigalign.run.progress import track
from bigalign.towers.base import TowerOutput
from bigalign.towers.padding import UsedLengths, all_positions, cut

CAPTIONS_AT_ONCE = 8  # of an image in one pass of the text tower


class SharedImages:
  """Embeddings of the images of sources that several evaluators read, for one call of each.

  The first evaluator of a source reads and embeds its images; the others take the embeddings, and
  the last one releases them. They are not shared if a sample is rejected: whether its image or its
  caption is the reason can differ between evaluators.
  """

  def __init__(self) -> None:
    self._readers: collections.Counter[Any] = collections.Counter()
    self._params: Any = None
    self._to_come: dict[Any, int] = {}
    self._embedded: dict[Any, list[jax.Array]] = {}

  def add_reader(self, key: Any) -> None:
    """Notes that another evaluator reads the images `key`."""
    self._readers[key] += 1

  def take(self, params: Any, key: Any) -> list[jax.Array] | None:
    """The embeddings of each batch of images if they are known for these parameters."""
    if self._params is not params:
      self._params, self._to_come, self._embedded = params, dict(self._readers), {}
    self._to_come[key] -= 1
    batches = self._embedded.get(key)
    if self._to_come[key] <= 0:
      self._embedded.pop(key, None)
    if not any(count > 0 for count in self._to_come.values()):
      self._params = None  # whose arrays would stay on the devices
    return batches

  def is_wanted(self, key: Any) -> bool:
    """Whether an evaluator is to come that reads the images `key`."""
    return self._params is not None and self._to_come[key] > 0

  def keep(self, key: Any, batches: list[jax.Array]) -> None:
    """Keeps the embeddings of each batch of the images `key`."""
    self._embedded[key] = batches


class Context(NamedTuple):
  """The model and the data options that every evaluator gets in addition to its own options.

  Attributes:
    name: of the evaluator in config.evals.
    embed_image: (params, image [B, S, S, 3] uint8, or Patches) -> [B, E], unit norm, float32;
      jitted.
    embed_text: (params, ids [B, L] int32, mask [B, L] bool) -> [B, E], unit norm, float32; jitted.
    mesh: to evaluate on.
    data: config.data; images and texts are preprocessed in the same way.
    text_lengths: how many positions of each text embed_text reads; the others are cut off. By
      default it reads all.
    shared: embeddings of images that evaluators share; None: each embeds its own.
    embed_patches: (params, image) -> [B, N, K], the patches in the space of the embeddings, or of
      their last K components; unit norm, float32, jitted.
    image_output: (params, image) -> the output of the image tower; jitted.
    logit_head: (params) -> the scale and the bias that the model was trained with; None: unknown.
  """

  name: str
  embed_image: Callable[[Any, jax.Array], jax.Array]
  embed_text: Callable[[Any, jax.Array, jax.Array], jax.Array]
  mesh: Mesh
  data: DataOptions
  text_lengths: UsedLengths = all_positions
  shared: SharedImages | None = None
  embed_patches: Callable[[Any, jax.Array], jax.Array] | None = None
  image_output: Callable[[Any, jax.Array], TowerOutput] | None = None
  logit_head: Callable[[Any], LogitHead] | None = None


def of_patches(context: Context) -> tuple[Context, Callable[[Any, jax.Array], jax.Array]]:
  """The context of an evaluator of patches, and `embed_patches`.

  Images are squashed to the square, so that none of their places is lost.

  Raises:
    ValueError: if the model gives no patches, or does not read squares.
  """
  where, data = f"config.evals.{context.name}", context.data
  if context.embed_patches is None or data.naflex or data.frames:
    raise ValueError(
      f"{where}: this evaluator reads the patches of squares, not those of config.data.naflex or"
      " config.data.frames"
    )
  squashed = dataclasses.replace(data, resize="squash", resize_edge=None)
  return context._replace(data=squashed, shared=None), context.embed_patches


class EvalData(NamedTuple):
  """An opened source and its batches.

  Attributes:
    source: the samples; the store of images, if they come from stores alone.
    batch_size: global.
    batches: starts an iteration from the first sample. With classes=K, batches also have
      label_set and has_label_set, with images=False no pixels, see evaluation.eval_batches.
    pattern: of the source, as in config.data.source, and the store of its images.
  """

  source: Any
  batch_size: int
  batches: Callable[..., Iterable[Mapping[str, np.ndarray]]]
  pattern: tuple[str, str] = ("", "")


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
  image_store: str = "",
  text_store: str = "",
  captions_of: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None,
) -> EvalData:
  """Opens a source as evaluation batches, preprocessed as in config.data without augmentation.

  Args:
    context: of the evaluator.
    source: as in config.data.source; "" if stores give both sides.
    batch_size: global; rounded up to fit the mesh.
    captions: C, captions per image in a batch; 0 reads none, None counts them first.
    fields: caption fields; None: config.data.captions.
    image_store: folder of the vectors of the images, in place of their pixels; "" for none.
    text_store: folder of the vectors of the captions, in place of their words; "" for none.
    captions_of: from a record to its captions; None: those that it has.

  Raises:
    ValueError: if the source has no samples, or too little is given.
  """
  where = f"config.evals.{context.name}"
  opened_stores = _open_stores(context, dict(image=image_store, text=text_store), where)
  size = round_batch(context.mesh, batch_size)
  rows = sharding.host_rows(context.mesh, size)
  pattern = (source, image_store)
  if context.shared:
    context.shared.add_reader((pattern, size))
  if not source:
    return EvalData(*_from_stores(opened_stores, where, captions, size, rows), pattern)
  if len(opened_stores) == 2:
    raise ValueError(
      f"{where}: image_store and text_store give both sides, so source={source!r} has no effect;"
      " leave it out"
    )
  if captions == 0 or text_store:
    fields = ()
  elif fields is None:
    fields = context.data.caption_fields
  opened = open_source(source, captions=fields, frames=context.data.frames is not None)
  if not len(opened):
    raise ValueError(f"config.evals.{context.name}.source={source!r} has no samples")
  opened = WithCaptions(opened, captions_of) if captions_of else opened
  stored = OneSide(image_store, text_store) if opened_stores else None
  if captions is None:
    texts = stored.text if stored else None
    captions = evaluation.most_rows(texts) if texts else most_captions(opened)
  return read_data(
    context, opened, batch_size=batch_size, captions=captions, stored=stored, pattern=pattern
  )


def read_data(
  context: Context,
  source: Any,
  *,
  batch_size: int,
  captions: int,
  stored: OneSide | None = None,
  pattern: tuple[str, str] = ("", ""),
) -> EvalData:
  """An opened source as evaluation batches, preprocessed as in config.data without augmentation.

  Args:
    context: of the evaluator.
    source: the samples.
    batch_size: global; rounded up to fit the mesh.
    captions: C, captions per image in a batch; 0 reads none.
    stored: vectors in place of images or captions.
    pattern: see EvalData.
  """
  size = round_batch(context.mesh, batch_size)
  rows = sharding.host_rows(context.mesh, size)

  def batches(**more: Any) -> Iterable[Mapping[str, np.ndarray]]:
    return evaluation.eval_batches(
      source, context.data, batch_size=size, rows=rows, captions=captions, stored=stored, **more
    )

  return EvalData(source, size, batches, pattern)


def _from_stores(
  opened: Mapping[str, Store], where: str, captions: int | None, size: int, rows: np.ndarray
) -> tuple[Store, int, Callable[..., Iterable[Mapping[str, np.ndarray]]]]:
  """The store of images as a source, and its batches with the vectors of captions."""
  missing = {"image", *(() if captions == 0 else ("text",))} - opened.keys()
  if missing:
    named = " and ".join(f"{side}_store" for side in sorted(missing))
    raise ValueError(f"{where}: give a source, or else {named}")
  if captions is None:
    captions = evaluation.most_rows(opened["text"])
  images, texts = opened["image"], opened.get("text")

  def batches(**more: Any) -> Iterable[Mapping[str, np.ndarray]]:
    return evaluation.stored_batches(
      images, texts, batch_size=size, rows=rows, captions=captions, **more
    )

  return images, size, batches


def _open_stores(context: Context, folders: Mapping[str, str], where: str) -> dict[str, Store]:
  """{side: store}; warns of vectors that were made another way than those of config.data.stores."""
  stores = {side: Store(folder) for side, folder in folders.items() if folder}
  for side, store in stores.items():
    own = getattr(context.data.stores, side)
    try:
      header = Store(own).header if own else store.header
    except OSError:  # evaluation needs the vectors of training no more
      continue
    names = sorted({*header, *store.header} - {"dtype"})
    differing = [name for name in names if header.get(name) != store.header.get(name)]
    if differing:
      logging.warning(
        "%s.%s_store=%s holds vectors that were made another way than those of"
        " config.data.stores.%s=%s: %s differ",
        *(where, side, store.folder, side, own, tree.shown(differing)),
      )
  return stores


def embed_vectors(
  embed: Callable[..., jax.Array], params: Any, *vectors: jax.Array, where: str
) -> jax.Array:
  """embed(params, *vectors) of stored vectors; ValueError if the model takes others.

  Args:
    embed: of the context.
    params: of the model.
    *vectors: and what else it takes.
    where: the evaluator, for the error.
  """
  try:
    return embed(params, *vectors)
  except Exception as error:
    if not type(error).__module__.startswith("flax"):
      raise
    raise ValueError(
      f"{where}: its stores hold vectors of the shape {vectors[0].shape[1:]}, which the projector"
      f" of this model does not take: {str(error).splitlines()[0]}"
    ) from error


def most_captions(source: Any) -> int:
  """Returns the largest number of captions of a sample; reads all samples, decodes no image."""
  most = 1
  for i in range(len(source)):
    try:
      most = max(most, len(read(source, i)["captions"]))
    except Rejected:  # logged and counted when the batches are made
      continue
  return most


def embedded_images(
  context: Context, data: EvalData, params: Any, **more: Any
) -> Iterator[tuple[jax.Array, dict[str, jax.Array]]]:
  """Yields the embeddings of images, [B, E], and the other arrays of each batch, over the mesh.

  Every process must iterate to the end.

  Args:
    context: of the evaluator.
    data: the source and its batches.
    params: of the model.
    **more: arguments of data.batches.
  """
  rows = sharding.host_rows(context.mesh, data.batch_size)
  total = -(-len(data.source) // data.batch_size)
  key, shared = (data.pattern, data.batch_size), context.shared
  known = shared.take(params, key) if shared else None
  kept, rejected = [], 0
  batches = data.batches(**more) if known is None else data.batches(images=False, **more)
  for k, batch in enumerate(track(batches, context.name, total, unit="batches")):
    cut_batch = _without_padding(context, batch)
    on_mesh = sharding.global_batch(context.mesh, cut_batch, rows, data.batch_size)
    image = naflex.of_fields(on_mesh)  # without pixels if its embedding is known
    on_mesh = {name: x for name, x in on_mesh.items() if name not in naflex.FIELDS}
    zimg = (
      embed_vectors(context.embed_image, params, image, where=f"config.evals.{context.name}")
      if known is None
      else known[k]
    )
    if known is None and shared and shared.is_wanted(key):
      kept.append(zimg)
      rejected += int(batch["rejects"].sum())
    yield zimg, on_mesh
  if shared and kept and not np.any(multihost_utils.process_allgather(np.int32(rejected))):
    shared.keep(key, kept)


def _without_padding(context: Context, batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """The batch without the positions of its texts that the tower does not read.

  Several processes keep them: the arrays must have one shape on all, and each knows its rows only.
  """
  if jax.process_count() > 1 or batch["texts"].dtype != np.int32:  # stored vectors have none
    return batch
  ids, mask, there = (batch[name] for name in ("texts", "texts_mask", "texts_valid"))
  length = cut(context.text_lengths(ids[there], mask[there]), ids.shape[-1])
  return {**batch, "texts": ids[..., :length], "texts_mask": mask[..., :length]}


def text_embedder(context: Context) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
  """Returns embed(params, texts, mask) of the captions of a batch, jitted."""

  @jax.jit
  def embed_texts(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, C, L], or vectors [B, C, D] or [B, C, 1 + T, D] -> [B, C, E]."""

    def some(texts: tuple[jax.Array, jax.Array]) -> jax.Array:
      flat = embed_vectors(
        context.embed_text,
        params,
        rearrange(texts[0], "b c ... -> (b c) ..."),
        rearrange(texts[1], "b c l -> (b c) l"),
        where=f"config.evals.{context.name}",
      )
      return rearrange(flat, "(b c) e -> b c e", c=texts[0].shape[1])

    captions = ids.shape[1]
    if captions <= CAPTIONS_AT_ONCE:
      return some((ids, mask))
    # Captions in 36 languages at a time would take 36 times the memory of the text tower.
    rest = -captions % CAPTIONS_AT_ONCE
    parts = [
      rearrange(
        jnp.pad(x, ((0, 0), (0, rest), *[(0, 0)] * (x.ndim - 2))),
        "b (n c) ... -> n b c ...",
        c=CAPTIONS_AT_ONCE,
      )
      for x in (ids, mask)
    ]
    every: jax.Array = jax.lax.map(some, (parts[0], parts[1]))
    return rearrange(every, "n b c e -> b (n c) e")[:, :captions]

  return embed_texts


def embedder(context: Context, data: EvalData) -> Callable[[Any], Embedded]:
  """Returns embed(params) -> Embedded for all images and captions; compiled once for all calls."""
  embed_texts = text_embedder(context)

  total = -(-len(data.source) // data.batch_size)
  split = NamedSharding(context.mesh, P(None, sharding.BATCH))
  layout: Any = (*[split] * 6, sharding.replicated_sharding(context.mesh))

  # Batches are written into their places, one by one. A function that stacks all of them would have
  # thousands of arguments, of which each takes milliseconds to trace and compile.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=Embedded(*layout))
  def put(placed: Embedded | None, k: jax.Array, batch: Embedded) -> Embedded:
    """Batch k of all of them; None: of none."""
    rejects = reduce(batch.rejects, "b r -> r", "sum")
    if placed is None:
      empty = jax.tree.map(lambda x: jnp.zeros((total, *x.shape), x.dtype), batch)
      placed = empty._replace(rejects=jnp.zeros_like(rejects))
    arrays = jax.tree.map(
      lambda every, x: jax.lax.dynamic_update_index_in_dim(every, x, k, 0), placed[:6], batch[:6]
    )
    return Embedded(*[*arrays, placed.rejects + rejects])

  def embed(params: Any) -> Embedded:
    embedded: Embedded | None = None
    pairs = zip(range(total), embedded_images(context, data, params), strict=True)
    for k, (zimg, batch) in pairs:
      one = Embedded(
        zimg=zimg,
        ztxt=sharding.block_on_cpu(embed_texts(params, batch["texts"], batch["texts_mask"])),
        label=batch["label"],
        ordinal=batch["index"],
        valid=batch["valid"],
        texts_valid=batch["texts_valid"],
        rejects=batch["rejects"],
      )
      embedded = sharding.block_on_cpu(put(embedded, np.int32(k), one))
    assert embedded is not None, "a source has samples"
    log_rejects(context.name, embedded.rejects)
    return embedded

  return embed


def unit_mean(z: jax.Array) -> jax.Array:
  """[K, G, E] -> [K, E], the means over G, unit norm."""
  z = z.mean(1)
  return z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def mean_embedder(
  context: Context,
  embed: Callable[[Any, Mapping[str, jax.Array]], jax.Array],
  arrays: Mapping[str, np.ndarray],
  *,
  group: int | np.ndarray,
  batch_size: int,
  lengths: np.ndarray | None = None,
  combine: Callable[[jax.Array], Any] = unit_mean,
) -> Callable[[Any], Any]:
  """Returns run(params) -> what `combine` makes of groups of embedded rows, on every device.

  Args:
    context: of the evaluator.
    embed: (params, batch) -> [B, E], unit norm; a batch holds rows of `arrays`, over the mesh.
    arrays: {name: [N, …]}, equal on every host.
    group: number of consecutive rows to average; or [K, G], the rows of each of K groups.
    batch_size: rows at a time, over all devices; rounded up to fit the mesh.
    lengths: [N], positions on axis 1 of `arrays` that decide the embedding of each row. Rows of
      similar lengths then share a batch, and the other positions are cut off.
    combine: [K, G, E], the embeddings of the groups -> what is returned for them; by default
      their unit means, [K, E].
  """
  count = len(next(iter(arrays.values())))
  batch_size = round_batch(context.mesh, min(batch_size, count))
  rows = sharding.host_rows(context.mesh, batch_size)
  order = np.arange(count) if lengths is None else np.argsort(lengths, kind="stable")
  if isinstance(group, int):
    group = rearrange(np.arange(count), "(k g) -> k g", g=group)
  places = np.argsort(order)[group]

  def mean(batches: list[jax.Array], places: jax.Array) -> Any:
    return combine(jnp.concatenate(batches)[places])

  mean_jit = jax.jit(mean, out_shardings=sharding.replicated_sharding(context.mesh))

  def run(params: Any) -> Any:
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
    return sharding.block_on_cpu(mean_jit(embedded, places))

  return run


def texts_embedder(
  context: Context,
  texts: Sequence[str],
  *,
  group: int | np.ndarray = 1,
  batch_size: int,
  combine: Callable[[jax.Array], Any] = lambda z: z[:, 0],
) -> Callable[[Any], Any]:
  """Returns run(params) -> what `combine` makes of groups of embedded texts, on every device.

  Args:
    context: of the evaluator.
    texts: N, equal on every host.
    group, batch_size: as of mean_embedder.
    combine: as of mean_embedder; by default the embedding of each text, [N, E].
  """
  ids, mask = context.data.make_tokenizer().encode_batch(list(texts))

  def embed(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return context.embed_text(params, batch["ids"], batch["mask"])

  return mean_embedder(
    context,
    embed,
    dict(ids=ids, mask=mask),
    group=group,
    batch_size=batch_size,
    lengths=context.text_lengths(ids, mask),
    combine=combine,
  )


def logits(z: jax.Array, weights: jax.Array) -> jax.Array:
  """[B, E], [K, E] -> [B, K], the products of images and classes, in full precision on TPUs too."""
  return jnp.einsum("be,ke->bk", z, weights, precision=jax.lax.Precision.HIGHEST)


def places(scores: jax.Array, label: jax.Array) -> jax.Array:
  """Returns how many classes come before the own class of each image: 0 for a hit.

  Of equal scores the earlier class comes first, as in argmax. NaN comes last, and an own class
  whose score is NaN or infinite is never a hit.

  >>> scores = jnp.array([[1.0, 3.0, 3.0], [0.0, jnp.nan, 1.0]])
  >>> places(scores, jnp.array([2, 1])).tolist()
  [1, 3]

  Args:
    scores: [..., K].
    label: [...] int32, in [0, K).

  Returns:
    [...] int32; K at a score that is not finite.
  """
  own = jnp.take_along_axis(scores, label[..., None], axis=-1)
  earlier = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1) < label[..., None]
  before = ((scores > own) | ((scores == own) & earlier)).sum(-1, dtype=jnp.int32)
  return jnp.where(jnp.isfinite(own[..., 0]), before, scores.shape[-1])


def first_class(scores: jax.Array) -> jax.Array:
  """Returns [B] int32, the class of the largest score, the first of equal ones; -1 if all are NaN.

  Args:
    scores: [B, K].
  """
  real = ~jnp.isnan(scores)
  found = jnp.argmax(jnp.where(real, scores, -jnp.inf), 1).astype(jnp.int32)
  return jnp.where(real.any(1), found, -1)


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
