"""Retrieval among a million pairs fits a small pod: what the compiler of the TPU says."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
from helpers.tpu_compiler import compiles_for_tpus
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import sharding
from bigalign.evals.embed import Embedded
from bigalign.evals.retrieval import both_directions
from bigalign.plan import topologies

pytestmark = compiles_for_tpus
BATCHES, BATCH, WIDTH = 1024, 1024, 512
PAIRS = BATCHES * BATCH


def test_a_million_by_a_million_fits_sixteen_chips():
  """The embeddings stay split: each chip has 1/16 of both sides, and a part of the similarities."""
  mesh = sharding.make_mesh(devices=topologies.devices("v5e:4x4"))
  split, whole = NamedSharding(mesh, P(None, sharding.BATCH)), sharding.replicated_sharding(mesh)

  def array(*shape, dtype=jnp.float32, place=split):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  embedded = Embedded(
    zimg=array(BATCHES, BATCH, WIDTH),
    ztxt=array(BATCHES, BATCH, 1, WIDTH),
    label=array(BATCHES, BATCH, dtype=jnp.int32),
    ordinal=array(BATCHES, BATCH, dtype=jnp.int32),
    valid=array(BATCHES, BATCH, dtype=bool),
    texts_valid=array(BATCHES, BATCH, 1, dtype=bool),
    rejects=array(7, dtype=jnp.int32, place=whole),
  )
  find = jax.jit(functools.partial(both_directions, mesh=mesh), out_shardings=whole)
  compiled = topologies.compile_without_cache(find.lower(embedded))
  memory = compiled.memory_analysis()
  assert memory.argument_size_in_bytes <= 2.1 * PAIRS * WIDTH * 4 / 16
  assert memory.temp_size_in_bytes <= 4e9  # of 16 GB
  # No collective moves the gallery: what is communicated is a batch of queries, and ranks.
  moved = re.findall(r"= (.*) (?:all-[-a-z]+|collective-permute)\(", compiled.as_text())
  sizes = [
    math.prod(int(n) for n in dims.split(",") if n)
    for shapes in moved
    for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
  ]
  assert sizes and max(sizes) <= max(BATCH * WIDTH, PAIRS)
