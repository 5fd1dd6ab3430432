"""Places of arrays: meshes, rules, the rows of a host, pinned activations."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest
from helpers.shipped import load
from jax.sharding import PartitionSpec as P

from bigalign import sharding, tree
from bigalign.config import resolve_config
from bigalign.program import layout, make_program
from bigalign.step import data_position, train_step


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, np.float32)


PARAMS = {
  "model/text_tower/encoder/blocks/attn/query/kernel": shape(12, 64, 4, 16),
  "model/text_tower/encoder/blocks/attn/query/bias": shape(12, 4, 16),
  "model/text_tower/encoder/block_0/attn/out/kernel": shape(4, 16, 64),
  "model/text_tower/encoder/blocks/mlp/fc1/kernel": shape(12, 64, 256),
  "model/text_tower/encoder/blocks/mlp/fc1/bias": shape(12, 256),
  "model/text_tower/encoder/blocks/mlp/fc2/kernel": shape(12, 256, 64),
  "model/text_tower/embedding": shape(999, 64),
  "loss/clip/t": shape(),
}


def specs(**sizes):
  placed = sharding.shardings(PARAMS, sharding.make_mesh(**sizes))
  return {path.removeprefix("model/text_tower/"): s.spec for path, s in placed.items()}


def test_golden_specs():
  """Tensor axis by rule, fsdp on the largest axis that it divides, never on the layer axis."""
  assert specs(data=2, fsdp=2, tensor=2) == {
    "encoder/blocks/attn/query/kernel": P(None, "fsdp", "tensor", None),
    "encoder/blocks/attn/query/bias": P(None, "tensor", None),  # 768 numbers: not worth a split
    "encoder/block_0/attn/out/kernel": P("tensor", None, "fsdp"),
    "encoder/blocks/mlp/fc1/kernel": P(None, "fsdp", "tensor"),
    "encoder/blocks/mlp/fc1/bias": P(None, "tensor"),
    "encoder/blocks/mlp/fc2/kernel": P(None, "tensor", "fsdp"),
    "embedding": P(None, "fsdp"),  # 999 rows do not divide
    "loss/clip/t": P(),
  }
  assert specs(fsdp=8, data=1)["embedding"] == P(None, "fsdp")


def test_rules_first_match_and_errors():
  rules = [("bias$", 1), ("kernel", 2), ("", 3)]
  assert tree.match(rules, ["a/bias", "a/kernel", "b"]) == {"a/bias": 1, "a/kernel": 2, "b": 3}
  with pytest.raises(ValueError, match=r"no rule matches \['b'\]"):
    tree.match(rules[:2], ["a/bias", "a/kernel", "b"])
  with pytest.raises(ValueError, match=r"rules \['kernel'\] match no path"):
    tree.match([("", 0), ("kernel", 2)], ["a/kernel"])


def test_an_axis_that_does_not_divide_says_what_would():
  with pytest.raises(ValueError, match=r"mesh.tensor=8 does not divide axis 2 .*\[1, 2, 4\]"):
    specs(data=1, tensor=8)
  with pytest.raises(ValueError, match=r"config.rules: .* which has 0 axes per layer"):
    sharding.shardings({"t": shape()}, sharding.make_mesh(), [("t", ("tensor",))])


@pytest.mark.parametrize(
  "axes", [("tensr", None), ("tensor", "tensor"), (("data", "fsdp"), None), "tensor"]
)
def test_a_rule_names_axes_of_the_mesh_once(axes):
  with pytest.raises(ValueError, match=r"config\.rules: .* for w must be 'replicate'.*'fsdp'"):
    sharding.shardings({"w": shape(8, 8)}, sharding.make_mesh(), [("w", axes)])


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(tensor=8)])
def test_rows_go_where_they_belong(sizes):
  """Row r of the host batch is row r of the global array on every mesh."""
  mesh = sharding.make_mesh(**sizes)
  rows = sharding.host_rows(mesh, 16)
  x = np.arange(32).reshape(16, 2)
  placed = sharding.global_batch(mesh, {"x": x[rows]}, rows, 16)["x"]
  np.testing.assert_array_equal(placed, x)
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, x[shard.index])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_activations_do_not_move_under_fsdp(sizes):
  """The compiled program gathers weights, not activations: sharding.constrain_batch, replicate."""
  c = load("tiny")
  c.batch_size = 512
  program = make_program(resolve_config(c), dataset_size=1000)
  mesh = sharding.make_mesh(**sizes)
  shapes, shardings = layout(program, mesh)
  batch = {
    k: jax.ShapeDtypeStruct(*s, sharding=sharding.batch_sharding(mesh))
    for k, s in program.spec.items()
  }
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  replicated = sharding.replicated_sharding(mesh)
  step = jax.jit(
    functools.partial(train_step, program=program),
    out_shardings=(shardings, replicated, replicated),
  )
  with jax.set_mesh(mesh):
    text = step.lower(state, batch, data_position(0, 1)).compile().as_text()
  biggest = max(x.size for x in {**shapes.trainable, **shapes.frozen}.values())
  # The loss gathers the texts' embeddings [512, 64]; nothing else that crosses may hold a batch.
  allowed = max(biggest, 512 * 64)
  collectives = "all-to-all|all-gather|collective-permute"
  moved = re.findall(rf"= (?:\()?f32\[([\d,]+)\]\S* ({collectives})", text)
  assert moved
  too_big = [(s, op) for s, op in moved if np.prod([int(n) for n in s.split(",")]) > allowed]
  assert not too_big, too_big
