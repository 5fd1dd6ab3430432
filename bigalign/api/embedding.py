"""Embeds the images of a source with loaded models, into stores that the next call reuses."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigalign import sharding
from bigalign.api.model import Model
from bigalign.data.files import storage
from bigalign.data.image import naflex
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import Rejected, rejection
from bigalign.data.sources.base import Source, prefetch, read, repeated_key
from bigalign.data.stores import reader, writer
from bigalign.evals.embed import round_batch, to_host
from bigalign.run.progress import Progress

logger = logging.getLogger(__name__)

_THREADS = 16  # that read images, at most
_PIECES = 4096  # of a source at most
_PIECE = 4096  # images of a piece at least; a kill loses at most one piece


class Target(NamedTuple):
  """A model, and the folder of the store of its embeddings."""

  model: Model
  folder: pathlib.Path


class _Batch(NamedTuple):
  """What the image tower reads for some samples, [n, ...], their samples [n, 2] uint64, rejects."""

  inputs: Any
  samples: np.ndarray
  left_out: dict[str, int]


def weights_digest(params: Mapping[str, Any], side: str) -> str:
  """Returns hex digits of the parameters of one side of a model.

  Args:
    params: {path: array} of a Model.
    side: "image" or "text".
  """
  digest = hashlib.sha256()
  for path in sorted(params):
    if path.startswith((f"{side}_tower/", f"{side}_projector/")):
      array = to_host(params[path])
      digest.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
  return digest.hexdigest()[:32]


def header_of(model: Model, dtype: str) -> dict[str, Any]:
  """Returns the header of a store of a model's image embeddings: what they depend on."""
  encoder, view = model.encoder, model.view
  parts = (encoder.image_tower, encoder.image_projector, encoder.pixels)
  text = re.sub(r" at 0x\w+", "", repr(parts))  # addresses of functions
  return dict(
    side="image",
    projected=True,
    weights=weights_digest(model.params, "image"),
    model=hashlib.sha256(text.encode()).hexdigest()[:32],
    view=view and view.reading.preprocessing(),
    width=model.embed_dim,
    dtype=dtype,
    tokens=0,
  )


def embed_source(
  model: Model,
  source: Source,
  folder: pathlib.Path,
  *,
  batch_size: int = 64,
  dtype: str = "float16",
) -> reader.Store:
  """Writes, or completes, a store of the embeddings of a source's images; returns it.

  As `embed_with`, with one model.
  """
  target = Target(model, folder)
  return embed_with([target], source, batch_size=batch_size, dtype=dtype)[0]


def embed_with(
  targets: Sequence[Target], source: Source, *, batch_size: int = 64, dtype: str = "float16"
) -> list[reader.Store]:
  """Writes, or completes, stores of the embeddings of a source's images by several models.

  An image is read and decoded once for all models. Images that cannot be read are left out, and
  counted by their reasons. All devices share the work.

  Args:
    targets: the models, which read images alike, and the folders of their stores.
    source: of the images.
    batch_size: images at a time over all devices; rounded up to fit them. A store that was begun
      with another one is completed.
    dtype: of the stored vectors.

  Returns:
    The store of each model.

  Raises:
    ValueError: if a folder holds vectors of another model or source, no image can be read, or the
      models read images differently.
    BlockingIOError: if another process of this machine writes the same folder.
  """
  model = targets[0].model
  for other, _ in targets:
    if other.view is None:
      raise ValueError(f"{other.source} has no image tower, so it embeds no images; use a STORE")
    assert model.view is not None
    if other.view.reading.preprocessing() != model.view.reading.preprocessing():
      raise ValueError(f"{other.source} and {model.source} read images differently")
  if repeated := repeated_key(source):
    raise ValueError(
      f"Two samples of {source!r} have the key {repeated!r}, in files of one name in several"
      " folders, so results could not be told apart. Rename the files, or read one folder"
    )
  batch_size = round_batch(model.mesh, batch_size)
  with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:

    def load(indices: Sequence[int]) -> _Batch:
      """The images of some samples as the model sees them."""
      prefetch(source, indices)
      made = list(pool.map(functools.partial(_square, model, source), indices))
      left_out = collections.Counter(x for x in made if isinstance(x, str))
      kept = [(i, *x) for i, x in zip(indices, made) if not isinstance(x, str)]
      assert model.view is not None
      views = model.view.reading.stacked([x[1] for x in kept])
      samples = np.array([(x[2], x[0]) for x in kept], np.uint64)
      return _Batch(views, samples.reshape(-1, 2), left_out)

    return _write(
      [(*target, header_of(target.model, dtype)) for target in targets],
      load,
      fingerprint=source.fingerprint,
      name=repr(source),
      count=len(source),
      batch_size=batch_size,
    )


