"""Collectives and FLOPs read from programs whose counts are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bigalign import sharding
from bigalign.losses.engine import pairwise
from bigalign.plan import hlo_collectives
from bigalign.run import flops


def test_collectives_in_loops_count_as_often_as_they_run():
  mesh = sharding.make_mesh(data=8)

  def local(x):  # [4, 16] on each device
    def body(carry, _):
      every = jax.lax.all_gather(carry, "data", tiled=True)  # [32, 16]
      part = jax.lax.psum_scatter(jnp.sin(every), "data", tiled=True)  # [4, 16]
      return jax.lax.ppermute(part, "data", [(i, (i + 1) % 8) for i in range(8)]), None

    x, _ = jax.lax.scan(body, x, length=5)
    return x, jax.lax.psum(x.sum(0), "data")

  with jax.set_mesh(mesh):
    f = jax.jit(jax.shard_map(local, in_specs=P("data"), out_specs=(P("data"), P())))
    text = f.lower(jax.ShapeDtypeStruct((32, 16), jnp.float32)).compile().as_text()
  whole, part = 32 * 16 * 4, 4 * 16 * 4
  assert hlo_collectives.collectives(text) == {
    "all-gather": (5, 5 * whole, 0),
    "reduce-scatter": (5, 5 * whole, 0),
    "collective-permute": (5, 5 * part, 0),
    "all-reduce": (1, 2 * 16 * 4, 0),
  }


def test_hlo_of_a_tpu():
  """A fused reduce-scatter, an asynchronous all-gather, a loop whose trip count is a constant."""
  text = """
%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}
}

%body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %ag = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), replica_groups=[4,4]<=[16]
  %fusion.1 = f32[16,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (p: (s32[], f32[16,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
}

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %while.1 = (s32[], f32[16,8]{1,0}) while(%t), condition=%condition, body=%body
  %rs = f32[2,8]{1,0} reduce-scatter(%z), replica_groups=[2,8]<=[16], dimensions={0}
}
"""
  assert hlo_collectives.collectives(text) == {
    "all-gather": (12, 12 * 16 * 8 * 2, 12 * 16 * 8 * 2),
    "reduce-scatter": (13, (12 * 64 * 8 + 8 * 2 * 8) * 4, 0),
  }


def test_combined_collectives_and_unnamed_groups():
  """Several arrays in one permute, with two context words; a reduce-scatter over all devices."""
  text = """HloModule jit_f, is_scheduled=true, num_partitions=16

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %p1 = ((f32[2,8], bf16[4]), (f32[2,8], bf16[4]), u32[]{:S(2)}, u32[]) collective-permute-start(%x)
  %p2 = (f32[2,8], f32[2,8], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  %rs = f32[2,8]{1,0} reduce-scatter(%z), replica_groups={}, dimensions={0}
}
"""
  assert hlo_collectives.collectives(text) == {
    "collective-permute": (2, 2 * 2 * 8 * 4 + 4 * 2, 2 * 2 * 8 * 4 + 4 * 2),
    "reduce-scatter": (1, 16 * 2 * 8 * 4, 0),
  }


def test_one_branch_of_a_conditional_counts():
  """The longest one, with what it calls; also when there are two, by another name."""
  text = """HloModule jit_f, is_scheduled=true, num_partitions=2

%short (p: f32[8]) -> f32[8] {
  %g0 = f32[64]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}

%inner (p: f32[8]) -> f32[8] {
  %r = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  %a = f32[8]{0} add(%r, %r)
}

%long (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} call(%p), to_apply=%inner
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %x = f32[8]{0} conditional(%i, %p, %p), branch_computations={%short, %long}
  %y = f32[8]{0} conditional(%b, %p, %p), true_computation=%short, false_computation=%long
}
"""
  assert hlo_collectives.runs(text) == {"main": 1, "long": 2, "inner": 2}
  assert hlo_collectives.collectives(text) == {"all-reduce": (2, 2 * 2 * 8 * 4, 0)}


def test_small_floats_have_a_size():
  line = "HloModule f, num_partitions=2\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %g = "
  for dtype, size in (("f8e4m3fn", 64), ("f8e5m2", 64), ("f4e2m1fn", 32), ("s4", 32), ("c64", 512)):
    text = f"{line}{dtype}[64]{{0}} all-gather(%p), replica_groups={{{{0,1}}}}\n}}\n"
    assert hlo_collectives.collectives(text) == {"all-gather": (1, size, 0)}


def test_a_collective_that_overlaps_a_loop_counts_once():
  text = """
%fused.1 (p: f32[2,8]) -> (f32[2,8], f32[16,8], u32[]) {
  %ag.1 = f32[16,8] all-gather(%p), channel_id=28, replica_groups=[1,8]<=[8], dimensions={0}
  %s = (f32[2,8], f32[16,8], u32[]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: f32[2,8], q: f32[16,8]) -> (f32[16,8]) {
  %ag.2 = f32[16,8] all-gather(%p), channel_id=28, replica_groups=[1,8]<=[8], dimensions={0}
}

%fused.2 (p: f32[2,8], q: f32[16,8]) -> f32[16,8] {
  %ag.3 = f32[16,8] all-gather(%p), channel_id=28, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %done = f32[16,8] custom-call(%ag.3, %q), custom_call_target="AsyncCollectiveDone"
}

%body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %w = (f32[16,8]) fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
}

%condition (p: (s32[], f32[16,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
}

ENTRY %main (p: f32[2,8]) -> f32[16,8] {
  %f1 = (f32[2,8], f32[16,8], u32[]) fusion(%p), kind=kCustom, calls=%fused.1
  %while.1 = (s32[], f32[16,8]) while(%f1), condition=%condition, body=%body
  %f2 = f32[16,8] fusion(%while.1), kind=kCustom, calls=%fused.2
}
"""
  assert hlo_collectives.collectives(text) == {"all-gather": (1, 16 * 8 * 4, 16 * 8 * 4)}


def test_a_sharded_product_counts_for_all_devices():
  mesh, engine = sharding.make_mesh(data=8), pairwise.DEFAULT
  z = jax.ShapeDtypeStruct((64, 16), jnp.float32)

  def value(x, y):
    def tile(row, col, shared):
      return {"i2t": engine.products(row["z"], col["z"])}

    return engine.reduce(tile, {"z": x}, {"z": y}, outputs={"i2t": "row_lse"})["i2t"].sum()

  with jax.set_mesh(mesh):
    assert flops.count(value, z, z) == 2 * 64 * 64 * 16
    assert flops.count(jax.grad(value, (0, 1)), z, z) == 8 * 64 * 64 * 16


def test_fixed_columns_send_no_gradient():
  """The rows of a teacher are gathered, but only the student's gradient is scattered."""
  mesh, engine = sharding.make_mesh(data=8), pairwise.Engine("gather")
  z = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=sharding.batch_sharding(mesh))
  t = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=sharding.batch_sharding(mesh))

  def value(z, t):
    def tile(row, col, shared):
      student, teacher = (engine.products(row[k], col[k]) for k in ("z", "t"))
      return {"loss": jnp.exp(student) * teacher}

    return engine.total(tile, {"z": z, "t": t}, {"z": z, "t": t}, fixed={"t"})

  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(value)).lower(z, t).compile().as_text()
  moved = hlo_collectives.collectives(text)
  assert moved["reduce-scatter"].bytes == 64 * 16 * 4
  assert moved["all-gather"].bytes <= 64 * (16 + 48 + 1) * 4
