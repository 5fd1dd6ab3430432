"""Times: to the first step, per step, images per second, share of the chips' peak; a trace."""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from bigalign.private_apis import (
  COMPILATION_CACHE_HIT_EVENT,
  COMPILE_REQUEST_EVENT,
  COMPILE_SECONDS_EVENT,
)
from bigalign.run import flops


class StepTimer:
  """Measures the wall time of the steps between two logs, without evaluation and saving.

  MFU is the model's FLOPs (perf/flops_per_step) per second over the peak of the chips. Work that
  remat and microbatches repeat occupies the chips but is not useful, and is not counted.

  Args:
    step: the number of steps done when the timer starts.
  """

  def __init__(self, step: int) -> None:
    self._start = time.perf_counter()
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._step = step

  @contextlib.contextmanager
  def _timed(self, activity: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    self._seconds[activity] += time.perf_counter() - begin

  def waiting_for_data(self) -> contextlib.AbstractContextManager[None]:
    """A context in which the loop waits for data."""
    return self._timed("data")

  def waiting_for_device(self) -> contextlib.AbstractContextManager[None]:
    """A context in which the loop waits for the device."""
    return self._timed("device")

  @contextlib.contextmanager
  def paused(self, queued: Any) -> Iterator[None]:
    """A context whose time does not count.

    Args:
      queued: arrays that the last update returns. The updates that the device still has to do
        count, so it is waited for them first.
    """
    with self.waiting_for_device():
      jax.block_until_ready(queued)
    with self._timed("paused"):
      yield

  def read(self, step: int, batch_size: float, work: float) -> dict[str, float]:
    """Returns the metrics since the last call; all hosts must call it.

    Args:
      step: the number of steps done now.
      batch_size: global batch size of these steps, their mean.
      work: useful FLOPs of one step, over all devices, their mean.
    """
    now = time.perf_counter()
    steps = step - self._step
    seconds = max(now - self._start - self._seconds["paused"], 1e-9) / steps
    data = self._seconds["data"] / steps
    # In the collectives all hosts wait for the slowest one; the time that a host was busy itself
    # shows which one that is.
    busy = max(seconds - self._seconds["device"] / steps, 0.0)
    self._start, self._step = now, step
    self._seconds.clear()
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
      hosts = multihost_utils.process_allgather(np.asarray([busy, data], np.float32))
      for i, (host_busy, host_data) in enumerate(hosts.tolist()):
        row |= {f"perf/host_{i}_busy_time": host_busy, f"perf/host_{i}_data_time": host_data}
    return row


class Profile:
  """A context that traces some updates with JAX's profiler; its end ends the trace.

  Args:
    span: (begin, end): the updates begin < n <= end are traced; (): none.
    folder: where the trace is written.
    step: updates that are done. A run that continues after `begin` traces nothing.

  Attributes:
    begin: number of updates before the trace; -1: nothing is traced.
    end: number of updates at its end.
  """

  def __init__(self, span: Sequence[int], folder: pathlib.Path, step: int) -> None:
    self.begin, self.end = span if span and step <= span[0] else (-1, -1)
    self._folder = folder
    self._running = False

  def start(self) -> None:
    """Starts the trace."""
    jax.profiler.start_trace(str(self._folder))
    self._running = True

  def stop(self) -> None:
    """Ends the trace and writes it; without a trace it does nothing."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, *exception: object) -> None:
    self.stop()


_EVENTS = (COMPILE_SECONDS_EVENT, COMPILE_REQUEST_EVENT, COMPILATION_CACHE_HIT_EVENT)


@functools.cache
def _event_sums() -> collections.Counter[str]:
  """{event of JAX: its seconds, or how often it happened} in this process, since the first call.

  JAX keeps its listeners, so a process registers them once and not for each of its runs, of which
  some end before their first step.
  """
  sums: collections.Counter[str] = collections.Counter()

  def count(event: str, **_: Any) -> None:
    sums[event] += 1

  def add(event: str, duration_secs: float, **_: Any) -> None:
    sums[event] += duration_secs  # type: ignore[assignment]

  jax.monitoring.register_event_listener(count)
  jax.monitoring.register_event_duration_secs_listener(add)
  return sums


class StartupTimer:
  """Measures the time from its creation to the end of the first step, and the compilations."""

  def __init__(self) -> None:
    self._begin = time.perf_counter()
    self._before = collections.Counter(_event_sums())
    self._metrics: dict[str, float] | None = None

  def first_step(self, metrics: Any) -> None:
    """Waits for the metrics of the first step and logs the times; later calls do nothing.

    Args:
      metrics: the arrays that the step returned.
    """
    if self._metrics is not None:
      return
    jax.block_until_ready(metrics)
    sums = _event_sums()
    since = {event: sums[event] - self._before[event] for event in _EVENTS}
    self._metrics = {
      "perf/seconds_to_first_step": time.perf_counter() - self._begin,
      "perf/compile_seconds": since[COMPILE_SECONDS_EVENT],
      "perf/programs": since[COMPILE_REQUEST_EVENT],
      "perf/programs_from_cache": since[COMPILATION_CACHE_HIT_EVENT],
    }
    seconds, compiling, programs, cached = self._metrics.values()
    logging.info(
      "First step done after %.1f s (%.1f s compiling; %d of %d program%s came from the compilation"
      " cache).",
      seconds,
      compiling,
      cached,
      programs,
      "" if programs == 1 else "s",
    )

  def take_metrics(self) -> dict[str, float]:
    """Returns the metrics of the start once; later calls return an empty dict."""
    metrics, self._metrics = self._metrics or {}, {}
    return metrics
