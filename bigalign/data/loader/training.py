"""Makes each host batch from its step number alone.

There is no iterator state to save, and the numbers of hosts and workers may change: an element of
the grain dataset is the whole batch of a step, so neither changes its content.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bigalign.data.image import transforms
from bigalign.data.loader import shared_memory
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.order import blocks
from bigalign.data.order.order import Order
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import REASONS, Rejected, append_json_line
from bigalign.data.sources.base import Source, where
from bigalign.data.stores.one_side import OneSide
from bigalign.data.stores.reader import Store
from bigalign.data.text.captions import by_field, choose, lacks, repaired
from bigalign.data.text.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

ATTEMPTS = 8
PROBES = 8


def batch_spec(data: DataOptions, *, batch_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
  """{name: (shape, dtype)} of the fields of a global train batch; reads no data."""
  b, size = batch_size, data.image_size
  text: dict[str, Any] = dict(
    text=((b, data.text_length), np.int32), text_mask=((b, data.text_length), np.bool_)
  )
  second = {name.replace("text", "text_second"): spec for name, spec in text.items()}
  return dict(
    image=((b, size, size, 3), np.uint8),
    **text,
    **(second if data.has_second_text else {}),
    image_id=((b, 2), np.uint32),
    text_id=((b, 2), np.uint32),
    label=((b,), np.int32),
    source=((b,), np.int32),
    rejects=((b, len(REASONS)), np.int32),
    repaired=((b,), np.int32),
  )


def train_batches(
  source: Source,
  data: DataOptions,
  *,
  batch_size: int,
  rows: np.ndarray | Sequence[int],
  seed: int,
  start: int = 0,
  stop: int | None = None,
  lane_rows: int = 0,
  rejected_log: str = "",
  stored: OneSide | None = None,
) -> Batches:
  """This host's rows of the global batches from a position on.

  A rejected sample is replaced by a substitute that its position chooses, and counted in `rejects`
  by reason, one count per sample tried. `repaired` counts the captions of a row, one or two, that
  were not valid UTF-8. Close the iterator (`.close()`) to end the workers.

  Args:
    source: the samples.
    data: how they are read. `workers` does not change the batches; with 0, a thread of this
      process reads.
    batch_size: of the global batch.
    rows: the rows of the global batch that this host owns.
    seed: of the order of samples, of the choice of captions, and of augmentation.
    start: samples seen: the position of row 0 of the first batch.
    stop: the end position, exclusive; an incomplete last batch is dropped. None: endless.
    lane_rows: of Order; the batch size if 0.
    rejected_log: a file to which each rejected sample is appended, one line of JSON each; "" for
      none.
    stored: embeddings that replace `image` or `text`, which then has the shape [b, D].

  Returns:
    An iterator of {name: array}; the fields are those of `batch_spec`.
  """
  order = Order(
    source, seed=seed, lane_rows=lane_rows or batch_size, shuffle=data.shuffle, kind=data.order
  )
  batches = _TrainBatches(
    source,
    data,
    batch_size=batch_size,
    rows=checked_rows(rows, batch_size=batch_size),
    seed=seed,
    start=start,
    stop=stop,
    order=order,
    rejected_log=rejected_log,
    stored=stored,
  )
  return iterate(batches, workers=data.workers)


def checked_rows(rows: np.ndarray | Sequence[int], *, batch_size: int) -> np.ndarray:
  """Returns [b] int64; raises ValueError unless they are rows of the global batch."""
  array = np.asarray(rows, np.int64)
  if array.ndim != 1 or not array.size or array.min() < 0 or array.max() >= batch_size:
    raise ValueError(
      f"rows must be a list of row numbers below batch_size={batch_size}; got an "
      f"array of shape {array.shape}: {array.ravel()[:8]}"
    )
  return array


def words(ids: np.ndarray) -> np.ndarray:
  """[N] 64-bit ids → [N, 2] uint32, (high, low): x64 is off on the device."""
  ids = ids.astype(np.uint64)
  return np.stack([ids >> np.uint64(32), ids & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)


class SampleReader:
  """Reads and decodes single samples, and logs rejected ones. Base of train and eval batches."""

  def __init__(
    self,
    source: Source,
    data: DataOptions,
    *,
    rejected_log: str = "",
    stored: OneSide | None = None,
  ):
    self._source = source
    self._data = data
    self._stored = stored
    self._rejected_log = rejected_log
    self._tokenizer: Tokenizer = data.make_tokenizer()
    self._logged: set[int] = set()
    self._shrink: Callable[[int, int], int] | None = None

  def _sample(
    self, index: int, *, rejects: np.ndarray, decoded: bool = True
  ) -> dict[str, Any] | None:
    """The record with its image decoded; None if rejected, which is counted in `rejects` [R]."""
    key = f"sample {index}"
    try:
      record = self._source[index]
      key = record["key"]
      if self._stored:
        record = self._stored.replace(record)
      if not decoded or (self._stored and self._stored.image):
        return record
      return {**record, "image": self._data.decode(record["image"], shrink=self._shrink)}
    except Rejected as rejected:
      self._reject(index, key, rejected, rejects=rejects)
      return None

  def _reject(self, index: int, key: str, rejected: Rejected, *, rejects: np.ndarray) -> None:
    rejects[REASONS.index(rejected.reason)] += 1
    if index not in self._logged:
      self._logged.add(index)
      logger.warning("Rejected %s (index %d): %s", key, index, rejected)
      if self._rejected_log:
        shard, ordinal, _ = where(self._source, index)
        append_json_line(
          self._rejected_log,
          shard=shard,
          ordinal=ordinal,
          index=index,
          key=key,
          reason=rejected.reason,
          detail=rejected.detail,
        )


class _TrainBatches(SampleReader):
  """Element k is this host's part of batch k after `start`."""

  def __init__(
    self,
    source: Source,
    data: DataOptions,
    *,
    batch_size: int,
    rows: np.ndarray,
    seed: int,
    start: int,
    stop: int | None,
    order: Order,
    rejected_log: str,
    stored: OneSide | None,
  ):
    super().__init__(source, data, rejected_log=rejected_log, stored=stored)
    self._image_store = stored.image if stored else None
    self._text_store = stored.text if stored else None
    self._second_store = stored.second if stored else None
    self._probed: set[str] = set()
    self._batch_size = batch_size
    self._rows = rows
    self._seed = seed
    self._start = start
    self._shrink = functools.partial(
      transforms.shrink, size=data.image_size, **data.augment.options
    )
    data.check_augment()  # here, where an error is easier to read than from a worker
    self._order = order
    self._captions, self._second_captions = data.first_columns, data.second_columns
    self._captions_per_image = data.captions_per_image
    self._stride = max(data.workers, 1)  # a worker makes every workers-th batch
    # Positions are int64; grain needs a length even for an endless dataset.
    self._length = ((1 << 62 if stop is None else stop) - start) // batch_size

  def __len__(self) -> int:
    return max(self._length, 0)

  def __repr__(self) -> str:
    return f"train batches of {self._source!r}"

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    positions = self._positions(k)
    indices = self._order(positions)
    self._prefetch(k, indices)
    b, size = len(positions), self._data.image_size
    images = (
      np.empty(b, np.int64)
      if self._image_store
      else shared_memory.empty((b, size, size, 3), np.uint8)
    )
    labels = np.empty(b, np.int32)
    image_ids, text_ids = np.empty(b, np.int64), np.empty(b, np.int64)
    rejects = np.zeros((b, len(REASONS)), np.int32)
    texts: list[Any] = []  # captions, or row numbers of stored captions
    seconds: list[Any] = []
    for r in range(b):
      position = int(positions[r])
      index, record, captions = self._usable(position, int(indices[r]), rejects=rejects[r])
      rng = philox(self._seed, position)
      all_captions = [text for column in captions.values() for text in column]
      ordinal = choose(captions, self._captions, rng)
      images[r] = (
        record["image"] if self._image_store else self._data.training_view(record["image"], rng)
      )
      texts.append(all_captions[ordinal])
      if self._second_captions:
        second = choose(captions, self._second_captions, rng, but=ordinal)
        seconds.append(all_captions[second])
      labels[r] = record["label"]
      image_ids[r], text_ids[r] = index, index * self._captions_per_image + ordinal
    text, mask, was_repaired = self._encode(texts, self._text_store)
    batch = dict(
      image=self._image_store.read(images) if self._image_store else images,
      text=text,
      text_mask=mask,
      image_id=words(image_ids),
      text_id=words(text_ids),
      label=labels,
      rejects=rejects,
      repaired=was_repaired,
      source=self._order.source_of(indices).astype(np.int32),
    )
    if self._second_captions:
      batch["text_second"], batch["text_second_mask"], was_repaired = self._encode(
        seconds, self._second_store
      )
      batch["repaired"] += was_repaired
    return batch

  def _encode(
    self, texts: Sequence[Any], store: Store | None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids [b, L], or stored vectors [b, D]; their mask; 1 for a repaired caption, [b]."""
    if store is None:
      return *self._tokenizer.encode_batch(texts), repaired(texts)
    return (
      store.read(np.array(texts)),
      np.ones((len(texts), 1), bool),
      np.zeros(len(texts), np.int32),
    )

  def _positions(self, k: int) -> np.ndarray:
    return self._start + k * self._batch_size + self._rows

  def _prefetch(self, k: int, indices: np.ndarray) -> None:
    """Starts fetching this batch and this worker's next one, so that I/O overlaps decoding."""
    if k + self._stride < len(self):
      indices = np.append(indices, self._order(self._positions(k + self._stride)))
    # If the number of workers divides blocks.STEP_LANES, each has lanes of its own.
    workers = math.gcd(self._stride, blocks.STEP_LANES)
    self._order.prefetch(indices, share=len(self._rows) / self._batch_size / workers)

  def _usable(
    self, position: int, index: int, *, rejects: np.ndarray
  ) -> tuple[int, dict[str, Any], dict[str, tuple[str, ...]]]:
    """(index, record, captions by field) of the sample, or of its first usable substitute."""
    for attempt in range(ATTEMPTS + 1):
      if attempt:
        index = self._order.substitute(position, attempt, index)
      sample = self._with_captions(index, rejects=rejects)
      if sample is not None:
        return index, *sample
      self._probe_shard(index)
    counts = {reason: int(n) for reason, n in zip(REASONS, rejects) if n}
    raise ValueError(
      f"{self._source!r}: position {position} and its {ATTEMPTS} substitutes are all rejected "
      f"({counts}), so most of this source, or of this part of the mixture, seems unusable; the"
      " log names samples and reasons"
      + (
        ". Set config.data.captions to fields that these samples have."
        if "no_caption" in counts
        else "."
      )
    )

  def _with_captions(
    self,
    index: int,
    *,
    rejects: np.ndarray,
  ) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]] | None:
    """The record, decoded, and its captions by field; None if rejected."""
    record = self._sample(index, rejects=rejects)
    if record is None:
      return None
    captions = by_field(record, self._captions, self._second_captions)
    if lacks(captions, self._captions) or lacks(captions, self._second_captions):
      self._reject(index, record["key"], Rejected("no_caption"), rejects=rejects)
      return None
    count = sum(len(column) for column in captions.values())
    if count > self._captions_per_image:
      raise ValueError(
        f"{record['key']} has {count} captions; set "
        "config.data.captions_per_image to the largest number of an image, now "
        f"{self._captions_per_image}"
      )
    return record, captions

  def _probe_shard(self, index: int) -> None:
    """Raises ValueError if nothing in the shard of a rejected sample seems to be usable."""
    shard, ordinal, size = where(self._source, index)
    if not self._data.stop_at_bad_shard or size <= PROBES or shard in self._probed:
      return
    self._probed.add(shard)
    reasons = np.zeros(len(REASONS), np.int32)  # of the probes, which are not in the batch
    others = [index - ordinal + (2 * i + 1) * size // (2 * PROBES) for i in range(PROBES)]
    # A view may lack samples of the shard, often bad ones; then the shard is not judged.
    in_shard = [0 <= i < len(self._source) and where(self._source, i)[0] == shard for i in others]
    if all(in_shard) and all(
      self._with_captions(other, rejects=reasons) is None for other in others
    ):
      counts = {reason: int(n) for reason, n in zip(REASONS, reasons) if n}
      raise ValueError(
        f"{shard}: sample {ordinal} and {PROBES} others spread over its {size} cannot be used"
        f" ({counts}), so the whole shard seems to be bad; repair it, leave it out, or set"
        " config.data.stop_at_bad_shard=False"
      )
