"""Undocumented parts of other libraries still work as bigalign/private_apis.py expects.

If a test fails after an upgrade of a library, the function that it names has to change.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys

import flax
import freetype
import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from flax import linen as nn
from grain.multiprocessing import SharedMemoryArray
from helpers.object_store_server import store
from helpers.shipped import ROOT
from jax.experimental.compilation_cache import compilation_cache

from bigalign import private_apis
from bigalign.checkpoint import Checkpoints
from bigalign.data.sources.arrayrecord import open_file
from bigalign.data.sources.glyphs import font_folder
from bigalign.plan import topologies

# One process, which is its own coordinator.
ALONE = """
import sys, jax
from jax._src import distributed
from bigalign import private_apis
start_service = distributed._jax.get_distributed_runtime_service
with private_apis.registration_timeout(20):
  jax.distributed.initialize(sys.argv[1], 1, 0)
assert distributed._jax.get_distributed_runtime_service is start_service
client = private_apis.coordination_client()
client.key_value_set("folder/a", "1", allow_overwrite=True)
client.key_value_set("folder/a", "2", allow_overwrite=True)
assert client.key_value_dir_get("folder/") == [("folder/a", "2")]
client.wait_at_barrier("end", 1000)
"""
# The same: one call makes all processes stop, although Python has its own handler of SIGTERM now.
ASKED_TO_STOP = """
import os, signal, sys, time, jax
from jax.experimental import multihost_utils
from bigalign import private_apis
assert private_apis.preemption_handler() is None
jax.distributed.initialize(sys.argv[1], 1, 0)
call, restore = private_apis.preemption_handler()
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(True))
assert private_apis.preemption_handler() is None
call()
restore()
os.kill(os.getpid(), signal.SIGTERM)
end = time.monotonic() + 30
asked = 1
while not multihost_utils.reached_preemption_sync_point(asked):
  assert time.monotonic() < end
  time.sleep(0.05)
  asked += 1
assert not received
"""
# Process 0 of two; the other never starts.
UNCONNECTED = """
import sys, jax
from bigalign import private_apis
with private_apis.registration_timeout(2):
  jax.distributed.initialize(sys.argv[1], 2, 0, initialization_timeout=30)
"""
# Two clients of one service, of which only the first reaches the barrier.
BARRIER = """
import os, sys, threading, jax
from jaxlib import _jax
from bigalign import private_apis
times = dict(heartbeat_timeout=10, shutdown_timeout=1)
service = _jax.get_distributed_runtime_service(sys.argv[1], 2, cluster_register_timeout=20, **times)
clients = [
  _jax.get_distributed_runtime_client(
    sys.argv[1], i, init_timeout=20, shutdown_on_destruction=False, **times
  )
  for i in range(2)
]
thread = threading.Thread(target=clients[1].connect)
thread.start()
clients[0].connect()
thread.join()
try:
  clients[0].wait_at_barrier("end", 500)
except jax.errors.JaxRuntimeError as error:
  assert private_apis.missing_at_barrier(error) == [1], error
  assert private_apis.is_lost_process(error), error
  os._exit(0)
"""
# 32 GiB of arguments and 32 GiB of results for a chip that has 15.75.
OUT_OF_MEMORY = """
import jax, jax.numpy as jnp
from bigalign import private_apis, sharding
from bigalign.plan import topologies
mesh = sharding.make_mesh(devices=topologies.devices("v5e:1x1"))
x = jax.ShapeDtypeStruct((2**17, 2**16), "float32", sharding=sharding.replicated_sharding(mesh))
try:
  topologies.compile_without_cache(jax.jit(jnp.sin).lower(x))
except jax.errors.JaxRuntimeError as error:
  assert private_apis.is_out_of_memory(error), error
  assert private_apis.memory_of_error(error) == (64 * 2**30, 15.75 * 2**30), error
  raise SystemExit(0)
