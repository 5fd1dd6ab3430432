"""Batches for evaluation: every sample once, in order, rows past the end marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.training import SampleReader, checked_rows, words
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import REASONS, rejection
from bigalign.data.sources.base import Source, prefetch


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
    images: whether images are decoded; if not, they are [b, 0, 0, 3], and none is rejected.
    start: the first sample.
    classes: K, the classes of a multilabel dataset; then batches also have label_set [b, K] bool
      and has_label_set [b] bool. A sample with another number of classes is an error.
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
  )
  return iterate(batches, workers=data.workers)


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
  ):
    super().__init__(source, data)
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
    soon = np.concatenate([indices, indices + self._ahead * self._batch_size])
    soon = soon[soon < len(self._source)]
    # Room for all blocks of both batches; what does not fit would be fetched one request at a time.
    block = getattr(self._source, "block", 1)
    held = (len(np.unique(soon // block)) + 2) * block if block > 1 else 0
    prefetch(self._source, soon.tolist(), hold=held)
    b, c = len(indices), self._captions
    size = self._data.image_size if self._images else 0
    images = np.zeros((b, size, size, 3), np.uint8)
    labels = np.full(b, -1, np.int32)
    valid = np.zeros(b, bool)
    texts_valid = np.zeros((b, c), bool)
    rejects = np.zeros((b, len(REASONS)), np.int32)
    texts: dict[int, tuple[str, ...]] = {}  # of each valid row
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
        if self._images:
          images[r] = self._data.evaluation_view(record["image"])
      except Exception as error:
        self._reject(int(indices[r]), record["key"], rejection(error), rejects=rejects[r])
        continue
      labels[r] = record["label"]
      if self._classes and "label_set" in record:
        has_label_set[r] = True
        label_sets[r] = self._label_set(record)
      ids[r] = sample_id(record["key"])
      texts[r] = captions
    text, mask = self._encode(texts, indices, rejects=rejects)
    valid[[*texts]] = True
    for r, captions in texts.items():
      texts_valid[r, : len(captions)] = True
    tokens = np.zeros((b, c, text.shape[1]), np.int32)
    tokens_mask = np.zeros((b, c, text.shape[1]), bool)
    tokens[texts_valid], tokens_mask[texts_valid] = text, mask
    images[~valid], labels[~valid], ids[~valid] = 0, -1, 0
    several = dict(label_set=label_sets, has_label_set=has_label_set) if self._classes else {}
    return dict(
      image=images,
      texts=tokens,
      texts_mask=tokens_mask,
      texts_valid=texts_valid,
      label=labels,
      image_id=words(indices),
      sample_id=words(ids),
      index=indices.astype(np.int32),
      valid=valid,
      rejects=rejects,
      **several,
    )

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
