"""Every test runs on eight CPU devices; implicit broadcasting and warnings are errors."""

from __future__ import annotations

import gc
import logging
import os
import pathlib
import signal
import tempfile

# What nohup or a shell in the background has switched off, programs could not hear in the tests.
for _heard in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
  if signal.getsignal(_heard) == signal.SIG_IGN:
    signal.signal(_heard, signal.SIG_DFL)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Compiling takes most of the time of a test. `make test-optimized` sets 0: it compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1":
  # A quarter of that time is spent on code for fused operations, and a sixth of what is left on
  # splitting each program into 32 parts, for more cores than there are.
  os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
  ).strip()
# Programs are compiled once per session, by whichever process of a test comes first. The smallest
# ones are kept too: a test of a loss spends half of its time on compiling single operations.
_CACHE = tempfile.TemporaryDirectory(prefix="bigalign-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
# Indexes of the shards that tests write.
os.environ["BIGALIGN_INDEX"] = os.path.join(_CACHE.name, "index")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def data_root() -> pathlib.Path:
  """The folder of real shards that BIGALIGN_DATA names."""
  root = os.environ.get("BIGALIGN_DATA")
  if not root:
    pytest.skip("BIGALIGN_DATA is not set: the root of the real image-text shards")
  return pathlib.Path(root)


@pytest.fixture(autouse=True)
def log_levels():
  """A program that a test calls sets the levels of its process, not those of the next test."""
  loggers = [logging.getLogger(name) for name in (None, "absl")]
  levels = [logger.level for logger in loggers]
  yield
  for logger, level in zip(loggers, levels):
    logger.setLevel(level)


def pytest_collection_finish(session: pytest.Session) -> None:
  """What is imported and collected stays until the end: no garbage collection looks through it.

  A fifth of the CPU time of tests that train was spent there, as JAX holds millions of objects.
  """
  del session
  _keep_objects()


@pytest.fixture(autouse=True, scope="module")
def keep_objects():
  """Nor through what the tests of a module leave, such as JAX's caches."""
  yield
  _keep_objects()


def _keep_objects() -> None:
  gc.collect()
  gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The longest tests, which state a time limit, start first: none runs alone at the end."""
  items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
