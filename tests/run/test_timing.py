"""Rates do not depend on where evaluations fall; FLOPs do not depend on who computes attention."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from bigalign.private_apis import (
  COMPILE_REQUEST_EVENT,
  COMPILE_SECONDS_EVENT,
  FUSED_ATTENTION_PRODUCTS,
)
from bigalign.run import flops, timing
from bigalign.run.timing import StartupTimer, StepTimer


def _seconds_per_step(step, x, pauses):
  """What the timer says of six steps that the device computes while the host runs ahead."""
  timer = StepTimer(0)
  for i in range(6):
    x = step(x)
    if pauses and i == 4:
      with timer.paused(x):
        jax.block_until_ready(x)  # as an evaluation does
        time.sleep(0.5)
  with timer.waiting_for_device():
    jax.block_until_ready(x)
  return timer.read(6, 8, 1)["train/batch_time"]


@pytest.mark.slow
def test_rates_are_the_same_with_and_without_evaluations():
  step = jax.jit(lambda x: jax.lax.fori_loop(0, 3000, lambda i, x: jnp.sin(x) + x, x))
  x = jax.block_until_ready(step(jnp.ones(10_000)))
  plain = min(_seconds_per_step(step, x, False) for _ in range(3))
  paused = min(_seconds_per_step(step, x, True) for _ in range(3))
  # Without the wait, five of the six steps would not count; half a second more would count double.
  assert 0.6 < paused / plain < 1.7, (plain, paused)


@pytest.mark.parametrize("queries,keys", [(64, 64), (64, 128)])
def test_fused_attention_has_the_flops_of_its_products(queries, keys, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)  # it is traced, not run
  q = jax.ShapeDtypeStruct((2, queries, 4, 32), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((2, keys, 4, 32), jnp.bfloat16)
  counts = {}
  for implementation in ("xla", "cudnn"):
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    gradient = jax.grad(lambda q, k, v, f=attend: f(q, k, v).sum(dtype=jnp.float32), (0, 1, 2))
    counts[implementation] = [flops.count(f, q, k, k) for f in (attend, gradient)]
  assert counts["cudnn"] == counts["xla"]
  assert counts["xla"][0] == 2 * 2 * (2 * 4 * queries * keys * 32)
  named = jax.make_jaxpr(gradient)(q, k, k)
  assert FUSED_ATTENTION_PRODUCTS.keys() & {eqn.primitive.name for eqn in named.eqns}


def test_a_kernel_counts_as_often_as_its_grid_runs():
  def kernel(x, y, out):
    out[...] = x[...] @ y[...]

  def product(x, y):
    return pallas.pallas_call(
      kernel,
      out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32),
      grid=(4,),
      in_specs=[
        pallas.BlockSpec((8, 64), lambda i: (i, 0)),
        pallas.BlockSpec((64, 16), lambda i: (0, 0)),
      ],
      out_specs=pallas.BlockSpec((8, 16), lambda i: (i, 0)),
      interpret=True,
    )(x, y)

  x, y = jnp.ones((32, 64)), jnp.ones((64, 16))
  assert flops.count(product, x, y) == flops.count(jnp.matmul, x, y) == 2 * 32 * 64 * 16


def test_runs_of_one_process_share_the_listeners_of_jax(monkeypatch):
  """Also those that end before their first step; each counts only what came after its start."""
  timing._event_sums.cache_clear()
  counts, durations = [], []
  monkeypatch.setattr(jax.monitoring, "register_event_listener", counts.append)
  monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", durations.append)
  timers = []
  for _ in range(3):
    timers.append(StartupTimer())
    counts[0](COMPILE_REQUEST_EVENT)
    durations[0](COMPILE_SECONDS_EVENT, 0.5)
  assert len(counts) == len(durations) == 1
  for timer, programs in zip(timers, (3, 2, 1)):
    timer.first_step(jnp.zeros(()))
    row = timer.take_metrics()
    assert (row["perf/programs"], row["perf/compile_seconds"]) == (programs, programs / 2)
    assert row["perf/programs_from_cache"] == 0
  timing._event_sums.cache_clear()
