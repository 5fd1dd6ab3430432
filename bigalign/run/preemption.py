"""How a run ends before its end so that it can go on: notices, lost processes, processes that hang.

Exit code 143 (128 + SIGTERM) says: start me again. A mistake in the program exits with 1.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import sys
import threading
import time
import urllib.request
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed
from jax.experimental import multihost_utils

RESTART_EXIT_CODE = 143
# Each value means that this machine is about to stop, whatever else the server answers.
METADATA = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
LOST_PROCESS = re.compile("Gloo|NCCL|CoordinationService|Barrier timed out|heartbeat")
POLL_SECONDS = 5.0  # seconds
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")


class Preempted(SystemExit):
  """The run ended early, with a checkpoint of `step` unless it is 0; the process exits with 143."""

  def __init__(self, step: int) -> None:
    super().__init__(RESTART_EXIT_CODE)
    self.step = step
    logging.warning("Told to end behind step %d; started again the run goes on from there", step)


class PreemptionListener:
  """A context that hears SIGTERM, and Google's notice of maintenance or preemption.

  A single process has a handler here. Of several each has JAX's, and JAX's service agrees on a step
  that none has passed: asking is a comparison of two numbers, no message.
  """

  def __init__(self) -> None:
    self._heard = False
    self._stop = threading.Event()
    self._own = not jax.distributed.is_initialized()
    self._own &= threading.current_thread() is threading.main_thread()  # others may set no handler

  def _hear(self, *_: object) -> None:
    self._heard = True

  def __enter__(self) -> PreemptionListener:
    if self._own:
      self._before = signal.signal(signal.SIGTERM, self._hear)
    host = _metadata_host()
    if host:
      threading.Thread(target=_poll, args=(host, self._stop), daemon=True).start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._stop.set()
    if self._own:
      signal.signal(signal.SIGTERM, self._before)

  def should_stop(self, step: int) -> bool:
    """Whether to end behind this step; each process asks behind each step."""
    return self._heard or multihost_utils.reached_preemption_sync_point(step)

  def should_stop_at_start(self, step: int) -> bool:
    """Whether to end before the first step, with `step` done; each process asks once."""
    # The service takes the step behind the last that it was asked for: 1, if it was told before.
    told = self.should_stop(1)
    return self.should_stop(step) or told


def _metadata_host() -> str | None:
  """Of Google's machines; GCE_METADATA_HOST is what Google's own clients read."""
  google = PRODUCT.exists() and PRODUCT.read_text().startswith("Google")
  return os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if google else None)


def _poll(host: str, stop: threading.Event) -> None:
  """Sends SIGTERM to this process when the metadata server tells that its machine will stop."""
  while not stop.wait(POLL_SECONDS):
    for name, ends in METADATA.items():
      url = f"http://{host}/computeMetadata/v1/instance/{name}"
      request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
      try:
        with urllib.request.urlopen(request, timeout=5) as answer:
          told = answer.read().decode().strip()
      except OSError:
        continue  # the server is away for moments, too, while a machine is moved
      if told == ends:
        logging.warning("%s of this machine is %s", name, told)
        os.kill(os.getpid(), signal.SIGTERM)
        return


class Watchdog:
  """A context that ends a run of several processes when no step ends, and names who is behind.

  JAX itself ends a run, naming a process, when one is gone or frozen and its heartbeats stop. One
  that only stands still has them: in a read of a dead disk, say. Each process tells its step to the
  coordinator every few seconds, from a thread.
  """

  def __init__(self, patience: float, step: int) -> None:
    """
    Args:
      patience: seconds without a step after which the run ends.
      step: at which it starts.
    """
    self._patience = patience
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self.completed(step)

  def completed(self, step: int) -> None:
    """The loop has come to this step."""
    self._now = (step, time.monotonic())

  def __enter__(self) -> Watchdog:
    if jax.process_count() > 1:
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join(5)  # it may be asking the coordinator, who is about to go

  def _run(self) -> None:
    client: Any = distributed.global_state.client
    while not self._stop.wait(min(self._patience / 4, 10.0)):
      step, since = self._now
      name = f"bigalign/step/{jax.process_index()}"
      client.key_value_set(name, str(step), allow_overwrite=True)
      if time.monotonic() - since > self._patience:
        told = client.key_value_dir_get("bigalign/step/")
        steps = {int(key.rsplit("/", 1)[1]): int(value) for key, value in told}
        logging.error("%s", hang_message(steps, self._patience))
        sys.stderr.flush()
        os._exit(RESTART_EXIT_CODE)


def hang_message(steps: dict[int, int], patience: float) -> str:
  """What to say when none of the processes at these steps moves."""
  first = min(steps.values())
  behind = [process for process, step in sorted(steps.items()) if step == first]
  who = f"processes {behind} hang behind step {first}, where the others wait for them"
  if len(behind) == len(steps):
    who = f"all {len(steps)} processes hang behind step {first}"
  return (
    f"No step in {patience:.0f} s: {who}. Look at their machines and at their logs; started again"
    " the run goes on from its newest checkpoint. If steps, evaluations or compilations may take"
    " longer, raise config.patience."
  )


def missing_processes(seconds: int) -> list[int]:
  """The processes that do not come to a barrier within these seconds."""
  client: Any = distributed.global_state.client
  try:
    client.wait_at_barrier("bigalign/end", seconds * 1000)
  except jax.errors.JaxRuntimeError as error:
    # Numbers, one a line; no list where process 0, which would make it, is gone.
    named = re.search(r"timed out task names:\n((?:\d+\n)+)", str(error))
    return [int(word) for word in named[1].split()] if named else [0]
  return []


def exit_on_error(error: Exception) -> NoReturn:
  """Ends one process of several at once: the others would wait for it in a collective.

  The exit code is 1, or 143 where the error is that another process is gone. A single process just
  raises.
  """
  if jax.process_count() == 1:
    raise error
  lost = LOST_PROCESS.search(str(error)) is not None
  logging.error("process %d ends, and with it the run", jax.process_index(), exc_info=error)
  if lost:
    logging.error(
      "processes %s do not answer: gone, or waiting for one that is. Their own logs say why."
      " Started again the run goes on from its newest checkpoint, on any number of processes.",
      missing_processes(5),
    )
  sys.stderr.flush()
  os._exit(RESTART_EXIT_CODE if lost else 1)
