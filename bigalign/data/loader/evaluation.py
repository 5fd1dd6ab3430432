"""Batches for evaluation: every sample once, in order, rows past the end marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.image import transforms
from bigalign.data.loader.training import Decoded, checked_rows, words
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.samples.rejects import REASONS
from bigalign.data.sources.base import Source, prefetch
from bigalign.data.stores.reader import sample_id


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  image_size: int,
  tokenizer: Mapping[str, Any],
  resize: str = "squash",
  apply_exif: bool = False,
  captions: int = 1,
  images: bool = True,
  workers: int = 0,
  start: int = 0,
) -> Batches:
  """Every sample from `start` on once, in order, in as many batches on every host.

  captions  C, the room for captions of one image. A record with more of them is an error, so that
            none is dropped unseen; 0 reads no captions at all (zero-shot on labels).
  images    whether they are decoded; if not, they are black, and none is rejected
  apply_exif  of decode.decode
  Rows past the end and rejected samples have valid=False. An image without captions stays valid,
  with texts_valid all False.
  """
  batches = _EvalBatches(
    source,
    batch_size=batch_size,
    rows=checked_rows(rows, batch_size=batch_size),
    image_size=image_size,
    tokenizer=tokenizer,
    resize=resize,
    captions=captions,
    images=images,
    apply_exif=apply_exif,
    start=start,
    ahead=max(workers, 1),
  )
  return iterate(batches, workers=workers)


class _EvalBatches(Decoded):
  """Element k is this host's part of the k-th batch in source order."""

  def __init__(
    self,
    source,
    *,
    batch_size: int,
    rows: np.ndarray,
    image_size: int,
    tokenizer,
    resize: str,
    captions: int,
    images: bool,
    start: int,
    apply_exif: bool,
    ahead: int,
  ):
    super().__init__(source, image_size=image_size, tokenizer=tokenizer, apply_exif=apply_exif)
    self._batch_size = batch_size
    self._rows = rows
    self._resize = resize
    transforms.eval_image(np.zeros((2, 2, 3), np.uint8), size=2, resize=resize)
    self._captions = captions
    self._images = images
    self._start = start
    self._ahead = ahead  # batches until this worker's next one

  def __len__(self) -> int:
    return -(-(len(self._source) - self._start) // self._batch_size)

  def __repr__(self) -> str:
    return f"eval batches of {self._source!r}"

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    indices = self._start + k * self._batch_size + self._rows
    soon = np.concatenate([indices, indices + self._ahead * self._batch_size])
    prefetch(self._source, soon[soon < len(self._source)].tolist())
    b, c, size = len(indices), self._captions, self._image_size
    images = np.zeros((b, size, size, 3), np.uint8)
    labels = np.full(b, -1, np.int32)
    valid = np.zeros(b, bool)
    texts_valid = np.zeros((b, c), bool)
    rejects = np.zeros((b, len(REASONS)), np.int32)
    texts: list[str] = []
    ids = np.zeros(b, np.uint64)
    for r in np.flatnonzero(indices < len(self._source)):
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
      if self._images:
        images[r] = transforms.eval_image(record["image"], size=size, resize=self._resize)
      labels[r] = record["label"]
      valid[r] = True
      ids[r] = sample_id(record["key"])
      texts_valid[r, : len(captions)] = True
      texts += captions
    text, mask = self._tokenizer.encode_batch(texts)
    tokens = np.zeros((b, c, text.shape[1]), np.int32)
    tokens_mask = np.zeros((b, c, text.shape[1]), bool)
    tokens[texts_valid], tokens_mask[texts_valid] = text, mask
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
    )
