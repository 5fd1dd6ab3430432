"""Per-sample tables: rows by 64-bit ids, over eight devices as on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import ids

from bigalign import sharding
from bigalign.losses.per_sample import tables
from bigalign.plan import hlo_collectives, topologies


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def words(x):
  """Python integers of up to 64 bits -> [B, 2] uint32."""
  return jnp.asarray([(i >> 32, i & 0xFFFFFFFF) for i in x], jnp.uint32)


def written(table, where, values):
  """The expected table: the last of equal ids wins; ids out of range are not written."""
  table = np.array(table)
  for i, v in zip(where, values, strict=True):
    if i < len(table):
      table[i] = v
  return table


@pytest.mark.parametrize("start", [0, 2**31, 2**32 - 5, 2**32, 3 * 2**32 + 7, 2**40 - 1])
def test_rows_are_found_above_32_bits(start):
  rows = 2**31 - 1
  asked = [
    0,
    1,
    start - 1,
    start,
    start + 1,
    start + rows - 1,
    start + rows,
    start + 2**32,
    start + 2**32 + 3,
    2**64 - 1,
  ]
  asked = [i for i in asked if i >= 0]
  row, hit = tables.local_row(words(asked), words([start])[0], rows)
  assert hit.tolist() == [0 <= i - start < rows for i in asked]
  assert [int(r) for r in row[hit]] == [i - start for i in asked if 0 <= i - start < rows]


@pytest.mark.parametrize("b", [16, 13])
def test_eight_devices_read_and_write_as_one(mesh, b):
  """With duplicates, ids out of range, and a batch that does not divide over the devices."""
  rng = np.random.default_rng(b)
  n = tables.ROWS
  where = rng.choice([3, n // 8 - 1, n // 8, n - 1, 5 * n // 8 + 2, n, 2**32 + 3, 17], b)
  old, new = (rng.normal(size=(2, k)).astype(np.float32) for k in (n, b))
  table = {"u": jnp.asarray(old[0]), "tau": jnp.asarray(old[1])}
  values = {"tau": jnp.asarray(new[1]), "u": jnp.asarray(new[0])}

  def both(table, where, values):
    return tables.read(table, where), tables.write(table, where, values)

  one = jax.jit(both)(table, words(where.tolist()), values)
  split = jax.device_put(table, {k: tables.state_sharding(x, mesh) for k, x in table.items()})
  with jax.set_mesh(mesh):
    eight = jax.jit(both)(split, words(where.tolist()), values)
  jax.tree.map(np.testing.assert_array_equal, one, eight)
  read, (table, current) = eight
  for k, name in enumerate(("u", "tau")):
    np.testing.assert_array_equal(read[name], [old[k][i] if i < n else 0 for i in where])
    np.testing.assert_array_equal(table[name], written(old[k], where, new[k]))
    last = {i: v for i, v in zip(where, new[k], strict=True)}
    np.testing.assert_array_equal(current[name], [last[i] for i in where])


def test_a_donated_table_is_written_in_place(mesh):
  shape = jax.ShapeDtypeStruct((tables.ROWS * 100,), np.float32)
  shape = {
    "u": jax.ShapeDtypeStruct(shape.shape, np.float32, sharding=tables.state_sharding(shape, mesh))
  }
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(lambda *args: tables.write(*args)[0], donate_argnums=0)
      .lower(shape, ids(range(16)), {"u": jnp.ones(16)})
      .compile()
    )
  memory = compiled.memory_analysis()
  own = tables.ROWS * 100 * 4 // 8
  assert memory.alias_size_in_bytes == own
  assert memory.temp_size_in_bytes < own / 100


def test_tables_lie_over_all_devices_and_scalars_on_each(mesh):
  table = tables.make(10, 0.5)
  assert table.shape == (tables.ROWS,)
  assert tables.state_sharding(table, mesh).shard_shape(table.shape) == (tables.ROWS // 8,)
  assert tables.state_sharding(jnp.zeros(()), mesh).is_fully_replicated
  assert tables.state_sharding(jnp.zeros(4100), mesh).is_fully_replicated


def test_a_table_that_does_not_divide_is_explained(mesh):
  with (
    jax.set_mesh(mesh),
    pytest.raises(
      ValueError, match=r"9 rows of .u., a per-sample table .* do not divide over 8 devices"
    ),
  ):
    tables.read({"u": jnp.zeros(9)}, ids([1]))


def test_an_id_out_of_range_is_named():
  tables.check_ids(np.asarray(words([0, 2**33])), 2**33 + 1, "image_id")
  with pytest.raises(ValueError, match=r"image_id: id 8589934593 in row 1 .* ids 0 to 8589934592"):
    tables.check_ids(np.asarray(words([0, 2**33 + 1])), 2**33 + 1, "image_id")


@pytest.mark.optimized
def test_more_than_2_to_the_31_rows(mesh):
  """In bytes, to fit in memory: rows beyond 2^31 are read and written."""
  n = 2**31 + 4096
  where = [0, 2**31 - 1, 2**31, n - 1, n - 1, n, 2**32, 2**28 + 512]
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
  with jax.set_mesh(mesh):
    table = {"u": jax.jit(lambda: jnp.full((n,), 3, jnp.uint8), out_shardings=split)()}
    write = jax.jit(lambda *args: tables.write(*args)[0], donate_argnums=0)
    table = write(table, words(where), {"u": jnp.arange(10, 18, dtype=jnp.uint8)})
    asked = [*where, 1, 2**31 + 1, n - 2]
    found = jax.jit(tables.read)(table, words(asked))["u"]
  assert found.tolist() == [10, 11, 12, 14, 14, 0, 0, 17, 3, 3, 3]
  changed = sum(np.count_nonzero(np.asarray(x.data) != 3) for x in table["u"].addressable_shards)
  assert changed == 5


@pytest.mark.optimized
@pytest.mark.skipif(not topologies.installed(), reason="libtpu is not installed: the extra plan")
@pytest.mark.parametrize(
  "n",
  [pytest.param(10**9, marks=pytest.mark.long), 8 * 10**9],  # the second needs more than 32 bits
)
def test_four_floats_of_each_sample_on_a_pod(n):
  """256 chips, 32,768 samples a step: in place, few temporaries, 4 MB of communication."""
  pod = sharding.make_mesh(data=16, fsdp=16, devices=topologies.devices("v5e:16x16"))
  batch = sharding.batch_sharding(pod)

  def array(shape, dtype, place):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def step(table, ids, g):
    old = tables.read(table, ids)
    return tables.write(table, ids, {name: x + g for name, x in old.items()})[0]

  one = jax.eval_shape(lambda: tables.make(n, 0.0))
  table = {name: array(one.shape, one.dtype, tables.state_sharding(one, pod)) for name in "utmv"}
  with jax.set_mesh(pod):
    lowered = jax.jit(step, donate_argnums=0).lower(
      table, array((32768, 2), jnp.uint32, batch), array((32768,), jnp.float32, batch)
    )
    compiled = topologies.compile_without_cache(lowered)
  memory, moved = compiled.memory_analysis(), hlo_collectives.collectives(compiled.as_text())
  assert 5e5 < sum(x.bytes for x in moved.values()) <= 4e6
  assert memory.temp_size_in_bytes < 1e6
  own = n * 4 * 4 / 256  # 62.5 MB for 1e9
  assert memory.argument_size_in_bytes <= 1.001 * own
  assert own <= memory.alias_size_in_bytes <= 1.001 * own