raise SystemExit("it compiled")
"""


def program(script):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = {
    k: x for k, x in os.environ.items() if k != "XLA_FLAGS"
  }  # libtpu refuses CPU flags
  return subprocess.run(
    [sys.executable, "-c", script, address],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=120,
    env=environment,
  )


def test_the_coordination_service_is_a_key_value_store_with_barriers():
  done = program(ALONE)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_handler_of_sigterm_can_be_called_and_restored():
  done = program(ASKED_TO_STOP)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_registration_timeout_names_the_missing_processes():
  done = program(UNCONNECTED)
  assert done.returncode == -6, done.stderr
  assert "timed out task names:\n1\n" in done.stderr
  assert "currently set to: 2s" in done.stderr


def test_a_barrier_timeout_names_the_missing_processes():
  done = program(BARRIER)
  assert done.returncode == 0, done.stderr


def test_other_errors_name_no_process():
  assert not private_apis.is_lost_process(FloatingPointError("step 3: loss is not finite"))
  assert private_apis.missing_at_barrier(RuntimeError("connection refused")) == [0]


@pytest.mark.skipif(not topologies.installed(), reason="libtpu is not installed: the extra plan")
def test_the_tpu_compiler_says_how_much_memory_it_needs():
  done = program(OUT_OF_MEMORY)
  assert done.returncode == 0, done.stderr
  assert private_apis.memory_of_error(RuntimeError("RESOURCE_EXHAUSTED: something else")) is None


def test_jax_reports_compilations_under_these_names(tmp_path):
  counts = collections.Counter()

  def count(event, *_, **__):
    counts[event] += 1

  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [jax.config.values[name] for name in names]
  for name, value in zip(names, (str(tmp_path), 0.0)):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  jax.monitoring.register_event_listener(count)
  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    for _ in range(2):
      jax.jit(lambda x: x @ x.T).lower(jax.ShapeDtypeStruct((8, 8), "float32")).compile()
  finally:
    jax.monitoring.unregister_event_listener(count)
    jax.monitoring.unregister_event_duration_listener(count)
    for name, value in zip(names, before):
      jax.config.update(name, value)
    compilation_cache.reset_cache()
  assert counts[private_apis.COMPILE_SECONDS_EVENT] == 2
  assert counts[private_apis.COMPILE_REQUEST_EVENT] == 2
  assert counts[private_apis.COMPILATION_CACHE_HIT_EVENT] == 1


def test_checkpoints_do_not_ask_for_preemption(tmp_path, monkeypatch):
  """A CheckpointManager asks in every save, unless ignore_preemption was called."""
  steps = []

  def ask(step):
    steps.append(step)
    return False

  monkeypatch.setattr("orbax.checkpoint.checkpoint_manager.utils.reached_preemption", ask)
  items = ocp.args.StandardSave({"a": jnp.ones(3)})
  with ocp.CheckpointManager(tmp_path / "plain") as manager:
    manager.save(1, args=items)
  assert steps
  steps.clear()
  with ocp.CheckpointManager(tmp_path / "ignoring") as manager:
    private_apis.ignore_preemption(manager)
    manager.save(1, args=items)
  assert not steps


def test_orbax_logs_nothing_about_a_sound_checkpoint(tmp_path, caplog):
  parts = {"trainable": {"a": jnp.ones(3)}}
  logger = logging.getLogger("absl")
  logger.addHandler(caplog.handler)
  level = logger.level
  logger.setLevel(logging.INFO)
  try:
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save_frozen(parts["trainable"])
      checkpoints.save(1, parts, {"step": 1}, {})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
      checkpoints.restore(1, parts)
      checkpoints.restore_frozen(parts["trainable"])
  finally:
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)
  assert not [x.getMessage() for x in caplog.records if "orbax" in x.pathname]


def test_a_pool_lists_its_processes_which_outlive_it():
  with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
    pid = pool.submit(os.getpid).result()
    processes = private_apis.pool_processes(pool)
    assert pid in processes and processes[pid].pid == pid and processes[pid].exitcode is None
  assert processes[pid].exitcode == 0


# Its main file is imported by the process that it starts.
SPAWNS = """
import multiprocessing
from bigalign import private_apis

def report():
  print(private_apis.imports_main_of_parent())

print(__name__, private_apis.imports_main_of_parent(), flush=True)
if __name__ == "__main__":
  process = multiprocessing.get_context("spawn").Process(target=report)
  process.start()
  process.join()
