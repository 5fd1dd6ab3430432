"""What each part of a step computes, moves and sends, from the names of its operations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers.shipped import load
from helpers.tpu_compiler import compiled_for_tpus

from bigalign import sharding
from bigalign.config import resolve_config
from bigalign.plan import hlo_memory, parts, topologies
from bigalign.program import init_state, make_program
from bigalign.run import flops
from bigalign.step import train_step

TEXT = """HloModule f, num_partitions=4

%all-reduce-scatter (i: f32[16]) -> f32[4] {
  %i = f32[16]{0} parameter(0)
  ROOT %s = f32[16]{0} all-reduce(%i), replica_groups={}
}

ENTRY %main (p: bf16[128,64]) -> bf16[128,64] {
  %p = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %c = (bf16[128,64]{1,0:T(8,128)(2,1)S(1)}, bf16[128,64]{1,0:T(8,128)(2,1)}, u32[]) copy-start(%p)
  %d = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%c)
  %k = bf16[128,64]{0,1:T(8,128)(2,1)} custom-call(%d), custom_call_target="x", m={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/jvp(DualEncoder)/dot_product_attention/pallas_call"}
  %a = bf16[128,64]{0,1:T(8,128)(2,1)} all-reduce(%k), metadata={op_name="transpose(jvp(loss))/x"}
  %g = f32[16]{0} custom-call(), custom_call_target="x", metadata={op_name="jvp(DualEncoder)/y"}
  %f = f32[4]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  ROOT %r = f32[130]{0:T(1024)} custom-call(%a), custom_call_target="other"
}
"""


def test_traffic_and_communication_belong_to_the_part_of_their_name():
  """A copy that the compiler adds belongs to its user, a collective to what it sends."""
  found = parts.split(jax.make_jaxpr(jnp.sin)(1.0), TEXT, 4)
  numbers, padded = 128 * 64 * 2, 128 * 128 * 2  # 64 columns are padded to 128
  assert {k: x["memory_traffic_bytes_per_chip"] for k, x in found.items()} == dict(
    attention=padded + numbers,
    loss=2 * numbers,
    update=numbers + 4 * (1024 + 16 + 4),
    encoders=0,
    heads=0,
    recomputation=0,
  )

  def sent(kind, size):
    return {kind: dict(runs=1, bytes=size, asynchronous_bytes=0.0)}

  assert {k: x["collectives"] for k, x in found.items() if x["collectives"]} == dict(
    loss=sent("all-reduce", 2 * numbers), encoders=sent("reduce-scatter", 64)
  )


@pytest.mark.slow
def test_the_products_of_a_step_have_names_of_their_parts():
  """Two microbatches of towers with remat: most forward products are computed three times."""
  c = load("tiny").to_dict() | dict(batch_size=8, microbatches=2)
  for side in ("image", "text"):
    c["model"][side] |= dict(depth=1, remat="full", attention="xla")
  program = make_program(resolve_config(c))
  state = jax.eval_shape(functools.partial(init_state, program), jax.random.key(0))
  batch = {name: jax.ShapeDtypeStruct(*x) for name, x in program.spec.items()}
  args = (state, batch, jax.ShapeDtypeStruct((2,), "float32"))
  jaxpr = jax.make_jaxpr(functools.partial(train_step, program=program))(*args)
  work = {part: x["flops_per_chip"] for part, x in parts.split(jaxpr, TEXT, 4).items()}
  assert 4 * sum(work.values()) == flops.of_jaxpr(jaxpr)
  assert work["loss"] == 3 * 2 * 8 * 8 * 64 / 4 and work["update"] == 0
  tokens = dict(image=16, text=48)
  products = sum(2 * 2 * 8 * n**2 * 64 for n in tokens.values())  # q k and p v
  assert work["attention"] == pytest.approx(3 * products / 4, rel=0.01)  # and of pooling
  forward = (work["attention"] + work["encoders"]) / 3
  # Some results are not needed again.
  assert 1.6 * forward < work["recomputation"] < 2 * forward


@compiled_for_tpus
def test_traffic_of_programs_that_the_tpu_compiler_made():
  """A chain of elementwise operations is one fusion; a product; both read and write once."""
  mesh = sharding.make_mesh(devices=topologies.devices("v5e:1x1"))

  def moved(function, *shapes):
    place = sharding.replicated_sharding(mesh)
    args = [jax.ShapeDtypeStruct(*x, sharding=place) for x in shapes]
    with jax.set_mesh(mesh):
      return hlo_memory.traffic(
        topologies.compile_without_cache(jax.jit(function).lower(*args)).as_text()
      )

  big, size = ((16_384, 4096), "float32"), 16_384 * 4096 * 4
  assert moved(lambda x: jnp.tanh(jnp.exp(x) + 1) * 2, big) == 2 * size
  assert moved(lambda x, y: jnp.tanh(x) + y * y, big, big) == 3 * size
  m, k, n = 16_384, 4096, 2048
  expected = 2 * (m * k + k * n + m * n)
  assert moved(jnp.matmul, ((m, k), "bfloat16"), ((k, n), "bfloat16")) == expected
  # 64 numbers in a row of 128 are moved with the padding.
  thin = moved(lambda x: jnp.tanh(x.astype("float32")), ((64, 197, 12, 64), "bfloat16"))
  assert thin >= 64 * 197 * 12 * 64 * 6
