"""Batches of stored vectors: images and captions, matched by id; pure functions of the step."""

from __future__ import annotations

import hashlib
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange

from bigalign.data.fields.texts import TextsOptions
from bigalign.data.files import fingerprints
from bigalign.data.files.patterns import expand_variables
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.training import checked_rows, words
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.order.order import Order
from bigalign.data.order.permutation import CAPTION, hash_words
from bigalign.data.samples.rejects import REASONS
from bigalign.data.stores.reader import Store
from bigalign.data.text.kinds import ABSENT, POSITIVE


class Pairs:
  """The images of one store that have captions in another, in the order of the first.

  Args:
    image: folder of the store of images.
    text: folder of the store of captions.
    second: folder of another store of captions, or of `text` once more; an image needs captions in
      both. "" for none.
    least: share of the images that must have captions.
    keep: an .npy file of sample ids, ascending, as `bigalign curate` writes: only these are read.

  Raises:
    ValueError: if fewer images match, or none; the message says how many do.
  """

  def __init__(
    self,
    image: str | pathlib.Path,
    text: str | pathlib.Path,
    *,
    second: str | pathlib.Path = "",
    least: float = 0.99,
    keep: str = "",
  ):
    self.image, self.text = Store(image), Store(text)
    self.second = Store(second) if second else None
    texts = [self.text, *([self.second] if self.second else [])]
    kept = _ids(keep) if keep else None
    self._rows, matching = _matching(
      self.image, [store for store in texts if store.ids != self.image.ids], kept
    )
    if matching < max(1, least * len(self.image)):
      raise ValueError(
        f"{matching} of the {len(self.image)} images in {self.image.folder} have captions"
        f" in {' and '.join(str(store.folder) for store in texts)}, fewer than the"
        f" share config.data.stores.least={least}: embed the same samples into each"
      )
    if kept is not None and not len(self):
      raise ValueError(
        f"config.data.stores.keep={keep!r}: none of its {len(kept)} ids is in"
        f" {self.image.folder}; are they of these samples?"
      )
    self.sides = {"image": [self.image], "text": texts}
    names = [store.fingerprint for store in (self.image, *texts)]
    names += [hashlib.sha256(kept.tobytes()).hexdigest()] if kept is not None else []
    self.fingerprint = fingerprints.of_names(*names)

  def __len__(self) -> int:
    return len(self.image if self._rows is None else self._rows)

  def __repr__(self) -> str:
    return f"Pairs({str(self.image.folder)!r}, {str(self.text.folder)!r})"

  def __getitem__(self, i: int) -> dict[str, Any]:
    """The vectors of one image, [D], and of its captions, [C, E]."""
    rows = self.rows(np.array([i]))
    (first,), (count,) = _find_all(self.text, self.image.samples(rows)[:, 0])
    return dict(
      image=self.image.read(rows)[0],
      text=self.text.read(first + np.arange(count)),
      key=f"row {int(rows[0])} of {self.image.folder}",
    )

  def rows(self, indices: np.ndarray) -> np.ndarray:
    """[N] → [N] int64, rows of the image store."""
    return indices if self._rows is None else np.asarray(self._rows[indices], np.int64)


def _ids(path: str) -> np.ndarray:
  """[N] uint64, mapped from a file."""
  name = expand_variables(path, what="config.data.stores.keep")
  try:
    ids: np.ndarray = np.load(name, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f"config.data.stores.keep={path!r} is not a .npy file: {error}") from error
  if ids.dtype != np.uint64 or ids.ndim != 1 or not ids.size or (ids[1:] <= ids[:-1]).any():
    raise ValueError(
      f"config.data.stores.keep={path!r}: {ids.dtype} {ids.shape}, but sample"
      " ids are uint64, one or more, ascending, without repetition; `bigalign curate` writes them"
    )
  return ids


