"""Embeds a dataset with frozen towers, over the whole mesh, into embedding stores.

  bigalign embed --config=configs/photos_frozen.py --out=stores/photos
  bigalign train --config=configs/photos_frozen.py --config.data.stores.image=stores/photos/image …

OUT/image and OUT/text hold the pooled outputs of config.model's towers on config.data, without
augmentation: the inputs of the projectors. The same command resumes after a kill; with another
source it appends.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.box
import rich.table
from absl import app, flags
from jax.experimental import multihost_utils

from bigalign import checks, sharding
from bigalign.config import Config, resolve_config, start, without_stores
from bigalign.data.files import storage
from bigalign.data.image import naflex
from bigalign.data.loader import evaluation
from bigalign.data.loader.options import DataOptions
from bigalign.data.samples.rejects import REASONS
from bigalign.data.sources.base import Source, repeated_key
from bigalign.data.stores import reader, writer
from bigalign.evals.embed import round_batch
from bigalign.frozen.towers import Towers, like_stored, load_towers
from bigalign.inputs import open_data
from bigalign.options import plain, without_defaults
from bigalign.run import preemption, progress, tables
from bigalign.run.errors import UsageError
from bigalign.run.flags import define_flags, parse_flags
from bigalign.run.provenance import check_hosts_agree
from bigalign.towers.padding import UsedLengths, cut, used_lengths

SIDES = ("image", "text")
BATCHES = 4  # per piece; a kill loses at most one piece
_PLACES = ("data_dir", "root")  # options of sources that say where files are
PIECES = 4096  # per source at most; the pieces of larger sources have more batches


class _Rows(NamedTuple):
  """The rows of a piece that one process computed.

  vectors: [N, D], or [N, 1 + T, D] with tokens. samples: [N, 2] uint64, the id of each row's sample
  and its position in the source. labels: [N], of images.
  """

  vectors: np.ndarray
  samples: np.ndarray
  labels: np.ndarray | None = None


def embed(
  values: Any,
  out: str | pathlib.Path,
  *,
  sides: Sequence[str] = SIDES,
  batch_size: int = 256,
  dtype: str = "float16",
  projected: bool = False,
  tokens: bool = False,
) -> dict[str, pathlib.Path]:
  """Writes, completes or extends the stores OUT/<side>; returns their folders.

  Args:
    values: a config of a training run; its `data`, without stores and augmentation, and `model`.
    sides: which towers.
    batch_size: images, or texts, at a time over all devices; rounded up to fit the mesh.
    dtype: of the vectors: float16, bfloat16 or float32.
    projected: after the projectors, in the shared space, of unit length.
    tokens: each token of the towers too, for projectors that read them.

  Raises:
    ValueError: if a tower is not all loaded, or a store holds another tower's vectors.
    BlockingIOError: if another process of this machine embeds into the same folder.
  """
  for side in sides:
    checks.choose(dict.fromkeys(SIDES), side, "--towers")
  values = without_stores(values)
  config = resolve_config(values)
  inputs = open_data(config.data)
  source, data = inputs.source, inputs.options
  check_source(source, data, sides)
  towers = load_towers(
    values, config, sides, len(source), dtype=dtype, projected=projected, tokens=tokens
  )
  batch_size = round_batch(towers.mesh, batch_size)
  per_piece = max(BATCHES, -(-len(source) // (batch_size * PIECES)))
  folders = {side: pathlib.Path(out).expanduser() / side for side in sides}
  with claimed(
    folders, towers.headers, source, data, batch_size=batch_size, per_piece=per_piece
  ) as ranges:
    if any(not found.done for found in ranges.values()):
      _fill(
        source,
        towers,
        folders,
        ranges,
        batch_size=batch_size,
        per_piece=per_piece,
        data=data,
        lengths=used_lengths(config.model.text),
      )
  return folders


def check_source(source: Source, data: DataOptions, sides: Sequence[str]) -> None:
  """Raises ValueError for samples or captions that a store cannot hold."""
  if "image" in sides and not data.images:
    raise ValueError(
      "config.data.images=False, so there are no images to embed; name the texts: --towers=text"
    )
  if repeated := repeated_key(source):
    raise ValueError(
      f"Two samples of {source!r} have the key {repeated!r}, in files of one name in several"
      " folders, so the rows of a store could not be told apart. Rename the files, or give each"
      " folder a name, as a part of config.data.mixture"
    )
  drawn = [name for name, weight in data.first_columns if weight]
  if "text" in sides and (drawn or data.second_columns):
    raise ValueError(
      "config.data.captions with weights, or second_captions: a store holds the captions of the"
      " first field that a sample has. Embed each field into a store of its own, captions=(FIELD,),"
      " and train with data.stores.text and data.stores.second"
    )


@contextlib.contextmanager
def claimed(
  folders: Mapping[str, pathlib.Path],
  headers: Mapping[str, Mapping[str, Any]],
  source: Source,
  data: DataOptions,
  *,
  batch_size: int,
  per_piece: int,
) -> Iterator[dict[str, writer.Range]]:
  """The pieces of a source in each store; at the end of the context, the stores are complete.

  Args:
    folders: {side: folder of its store}.
    headers: {side: header of its store}.
    source: the samples.
    data: how they are read.
    batch_size, per_piece: rows of a batch, and batches of a piece.
  """
  ranges = {}
  fingerprint = source_fingerprint(source, data)
  older = source_fingerprint(source, data, places=True)
  check_hosts_agree({"data": fingerprint, "headers": headers})
  with contextlib.ExitStack() as held:
    for side, folder in folders.items():
      if jax.process_index() == 0:
        writer.begin(folder, like_stored(folder, headers[side]))
        held.enter_context(storage.locked(folder, "bigalign embed"))
      ranges[side] = writer.claim(
        folder,
        older if older in writer.fingerprints(folder) else fingerprint,
        len(source),
        repr(source),
        batch_size=batch_size,
        batches=per_piece,
        write=jax.process_index() == 0,
      )
    check_hosts_agree({"existing rows": ranges})
    multihost_utils.sync_global_devices("claimed")
    yield ranges
    multihost_utils.sync_global_devices("embedded")
    for side, folder in folders.items():
      if jax.process_index() == 0:
        several = side != "image" or "reinforced" in headers[side]  # rows of one sample
        writer.finish(folder, captions=several)
    multihost_utils.sync_global_devices("stores are complete")


def source_fingerprint(source: Source, data: DataOptions, *, places: bool = False) -> str:
  """Returns hex digits of what decides ids and captions: samples, names of their parts, fields.

  Args:
    source: whose own fingerprint covers the samples and the view.
    data: config.data.
    places: whether the folders in the options count, as in older versions; it finds their stores.
      Without them, a dataset that was moved has the same fingerprint.
  """

  def options_of(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {k: v for k, v in (values or {}).items() if k not in _PLACES} or None

  parts = [
    {k: v for k, v in without_defaults(part).items() if k not in ("source", "weight", "upsampling")}
    for part in data.mixture
  ]
  options = plain(data.source_options)
  if not places:
    options = options_of(options)
    parts = [
      {
        k: v
        for k, v in {**part, "source_options": options_of(part.get("source_options"))}.items()
        if k != "view" and v is not None
      }
      for part in parts
    ]
  content = [source.fingerprint, parts, plain(data.captions), options]
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _fill(
  source: Source,
  towers: Towers,
  folders: Mapping[str, pathlib.Path],
  ranges: Mapping[str, writer.Range],
  *,
  batch_size: int,
  per_piece: int,
  data: DataOptions,
  lengths: UsedLengths,
) -> None:
  """Embeds the pieces that are missing on some side, one after the other."""
  folders = {side: folder for side, folder in folders.items() if not ranges[side].done}
  first = min(ranges[side].next for side in folders)
  rows = sharding.host_rows(towers.mesh, batch_size)
  room = data.captions_per_image if "text" in folders else 0
  batches = evaluation.eval_batches(
    source,
    data,
    batch_size=batch_size,
    rows=rows,
    captions=room,
    images="image" in folders,
    start=first * per_piece * batch_size,
  )
  total, done = -(-len(source) // batch_size), first * per_piece
  left = total - done
  visible = progress.is_shown() and jax.process_index() == 0

  def advance() -> None:
    shown.advance()
    shown.note = f"{shown.clock.speed() * batch_size:,.0f} images/s"

  with (
    contextlib.closing(batches),
    progress.Progress("embed", total, unit="batches", start=done, visible=visible) as shown,
  ):
    for piece in range(first, first + -(-left // per_piece)):
      number = min(left, per_piece)
      left -= number
      wanted = [side for side in folders if piece >= ranges[side].next]
      found, left_out = _piece(batches, number, towers, wanted, rows, batch_size, lengths, advance)
      for side, made in found.items():
        with np.errstate(over="ignore"):  # vectors beyond float16's 65,504 are left out
          vectors = made.vectors.astype(reader.DTYPES[towers.headers[side]["dtype"]])
        sound = reader.finite(vectors)
        reasons = left_out | ({} if sound.all() else {"not_finite": int((~sound).sum())})
        samples = made.samples[sound]
        samples[:, 1] += np.uint64(ranges[side].place)
        writer.write(
          folders[side],
          ranges[side].first + piece,
          vectors[sound],
          samples,
          labels=None if made.labels is None else made.labels[sound],
          part=jax.process_index(),
          parts=jax.process_count(),
          left_out=reasons,
        )


def _piece(
  batches: Any,
  number: int,
  towers: Towers,
  sides: Sequence[str],
  rows: np.ndarray,
  batch_size: int,
  lengths: UsedLengths,
  advance: Callable[[], None],
) -> tuple[dict[str, _Rows], dict[str, int]]:
  """This process's rows of the next `number` batches, and {reason: samples left out}."""
  images: list[_Rows] = []
  texts: list[dict[str, np.ndarray]] = []
  samples: list[np.ndarray] = []
  rejected = np.zeros(len(REASONS), np.int64)
  running: collections.deque[tuple[jax.Array, dict[str, np.ndarray]]] = collections.deque()

  def fetch() -> None:
    z, of = running.popleft()
    valid = of["valid"]
    images.append(_Rows(sharding.host_part(z)[valid], of["own"][valid], of["label"][valid]))

  for _ in range(number):
    batch = next(batches)
    own = np.stack([joined(batch[name]) for name in ("sample_id", "image_id")], 1)
    rejected += batch["rejects"].sum(0)
    if "image" in sides:
      pixels = naflex.only_images(batch)
      on_mesh = sharding.global_batch(towers.mesh, pixels, rows, batch_size)
      z = sharding.block_on_cpu(towers.run["image"](naflex.of_fields(on_mesh)))
      running.append((z, dict(valid=batch["valid"], own=own, label=batch["label"])))
      if len(running) > 1:  # the device works on one while the host reads the other
        fetch()
    there = batch["texts_valid"] & batch["valid"][:, None]
    texts.append(dict(text=batch["texts"][there], mask=batch["texts_mask"][there]))
    samples.append(np.repeat(own, there.sum(1), axis=0))
    advance()
  while running:
    fetch()
  found = {}
  if "image" in sides:
    found["image"] = _Rows(*(np.concatenate(x) for x in zip(*images)))
  if "text" in sides:
    every = {name: np.concatenate([x[name] for x in texts]) for name in ("text", "mask")}
    found["text"] = _Rows(_texts(every, towers, rows, batch_size, lengths), np.concatenate(samples))
  return found, {reason: int(n) for reason, n in zip(REASONS, rejected) if n}


