"""Undocumented parts of other libraries that bigalign needs, one small function for each.

If a library changes such a part, its test in tests/run/test_private_apis.py fails, and only this
file has to change. Each docstring names the library, the version that it was checked with, and why
the public interface does not suffice. Importing this module must stay cheap, because data workers
import it: each function imports the library that it needs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import concurrent.futures
  from multiprocessing.process import BaseProcess

  import numpy as np
  import orbax.checkpoint

# Events that JAX reports to jax.monitoring. The mechanism is public, the names are not. jax 0.10.2.
COMPILE_SECONDS_EVENT = "/jax/core/compile/backend_compile_duration"
COMPILE_REQUEST_EVENT = "/jax/compilation_cache/compile_requests_use_cache"
COMPILATION_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"

# Primitives of cuDNN's fused attention, and the products of [query, key] matrices that each stands
# for: q k and p v; their gradients with respect to p, v, q and k. A jaxpr shows no more of them.
# jax 0.10.2: jax._src.cudnn.fused_attention_stablehlo.
FUSED_ATTENTION_PRODUCTS = {
  "dot_product_attention_fwd_wrapper": 2,
  "dot_product_attention_fwd": 2,
  "dot_product_attention_bwd_wrapper": 4,
  "dot_product_attention_bwd": 4,
}

# Texts of the errors that Gloo, NCCL and JAX's coordination service raise in the surviving
# processes when another process of the run is gone.
_LOST_PROCESS = re.compile("Gloo|NCCL|CoordinationService|Barrier timed out|heartbeat")
_MISSING_AT_BARRIER = re.compile(r"timed out task names:\n((?:\d+\n)+)")

_SIZE = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_HBM_EXCEEDED = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")

_SHAPE_CHECKS = threading.local()  # off: see without_shape_checks

# Warnings of orbax that our use of it causes: checkpoints opened read-only on purpose, a metadata
# file that the parts of our checkpoints do not have, and a type handler that we replace.
_EXPECTED_ORBAX_WARNINGS = (
  "read_only=True",
  "directory is read only",
  "Metadata file does not exist",
  "overriding",
  # A write that failed, which is raised where it is waited for.
  "_SignalingThread.run() raised an exception",
  "Handler Commit operations or the Commit callback in background save thread",
  "Save Finalize thread",
)


def skip_tpu() -> None:
  """Makes JAX look for devices as if libtpu were not installed, without a word about it.

  jax 0.10.2: `jax._src.xla_bridge.register_backend_factory`. JAX asks libtpu for devices if it is
  installed, and libtpu reports on standard error that there are none. JAX_PLATFORMS would have to
  list all other platforms, and JAX raises if one of a list has no device. Programs for TPUs can
  still be compiled. Does nothing once JAX has its devices.
  """
  from jax._src import xla_bridge

  def absent() -> None:
    raise RuntimeError("this machine has no TPU")

  name = "Unable to initialize backend 'tpu'"  # logged at INFO, which our programs show
  quiet = logging.getLogger("jax._src.xla_bridge")
  if not xla_bridge.backends_are_initialized():
    xla_bridge.register_backend_factory("tpu", absent, priority=300, fail_quietly=True)  # type: ignore[arg-type]
    quiet.addFilter(lambda record: not record.getMessage().startswith(name))


@contextlib.contextmanager
def without_shape_checks() -> Iterator[None]:
  """A context in which flax does not compare parameters with the shapes of their initialisers.

  flax 0.12.8: `flax.core.scope.Scope.param`. To compare, flax traces the initialiser of each
  parameter whenever a module is applied, which takes half of the time of tracing a tower. Nothing
  public turns it off. Only for parameters whose shapes are known to fit.
  """
  from flax.core import meta, scope

  if not hasattr(scope.Scope.param, "with_checks"):
    with_checks = scope.Scope.param

    @functools.wraps(with_checks)
    def param(self: Any, name: str, *args: Any, unbox: bool = True, **kwargs: Any) -> Any:
      if not getattr(_SHAPE_CHECKS, "off", False) or not self.has_variable("params", name):
        return with_checks(self, name, *args, unbox=unbox, **kwargs)
      self.reserve(name, "params")
      value = self.get_variable("params", name)
      return meta.unbox(value) if unbox else value

    param.with_checks = with_checks  # type: ignore[attr-defined]
    scope.Scope.param = param  # type: ignore[method-assign]
  before = getattr(_SHAPE_CHECKS, "off", False)
  _SHAPE_CHECKS.off = True
  try:
    yield
  finally:
    _SHAPE_CHECKS.off = before


def coordination_client() -> Any:
  """Returns this process's client of JAX's coordination service, which runs in process 0.

  jax 0.10.2: `jax._src.distributed.global_state.client`. The public interface has no key-value
  store and no barrier with a time limit. We use the methods `key_value_set(key, value,
  allow_overwrite=)`, `key_value_dir_get(prefix)` and `wait_at_barrier(name, milliseconds)`.
  """
  from jax._src import distributed

  return distributed.global_state.client


@contextlib.contextmanager
def registration_timeout(seconds: int) -> Iterator[None]:
  """A context in which jax.distributed.initialize waits `seconds` for all processes to register.

  jaxlib 0.10.2: `jaxlib._jax.get_distributed_runtime_service`, whose argument
  `cluster_register_timeout` initialize() does not expose. Its public argument
  `initialization_timeout` limits each process separately, and its error does not name the processes
  that did not connect; the error of the service does.
  """
  from jaxlib import _jax

  start_service = _jax.get_distributed_runtime_service
  with_timeout = functools.partial(start_service, cluster_register_timeout=seconds)
  _jax.get_distributed_runtime_service = with_timeout  # type: ignore[assignment]
  try:
    yield
  finally:
    _jax.get_distributed_runtime_service = start_service


def fused_attention_flops(name: str, params: Mapping[str, Any], query: Any, key: Any) -> int:
  """Returns the floating-point operations of a primitive of FUSED_ATTENTION_PRODUCTS.

  jax 0.10.2: `layout` is 0 for [B, N, H, K] and 1 for [B, H, N, K].

  Args:
    name: of the primitive.
    params: of its equation.
    query: the shape of the queries, as jax.ShapeDtypeStruct or an abstract value.
    key: the same of the keys.
  """
  keys = key.shape[2 if params["layout"] else 1]
  return FUSED_ATTENTION_PRODUCTS[name] * 2 * int(query.size) * int(keys)


def preemption_handler() -> tuple[Callable[[], None], Callable[[], None]] | None:
  """Returns functions that call and restore JAX's handler of SIGTERM; None if it has none.

  jaxlib 0.10.2: jax.distributed.initialize installs it, in C++, so Python's signal module does not
  know it. Once it is called, all processes agree on a step to stop at. It only sets a flag, so any
  thread may call it. The first member of libc's `struct sigaction` is the address of the handler.
  """
  import ctypes
  import signal

  if callable(signal.getsignal(signal.SIGTERM)):
    return None  # of Python, which replaced that of JAX
  libc = ctypes.CDLL(None)
  action = ctypes.create_string_buffer(1024)  # larger than the struct
  if libc.sigaction(int(signal.SIGTERM), None, action):
    return None
  address = ctypes.c_void_p.from_buffer(action).value
  if address in (None, int(signal.SIG_DFL), int(signal.SIG_IGN)):
    return None
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)

  def call() -> None:
    handler(int(signal.SIGTERM))

  def restore() -> None:
    libc.sigaction(int(signal.SIGTERM), action, None)

  return call, restore


def is_lost_process(error: BaseException) -> bool:
  """Returns whether an error says that another process of the run is gone.

  jax 0.10.2: these errors have no type of their own, so their text is searched.
  """
  return _LOST_PROCESS.search(str(error)) is not None


def missing_at_barrier(error: BaseException) -> list[int]:
  """Returns the processes that a barrier timeout names, or [0] if it names none.

  jax 0.10.2: the error of `wait_at_barrier` lists them in its text only, one number a line. Process
  0 runs the service that makes this list: without a list, process 0 itself is gone.
  """
  named = _MISSING_AT_BARRIER.search(str(error))
  return [int(process) for process in named[1].split()] if named else [0]


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether a JaxRuntimeError says that a program needs more memory than there is.

  jax 0.10.2, libtpu 0.0.51: the status code is in the text only.
  """
  return "RESOURCE_EXHAUSTED" in str(error)


