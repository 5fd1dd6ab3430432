"""Seconds to the first step and per step, images per second, share of the chip's peak."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from bigalign.run import flops


class StepTimer:
  """Wall time between two logs, without evaluation and saving, and what it was spent on.

  MFU is the share of the chips' peak that goes into the model's FLOPs, which are
  perf/flops_per_step: what remat and microbatches compute again is work for the chips, but no use,
  and not counted.
  """

  def __init__(self, step: int) -> None:
    self._start = time.perf_counter()
    self._data = self._pause = self._device = 0.0
    self._step = step

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

  def read(self, step: int, batch_size: int, work: int) -> dict[str, float]:
    """Metrics since the last read, of steps of one batch size and of `work` useful FLOPs each.

    All hosts must call it.
    """
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
      "train/samples_per_second": batch_size / seconds,
      "train/samples_per_second_per_gpu": batch_size / seconds / chips,
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


class StartupTimer:
  """What goes by from here to the end of the first step."""

  def __init__(self) -> None:
    self._begin = time.perf_counter()
    self._sums: dict[str, float] = collections.defaultdict(float)
    self._row: dict[str, float] | None = None
    jax.monitoring.register_event_listener(self._count)
    jax.monitoring.register_event_duration_secs_listener(self._add)

  def _count(self, event: str, **_: Any) -> None:
    self._sums[event] += 1

  def _add(self, event: str, duration_secs: float, **_: Any) -> None:
    self._sums[event] += duration_secs

  def first_step(self, metrics: Any) -> None:
    """Waits for the metrics of the first step, of no other, and logs the times."""
    if self._row is not None:
      return
    jax.block_until_ready(metrics)
    jax.monitoring.unregister_event_listener(self._count)
    jax.monitoring.unregister_event_duration_listener(self._add)
    self._row = {
      "perf/seconds_to_first_step": time.perf_counter() - self._begin,
      "perf/compile_seconds": self._sums["/jax/core/compile/backend_compile_duration"],
      "perf/programs": self._sums["/jax/compilation_cache/compile_requests_use_cache"],
      "perf/programs_from_cache": self._sums["/jax/compilation_cache/cache_hits"],
    }
    logging.info(
      "The first step ended after %.1f s, %.1f of them in the compiler; of %d programs the"
      " compilation cache had %d",
      *self._row.values(),
    )

  def take_metrics(self) -> dict[str, float]:
    """The metrics of this, once."""
    row, self._row = self._row or {}, {}
    return row
