"""Early ends of a run: preemption notices, processes that are lost, processes that hang.

Exit code 143 (128 + SIGTERM) means: run the same command again. An error in the program exits
with 1, a run that Ctrl-C stopped with 130.
"""

from __future__ import annotations

import functools
import os
import pathlib
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import logging
from jax.experimental import multihost_utils

from bigalign import tree
from bigalign.private_apis import coordination_client, is_lost_process, missing_at_barrier
from bigalign.run import errors, watchdog
from bigalign.run.stop_signals import StopSignals

RESTART_EXIT_CODE = 143
# A value of Google's metadata server that announces the end of this machine, by name.
METADATA = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
POLL_SECONDS = 5.0
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")


class Preempted(SystemExit):
  """The run stopped early; unless `step` is 0, a checkpoint of `step` exists.

  Exits with 143, or after Ctrl-C with 130, so that no script starts the run again by itself.
  """

  def __init__(self, step: int, *, interrupted: bool = False) -> None:
    super().__init__(errors.INTERRUPTED if interrupted else RESTART_EXIT_CODE)
    self.step = step
    saved = f"checkpoint saved at step {step}" if step else "no step was done"
    why = "Interrupted" if interrupted else "SIGTERM received"
    logging.warning("%s: %s. Run the same command to resume.", why, saved)


class EvaluationStopped(Exception):
  """An evaluation ended early, because the run was asked to stop."""


class PreemptionListener:
  """A context that listens for SIGTERM, Ctrl-C and Google's notices of maintenance or preemption.

  `stop_signals.StopSignals` handles the signals. With several processes, JAX's coordination service
  agrees on a question that no process has asked yet; asking compares two numbers and sends no
  message. Inside the context one signal ends nothing by itself. So the context must contain
  everything that a run writes.
  """

  def __init__(self) -> None:
    self._signals = StopSignals()
    self._asked = 0  # questions so far; JAX's service wants numbers that grow by one
    self._stopping = False
    self._listening = False
    self._stop = threading.Event()

  @property
  def interrupted(self) -> bool:
    """Whether Ctrl-C was pressed in this process."""
    return self._signals.interrupted

  def __enter__(self) -> PreemptionListener:
    self._signals.__enter__()
    host = _metadata_host()
    if host:
      threading.Thread(target=_poll_metadata, args=(host, self._stop), daemon=True).start()
    self._listening = True
    return self

  def __exit__(self, *exception: object) -> None:
    self._listening = False
    self._stop.set()
    self._signals.__exit__(*exception)

  def should_stop(self, step: int) -> bool:
    """Returns whether to stop now; every process must ask before the first update and after each.

    Args:
      step: number of updates done, for the log.
    """
    was_stopping, stops = self._stopping, self._ask()
    if stops and not (was_stopping or self._signals.received):  # which was said on arrival
      logging.warning("The run is asked to stop and ends after step %d", step)
    return stops

  def interruptible(self, embed: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `embed(params, *arrays)`, which raises EvaluationStopped once the run should stop.

    An evaluation can take longer than a machine has left. All processes embed the same batches in
    the same order, so all of them stop before the same one.
    """

    @functools.wraps(embed)
    def embed_or_stop(params: Any, *arrays: Any) -> Any:
      traced = isinstance(arrays[0], jax.core.Tracer)  # the function that is traced will be called
      if self._listening and not traced and self._ask():
        raise EvaluationStopped
      return embed(params, *arrays)

    return embed_or_stop

  def _ask(self) -> bool:
    """Whether to stop; all processes get the same answer to the same question."""
    self._asked += 1
    reached = multihost_utils.reached_preemption_sync_point(self._asked)
    # Several processes stop at the step that all agree on.
    alone = not jax.distributed.is_initialized()
    self._stopping |= reached or (alone and self._signals.received)
    return self._stopping


def _metadata_host() -> str | None:
  """The metadata server of a Google machine; Google's own clients read GCE_METADATA_HOST too."""
  google = PRODUCT.exists() and PRODUCT.read_text().startswith("Google")
  return os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if google else None)


def _poll_metadata(host: str, stop: threading.Event) -> None:
  """Sends SIGTERM to this process when the metadata server says that its machine will stop."""
  while not stop.wait(POLL_SECONDS):
    for name, announcement in METADATA.items():
      url = f"http://{host}/computeMetadata/v1/instance/{name}"
      request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
      try:
        with urllib.request.urlopen(request, timeout=5) as response:
          value = response.read().decode().strip()
      except OSError:
        continue  # the server is unreachable for moments while a machine is migrated
      if value == announcement:
        logging.warning("Google's metadata server: %s of this machine is %s", name, value)
        os.kill(os.getpid(), signal.SIGTERM)
        return