def memory_of_error(error: BaseException) -> tuple[int, int] | None:
  """Returns (required, available) bytes from an out-of-memory error of the TPU compiler.

  libtpu 0.0.51: "... (20.00G) exceeds available HBM (15.75G)". Returns None for other texts.
  """
  sizes = _HBM_EXCEEDED.search(str(error))
  if sizes is None:
    return None
  required, required_unit, available, available_unit = sizes.groups()
  return (
    round(float(required) * _UNITS[required_unit]),
    round(float(available) * _UNITS[available_unit]),
  )


def ignore_preemption(manager: orbax.checkpoint.CheckpointManager) -> None:
  """Stops a CheckpointManager from asking JAX whether the run is being preempted.

  orbax-checkpoint 0.12.8: replaces the method `reached_preemption`, because there is no option. Its
  threads ask about steps that the loop has already passed. The hosts agree on the step to stop at
  from the last step that each one asked about, so only `preemption.PreemptionListener` may ask.
  """
  manager.reached_preemption = lambda step: False  # type: ignore[method-assign]


def quiet_orbax() -> None:
  """Drops orbax's routine messages, about thirty lines a checkpoint, and the warnings we expect.

  orbax-checkpoint 0.12.8 logs through absl and has no verbosity of its own, so records are
  recognised by their source file and text. Other warnings pass. A write that fails is raised where
  it is waited for; orbax logs it before, with thirty lines of its own code, and closes its event
  loop. tensorstore 0.1.86 reports the other pending writes to that loop, and prints a traceback for
  each, through sys.unraisablehook.
  """
  logging.getLogger("absl").addFilter(_keep_log_record)
  if not isinstance(sys.unraisablehook, _QuietHook):
    sys.unraisablehook = _QuietHook(sys.unraisablehook)


