"""Scores the samples of a source by a run: bigalign score runs/clip 'DIR/*.tar' --out good."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from bigalign import sharding, sphere
from bigalign.data.fields.column_files import Unfinished
from bigalign.data.loader import evaluation
from bigalign.data.sources.base import Source, open_spec
from bigalign.data.stores.reader import Store
from bigalign.evals.embed import (
  Context,
  EvalData,
  embedded_images,
  text_embedder,
)
from bigalign.evaluate import Run, open_run
from bigalign.run import parsers, preemption, progress, runtime, tables
from bigalign.shards import source_flags

SCALE = 1 / 0.07  # of logits, for a model without one
TEACHER_SCALE = 100.0  # of the logits of a teacher from stores, as config.selection has it
BATCHES = 8  # per piece; a kill loses at most one piece
CAPTIONS = 64  # of a sample, at most
CHUNK = 1 << 22  # numbers that are read at a time


def cosine(sims: jax.Array, scale: float) -> jax.Array:
  """[B], the cosine of each pair."""
  own: jax.Array = jnp.diagonal(sims)
  return own


def loss(sims: jax.Array, scale: float) -> jax.Array:
  """[B], the softmax loss of each pair among the batch, the mean of both directions."""
  own = scale * jnp.diagonal(sims)
  i2t, t2i = (jax.nn.logsumexp(scale * sims, axis) - own for axis in (1, 0))
  mean: jax.Array = (i2t + t2i) / 2
  return mean


def margin(sims: jax.Array, scale: float) -> jax.Array:
  """[B], the cosine of a pair minus the largest one of its image, and of its text, with another.

  The mean of both directions.
  """
  others = jnp.where(jnp.eye(len(sims), dtype=bool), -jnp.inf, sims)
  over: jax.Array = jnp.diagonal(sims) - (others.max(1) + others.max(0)) / 2
  return over


def learnability(
  sims: jax.Array, scale: float, teacher_sims: jax.Array, teacher_scale: float
) -> jax.Array:
  """[B], the loss of the model minus that of the teacher among the same pairs.

  JEST's score (https://arxiv.org/abs/2406.17711), the reducible loss of RHO
  (https://arxiv.org/abs/2206.07137): a pair that the model has still to learn, and can.
  """
  return loss(sims, scale) - loss(teacher_sims, teacher_scale)


class Score(NamedTuple):
  """A number for each pair.

  of: whose cosines `values` reads, in this order, each with its scale: "model", "teacher".
  values: (cosines [B, B] of a batch, -inf for what is not there, scale, ...) -> [B].
  """

  of: tuple[str, ...]
  values: Callable[..., jax.Array]


SCORES = dict(
  cosine=Score(("model",), cosine),
  loss=Score(("model",), loss),
  margin=Score(("model",), margin),
  teacher_margin=Score(("teacher",), margin),
  learnability=Score(("model", "teacher"), learnability),
)


class Stored(NamedTuple):
  """A teacher of which the vectors are known: stores of `bigalign embed --projected`."""

  image: Store
  text: Store


class Vectors(NamedTuple):
  """What a model makes of a batch.

  zimg, ztxt: [B, E]; ztxt is the mean of the unit vectors of the captions. known: [B] bool.
  """

  zimg: jax.Array
  ztxt: jax.Array
  known: jax.Array


# (start, count) -> the vectors of `count` batches from the sample `start` on
Read = Callable[[int, int], Iterator[Vectors]]


def score(
  run: Run,
  source: Source,
  out: str,
  *,
  what: str = "cosine",
  batch_size: int = 256,
  ema: bool = False,
  teacher: Run | Stored | None = None,
  teacher_scale: float = TEACHER_SCALE,
) -> dict[str, Any]:
  """Writes a column of a number for each sample; the same call resumes.

  A sample without a caption, or that cannot be read, has NaN. Several captions of an image count by
  the mean of their embeddings.

  Args:
    run: the model.
    source: the samples, opened with the captions that are scored.
    out: path of the column, without an ending.
    what: one of SCORES. All but "cosine" compare a pair with the others of its batch, consecutive
      samples; the last batch overlaps the one before, so that each has as many.
    batch_size: samples at a time over all devices.
    ema: whether the averaged parameters are used.
    teacher: another model, for the scores that read one. Of stores, a sample needs an image, and a
      row for each of its captions.
    teacher_scale: of the logits of stores; a run has its own.

  Returns:
    What the numbers are, and how many samples have one.

  Raises:
    ValueError: for a batch size that does not divide over the devices; without averages; for a
      teacher that is missing, or that the score does not read.
  """
  chosen = SCORES[what]
  if ("teacher" in chosen.of) != (teacher is not None):
    raise ValueError(
      f"--what={what} compares with a teacher; set --teacher=RUN, or --teacher IMAGES TEXTS, two"
      " stores"
      if teacher is None
      else f"--what={what} reads no teacher; leave --teacher out, or use"
      f" {' or '.join(name for name, x in SCORES.items() if 'teacher' in x.of)}"
    )
  params = run.ema if ema else run.params
  if not params:
    raise ValueError(f"--ema: {run.workdir} has no running averages, because config.ema is 0")
  parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
  if batch_size % parts:
    raise ValueError(f"--batch_size={batch_size} does not divide over the {parts} devices")
  made_by = dict(what=what, run=run.address, step=run.step, ema=ema, batch_size=batch_size)
  scales = dict(model=_scale(params))
  readers: dict[str, Read] = dict(model=_of_run(run, source, params, batch_size))
  if isinstance(teacher, Stored):
    _check_stores(teacher)
    readers["teacher"] = _of_stores(run, source, teacher, batch_size)
    scales["teacher"] = teacher_scale
    named = f"{teacher.image.fingerprint} {teacher.text.fingerprint}"
  elif teacher is not None:
    readers["teacher"] = _of_run(teacher, source, teacher.params, batch_size)
    scales["teacher"] = _scale(teacher.params)
    named = f"{teacher.address} {teacher.step}"
  made_by["scale"] = scales["model"]
  if teacher is not None:
    made_by |= dict(teacher=named, teacher_scale=scales["teacher"])
  column = Unfinished(out, source, made_by=made_by, write=jax.process_index() == 0)
  done = int(multihost_utils.broadcast_one_to_all(np.int64(column.count))) // batch_size
  measure = _measure(
    run, chosen.values, [readers[name] for name in chosen.of], [scales[name] for name in chosen.of]
  )
  size, full = len(source), len(source) // batch_size
  first = done * batch_size
  with jax.set_mesh(run.mesh):
    batches = measure(first, full - done)
    while piece := [*itertools.islice(batches, BATCHES)]:
      numbers = np.concatenate([np.asarray(x) for x in piece])
      column.put(first, numbers)
      first += len(numbers)
    if first < size:
      start = max(size - batch_size, 0)
      (last,) = measure(start, 1)
      column.put(first, np.asarray(last)[first - start : size - start])
  column.finish()
  multihost_utils.sync_global_devices("the column is written")
  scored = np.int64(0)
  if jax.process_index() == 0:
    values = np.load(f"{out}.npy", mmap_mode="r", allow_pickle=False)
    scored += sum(int(np.isfinite(values[i : i + CHUNK]).sum()) for i in range(0, size, CHUNK))
  scored = multihost_utils.broadcast_one_to_all(scored)
  return dict(**made_by, samples=size, scored=int(scored))


def _scale(params: Mapping[str, jax.Array]) -> float:
  """The scale of the logits that a run learned; SCALE for one without."""
  learned = [x for path, x in params.items() if re.fullmatch(r"loss/[^/]+/t", path)]
  return math.exp(float(learned[0])) if learned else SCALE


def _check_stores(teacher: Stored) -> None:
  """Raises ValueError for stores whose vectors cannot be compared."""
  for store in teacher:
    if len(store.shape) > 1:
      raise ValueError(f"--teacher: {store.folder} holds tokens; embed again with --projected")
  if teacher.image.width != teacher.text.width:
    widths = ", ".join(f"{store.folder} has width {store.width}" for store in teacher)
    raise ValueError(
      f"--teacher: {widths}; a cosine needs vectors of one space, of `bigalign embed --projected`"
    )


def _measure(
  run: Run,
  values: Callable[..., jax.Array],
  readers: Sequence[Read],
  scales: Sequence[float],
) -> Callable[[int, int], Iterator[jax.Array]]:
  """Returns measure(start, count): the numbers [B] of `count` batches, on every device."""

  @functools.partial(jax.jit, out_shardings=sharding.replicated_sharding(run.mesh))
  def numbers(every: Sequence[Vectors]) -> jax.Array:
    known = functools.reduce(jnp.logical_and, [one.known for one in every])
    given: list[Any] = []
    for one, scale in zip(every, scales):
      sims = jnp.einsum("be,ce->bc", one.zimg, one.ztxt, precision=jax.lax.Precision.HIGHEST)
      given += [jnp.where(known[:, None] & known[None, :], sims, -jnp.inf), scale]
    found = values(*given)
    return jnp.where(known & jnp.isfinite(found), found, jnp.nan)

  def measure(start: int, count: int) -> Iterator[jax.Array]:
    for every in zip(*(read(start, count) for read in readers), strict=True):
      yield sharding.block_on_cpu(numbers(every))

  return measure


def _of_run(run: Run, source: Source, params: Any, batch_size: int) -> Read:
  """Reads the samples and embeds them."""
  context = Context("score", mesh=run.mesh, data=run.config.data, **run.embed)
  embed_texts = text_embedder(context)

  @jax.jit
  def joined(zimg: jax.Array, ztxt: jax.Array, valid: jax.Array, there: jax.Array) -> Vectors:
    return Vectors(zimg, _mean(ztxt, there), valid & there.any(1))

  def read(start: int, count: int) -> Iterator[Vectors]:
    if not count:
      return

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
      return _batches(run, source, batch_size, start, count)

    data = EvalData(range(count * batch_size), batch_size, batches)
    for zimg, batch in embedded_images(context, data, params):
      ztxt = sharding.block_on_cpu(embed_texts(params, batch["texts"], batch["texts_mask"]))
      yield joined(zimg, ztxt, batch["valid"], batch["texts_valid"])

  return read


def _of_stores(run: Run, source: Source, stored: Stored, batch_size: int) -> Read:
  """Reads the keys and the captions of the samples, and finds their vectors in stores."""
  rows = sharding.host_rows(run.mesh, batch_size)

  @jax.jit
  def joined(zimg: jax.Array, ztxt: jax.Array, known: jax.Array, there: jax.Array) -> Vectors:
    image, text = (sphere.unit(x.astype(jnp.float32)) for x in (zimg, ztxt))
    return Vectors(image, _mean(text, there), known)

  def read(start: int, count: int) -> Iterator[Vectors]:
    for batch in _batches(run, source, batch_size, start, count, images=False):
      there = batch["texts_valid"]
      high, low = batch["sample_id"].astype(np.uint64).T
      ids = high << np.uint64(32) | low
      (image, has_image), (text, captions) = (store.find(ids) for store in stored)
      known = batch["valid"] & (has_image == 1) & (captions == there.sum(1)) & (captions > 0)
      there = there & known[:, None]
      zimg = np.zeros((len(ids), stored.image.width), np.float32)
      zimg[known] = stored.image.read(image[known])
      ztxt = np.zeros((*there.shape, stored.text.width), np.float32)
      ztxt[there] = stored.text.read((text[:, None] + np.arange(there.shape[1]))[there])
      host = dict(zimg=zimg, ztxt=ztxt, known=known, there=there)
      yield joined(**sharding.global_batch(run.mesh, host, rows, batch_size))

  return read


def _mean(ztxt: jax.Array, there: jax.Array) -> jax.Array:
  """The mean of the vectors of the captions that are there, [B, C, E] -> [B, E]."""
  total = jnp.where(there[:, :, None], ztxt, 0).sum(1)
  mean: jax.Array = total / jnp.maximum(there.sum(1), 1)[:, None]
  return mean


def _batches(
  run: Run, source: Source, batch_size: int, start: int, count: int, *, images: bool = True
) -> Iterator[Mapping[str, np.ndarray]]:
  """This host's rows of `count` batches from the sample `start` on, as the run reads them."""
  if not count:
    return
  every = evaluation.eval_batches(
    source,
    run.config.data,
    batch_size=batch_size,
    rows=sharding.host_rows(run.mesh, batch_size),
    captions=CAPTIONS,
    images=images,
    start=start,
  )
  with contextlib.closing(every):
    yield from map(_cut, itertools.islice(every, count))


def _cut(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """The batch with as many captions as its samples have, on all processes together."""
  most = np.int32(max(1, batch["texts_valid"].sum(1).max()))
  if jax.process_count() > 1:
    most = np.max(multihost_utils.process_allgather(most))
  texts = {name: x[:, :most] for name, x in batch.items() if name.startswith("texts")}
  return {**batch, **texts}


def _teacher(names: Sequence[str]) -> Run | Stored | None:
  """The teacher that --teacher names: a run, or a store of images and one of captions."""
  if len(names) > 2:
    raise ValueError(f"--teacher {' '.join(names)}: give a run, or two stores, IMAGES TEXTS")
  if len(names) == 2:
    return Stored(*map(Store, names))
  return open_run(names[0]) if names else None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program; returns what it prints."""
  given = parsers.score().parse_args(argv)
  runtime.setup()
  runtime.connect()
  run = open_run(given.run, given.step)
  spec = source_flags.spec_from_flags(given)
  if spec.captions is None and run.config.data.caption_fields:
    spec = spec._replace(captions=run.config.data.caption_fields)
  teacher = _teacher(given.teacher)
  with progress.shown(jax.process_index() == 0):
    about = score(
      run,
      open_spec(spec),
      given.out,
      what=given.what,
      batch_size=given.batch_size,
      ema=given.ema,
      teacher=teacher,
      teacher_scale=given.teacher_scale,
    )
  if jax.process_index() == 0:
    rows = tables.pairs()
    for name, value in about.items():
      rows.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    tables.show(rows)
    print(f"{given.out}.npy")
    if given.json:
      tables.write_json(given.json, about)
  return about


def run() -> None:
  """The program `bigalign score`."""
  try:
    main()
  except Exception as error:
    preemption.exit_on_error(error)
