"""SIGTERM and Ctrl-C ask a run to stop, and say so on arrival."""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal
import sys
import threading
import time

import pytest

from bigalign.private_apis import preemption_handler
from bigalign.run import errors, preemption, stop_signals
from bigalign.run.stop_signals import StopSignals

LIBC = ctypes.CDLL(None)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(stop_signals, "SAME_PRESS", 0.05)


def press(number=signal.SIGINT):
  os.kill(os.getpid(), number)


def wait_for(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


@pytest.mark.parametrize("number", stop_signals.SIGNALS)
def test_one_signal_ends_nothing_and_is_answered(number, caplog):
  before = [signal.getsignal(x) for x in stop_signals.SIGNALS]
  with StopSignals() as signals:
    press(number)
    wait_for(lambda: "after this step" in caplog.text)
    assert signals.received and signals.interrupted == (number == signal.SIGINT)
  assert [signal.getsignal(x) for x in stop_signals.SIGNALS] == before
  assert signal.set_wakeup_fd(-1) == -1
  quits = (
    "press Ctrl-C again to quit at once" if number == signal.SIGINT else "Ctrl-C quits at once"
  )
  assert quits in caplog.text


def test_the_answer_does_not_wait_for_the_main_thread(caplog):
  """Which is in C here, without a word to Python, as while it compiles."""
  with StopSignals() as signals:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(stop_signals.SIGNALS))
    try:
      press(signal.SIGTERM)  # another thread gets it
      LIBC.usleep(300_000)
      text, received = caplog.text, signals.received
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
  assert "SIGTERM received: saving after this step" in text and received


def test_a_second_ctrl_c_quits_at_once_and_a_second_sigterm_does_not(monkeypatch, caplog):
  ended: list[int] = []
  monkeypatch.setattr(os, "_exit", ended.append)
  monkeypatch.setattr(stop_signals.watchdog, "kill_workers", lambda: ended.append("workers"))
  with errors.reported("bigalign train"), StopSignals():
    for count in (1, 2):
      press(signal.SIGTERM)
      wait_for(lambda count=count: caplog.text.count("SIGTERM received") == count)
      time.sleep(2 * stop_signals.SAME_PRESS)
    assert "still saving after this step" in caplog.text and not ended
    press()
    wait_for(lambda: len(ended) == 2)
  assert ended == ["workers", 130]


def test_one_press_that_comes_twice_counts_once(monkeypatch, caplog):
  monkeypatch.setattr(stop_signals, "SAME_PRESS", 60.0)
  monkeypatch.setattr(os, "_exit", sys.exit)
  with errors.reported("bigalign train"), StopSignals():
    press()
    wait_for(lambda: "Interrupted" in caplog.text)
    press()
    time.sleep(0.05)
  assert caplog.text.count("Interrupted") == 1


def test_outside_of_a_program_a_second_ctrl_c_raises(caplog):
  with pytest.raises(KeyboardInterrupt), StopSignals():
    press()
    wait_for(lambda: "Interrupted" in caplog.text)
    time.sleep(2 * stop_signals.SAME_PRESS)
    press()
    time.sleep(5)


def test_one_ctrl_c_that_waits_for_the_main_thread_does_not_raise():
  """Python calls the handler much later than the signal arrives; that is not a second press."""
  with StopSignals() as signals:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # other threads get it
    try:
      threading.Timer(0.05, press).start()
      LIBC.usleep(300_000)
      time.sleep(0)  # the handler runs here at the latest
    except KeyboardInterrupt:
      pytest.fail("the first Ctrl-C raised KeyboardInterrupt")
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
  assert signals.interrupted


def test_the_second_run_of_several_processes_answers_too(monkeypatch):
  """JAX's handler is one of C, which Python does not know; `abs` of libc stands for it here."""
  monkeypatch.setattr(stop_signals.jax.distributed, "is_initialized", lambda: True)
  before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
  LIBC.signal(int(signal.SIGTERM), ctypes.cast(LIBC.abs, ctypes.c_void_p))
  try:
    for _ in range(2):
      assert preemption_handler() is not None
      with StopSignals() as signals:
        press(signal.SIGTERM)
        wait_for(lambda signals=signals: signals.received)
    assert preemption_handler() is not None
  finally:
    signal.signal(signal.SIGTERM, before)


def test_the_cursor_comes_back_when_a_process_ends_at_once(monkeypatch):
  ours, terminal = os.openpty()
  ended: list[int] = []
  monkeypatch.setattr(os, "_exit", ended.append)
  monkeypatch.setattr(stop_signals.watchdog, "kill_workers", lambda: None)
  monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
  fail = functools.partial(preemption.exit_on_error, ValueError("x"))
  with open(ours, "rb", buffering=0) as screen, open(terminal, "w") as stderr:
    monkeypatch.setattr(sys, "__stderr__", stderr)
    for end in (stop_signals._quit, preemption._exit_to_restart, fail):
      end()
      assert select.select([screen], [], [], 5)[0]
      assert screen.read(100) == b"\x1b[?25h"
  assert ended == [130, 143, 1]


def test_a_run_that_ctrl_c_stopped_is_not_started_again(caplog):
  with preemption.PreemptionListener() as listener:
    assert not listener.should_stop(6)
    press()
    wait_for(lambda: listener.interrupted)
    assert listener.should_stop(7)
  ended = preemption.Preempted(7, interrupted=listener.interrupted)
  assert ended.code == 130 and preemption.Preempted(7).code == 143
  assert "Interrupted: checkpoint saved at step 7. Run the same command to resume." in caplog.text
  assert "is asked to stop" not in caplog.text  # it was said on arrival