"""


def test_a_spawned_process_knows_that_it_imports_the_main_file(tmp_path):
  (tmp_path / "spawns.py").write_text(SPAWNS)
  output = subprocess.run(
    [sys.executable, tmp_path / "spawns.py"], cwd=ROOT, check=True, capture_output=True, text=True
  ).stdout
  assert output.splitlines() == ["__main__ False", "__mp_main__ True", "False"]


class Killed:
  """Batches of which the third kills the worker that makes it."""

  def __len__(self):
    return 8

  def __getitem__(self, k):
    if k == 2:
      os.kill(os.getpid(), signal.SIGKILL)
    return {"k": np.full(1000, k)}


def test_a_dead_worker_of_grain_is_recognised_and_its_memory_freed():
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  dataset = grain.MapDataset.source(Killed()).to_iter_dataset()
  batches = iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1)))
  with pytest.raises(RuntimeError) as caught:
    for _ in range(8):
      next(batches)
  assert private_apis.exit_code_of_grain_worker(caught.value) == -signal.SIGKILL
  assert private_apis.exit_code_of_grain_worker(RuntimeError("another")) is None
  batches.close()


def test_shared_memory_and_semaphores_of_a_process_have_a_prefix():
  """In a process of its own, because the names stay."""
  script = (
    "import multiprocessing; from multiprocessing.shared_memory import SharedMemory\n"
    "from grain.multiprocessing import SharedMemoryArray\n"
    "from bigalign import private_apis; private_apis.name_shared_memory('mine-')\n"
    "one = SharedMemory(create=True, size=8); print(one.name); one.close(); one.unlink()\n"
    "two = SharedMemoryArray((8,), 'uint8'); print(two.metadata.name); two.unlink_on_del()\n"
    "print(multiprocessing.get_context('spawn').Lock()._semlock.name.lstrip('/'))\n"
  )
  out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
  names = out.stdout.split()
  assert len({*names}) == 3 and all(name.startswith("mine-") for name in names)


def test_grain_frees_shared_memory_in_order_in_one_thread():
  SharedMemoryArray.enable_async_del(1)
  array = SharedMemoryArray((1000,), np.uint8)
  path = pathlib.Path("/dev/shm") / array.metadata.name
  assert path.exists()
  array.unlink_on_del()
  del array
  private_apis.free_grain_shared_memory()
  assert not path.exists()


def test_errors_of_tensorstore_begin_with_their_status(tmp_path):
  with store(tmp_path) as server:
    objects = tensorstore.KvStore.open(f"{server.url}/").result()
    (tmp_path / "x").write_bytes(b"12345")
    with pytest.raises(ValueError) as caught:
      objects.read("x", byte_range=slice(9, 10)).result()
  assert private_apis.tensorstore_status(caught.value) == "OUT_OF_RANGE"
  assert private_apis.tensorstore_status(ValueError("no status")) == ""


def test_a_corrupt_array_record_is_recognised(tmp_path):
  path = str(tmp_path / "0.array_record")
  writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
  for _ in range(2):
    writer.write(b"a record" * 100)
  writer.close()
  data = bytearray(pathlib.Path(path).read_bytes())
  place = data.index(b"a record" * 100) + 50
  data[place] ^= 1
  pathlib.Path(path).write_bytes(data)
  reader, _ = open_file(path)
  with pytest.raises(RuntimeError) as caught:
    reader.read([0])
  assert private_apis.is_corrupt_array_record(caught.value)
  assert not private_apis.is_corrupt_array_record(RuntimeError("Input/output error"))


def test_the_hub_sends_requests_with_a_library_whose_errors_have_one_base():
  found = private_apis.error_of_hub_requests()
  library = sys.modules[found.__module__.split(".")[0]]
  assert issubclass(library.ConnectError, found) and issubclass(library.ReadTimeout, found)
  assert not issubclass(found, OSError) and not issubclass(FileNotFoundError, found)


def test_flax_calls_no_initialiser_where_shapes_are_known():
  drawn = []

  def ones(key, shape, dtype):
    drawn.append(shape)
    return jnp.ones(shape, dtype)

  layer = nn.Dense(2, use_bias=False, kernel_init=ones)
  x, kernel = jnp.ones((1, 3)), jnp.arange(6.0).reshape(3, 2)
  with private_apis.without_shape_checks():
    layer.init(jax.random.key(0), x)  # parameters that do not exist yet are drawn
    assert drawn == [(3, 2)]
    np.testing.assert_array_equal(layer.apply({"params": {"kernel": kernel}}, x), x @ kernel)
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
      layer.apply({"params": {"weight": kernel}}, x)
  assert drawn == [(3, 2)]
  with pytest.raises(flax.errors.ScopeParamShapeError):
    layer.apply({"params": {"kernel": kernel.T}}, x)


def test_freetype_gives_the_coverage_of_a_glyph():
  face = freetype.Face(str(font_folder() / "DejaVuSans.ttf"))
  face.set_char_size(64 * 24)
  face.load_char("g", freetype.FT_LOAD_RENDER)
  ink, top = private_apis.rendered_glyph(face)
  bitmap = face.glyph.bitmap
  expected = np.array(bitmap.buffer, np.uint8).reshape(bitmap.rows, bitmap.pitch)
  np.testing.assert_array_equal(ink, expected[:, : bitmap.width])
  assert top == face.glyph.bitmap_top and ink.max() == 255