class _QuietHook:
  """sys.unraisablehook without the reports of pending writes to a closed event loop."""

  def __init__(self, before: Callable[..., Any]):
    self._before = before

  def __call__(self, report: Any) -> None:
    error = report.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
      self._before(report)


def _keep_log_record(record: logging.LogRecord) -> bool:
  expected = any(text in record.getMessage() for text in _EXPECTED_ORBAX_WARNINGS)
  return "/orbax/" not in record.pathname or (record.levelno > logging.INFO and not expected)


# The data loader and the sources


def pool_processes(pool: concurrent.futures.ProcessPoolExecutor) -> Mapping[int, BaseProcess]:
  """Returns {process id: process} of a pool, which the pool fills as it starts processes.

  Python 3.11: `ProcessPoolExecutor._processes`. BrokenProcessPool does not say which process died,
  nor how. The pool sets its own attribute to None when it shuts down, but the mapping stays valid.
  """
  return pool._processes  # type: ignore[return-value]


def imports_main_of_parent() -> bool:
  """Returns whether this is a spawned process that is still importing its parent's main file.

  Python 3.11: `_inheriting`, which multiprocessing sets on the current process meanwhile. A program
  that must not start processes at import can check it, and raise an error that names the fix.
  """
  return bool(getattr(multiprocessing.current_process(), "_inheriting", False))


