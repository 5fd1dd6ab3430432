"""Compiled for TPU slices: memory, communication and products of the losses at huge batches.

With `logits.dtype="bfloat16"`: communication in float32 is half as much again, over the target.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers.loss_oracles import at
from helpers.tpu_compiler import compiles_for_tpus

from bigalign import losses, sharding
from bigalign.losses.engine import pairwise
from bigalign.plan import hlo_collectives, topologies
from bigalign.run import flops

pytestmark = compiles_for_tpus
D = 1152
MESHES = {"data x fsdp": dict(data=16, fsdp=16), "data": dict(data=256)}


@functools.cache
def compiled(name, way, batch, mesh):
  """(FLOPs per chip, memory, collectives) of loss and gradients on 256 chips of v5e."""
  grid = sharding.make_mesh(**MESHES[mesh], devices=topologies.devices("v5e:16x16"))
  loss = losses.make_loss({name: {}})
  params, state = loss.init({})

  def value(params, zimg, ztxt):
    context = at(engine=pairwise.Engine(way, "bfloat16"))
    return loss.apply(params, state, {"zimg": zimg, "ztxt": ztxt}, {}, context)[0]

  def abstract(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  z = abstract(jax.ShapeDtypeStruct((batch, D), jnp.float32), sharding.batch_sharding(grid))
  params = jax.tree.map(lambda x: abstract(x, sharding.replicated_sharding(grid)), params)
  with jax.set_mesh(grid):
    traced = jax.jit(jax.value_and_grad(value, (0, 1, 2))).trace(params, z, z)
    program = topologies.compile_without_cache(traced.lower())
  work = flops.of_jaxpr(traced.jaxpr) / 256
  return work, program.memory_analysis(), hlo_collectives.collectives(program.as_text())


@pytest.mark.parametrize("mesh", [pytest.param("data", marks=pytest.mark.long), "data x fsdp"])
@pytest.mark.parametrize("name,products", [("clip", 8.05), ("siglip", 6.05)])
def test_a_million_pairs(name, products, mesh):
  """Temporaries, communication and products of the default way at 2^20 pairs of width 1152."""
  batch = 1 << 20
  work, memory, moved = compiled(name, "auto", batch, mesh)
  assert memory.temp_size_in_bytes <= 256e6
  assert sum(x.bytes for x in moved.values()) <= 10.3e9
  assert moved["reduce-scatter"].bytes >= batch * D * 4, "the gradient of the texts is scattered"
  assert moved["all-reduce"].bytes <= 160e6, "and never reduced as a whole"
  assert work <= products * (batch / 256) * batch * D


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_four_million_pairs_in_a_ring(name):
  batch = 1 << 22
  work, memory, moved = compiled(name, "ring", batch, "data")
  assert memory.temp_size_in_bytes <= 512e6
  assert set(moved) <= {"collective-permute", "all-reduce"}
  assert moved["all-reduce"].bytes <= 1e6
  assert work <= 8.05 * (batch / 256) * batch * D


def test_the_whole_matrix_is_what_does_not_fit():
  """What the targets are compared with."""
  _, memory, _ = compiled("clip", "dense", 1 << 17, "data")
  _, tiled, _ = compiled("clip", "auto", 1 << 17, "data")
  assert memory.temp_size_in_bytes > 5 * tiled.temp_size_in_bytes


def test_an_unknown_topology_is_named():
  with pytest.raises(ValueError, match="v5e:17x3"):
    topologies.devices("v5e:17x3")


def test_compiling_without_devices_bypasses_the_cache(tmp_path):
  """A program compiled without a client cannot be read from the cache: a warning, an error here."""
  x = jax.ShapeDtypeStruct(
    (8, 128),
    jnp.float32,
    sharding=sharding.batch_sharding(sharding.make_mesh(devices=topologies.devices("v5e:2x2"))),
  )
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [jax.config.values[name] for name in names]
  for name, value in zip(names, (str(tmp_path), 0.0)):
    jax.config.update(name, value)
  try:
    for _ in range(2):
      topologies.compile_without_cache(jax.jit(lambda x: x @ x.T).lower(x))
    assert not [*tmp_path.iterdir()]
  finally:
    for name, value in zip(names, before):
      jax.config.update(name, value)


def test_a_program_that_jax_cannot_read_back_is_written_by_the_compiler():
  """Its collectives are those of the text that JAX gives."""
  grid = sharding.make_mesh(devices=topologies.devices("v5e:2x2"))
  x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding.batch_sharding(grid))
  lowered = jax.jit(lambda x: x @ x.T).lower(x)
  compiled = topologies.compile_without_cache(lowered)

  class Unreadable:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands")

  written = hlo_collectives.collectives(topologies.program_text(lowered, Unreadable()))
  assert written == hlo_collectives.collectives(compiled.as_text()) and written