def project(
  model: Model, store: reader.Store, folder: pathlib.Path, *, batch_size: int = 1024
) -> reader.Store:
  """Applies a model's projector to a store of a tower's outputs; returns the store of embeddings.

  Args:
    model: whose tower made the store.
    store: of `bigalign embed` without --projected, of the image tower.
    folder: of the new store.
    batch_size: rows at a time, over all devices.
  """

  def load(indices: Sequence[int]) -> _Batch:
    rows = np.asarray(indices)
    return _Batch(store.read(rows).astype(np.float32), store.samples(rows), {})

  (projected,) = _write(
    [(model, folder, header_of(model, "float16"))],
    load,
    fingerprint=store.fingerprint,
    name=repr(store),
    count=len(store),
    batch_size=round_batch(model.mesh, batch_size),
  )
  return projected


def _square(model: Model, source: Source, i: int) -> tuple[Any, int] | str:
  """An image as the model sees it and its id; the reason if it cannot be used."""
  assert model.view is not None
  try:
    record = read(source, i)
    try:
      return model.view(record["image"]), sample_id(record["key"])
    except Exception as error:
      raise rejection(error) from error
  except Rejected as error:
    logger.info("sample %d of %r is left out: %s", i, source, error)
    return error.reason


class _Begun(NamedTuple):
  """A store that may lack pieces: how it is written, its first missing sample, samples a piece."""

  embed: Callable[[Any], np.ndarray]
  folder: pathlib.Path
  dtype: str
  first: int
  piece: int


