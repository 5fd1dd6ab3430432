"""Seconds per step, images per second, share of the chip's peak."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from bigalign import flops


class Clock:
  """Wall time between two logs, without evaluation and saving, and what it was spent on.

  MFU is the share of the chips' peak that goes into the model's FLOPs, which are
  perf/flops_per_step: what remat and microbatches compute again is work for the chips, but no use,
  and not counted.
  """

  def __init__(self, step: int, batch_size: int) -> None:
    self._start = time.perf_counter()
    self._data = self._pause = self._device = 0.0
    self._step = step
    self._batch_size = batch_size

  @contextlib.contextmanager
  def _timer(self, name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    setattr(self, name, getattr(self, name) + time.perf_counter() - begin)

  def waiting_for_data(self) -> contextlib.AbstractContextManager[None]:
    """A context in which the loop waits for data."""
    return self._timer("_data")

  def waiting_for_device(self) -> contextlib.AbstractContextManager[None]:
    """A context in which the loop waits for the device."""
    return self._timer("_device")

  def paused(self) -> contextlib.AbstractContextManager[None]:
    """A context that does not count."""
    return self._timer("_pause")

  def read(self, step: int, work: int) -> dict[str, float]:
    """Metrics since the last read; `work` is useful FLOPs per step. All hosts must call it."""
    now = time.perf_counter()
    steps = step - self._step
    seconds = max(now - self._start - self._pause, 1e-9) / steps
    data = self._data / steps
    # All hosts wait for the slowest in the collectives; what a host itself was busy with tells it.
    busy = max(seconds - self._device / steps, 0.0)
    self._start, self._step = now, step
    self._data = self._pause = self._device = 0.0
    chips = jax.device_count()
    row = {
      "train/batch_time": seconds,
      "train/data_time": data,
      "train/samples_per_second": self._batch_size / seconds,
      "train/samples_per_second_per_gpu": self._batch_size / seconds / chips,
      "perf/data_share": data / seconds,
      "perf/flops_per_step": work,
    }
    peak = flops.peak(jax.devices()[0])
    if peak:
      row["perf/mfu"] = work / seconds / chips / peak
    if jax.process_count() > 1:
      every = multihost_utils.process_allgather(np.asarray([busy, data], np.float32))
      for i, (own, waited) in enumerate(every.tolist()):
        row |= {f"perf/host_{i}_busy_time": own, f"perf/host_{i}_data_time": waited}
    return row
