"""SIGTERM and Ctrl-C as requests to stop, which are answered on arrival.

Python calls a handler when the main thread runs Python code again, which is minutes later if it
compiles. But the number of a signal is written to a pipe as soon as the signal arrives
(signal.set_wakeup_fd), and a thread reads it there. So the thread says what will happen, and a
second Ctrl-C ends the program even if the main thread is busy. No code runs in a signal handler
that would not be safe there.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import jax
from absl import logging

from bigalign.private_apis import preemption_handler
from bigalign.run import errors, watchdog

# A terminal, and a wrapper that passes Ctrl-C on, can both send one press: within these seconds.
SAME_PRESS = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
  """A context in which the first SIGTERM or Ctrl-C sets `received`, and ends nothing.

  A second Ctrl-C ends the process at once; in a program other than ours, such as a notebook, it
  raises KeyboardInterrupt. A second SIGTERM does not: schedulers repeat it while a run saves.

  With several processes, JAX has a handler of SIGTERM, which makes all of them agree on the step to
  stop at; it is called for Ctrl-C too. Outside of the main thread, which alone may handle signals,
  the context does nothing.

  Attributes:
    received: whether a signal has arrived in this process.
    interrupted: whether one of them was Ctrl-C.
  """

  def __init__(self) -> None:
    self.received = False
    self.interrupted = False
    self._since = 0.0  # of the first signal
    self._terminated = False
    self._answered = False  # whether the thread has seen a Ctrl-C since `_handle` last returned
    self._raises = False  # whether `_handle` raises KeyboardInterrupt; only the thread decides it
    self._active = threading.current_thread() is threading.main_thread()
    self._notify_others: Callable[[], None] | None = None
    self._restore: list[Callable[[], object]] = []

  def __enter__(self) -> StopSignals:
    if not self._active:
      return self
    if jax.distributed.is_initialized():
      of_jax = preemption_handler()
      if of_jax is None:
        return self  # JAX stops the run in another way, which also reaches the other processes
      self._notify_others, restore = of_jax
      # Python must forget `_handle` too, or the next context would take it for a handler of others.
      self._restore += [restore, lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=self._read, args=(reading,), daemon=True)
    thread.start()
    self._restore += [
      lambda: thread.join(1),
      lambda: os.close(writing),
      lambda: signal.set_wakeup_fd(previous),
    ]
    for number in SIGNALS:
      before = signal.signal(number, self._handle)
      # The handler of JAX comes back by `restore`.
      if number == signal.SIGINT or self._notify_others is None:
        self._restore.append(functools.partial(signal.signal, number, before))
    return self

  def __exit__(self, *exception: object) -> None:
    while self._restore:
      self._restore.pop()()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    """Called in the main thread, later than `_read` or before it."""
    self.received = True
    if number != signal.SIGINT:
      return
    end = time.monotonic() + 1
    while not self._answered and time.monotonic() < end:  # a lock would not be safe here
      time.sleep(0.001)
    self._answered = False
    raises, self._raises = self._raises, False
    if raises:
      raise KeyboardInterrupt

  def _is_second_press(self) -> bool:
    announced = self.interrupted or self._terminated
    return announced and time.monotonic() - self._since > SAME_PRESS

  def _read(self, pipe: int) -> None:
    with open(pipe, "rb", buffering=0) as arrivals:
      while numbers := arrivals.read(1):
        self._arrived(numbers[0])

  def _arrived(self, number: int) -> None:
    if number == signal.SIGINT:
      if self._is_second_press():
        if errors.in_program():
          _quit()
        else:
          self._raises = True
      first, self.interrupted = not self.interrupted, True
      if first:
        self._since = time.monotonic()
      self._answered = True  # before the log, whose lock the main thread may hold
      if not first:
        return
      logging.warning("Interrupted: saving after this step; press Ctrl-C again to quit at once")
    elif number == signal.SIGTERM:
      saving = "still saving" if self._terminated else "saving"
      logging.warning("SIGTERM received: %s after this step; Ctrl-C quits at once", saving)
      if not (self._terminated or self.interrupted):
        self._since = time.monotonic()
      self._terminated = True
    else:
      return
    self.received = True
    if self._notify_others is not None:
      self._notify_others()


def _quit() -> NoReturn:
  """Ends this process and its workers at once."""
  sys.stderr.write("\nQuitting without saving\n")
  watchdog.kill_workers()
  errors.exit_now(errors.INTERRUPTED)