class Watchdog:
  """A context that ends a run if no step completes, and names what hangs.

  A single process ends only if it also computes nothing, because a long evaluation or compilation
  is not a fault; it names its stopped workers and where its main thread is.

  JAX itself ends a run, and names the process, when the heartbeats of a process stop because it
  died or is frozen. A process that hangs, in a read from a dead disk for example, still sends
  heartbeats. So a thread of each process reports its step to the coordinator every few seconds.
  """

  def __init__(self, patience: float, step: int) -> None:
    """
    Args:
      patience: seconds without a completed step after which the run ends.
      step: the step at which the run starts.
    """
    self._patience = patience
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self.completed(step)

  def completed(self, step: int) -> None:
    """Records that the loop has completed this step."""
    self._last = (step, time.monotonic())

  def __enter__(self) -> Watchdog:
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._stop.set()
    if self._thread.is_alive():
      self._thread.join(5)  # it may be talking to the coordinator, which is about to stop

  def _run(self) -> None:
    if jax.process_count() == 1:
      self._watch_alone()
      return
    client = coordination_client()
    while not self._stop.wait(min(self._patience / 4, 10.0)):
      step, since = self._last
      name = f"bigalign/step/{jax.process_index()}"
      client.key_value_set(name, str(step), allow_overwrite=True)
      if time.monotonic() - since > self._patience:
        reported = client.key_value_dir_get("bigalign/step/")
        steps = {int(key.rsplit("/", 1)[1]): int(value) for key, value in reported}
        message = hang_message(steps, self._patience, jax.process_count())
        logging.error("%s %s", message, watchdog.describe())
        _exit_to_restart()

  def _watch_alone(self) -> None:
    interval = min(self._patience / 4, 10.0)
    tick, used, quiet = time.monotonic(), watchdog.cpu_seconds(), 0.0
    last, warned = self._last, False
    while not self._stop.wait(interval):
      now, now_used = time.monotonic(), watchdog.cpu_seconds()
      # A tick that is far too long means that this process was stopped itself, so it counts once.
      passed = min(now - tick, 2 * interval)
      if self._last is not last:
        last, quiet, warned = self._last, 0.0, False
      else:
        quiet += passed
      computes = now_used - used > watchdog.BUSY * passed
      tick, used = now, now_used
      if quiet <= self._patience:
        continue
      if computes and not warned:
        logging.warning(
          "No step in %.0f s, but this process is computing, so it goes on. %s",
          quiet,
          watchdog.describe(),
        )
        warned = True
      elif not computes:
        logging.error("%s %s", hang_message({0: last[0]}, self._patience, 1), watchdog.describe())
        _exit_to_restart()


def _exit_to_restart() -> NoReturn:
  """Ends this process at once, and its workers with it."""
  watchdog.kill_workers()
  errors.exit_now(RESTART_EXIT_CODE)


def hang_message(steps: dict[int, int], patience: float, processes: int) -> str:
  """Returns the error to log when no process completes a step.

  Args:
    steps: {process: the last step that it reported}.
    patience: seconds without a completed step.
    processes: of the run; one that is not in `steps` hangs before it reports its first step.
  """
  first = min(steps.values())
  slowest = [process for process, step in sorted(steps.items()) if step == first]
  silent = [process for process in range(processes) if process not in steps]
  if processes == 1:
    who = f"the process hangs after step {first}"
  elif silent:
    who = f"processes {tree.shown(silent)} have not reported any step; the others wait for them"
  elif len(slowest) == processes:
    who = f"all {processes} processes hang after step {first}"
  else:
    who = f"processes {tree.shown(slowest)} hang after step {first}; the others wait for them"
  return (
    f"No step in {patience:.0f} s: {who}. Look at their machines and logs. Run the same command to"
    " resume from the newest checkpoint. If steps, evaluations or compilations may take longer,"
    " raise config.patience."
  )


def missing_processes(seconds: int) -> list[int]:
  """Returns the processes that do not reach a barrier within this many seconds."""
  try:
    coordination_client().wait_at_barrier("bigalign/end", seconds * 1000)
  except jax.errors.JaxRuntimeError as error:
    return missing_at_barrier(error)
  return []


def exit_on_error(error: Exception) -> NoReturn:
  """Ends one of several processes at once, because the others would wait for it in a collective.

  The exit code is 1, or 143 if the error says that another process is lost.

  Raises:
    Exception: `error` itself, if there is a single process.
  """
  if jax.process_count() == 1:
    raise error
  lost = is_lost_process(error)
  if errors.is_mistake(error) and not lost and not errors.shows_tracebacks():
    logging.error("process %d: %s", jax.process_index(), errors.message(error))
  else:
    logging.error("process %d ends, and the run with it", jax.process_index(), exc_info=error)
  if lost:
    logging.error(
      "processes %s do not answer: they are lost or wait for a lost one. Their own logs say why."
      " Run the same command, with any number of processes, to resume from the newest checkpoint.",
      missing_processes(5),
    )
  errors.exit_now(RESTART_EXIT_CODE if lost else 1)
