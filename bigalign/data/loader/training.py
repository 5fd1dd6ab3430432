"""Makes each host batch from its step number alone.

There is no iterator state to save, and the numbers of hosts and workers may change: an element of
the grain dataset is the whole batch of a step, so neither changes its content.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from bigalign.data.fields import texts as several_texts
from bigalign.data.fields import views
from bigalign.data.fields.base import Draws, Field, Sample
from bigalign.data.fields.texts import Texts
from bigalign.data.image import naflex
from bigalign.data.loader import extra_fields, shared_memory
from bigalign.data.loader.options import DataOptions
from bigalign.data.loader.workers import Batches, iterate
from bigalign.data.order import blocks
from bigalign.data.order.lengths import LengthSchedule
from bigalign.data.order.order import Order
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import (
  DETAIL,
  REASONS,
  Rejected,
  append_json_line,
  rejection,
)
from bigalign.data.sources.base import Source, read, where
from bigalign.data.sources.mixture import names
from bigalign.data.stores.one_side import OneSide
from bigalign.data.stores.reader import Store
from bigalign.data.text.captions import by_field, choose, lacks, repaired
from bigalign.data.text.code_switch import CodeSwitch
from bigalign.data.text.tokenizers import Tokenizer
from bigalign.tree import cut

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # substitutes that are tried at least; see attempts()
PROBES = 8  # shards up to this size are not judged

Rows = np.ndarray | Sequence[int] | Mapping[int, np.ndarray]


def batch_spec(data: DataOptions, *, batch_size: int) -> dict[str, tuple[tuple[int, ...], type]]:
  """{name: (shape, dtype)} of the fields of a global train batch; reads no data.

  Args:
    data: how samples are read; of images as patches, those of its evaluation length.
    batch_size: of the global batch.
  """
  b = batch_size
  text: dict[str, Any] = dict(
    text=((b, data.text_length), np.int32), text_mask=((b, data.text_length), np.bool_)
  )
  second = {name.replace("text", "text_second"): spec for name, spec in text.items()}
  images = data.spec if data.images else {}
  return dict(
    **{name: ((b, *shape), dtype) for name, (shape, dtype) in images.items()},
    **text,
    **(second if data.has_second_text else {}),
    image_id=((b, 2), np.uint32),
    text_id=((b, 2), np.uint32),
    label=((b,), np.int32),
    source=((b,), np.int32),
    rejects=((b, len(REASONS)), np.int32),
    repaired=((b,), np.int32),
    **{name: ((b, *shape), dtype) for name, (shape, dtype) in extra_fields.spec(data).items()},
  )


def train_batches(
  source: Source,
  data: DataOptions,
  *,
  batch_size: int,
  rows: Rows,
  seed: int,
  start: int = 0,
  stop: int | None = None,
  step: int = 0,
  lane_rows: int = 0,
  rejected_log: str = "",
  stored: OneSide | None = None,
  fields: tuple[Field, ...] | None = None,
) -> Batches:
  """This host's rows of the global batches from a position on.

  A rejected sample is replaced by a substitute that its position chooses, and counted in `rejects`
  by reason, one count per sample tried. `repaired` counts the captions of a row, one or two, that
  were not valid UTF-8. Close the iterator (`.close()`) to end the workers.

  Args:
    source: the samples.
    data: how they are read. `workers` does not change the batches; with 0, a thread of this
      process reads.
    batch_size: of the global batch; with data.naflex, of the largest.
    rows: the rows of the global batch that this host owns; or {batch size: rows}, of batches of
      several sizes.
    seed: of the order of samples, of the choice of captions, of augmentation, and of the lengths of
      data.naflex.
    start: samples seen: the position of row 0 of the first batch.
    stop: the end position, exclusive; an incomplete last batch is dropped. None: endless.
    step: the number of the first batch in the run, from which data.naflex draws its length.
    lane_rows: of Order; the batch size if 0.
    rejected_log: a file to which each rejected sample is appended, one line of JSON each; "" for
      none.
    stored: embeddings that replace `image` or `text`, which then has the shape [b, D].
    fields: of extra_fields.open_fields; None to open them here.

  Returns:
    An iterator of {name: array}; the fields are those of `batch_spec`.
  """
  order = Order(
    source, seed=seed, lane_rows=lane_rows or batch_size, shuffle=data.shuffle, kind=data.order
  )
  batches = _TrainBatches(
    source,
    data,
    rows=rows,
    seed=seed,
    plan=Plan(data.length_schedule(batch_size, seed), batch_size, step, start, stop),
    order=order,
    rejected_log=rejected_log,
    stored=stored,
    fields=extra_fields.open_fields(data, source) if fields is None else fields,
  )
  return iterate(batches, workers=data.workers)


class Plan:
  """The position, the size and the length of each batch of a stretch of a run.

  Args:
    schedule: of batches of several lengths; None for squares.
    batch_size: of the batches, without a schedule.
    step: the number of batch 0 in the run.
    start: its first position.
    stop: the end position, exclusive; None: endless.
  """

  def __init__(
    self,
    schedule: LengthSchedule | None,
    batch_size: int,
    step: int,
    start: int,
    stop: int | None,
  ):
    self.schedule, self._batch_size, self._step = schedule, batch_size, step
    # Positions are int64; grain needs a length even for an endless dataset.
    self._start, self._end = start, 1 << 62 if stop is None else stop
    sizes = {batch_size} if schedule is None else {*schedule.sizes}
    self._fixed = sizes.pop() if len(sizes) == 1 else 0
    self._starts = np.array([start])  # of the batches that were asked for so far

  def __len__(self) -> int:
    if self._fixed:
      return max(0, (self._end - self._start) // self._fixed)
    if self._end == 1 << 62:
      return self._end
    while self._starts[-1] < self._end:
      self._reach(2 * len(self._starts))
    return int(np.searchsorted(self._starts, self._end, side="right")) - 1

  def start(self, k: int) -> int:
    """The position of row 0 of batch k."""
    if self._fixed:
      return self._start + k * self._fixed
    self._reach(k)
    return int(self._starts[k])

  def _reach(self, k: int) -> None:
    """Computes the starts of the batches up to k, and of some more."""
    known = len(self._starts)
    if k < known or self.schedule is None:
      return
    steps = self._step + np.arange(known - 1, max(k, known + 1024))
    sizes = np.array(self.schedule.sizes)[self.schedule.draw(steps)]
    self._starts = np.append(self._starts, self._starts[-1] + np.cumsum(sizes))

  def size(self, k: int) -> int:
    """The size of batch k."""
    return self._fixed or self.at(k)[1]

  def at(self, k: int) -> tuple[int, int]:
    """(length, size) of batch k; length 0 without a schedule."""
    return self.schedule.at(self._step + k) if self.schedule else (0, self._batch_size)


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
    self._last: Rejected | None = None
    self._probing = False

  def _sample(
    self,
    index: int,
    *,
    rejects: np.ndarray,
    decoded: bool = True,
    rng: np.random.Generator | None = None,
  ) -> dict[str, Any] | None:
    """The record with its image decoded; None if rejected, which is counted in `rejects` [R].

    With config.data.frames the image is a list of frames, which `rng` draws.
    """
    key = f"sample {index}"
    try:
      record = read(self._source, index)
      key = record["key"]
      if self._stored:
        record = self._stored.replace(record)
      if not decoded or (self._stored and self._stored.image):
        return record
      image = self._data.decode(record["image"], shrink=self._shrink, rng=rng)
      return {**record, "image": image}
    except Rejected as rejected:
      self._reject(index, key, rejected, rejects=rejects)
      return None

  def _reject(self, index: int, key: str, rejected: Rejected, *, rejects: np.ndarray) -> None:
    rejects[REASONS.index(rejected.reason)] += 1
    self._last = rejected
    if self._probing:  # neither in a batch nor in the log
      return
    if index not in self._logged:
      self._logged.add(index)
      shard, ordinal, _ = where(self._source, index)
      logger.warning(
        "Rejected %s (index %d): %s; sample %d of %s",
        *(cut(key, DETAIL), index, rejected, ordinal, shard),
      )
      if self._rejected_log:
        append_json_line(
          self._rejected_log,
          shard=shard,
          ordinal=ordinal,
          index=index,
          key=key,
          reason=rejected.reason,
          detail=rejected.detail,
        )


class _NotTokenised(Exception):
  """The tokenizer raised an error for some text of a batch."""


class _View(NamedTuple):
  """What a train batch holds of one sample: second is None without second captions."""

  sample: int  # its index
  image: Any  # uint8 [S, S, 3], [F, S, S, 3], or the row of a store; not read without images
  texts: Texts  # captions, or the rows of a store; the first is that of batch["text"]
  second: Any
  label: int
  extra: tuple[Any, ...]  # the value of each extra field


class _TrainBatches(SampleReader):
  """Element k is this host's part of batch k after `start`."""

  def __init__(
    self,
    source: Source,
    data: DataOptions,
    *,
    rows: Rows,
    seed: int,
    plan: Plan,
    order: Order,
    rejected_log: str,
    stored: OneSide | None,
    fields: tuple[Field, ...],
  ):
    super().__init__(source, data, rejected_log=rejected_log, stored=stored)
    self._fields = fields
    self._replay = next((x for field in fields if (x := getattr(field, "replay", None))), None)
    self._image_store = stored.image if stored else None
    self._text_store = stored.text if stored else None
    self._second_store = stored.second if stored else None
    self._views_images = data.images and not self._image_store
    self._probed: set[str] = set()
    self._plan = plan
    schedule = plan.schedule
    lengths = schedule.lengths if schedule else (0,)
    sizes = {*schedule.sizes} if schedule else {plan.size(0)}
    by_size = rows if isinstance(rows, Mapping) else dict.fromkeys(sizes, rows)
    self._rows = {size: checked_rows(by_size[size], batch_size=size) for size in sizes}
    self._seed = seed
    self._of_length = {n: data.of_length(n) for n in lengths}
    self._read_at(lengths[0])
    data.check_augment()  # here, where an error is easier to read than from a worker
    self._order = order
    self._tolerated = float(data.rejects.option("stop"))
    self._attempts = attempts(self._tolerated)
    self._bad: collections.Counter[int] = collections.Counter()  # samples in bad shards, by part
    tokens = data.prefix_tokens
    self._prefixes = tokens.numbers(names(source)) if tokens else None
    self._captions, self._second_captions = data.first_columns, data.second_columns
    self._switch = CodeSwitch(data.code_switch) if data.code_switch else None
    self._captions_per_image = data.captions_per_image
    self._stride = max(data.workers, 1)  # a worker makes every workers-th batch
    self._length = len(plan)

  def __len__(self) -> int:
    return self._length

  def _read_at(self, length: int) -> None:
    """Reads images with so many patches from now on; one thread makes the batches."""
    self._reading = self._of_length[length]
    # The crops that a teacher saw are those of the whole image.
    self._shrink = None if self._replay else functools.partial(_shrink, self._reading)

  def __repr__(self) -> str:
    return f"train batches of {self._source!r}"

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    try:
      return self._batch(k, alone=False)
    except _NotTokenised:
      return self._batch(k, alone=True)  # finds the texts that fail, and rejects their samples

  def _batch(self, k: int, *, alone: bool) -> dict[str, np.ndarray]:
    """Batch k; with `alone` every text is tokenised by itself first."""
    positions = self._positions(k)
    indices = self._order(positions)
    self._prefetch(k, indices)
    self._read_at(self._plan.at(k)[0])
    b, spec = len(positions), self._reading.spec
    stored = np.empty(b, np.int64)
    images = {}
    if self._views_images:
      images = {x: shared_memory.empty((b, *shape), dtype) for x, (shape, dtype) in spec.items()}
    labels = np.empty(b, np.int32)
    image_ids, text_ids = np.empty(b, np.int64), np.empty(b, np.int64)
    rejects = np.zeros((b, len(REASONS)), np.int32)
    texts: list[Any] = []  # captions, or row numbers of stored captions
    seconds: list[Any] = []
    chosen: list[Texts] = []
    extra: list[tuple[Any, ...]] = []
    for r in range(b):
      view = self._usable(int(positions[r]), int(indices[r]), rejects=rejects[r], alone=alone)
      if self._image_store:
        stored[r] = view.image
      elif self._views_images:
        for name, x in naflex.to_fields(view.image).items():
          images[name][r] = x
      texts.append(view.texts.texts[0])
      chosen.append(view.texts)
      extra.append(view.extra)
      if self._second_captions:
        seconds.append(view.second)
      labels[r] = view.label
      image_ids[r] = view.sample
      text_ids[r] = view.sample * self._captions_per_image + view.texts.places[0]
    origin = self._order.source_of(indices)
    text, mask, was_repaired = self._encode(texts, self._text_store, origin)
    batch = dict(
      **(dict(image=self._image_store.read(stored)) if self._image_store else images),
      text=text,
      text_mask=mask,
      image_id=words(image_ids),
      text_id=words(text_ids),
      label=labels,
      rejects=rejects,
      repaired=was_repaired,
      source=origin.astype(np.int32),
    )
    if self._second_captions:
      batch["text_second"], batch["text_second_mask"], was_repaired = self._encode(
        seconds, self._second_store, origin
      )
      batch["repaired"] += was_repaired
    if self._data.texts:
      batch |= self._several(chosen, origin)
    return batch | extra_fields.stacked(self._fields, extra)

  def _several(self, chosen: Sequence[Texts], origin: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of several texts."""
    kinds = dict(texts_kind=np.array([one.kinds for one in chosen], np.int32))
    others = [text for one in chosen for text in one.texts[1:]]
    if not others:
      return kinds
    origin = np.repeat(origin, len(others) // len(chosen))
    ids, mask, _ = self._encode(others, self._text_store, origin)
    ids, mask = (rearrange(x, "(b m) ... -> b m ...", b=len(chosen)) for x in (ids, mask))
    return dict(text_others=ids, text_others_mask=mask, **kinds)

  def _encode(
    self, texts: Sequence[Any], store: Store | None, origin: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids [b, L], or stored vectors [b, D]; their mask; 1 for a repaired caption, [b].

    Args:
      texts: b captions, or row numbers of stored captions.
      store: of captions.
      origin: [b], the sources of the texts.
    """
    if store is None:
      which = {} if self._prefixes is None else {"which": self._prefixes[origin]}
      try:
        return *self._tokenizer.encode_batch(texts, **which), repaired(texts)
      except Exception as error:
        raise _NotTokenised(
          f"the tokenizer fails on a batch, but not on each of its texts alone: {error}"
        ) from error
    return (
      store.read(np.array(texts)),
      np.ones((len(texts), 1), bool),
      np.zeros(len(texts), np.int32),
    )

  def _positions(self, k: int) -> np.ndarray:
    return self._plan.start(k) + self._rows[self._plan.size(k)]

  def _prefetch(self, k: int, indices: np.ndarray) -> None:
    """Starts fetching this batch and this worker's next one, so that I/O overlaps decoding."""
    if k + self._stride < len(self):
      indices = np.append(indices, self._order(self._positions(k + self._stride)))
    # If the number of workers divides blocks.STEP_LANES, each has lanes of its own.
    workers = math.gcd(self._stride, blocks.STEP_LANES)
    size = self._plan.size(k)
    self._order.prefetch(indices, share=len(self._rows[size]) / size / workers)

  def _usable(self, position: int, index: int, *, rejects: np.ndarray, alone: bool) -> _View:
    """The view of the sample, or of its first usable substitute."""
    for attempt in range(self._attempts + 1):
      if attempt:
        index = self._order.substitute(position, attempt, index)
      view = self._view(index, position, rejects=rejects, alone=alone)
      if view is not None:
        return view
      self._probe_shard(index)
    counts = {reason: int(n) for reason, n in zip(REASONS, rejects) if n}
    raise ValueError(
      f"{self._source!r}: position {position} and its {self._attempts} substitutes are all"
      f" rejected ({counts}; the last: {cut(str(self._last), DETAIL)}), so most of this source, or"
      " of this part of the mixture, seems unusable; the log names samples and reasons"
      + (
        ". Set config.data.captions to fields that these samples have."
        if "no_caption" in counts
        else "."
      )
    )

  def _view(
    self, index: int, position: int, *, rejects: np.ndarray, alone: bool = False
  ) -> _View | None:
    """What a batch holds of a sample at a position; None if it is rejected."""
    draws = Draws(self._seed, position)
    sample = self._with_captions(index, rejects=rejects, draws=draws)
    if sample is None:
      return None
    record, captions = sample
    rng = philox(self._seed, position)
    every = [text for column in captions.values() for text in column]
    first, second, replay = choose(captions, self._captions, rng), -1, -1
    try:
      image, part, seen = record["image"], None, rng
      if self._replay:
        replay = int(draws.of("replay").integers(self._replay.views))
        seen = self._replay.rng(record["key"], replay)
      if self._data.regions or self._data.locations:
        part = self._reading.part_of_view(image, seen)
      if self._replay or self._views_images:
        image = self._reading.training_view(image, seen)
      if self._second_captions:
        second = choose(captions, self._second_captions, rng, but=first)
      texts = several_texts.read(
        self._data.texts,
        captions,
        self._captions,
        draws,
        first=first,
        source=self._source,
        index=index,
        switch=self._switch,
      )
      second_text = every[second] if second >= 0 else None
      for text, store in (
        *((text, self._text_store) for text in texts.texts),
        (second_text, self._second_store),
      ):
        if alone and store is None and text is not None:
          self._tokenizer.encode_batch([text])
      known = Sample(index, record, captions, texts.places, second, replay, rejects, part)
      extra = tuple(field.read(known, draws) for field in self._fields)
    except Exception as error:
      self._reject(index, record["key"], rejection(error), rejects=rejects)
      return None
    return _View(index, image, texts, second_text, record["label"], extra)

  def _with_captions(
    self,
    index: int,
    *,
    rejects: np.ndarray,
    draws: Draws | None = None,
  ) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]] | None:
    """The record, decoded, and its captions by field; None if rejected."""
    rng = draws.of("frames") if draws and self._data.frames else None
    record = self._sample(index, rejects=rejects, decoded=self._data.images, rng=rng)
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
    """Judges the shard of a rejected sample by other samples of it, drawn at random, once.

    Raises:
      ValueError: if shards without usable samples hold a larger share of the source than
        config.data.rejects.stop; names this one.
    """
    shard, ordinal, size = where(self._source, index)
    if not self._data.stop_at_bad_shard or size <= PROBES or shard in self._probed:
      return
    self._probed.add(shard)
    # The samples of the shard; a view may lack some of them, often bad ones.
    first = _edge(self._source, shard, index, max(index - ordinal, 0) - 1)
    last = _edge(self._source, shard, index, min(index - ordinal + size, len(self._source)))
    count = last - first + 1
    part = int(self._order.source_of(np.asarray(index)))
    total = self._order.size(part)
    wanted = evidence(count, shards=-(-total // size), tolerated=self._tolerated)
    reasons = np.zeros(len(REASONS), np.int32)  # of the probes, which are not in the batch
    probed, self._probing = 0, True
    try:
      for other in _draw(first, last, wanted, but=index, rng=philox(self._seed, first)):
        if self._with_captions(other, rejects=reasons) is not None:
          return
        probed += 1
    finally:
      self._probing = False
    if not probed:
      return
    self._bad[part] += count
    share = self._bad[part] / total
    counts = {reason: int(n) for reason, n in zip(REASONS, reasons) if n}
    text = (
      f"{shard}: sample {ordinal} and {probed} others, drawn at random from its {count}, cannot be"
      f" used ({counts}), so the whole shard seems to be bad. The bad shards that this process"
      f" found hold {share:.2%} of the source; config.data.rejects.stop is {self._tolerated:.2%}"
    )
    if share <= self._tolerated:
      logger.warning("%s", text)
      return
    raise ValueError(
      f"{text}. Repair it, leave it out, allow more with config.data.rejects=dict(stop=…), or set"
      " config.data.stop_at_bad_shard=False"
    )


def _shrink(data: DataOptions, height: int, width: int) -> int:
  """By how much a JPEG may be reduced when it is decoded for all views of it."""
  own = data.shrink(height, width)
  return min(own, views.shrink(data.views, data.image_size, height, width))


def evidence(size: int, *, shards: int, tolerated: float) -> int:
  """Returns how many samples of a shard, all bad, show that the shard is bad throughout.

  If a share p of a shard is bad, n samples that are drawn are all bad with probability p ** n. A
  shard counts as bad throughout if more than p of it is bad; p is the tolerated share, but at
  least 90 % for shards of up to 1,000 samples and 99 % for those of 10,000 and more. n is the
  smallest number with which the probability that any shard is judged wrongly is at most 1e-6. If n
  is larger than the shard, all of it is read.

  Args:
    size: samples in the shard.
    shards: number of shards, each of which may be judged once.
    tolerated: the share of rejected samples that the options allow.

  >>> evidence(1_000, shards=1, tolerated=0.02), evidence(10_000, shards=1_000, tolerated=0.02)
  (132, 2062)
  """
  share = min(max(tolerated, 0.9, 1 - 100 / size), 0.99)
  return math.ceil(math.log(1e-6 / max(shards, 1)) / math.log(share))


def attempts(tolerated: float) -> int:
  """Returns how many substitutes of a rejected sample are tried before a run stops.

  So many that a run whose share of rejected samples is tolerated meets as many in a row at one of
  a billion positions with a probability of at most 1e-6; at most 3,437.

  >>> attempts(0.02), attempts(0.5), attempts(1.0)
  (8, 49, 3436)
  """
  share = min(tolerated, 0.99)
  return max(ATTEMPTS, math.ceil(math.log(1e-15) / math.log(share)) - 1) if share > 0 else ATTEMPTS


def _edge(source: Source, shard: str, inside: int, outside: int) -> int:
  """The index of a shard's sample that is nearest to `outside`, an index beyond the shard."""
  while abs(outside - inside) > 1:
    middle = (inside + outside) // 2
    if where(source, middle)[0] == shard:
      inside = middle
    else:
      outside = middle
  return inside


def _draw(
  first: int, last: int, count: int, *, but: int, rng: np.random.Generator
) -> Iterator[int]:
  """Yields up to `count` different indices from first to last, in a random order, without `but`."""
  size = last - first + 1
  if 2 * count > size:
    order = (first + rng.permutation(size)).tolist()
    yield from [i for i in order if i != but][:count]
    return
  seen = {but}
  while len(seen) <= count:
    i = first + int(rng.integers(size))
    if i not in seen:
      seen.add(i)
      yield i
