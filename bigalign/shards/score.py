"""Scores the samples of a source by a run: bigalign score runs/clip 'DIR/*.tar' --out good."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from bigalign import sharding
from bigalign.data.fields.column_files import Unfinished
from bigalign.data.loader import evaluation
from bigalign.data.sources.base import Source, open_spec
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


# {name: function of the cosines [B, B] of a batch, -inf for what is not there, and of the scale}
SCORES: dict[str, Callable[..., jax.Array]] = dict(cosine=cosine, loss=loss, margin=margin)


def score(
  run: Run,
  source: Source,
  out: str,
  *,
  what: str = "cosine",
  batch_size: int = 256,
  ema: bool = False,
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

  Returns:
    What the numbers are, and how many samples have one.

  Raises:
    ValueError: for a batch size that does not divide over the devices; without averages.
  """
  params = run.ema if ema else run.params
  if not params:
    raise ValueError(f"--ema: {run.workdir} has no running averages, because config.ema is 0")
  parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
  if batch_size % parts:
    raise ValueError(f"--batch_size={batch_size} does not divide over the {parts} devices")
  scale = _scale(params)
  made_by = dict(
    what=what, run=run.address, step=run.step, ema=ema, batch_size=batch_size, scale=scale
  )
  column = Unfinished(out, source, made_by=made_by, write=jax.process_index() == 0)
  done = int(multihost_utils.broadcast_one_to_all(np.int64(column.count))) // batch_size
  measure = _measure(run, source, functools.partial(SCORES[what], scale=scale), params, batch_size)
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


def _measure(
  run: Run,
  source: Source,
  values: Callable[[jax.Array], jax.Array],
  params: Any,
  batch_size: int,
) -> Callable[[int, int], Iterator[jax.Array]]:
  """Returns measure(start, count): the numbers [B] of `count` batches, on every device."""
  context = Context("score", mesh=run.mesh, data=run.config.data, **run.embed)
  embed_texts = text_embedder(context)
  rows = sharding.host_rows(run.mesh, batch_size)

  @functools.partial(jax.jit, out_shardings=sharding.replicated_sharding(run.mesh))
  def numbers(zimg: jax.Array, ztxt: jax.Array, valid: jax.Array, there: jax.Array) -> jax.Array:
    count = there.sum(1)
    text = jnp.where(there[:, :, None], ztxt, 0).sum(1) / jnp.maximum(count, 1)[:, None]
    known = valid & (count > 0)
    sims = jnp.einsum("be,ce->bc", zimg, text, precision=jax.lax.Precision.HIGHEST)
    sims = jnp.where(known[:, None] & known[None, :], sims, -jnp.inf)
    found = values(sims)
    return jnp.where(known & jnp.isfinite(found), found, jnp.nan)

  def measure(start: int, count: int) -> Iterator[jax.Array]:
    def batches() -> Iterator[Mapping[str, np.ndarray]]:
      every = evaluation.eval_batches(
        source,
        context.data,
        batch_size=batch_size,
        rows=rows,
        captions=CAPTIONS,
        start=start,
      )
      with contextlib.closing(every):
        yield from map(_cut, itertools.islice(every, count))

    if not count:
      return
    data = EvalData(range(count * batch_size), batch_size, batches)
    for zimg, batch in embedded_images(context, data, params):
      ztxt = sharding.block_on_cpu(embed_texts(params, batch["texts"], batch["texts_mask"]))
      yield sharding.block_on_cpu(numbers(zimg, ztxt, batch["valid"], batch["texts_valid"]))

  return measure


def _cut(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """The batch with as many captions as its samples have, on all processes together."""
  most = np.int32(max(1, batch["texts_valid"].sum(1).max()))
  if jax.process_count() > 1:
    most = np.max(multihost_utils.process_allgather(most))
  texts = {name: x[:, :most] for name, x in batch.items() if name.startswith("texts")}
  return {**batch, **texts}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the program; returns what it prints."""
  given = parsers.score().parse_args(argv)
  runtime.setup()
  runtime.connect()
  run = open_run(given.run, given.step)
  spec = source_flags.spec_from_flags(given)
  if spec.captions is None and run.config.data.caption_fields:
    spec = spec._replace(captions=run.config.data.caption_fields)
  with progress.shown(jax.process_index() == 0):
    about = score(
      run,
      open_spec(spec),
      given.out,
      what=given.what,
      batch_size=given.batch_size,
      ema=given.ema,
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