def _write(
  targets: Sequence[tuple[Model, pathlib.Path, Mapping[str, Any]]],
  load: Callable[[Sequence[int]], _Batch],
  *,
  fingerprint: str,
  name: str,
  count: int,
  batch_size: int,
) -> list[reader.Store]:
  """Embeds the pieces that stores lack: (model, folder, header) of each."""
  if jax.process_count() > 1:
    raise ValueError("one process embeds images here; use `bigalign embed` on several hosts")
  batches = max(-(-_PIECE // batch_size), -(-count // (batch_size * _PIECES)))
  with contextlib.ExitStack() as stack:
    lacking = []
    for model, folder, header in targets:
      recorded, piece = batch_size, batches * batch_size
      writer.begin(folder, header)
      stack.enter_context(storage.locked(folder, "bigalign search or bigalign evaluate"))
      begun = writer.begun(folder)
      # Before the claim, which appends a source that is new.
      if [x["fingerprint"] for x in begun] not in ([], [fingerprint]) and writer.pieces(folder):
        raise ValueError(f"{folder} holds the embeddings of another source; name another --out")
      if begun and begun[0]["fingerprint"] == fingerprint:
        # Pieces keep their size; how many images are embedded at a time does not change a piece.
        recorded, piece = begun[0]["batch_size"], begun[0]["piece"]
      claimed = writer.claim(
        folder,
        fingerprint,
        count,
        name,
        batch_size=recorded,
        batches=piece // recorded,
        write=True,
      )
      if not claimed.done:
        first = min(count, claimed.next * piece)
        embed = _embedder(model, batch_size)
        lacking.append(_Begun(embed, folder, str(header["dtype"]), first, piece))
    # Pieces have one size, unless a store was begun with another batch size.
    for piece in sorted({store.piece for store in lacking}):
      _complete([x for x in lacking if x.piece == piece], load, count, batch_size)
    for _, folder, _ in targets:
      writer.finish(folder, captions=False)
  return [reader.Store(folder) for _, folder, _ in targets]


def _complete(
  stores: Sequence[_Begun],
  load: Callable[[Sequence[int]], _Batch],
  count: int,
  batch_size: int,
) -> None:
  """Writes the missing pieces of stores whose pieces have one size."""
  first, piece = min(store.first for store in stores), stores[0].piece
  with Progress("embed", count, unit="images", start=first) as progress:
    for start in range(first, count, piece):
      places = range(start, min(start + piece, count))
      here = [store for store in stores if store.first <= start]
      embeds = [store.embed for store in here]
      every, samples, left_out = _embed_piece(embeds, load, places, batch_size, progress)
      for store, vectors in zip(here, every, strict=True):
        number = start // piece
        _write_piece(store.folder, number, vectors, samples, {**left_out}, dtype=store.dtype)


def _embed_piece(
  embeds: Sequence[Callable[[Any], np.ndarray]],
  load: Callable[[Sequence[int]], _Batch],
  places: range,
  batch_size: int,
  progress: Progress,
) -> tuple[list[np.ndarray], np.ndarray, dict[str, int]]:
  """Vectors [n, E] of each model, samples [n, 2] of these places, and what was left out."""
  vectors: list[list[np.ndarray]] = [[] for _ in embeds]
  samples = []
  left_out: collections.Counter[str] = collections.Counter()
  parts = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
  with concurrent.futures.ThreadPoolExecutor(1) as ahead:  # reads while the devices compute
    loading = ahead.submit(load, parts[0])
    for part, following in itertools.zip_longest(parts, parts[1:]):
      batch = loading.result()
      if following is not None:
        loading = ahead.submit(load, following)
      for embed, own in zip(embeds, vectors):
        own.append(embed(batch.inputs))
      samples.append(batch.samples)
      left_out.update(batch.left_out)
      progress.advance(len(part))
  return [np.concatenate(own) for own in vectors], np.concatenate(samples), left_out


def _write_piece(
  folder: pathlib.Path,
  piece: int,
  z: np.ndarray,
  samples: np.ndarray,
  left_out: dict[str, int],
  *,
  dtype: str,
) -> None:
  sound = reader.finite(z)
  if not sound.all():
    left_out["not_finite"] = int((~sound).sum())
  vectors = z[sound].astype(reader.DTYPES[dtype])
  writer.write(folder, piece, vectors, samples[sound], left_out=left_out)


def _embedder(model: Model, batch_size: int) -> Callable[[Any], np.ndarray]:
  """A function from [n, ...] inputs, n <= batch_size, to [n, E] float32 of unit norm."""
  apply = jax.jit(lambda params, x: model.apply(params, x)["zimg"])
  rows = sharding.host_rows(model.mesh, batch_size)

  def embed(inputs: Any) -> np.ndarray:
    fields = naflex.to_fields(inputs)
    count = len(fields["image"])
    if not count:
      return np.empty((0, model.embed_dim), np.float32)
    padded = {name: np.resize(x, (batch_size, *x.shape[1:])) for name, x in fields.items()}
    with jax.set_mesh(model.mesh):
      on_mesh = sharding.global_batch(model.mesh, padded, rows, batch_size)
      z = sharding.block_on_cpu(apply(model.params, naflex.of_fields(on_mesh)))
    return to_host(z)[:count].astype(np.float32)

  return embed


def cache_folder(model: Model, fingerprint: str) -> pathlib.Path:
  """Returns where the embeddings of a source are kept if no folder is given.

  It is a folder of $BIGALIGN_SEARCH, or of ~/.cache/bigalign/search.

  Args:
    model: that embeds.
    fingerprint: of the source, or of the store whose vectors the model projects.
  """
  root = os.environ.get("BIGALIGN_SEARCH") or "~/.cache/bigalign/search"
  return folder_of(header_of(model, "float16"), fingerprint, root)


def folder_of(
  header: Mapping[str, Any], fingerprint: str, root: str | os.PathLike[str]
) -> pathlib.Path:
  """Returns the folder of a store in a root folder; digits of its header and source name it."""
  content = json.dumps([header, fingerprint], sort_keys=True)
  return pathlib.Path(root).expanduser() / hashlib.sha256(content.encode()).hexdigest()[:24]
