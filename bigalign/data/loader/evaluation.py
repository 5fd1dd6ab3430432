"""Batches for evaluation: every sample once, in order, rows past the end marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.data.image import naflex
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.training import SampleReader, checked_rows, words
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import REASONS, rejection
from bigalign.data.sources.base import Source, prefetch
from bigalign.data.stores.one_side import OneSide
from bigalign.data.stores.reader import Store


def eval_batches(
  source: Source,
  data: DataOptions,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  captions: int = 1,
  images: bool = True,
  start: int = 0,
  classes: int = 0,
  stored: OneSide | None = None,
) -> Batches:
  """Every sample from `start` on once, in order, in the same number of batches on every host.

  Rows past the end and rejected samples have valid=False. An image without captions stays valid,
  with texts_valid all False.

  Args:
    source: the samples.
    data: how they are read; augmentation is not applied.
    batch_size: of the global batch.
    rows: the rows of the global batch that this host owns.
    captions: C, the room for captions of one image. A record with more of them is an error, so that
      none is dropped unseen; 0 reads no captions at all (zero-shot on labels).
    images: whether images are decoded; if not, `image` is [b, 0, 0, 3], and none is rejected.
    start: the first sample.
    classes: K, the classes of a multilabel dataset; then batches also have label_set [b, K] bool
      and has_label_set [b] bool. A sample with another number of classes is an error.
    stored: vectors that replace images, then `image` is [b, D], or captions, then `texts` is
      [b, C, D] and their mask [b, C, 1]; with tokens [b, 1 + T, D] and [b, C, 1 + T, D]. A sample
      without a vector is rejected.
  """
  batches = _EvalBatches(
    source,
    data,
    batch_size=batch_size,
    rows=checked_rows(rows, batch_size=batch_size),
    captions=captions,
    images=images,
    start=start,
    classes=classes,
    stored=stored,
  )
  return iterate(batches, workers=data.workers)


def stored_batches(
  image: Store,
  text: Store | None,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  captions: int = 1,
  images: bool = True,
  classes: int = 0,
) -> Batches:
  """The rows of a store of images once, in order, with their texts from another store.

  The fields are those of eval_batches with `stored`; labels come from the store of images.

  Args:
    image: the vectors of images.
    text: those of their captions; None for none.
    batch_size, rows, captions, images: as of eval_batches.
    classes: stores hold no sets of classes, so it adds nothing.
  """
  own = checked_rows(rows, batch_size=batch_size)
  batches = _StoredBatches(image, text, batch_size, own, captions, images)
  return iterate(batches, workers=0)  # a thread is enough: rows are only copied


def most_rows(store: Store) -> int:
  """The largest number of rows of a sample."""
  return max(int(store.find(ids)[1].max()) for ids, _ in store.sorted_ids())


class _StoredBatches:
  """Element k is this host's part of the k-th batch in the order of the store of images."""

  def __init__(
    self,
    image: Store,
    text: Store | None,
    batch_size: int,
    rows: np.ndarray,
    captions: int,
    images: bool,
  ):
    self._image, self._text, self._captions, self._images = image, text, captions, images
    self._batch_size, self._rows = batch_size, rows

  def __len__(self) -> int:
    return -(-len(self._image) // self._batch_size)

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    indices = k * self._batch_size + self._rows
    b, valid = len(indices), indices < len(self._image)
    rows = np.where(valid, indices, 0)
    image = self._image.read(rows) if self._images else np.zeros((b, 0, 0, 3), np.uint8)
    image[~valid] = 0
    labels = self._image.labels(rows) if self._image.has_labels else np.full(b, -1, np.int32)
    ids = self._image.samples(rows)[:, 0]
    places = np.full((b, self._captions), -1)
    if self._text is not None:
      first, count = self._text.find(ids)
      if (most := int(count[valid].max(initial=0))) > self._captions:
        raise ValueError(
          f"{self._text.folder}: an image has {most} captions, but captions={self._captions}"
        )
      ordinal = np.arange(self._captions)[None]
      there = (ordinal < count[:, None]) & valid[:, None]
      places = np.where(there, first[:, None] + ordinal, -1)
    return dict(
      image=image,
      **_stored_texts(self._text, places),
      label=np.where(valid, labels, -1).astype(np.int32),
      image_id=words(indices),
      sample_id=words(np.where(valid, ids, 0)),
      index=indices.astype(np.int32),
      valid=valid,
      rejects=np.zeros((b, len(REASONS)), np.int32),
    )


def _stored_texts(store: Store | None, places: np.ndarray) -> dict[str, np.ndarray]:
  """The fields of texts of which a store holds the vectors.

  Args:
    store: None for no texts.
    places: [b, C], the row of each; -1 for none.
  """
  there = places >= 0
  shape, dtype = ((1,), np.dtype(np.float32)) if store is None else (store.shape, store.dtype)
  vectors = np.zeros((*places.shape, *shape), dtype)
  if store is not None:
    vectors[there] = store.read(places[there])
  return dict(texts=vectors, texts_mask=there[:, :, None], texts_valid=there)


def prefetch_two(source: Source, indices: np.ndarray, distance: int) -> None:
  """Lets a source begin to fetch a batch in its order, and the worker's next one.

  Args:
    source: the samples.
    indices: [b], of the batch; some may be past the end.
    distance: how much further on the next batch is.
  """
  soon = np.concatenate([indices, indices + distance])
  soon = soon[soon < len(source)]
  # Room for all blocks of both batches; what does not fit would be fetched one request at a time.
  block = getattr(source, "block", 1)
  held = (len(np.unique(soon // block)) + 2) * block if block > 1 else 0
  prefetch(source, soon.tolist(), hold=held)


class _EvalBatches(SampleReader):
  """Element k is this host's part of the k-th batch in source order."""

  def __init__(
    self,
    source: Source,
    data: DataOptions,
    *,
    batch_size: int,
    rows: np.ndarray,
    captions: int,
    images: bool,
    start: int,
    classes: int,
    stored: OneSide | None,
  ):
    super().__init__(source, data, stored=stored)
    self._image_store = stored.image if stored else None
    self._text_store = stored.text if stored else None
    self._batch_size = batch_size
    self._rows = rows
    self._captions = captions
    self._images = images
    self._start = start
    self._classes = classes
    self._ahead = max(data.workers, 1)  # batches until this worker's next one

  def __len__(self) -> int:
    return -(-(len(self._source) - self._start) // self._batch_size)

  def __repr__(self) -> str:
    return f"eval batches of {self._source!r}"

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    indices = self._start + k * self._batch_size + self._rows
    prefetch_two(self._source, indices, self._ahead * self._batch_size)
    b, c = len(indices), self._captions
    blank = self._data.blank(1) if self._images else {"image": np.zeros((1, 0, 0, 3), np.uint8)}
    images = {name: np.repeat(x, b, axis=0) for name, x in blank.items()}
    image_rows = np.zeros(b, np.int64)  # of the store, for stored images
    labels = np.full(b, -1, np.int32)
    valid = np.zeros(b, bool)
    rejects = np.zeros((b, len(REASONS)), np.int32)
    texts: dict[int, tuple[Any, ...]] = {}  # of each valid row; numbers of stored captions
    ids = np.zeros(b, np.uint64)
    label_sets = np.zeros((b, self._classes), bool)
    has_label_set = np.zeros(b, bool)
    for r in np.flatnonzero(indices < len(self._source)).tolist():
      record = self._sample(int(indices[r]), rejects=rejects[r], decoded=self._images)
      if record is None:
        continue
      captions = record["captions"] if c else ()
      if len(captions) > c:
        raise ValueError(
          f"{record['key']} has {len(captions)} captions, but captions={c}; set it"
          " (of `bigalign embed`: config.data.captions_per_image) to the largest"
          " number of captions of an image (0: none)"
        )
      try:
        if self._image_store:
          image_rows[r] = record["image"]
        elif self._images:
          view = self._data.evaluation_view(record["image"])
          for name, x in naflex.to_fields(view).items():
            images[name][r] = x
      except Exception as error:
        self._reject(int(indices[r]), record["key"], rejection(error), rejects=rejects[r])
        continue
      labels[r] = record["label"]
      if self._classes and "label_set" in record:
        has_label_set[r] = True
        label_sets[r] = self._label_set(record)
      ids[r] = sample_id(record["key"])
      texts[r] = captions
    if self._text_store:
      places = np.full((b, c), -1)
      for r, own in texts.items():
        places[r, : len(own)] = own
      fields = _stored_texts(self._text_store, places)
    else:
      fields = self._token_fields(texts, indices, rejects=rejects)
    valid[[*texts]] = True
    if self._image_store and self._images:
      images = {"image": self._image_store.read(image_rows)}
      blank = {"image": np.zeros((1, *images["image"].shape[1:]), images["image"].dtype)}
    for name, x in images.items():
      x[~valid] = blank[name]
    labels[~valid], ids[~valid] = -1, 0
    several = dict(label_set=label_sets, has_label_set=has_label_set) if self._classes else {}
    return dict(
      **images,
      **fields,
      label=labels,
      image_id=words(indices),
      sample_id=words(ids),
      index=indices.astype(np.int32),
      valid=valid,
      rejects=rejects,
      **several,
    )

  def _token_fields(
    self, texts: dict[int, tuple[str, ...]], indices: np.ndarray, *, rejects: np.ndarray
  ) -> dict[str, np.ndarray]:
    """The fields of texts; rows that fail are taken out of `texts`."""
    text, mask = self._encode(texts, indices, rejects=rejects)
    valid = np.zeros((len(indices), self._captions), bool)
    for r, captions in texts.items():
      valid[r, : len(captions)] = True
    tokens = np.zeros((*valid.shape, text.shape[1]), np.int32)
    tokens_mask = np.zeros(tokens.shape, bool)
    tokens[valid], tokens_mask[valid] = text, mask
    return dict(texts=tokens, texts_mask=tokens_mask, texts_valid=valid)

  def _label_set(self, record: dict[str, Any]) -> np.ndarray:
    """[K] bool, the classes of a sample."""
    label_set: np.ndarray = record["label_set"]
    if len(label_set) != self._classes:
      raise ValueError(
        f"{record['key']}.npy has {len(label_set)} numbers, one per class, but there are"
        f" {self._classes} class names; give the list of names that the dataset was made with"
      )
    return label_set

  def _encode(
    self, texts: dict[int, tuple[str, ...]], indices: np.ndarray, *, rejects: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, [n, L] each, of all texts in order; rows that fail are taken out."""
    try:
      return self._tokenizer.encode_batch([text for row in texts.values() for text in row])
    except Exception:
      for r, captions in list(texts.items()):
        try:
          self._tokenizer.encode_batch([*captions])
        except Exception as error:
          del texts[r]
          rejected = rejection(error)
          self._reject(int(indices[r]), f"row {r}", rejected, rejects=rejects[r])
      return self._tokenizer.encode_batch([text for row in texts.values() for text in row])