def _find_all(store: Store, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Store.find of samples that the store must have."""
  first, count = store.find(ids)
  if not count.all() or (store.samples(first)[:, 0] != ids).any():
    raise ValueError(
      f"{store.folder} changed while it was read; check it with `bigalign embed --verify`"
    )
  return first, count


def _matching(
  image: Store, texts: Sequence[Store], keep: np.ndarray | None
) -> tuple[np.ndarray | None, int]:
  """The rows of the images that `keep` and all of `texts` have, and how many the texts have.

  None for all rows; others are held on the disk.
  """
  if not texts and keep is None:
    return None, len(image)
  matching = 0
  with tempfile.TemporaryFile() as file:  # its map outlives it
    for ids, rows in image.sorted_ids():
      matches = np.ones(len(ids), bool)
      for text in texts:
        matches &= text.find(ids)[1] > 0
      matching += int(matches.sum())
      if keep is not None:
        matches &= keep[np.minimum(np.searchsorted(keep, ids), len(keep) - 1)] == ids
      file.write(rows[matches].tobytes())
    file.flush()
    count = file.tell() // 8
    kept = np.memmap(file, np.uint64, "r+", shape=(count,)) if count else np.empty(0, np.uint64)
  kept.sort()
  return (None if count == len(image) else kept), matching


def pair_batches(
  source: Pairs,
  data: DataOptions,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  seed: int,
  start: int = 0,
  stop: int | None = None,
  lane_rows: int = 0,
) -> Batches:
  """This host's rows of the global batches of vectors.

  `image` [b, D] and `text` [b, E] have the dtypes of the stores; of several captions one is drawn.
  `text_second` [b, E] comes from the second store, or, if that is the store of the texts, from
  another caption of the image if there is one. With config.data.texts, `text_others` [b, M - 1, E]
  are further captions of the image, drawn without replacement, and `texts_kind` [b, M] says which
  there are.

  Args:
    source: the stores of both sides.
    data, batch_size, rows, seed, start, stop, lane_rows: as of training.train_batches.
  """
  order = Order(
    source, seed=seed, lane_rows=lane_rows or batch_size, shuffle=data.shuffle, kind=data.order
  )
  batches = _PairBatches(
    source,
    batch_size=batch_size,
    rows=checked_rows(rows, batch_size=batch_size),
    seed=seed,
    start=start,
    stop=stop,
    order=order,
    captions_per_image=data.captions_per_image,
    texts=data.texts,
  )
  return iterate(batches, workers=0)  # a thread is enough: rows are only copied


class _PairBatches:
  """Element k is this host's part of batch k after `start`."""

  def __init__(
    self,
    source: Pairs,
    *,
    batch_size: int,
    rows: np.ndarray,
    seed: int,
    start: int,
    stop: int | None,
    order: Order,
    captions_per_image: int,
    texts: TextsOptions | None,
  ):
    self._source, self._batch_size, self._rows, self._seed = source, batch_size, rows, seed
    self._texts = texts
    self._start, self._order, self._captions_per_image = start, order, captions_per_image
    self._length = ((1 << 62 if stop is None else stop) - start) // batch_size

  def __len__(self) -> int:
    return max(self._length, 0)

  def __repr__(self) -> str:
    return f"batches of {self._source!r}"

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    source = self._source
    positions = self._start + k * self._batch_size + self._rows
    indices = self._order(positions)
    rows = source.rows(indices)
    ids = source.image.samples(rows)[:, 0]
    first, count = _find_all(source.text, ids)
    most = int(count.max())
    if most > self._captions_per_image:
      raise ValueError(
        f"{source.text.folder}: an image has {most} captions; set"
        f" config.data.captions_per_image, now {self._captions_per_image}, to the"
        " largest number of an image"
      )
    draw = hash_words(CAPTION, self._seed, positions)
    ordinal = (draw % count.astype(np.uint64)).astype(np.int64)
    b = len(positions)
    seen = np.ones((b, 1), bool)
    batch = dict(
      image=source.image.read(rows),
      text=source.text.read(first + ordinal),
      text_mask=seen,
      image_id=words(indices),
      text_id=words(indices * self._captions_per_image + ordinal),
      label=source.image.labels(rows) if source.image.has_labels else np.full(b, -1, np.int32),
      source=np.zeros(b, np.int32),
      rejects=np.zeros((b, len(REASONS)), np.int32),
      repaired=np.zeros(b, np.int32),
    )
    if source.second:
      batch |= dict(text_second=self._second(ids, draw, ordinal), text_second_mask=seen)
    if self._texts:
      batch |= self._several(self._texts.count, first, count, draw, ordinal)
    return batch

  def _several(
    self, texts: int, first: np.ndarray, count: np.ndarray, draw: np.ndarray, ordinal: np.ndarray
  ) -> dict[str, np.ndarray]:
    """The fields of several texts; the row of an absent one is that of the first text.

    Args:
      texts: M, of an image.
      first: [b], the rows of the images' first captions.
      count: [b] of captions.
      draw: [b], the random words of the first texts.
      ordinal: [b], the first texts among the captions.
    """
    first_kind = np.full((len(draw), 1), POSITIVE, np.int32)
    if texts == 1:
      return dict(texts_kind=first_kind)
    slots = np.arange(1, max(int(count.max()), texts))
    words_of_slots = hash_words(CAPTION, draw[:, None], slots[None].astype(np.uint64))
    there = slots < count[:, None]
    order = np.argsort(np.where(there, words_of_slots, ~np.uint64(0)), 1, kind="stable")
    step = np.take_along_axis(np.where(there, slots, 0), order, 1)[:, : texts - 1]
    kinds = np.where(step > 0, POSITIVE, ABSENT).astype(np.int32)
    places = first[:, None] + (ordinal[:, None] + step) % count[:, None]
    others = self._source.text.read(places.ravel())
    return dict(
      text_others=rearrange(others, "(b m) d -> b m d", b=len(draw)),
      text_others_mask=np.ones((len(draw), texts - 1, 1), bool),
      texts_kind=np.concatenate([first_kind, kinds], 1),
    )

  def _second(self, ids: np.ndarray, draw: np.ndarray, ordinal: np.ndarray) -> np.ndarray:
    store = self._source.second
    assert store is not None
    first, count = _find_all(store, ids)
    fresh = hash_words(CAPTION, draw)
    if store.fingerprint != self._source.text.fingerprint:
      return store.read(first + (fresh % count.astype(np.uint64)).astype(np.int64))
    others = np.maximum(count - 1, 1)
    step = 1 + (fresh % others.astype(np.uint64)).astype(np.int64)
    return store.read(first + np.where(count > 1, (ordinal + step) % count, 0))
