"""Runs a teacher over augmented views of each image, and over its captions: dataset reinforcement.

  bigalign reinforce --config=teacher.py --views=10 --out=stores/a
  bigalign train --config=student.py --config.data.teachers.a.image=stores/a/image …

OUT/image holds a row for each view of an image, OUT/text one for each caption, after the teacher's
projectors. The header of OUT/image says how the views are drawn (data/fields/replay.py). A student
with config.data.teachers draws one of them, makes the very pixels again at its own size, and reads
the teacher's vector of that view. MobileCLIP: https://arxiv.org/abs/2311.17049. The same command
resumes after a kill.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from bigalign import checks, sharding
from bigalign.config import Config, resolve_config, start, without_stores
from bigalign.data.fields.replay import Replay
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.replayed import view_batches
from bigalign.data.samples.rejects import REASONS
from bigalign.data.sources.base import Source
from bigalign.data.stores import reader, writer
from bigalign.evals.embed import round_batch
from bigalign.frozen.embed import PIECES, check_source, claimed, embed, joined, show
from bigalign.frozen.towers import Towers, load_towers
from bigalign.inputs import open_data
from bigalign.options import plain
from bigalign.run import preemption, progress
from bigalign.run.flags import define_flags, parse_flags


def reinforce(
  values: Any,
  out: str | pathlib.Path,
  *,
  views: int = 10,
  seed: int = 0,
  batch_size: int = 256,
  dtype: str = "bfloat16",
  sides: Sequence[str] = ("image", "text"),
) -> dict[str, pathlib.Path]:
  """Writes, completes or extends the stores OUT/<side>; returns their folders.

  Args:
    values: a config of the teacher; its `data`, whose `augment` makes the views, and its `model`.
    out: folder of the stores.
    views: A, the number of views of each image.
    seed: of the views.
    batch_size: images, or texts, at a time over all devices; rounded up to fit the mesh.
    dtype: of the vectors: float16, bfloat16 or float32.
    sides: which towers.

  Raises:
    ValueError: if a tower is not all loaded, a store holds other vectors, or no view is asked for.
    BlockingIOError: if another process of this machine writes into the same folder.
  """
  checks.between("bigalign reinforce", 1, views=views)
  folders = {}
  if "image" in sides:
    folders["image"] = _images(
      values, pathlib.Path(out).expanduser(), views, seed, batch_size, dtype
    )
  if "text" in sides:
    folders |= embed(
      values, out, sides=("text",), batch_size=batch_size, dtype=dtype, projected=True
    )
  return folders


def _images(
  values: Any, out: pathlib.Path, views: int, seed: int, batch_size: int, dtype: str
) -> pathlib.Path:
  """The store of views; returns its folder."""
  own = without_stores(values)
  own["data"] = {
    **own["data"],
    **{k: x for k, x in plain(values)["data"].items() if k == "augment"},
  }
  config = resolve_config(own)
  if config.data.frames:
    raise ValueError(
      "config.data.frames reads several images of a sample, but `bigalign reinforce` makes views of"
      " one; use `bigalign embed`"
    )
  inputs = open_data(config.data)
  source, data = inputs.source, inputs.options
  check_source(source, data, ("image",))
  replay = Replay(views, seed, plain(data.augment), data.apply_exif)
  towers = load_towers(own, config, ["image"], len(source), dtype=dtype, projected=True)
  batch_size = round_batch(towers.mesh, batch_size)
  per_piece = max(1, -(-len(source) // (batch_size * PIECES)))
  headers = {"image": {**towers.headers["image"], "reinforced": replay.header}}
  folder = out / "image"
  with claimed(
    {"image": folder}, headers, source, data, batch_size=batch_size, per_piece=per_piece
  ) as ranges:
    found = ranges["image"]
    if not found.done:
      _fill(source, data, replay, towers, folder, found, batch_size, per_piece)
  return folder


def _fill(
  source: Source,
  data: DataOptions,
  replay: Replay,
  towers: Towers,
  folder: pathlib.Path,
  found: writer.Range,
  batch_size: int,
  per_piece: int,
) -> None:
  """Embeds the pieces that are missing, one after the other."""
  rows = sharding.host_rows(towers.mesh, batch_size)
  done, total = found.next * per_piece, -(-len(source) // batch_size)
  batches = view_batches(
    source, data, replay, batch_size=batch_size, rows=rows, start=done * batch_size
  )
  visible = progress.is_shown() and jax.process_index() == 0
  with (
    contextlib.closing(batches),
    progress.Progress("reinforce", total, unit="batches", start=done, visible=visible) as shown,
  ):
    for piece in range(found.next, -(-total // per_piece)):
      parts, rejected = [], np.zeros(len(REASONS), np.int64)
      for _ in range(min(per_piece, total - piece * per_piece)):
        batch = next(batches)
        rejected += batch["rejects"].sum(0)
        parts.append(_rows(batch, towers, rows, batch_size))
        shown.advance()
        shown.note = f"{shown.clock.speed() * batch_size * replay.views:,.0f} views/s"
      vectors, samples, labels, pixels = (np.concatenate(x) for x in zip(*parts))
      vectors = vectors.astype(reader.DTYPES[towers.headers["image"]["dtype"]])
      # A sample has all of its views or none.
      sound = reader.finite(vectors).reshape(-1, replay.views).all(1).repeat(replay.views)
      reasons = {reason: int(n) for reason, n in zip(REASONS, rejected) if n}
      if not sound.all():
        reasons["not_finite"] = int((~sound).sum()) // replay.views
      samples[:, 1] += np.uint64(found.place)
      writer.write(
        folder,
        found.first + piece,
        vectors[sound],
        samples[sound],
        labels=labels[sound],
        sizes=pixels[sound],
        part=jax.process_index(),
        parts=jax.process_count(),
        left_out=reasons,
      )


def _rows(
  batch: Mapping[str, np.ndarray], towers: Towers, rows: np.ndarray, batch_size: int
) -> tuple[np.ndarray, ...]:
  """Vectors, samples, labels and sizes of this process's views; those of a sample are adjacent."""
  views, valid = len(batch["view"]), batch["valid"]
  vectors = []
  for view in batch["view"]:  # one after the other, as large as a batch of plain images
    on_mesh = sharding.global_batch(towers.mesh, {"image": view}, rows, batch_size)
    z = sharding.block_on_cpu(towers.run["image"](on_mesh["image"]))
    vectors.append(sharding.host_part(z)[valid])
  own = np.stack([joined(batch[name]) for name in ("sample_id", "image_id")], 1)
  every = np.stack(vectors, 1)  # [n, A, D]
  return (
    every.reshape(-1, every.shape[-1]),
    *(np.repeat(x[valid], views, axis=0) for x in (own, batch["label"], batch["pixels"])),
  )


def main(argv: Sequence[str]) -> None:
  """The program, once absl has read the flags."""
  values = flags.FLAGS
  config = start(argv, values)
  try:
    with progress.shown():
      folders = reinforce(
        config,
        values.out,
        views=values.views,
        seed=values.seed,
        batch_size=values.batch_size,
        dtype=values.dtype,
        sides=values.towers,
      )
  except Exception as error:
    preemption.exit_on_error(error)
  show(folders.values(), values.json)


def run() -> None:
  """The program `bigalign reinforce`."""
  define_flags(lambda: Config, "reinforce")
  app.run(main, flags_parser=parse_flags)