def joined(words: np.ndarray) -> np.ndarray:
  """64-bit ids: [B, 2] uint32, (high, low) -> [B] uint64."""
  wide = words.astype(np.uint64)
  joined: np.ndarray = wide[:, 0] << np.uint64(32) | wide[:, 1]
  return joined


def _texts(
  every: Mapping[str, np.ndarray],
  towers: Towers,
  rows: np.ndarray,
  batch_size: int,
  lengths: UsedLengths,
) -> np.ndarray:
  """[N, L] -> [N, D] or [N, 1 + L, D]; processes with fewer texts than others pad.

  The longest texts come first, so that the padding that the tower does not read can be cut off.
  """
  count, own, width = len(every["text"]), len(rows), every["text"].shape[1]
  vectors = np.zeros((count, *reader.row_shape(towers.headers["text"])), np.float32)
  batches = int(np.max(multihost_utils.process_allgather(np.int32(-(-count // own)))))
  if not batches:
    return vectors
  used = lengths(every["text"], every["mask"])
  order = np.argsort(-used, kind="stable")
  chosen = [order[i * own :][:own] for i in range(batches)]
  longest = np.array([used[some].max(initial=1) for some in chosen], np.int32)
  longest = np.atleast_2d(multihost_utils.process_allgather(longest)).max(0)
  for some, used_length in zip(chosen, longest):
    length = cut(used_length, width)
    # Repeats texts to fill a batch; of no text, it makes zeros.
    part = {name: np.resize(x[some, :length], (own, length)) for name, x in every.items()}
    on_mesh = sharding.global_batch(towers.mesh, part, rows, batch_size)
    z = sharding.block_on_cpu(towers.run["text"](on_mesh["text"], on_mesh["mask"]))
    # A row with tokens keeps zeros for the padding that was cut off.
    vectors[some, : z.shape[1]] = sharding.host_part(z)[: len(some)]
  return vectors


def summary(folders: Iterable[pathlib.Path]) -> dict[str, dict[str, Any]]:
  """{folder of a store: its number of rows, their width, and how many samples are left out}."""
  stores = {str(folder): reader.Store(folder) for folder in folders}
  return {
    folder: dict(rows=len(store), width=store.width, left_out=store.left_out)
    for folder, store in stores.items()
  }


def table(stores: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
  """The summary for the terminal."""
  rows = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  rows.add_column("store", overflow="fold")
  rows.add_column("rows", justify="right")
  rows.add_column("width", justify="right")
  rows.add_column("samples left out", overflow="fold")
  for folder, about in stores.items():
    left_out = tables.counts(about["left_out"]) or "none"
    rows.add_row(folder, f"{about['rows']:,}", f"{about['width']:,}", left_out)
  return rows


def show(folders: Iterable[pathlib.Path], json_file: str | None) -> None:
  """Prints the table of some stores, in one process, and writes the summary to a file if asked."""
  if jax.process_index() == 0:
    made = summary(folders)
    tables.show(table(made))
    if json_file:
      tables.write_json(json_file, made)


def verify(folder: str | pathlib.Path) -> bool:
  """Prints the errors of a store; returns whether there are none."""
  found = reader.Store(folder)
  wrong = list(found.verify())
  print("\n".join(wrong) or f"{folder}: {len(found)} rows, all checksums match")
  return not wrong


def main(argv: Sequence[str]) -> None:
  """The program, once absl has read the flags."""
  values = flags.FLAGS
  function = getattr(values, "with", "")  # a word of Python
  if function:  # leaves the accelerator to the function
    jax.config.update("jax_platforms", "cpu")
  elif getattr(values, "classnames", ""):
    raise UsageError("--classnames needs --with=MODULE:FUNCTION")
  config = start(argv, values)
  if values.verify:
    sound = [verify(pathlib.Path(values.out).expanduser() / side) for side in values.towers]
    sys.exit(0 if all(sound) else 1)
  try:
    shared = dict(sides=values.towers, batch_size=values.batch_size, dtype=values.dtype)
    with progress.shown():
      if function:
        from bigalign.frozen.external import embed_with  # which imports this module

        folders = embed_with(
          function,
          config,
          values.out,
          classnames=values.classnames,
          templates=values.templates,
          **shared,
        )
      else:
        folders = embed(
          config, values.out, projected=values.projected, tokens=values.tokens, **shared
        )
  except Exception as error:
    preemption.exit_on_error(error)
  show(folders.values(), values.json)


def run() -> None:
  """The program `bigalign embed`."""
  define_flags(lambda: Config, "embed")
  app.run(main, flags_parser=parse_flags)