def exit_code_of_grain_worker(error: BaseException) -> int | None:
  """Returns how a worker process died, if an error of a grain iterator says so, else None.

  grain 0.2.18: it is a RuntimeError like others, "Worker process was terminated unexpectedly with
  exit code -9. ...", so its text is searched.
  """
  code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
  return int(code[1]) if code and isinstance(error, RuntimeError) else None


def free_grain_shared_memory() -> None:
  """Waits until grain has freed the shared memory of the batches that were deleted.

  grain 0.2.18: `SharedMemoryArray._del_thread_pool`, a pool of one thread that frees them in order,
  so it has freed all of them once it runs a task that is submitted now. The thread ends with the
  program, and Python reports what it has not freed by then as leaked.
  """
  from grain.multiprocessing import SharedMemoryArray

  pool = getattr(SharedMemoryArray, "_del_thread_pool", None)
  if pool is not None:  # None before the first deletion
    pool.apply(bool)


def name_shared_memory(prefix: str) -> None:
  """Gives all new shared memory and semaphores of this process, grain's too, names with a prefix.

  Python 3.11: `multiprocessing.shared_memory._make_filename`, and `semprefix` in `_config` of the
  current process. The public interface names each piece of memory, but grain makes its own. If all
  processes of a run are killed, nothing frees them, and only their names say whose they were.
  """
  from multiprocessing import shared_memory

  multiprocessing.current_process()._config["semprefix"] = f"/{prefix}"  # type: ignore[attr-defined]
  shared_memory._make_filename = lambda: f"/{prefix}{secrets.token_hex(8)}"  # type: ignore[attr-defined]


def text_of_remote_traceback(error: BaseException) -> str | None:
  """Returns the traceback of an error that a process pool passes on; None for other errors.

  Python 3.11: `concurrent.futures.process._RemoteTraceback` is its cause, whose `tb` is the text.
  """
  cause = error.__cause__
  return cause.tb if type(cause).__name__ == "_RemoteTraceback" else None  # type: ignore[union-attr]


def tensorstore_status(error: ValueError) -> str:
  """Returns the status code of an error of tensorstore, such as "UNAVAILABLE"; "" if it has none.

  tensorstore 0.1.86: the code is only at the start of the text, "UNAVAILABLE: Too Many Requests".
  """
  status = re.match(r"[A-Z_]+(?=: )", str(error))
  return status[0] if status else ""


def is_corrupt_array_record(error: RuntimeError) -> bool:
  """Returns whether a reader of ArrayRecord says that the record is corrupt.

  array-record 0.8.6: errors of the disk are RuntimeErrors too, so the text is searched.
  """
  return "Corrupted" in str(error)


def error_of_hub_requests() -> type[Exception]:
  """Returns the base class of the errors of the library that huggingface_hub sends requests with.

  huggingface_hub 2.4: HfHubHTTPError inherits it. The library is httpx in 1.x and httpx2 in 2.x,
  and huggingface_hub does not say which.
  """
  from huggingface_hub.errors import HfHubHTTPError

  found: type[Exception] = next(x for x in HfHubHTTPError.__mro__ if x.__name__ == "HTTPError")
  return found


def rendered_glyph(face: Any) -> tuple[np.ndarray, int]:
  """Returns the coverage of the glyph that a freetype.Face rendered last, and its top.

  freetype-py 2.5.1: `Face._FT_Face`, because the public `bitmap.buffer` makes a list of Python
  integers, which takes longer than drawing.

  Args:
    face: after load_glyph with FT_LOAD_RENDER.

  Returns:
    [rows, columns] uint8, and the rows between the top of the glyph and its baseline.
  """
  import ctypes

  import numpy as np

  slot = face._FT_Face.contents.glyph.contents
  bitmap = slot.bitmap
  rows, pitch = bitmap.rows, bitmap.pitch
  flat = np.frombuffer(ctypes.string_at(bitmap.buffer, rows * pitch), np.uint8)
  return flat.reshape(rows, pitch)[:, : bitmap.width], slot.bitmap_top
