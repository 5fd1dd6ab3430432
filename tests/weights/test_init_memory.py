"""The memory of a run that begins from a checkpoint: straight into the arrays of its devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.shipped import ROOT, load
from helpers.small_checkpoints import BERT, bert_keys, folder, save

from bigalign import tree
from bigalign.towers import TOWERS
from bigalign.weights import LAYOUTS, table

FLOAT32 = dict(dtype="float32")

MEMORY = """
import functools, json, resource, sys
import jax, numpy as np
from bigalign import sharding
from bigalign.config import resolve_config
from bigalign.program import init_on_mesh, layout, make_program
from bigalign.weights import init, slices

def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()

def peak():  # ru_maxrss would begin at the size of the process that started this one
  with open("/proc/self/status") as file:
    return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

def prepare(values):
  program = make_program(resolve_config(values), dataset_size=100)
  shapes, shardings = layout(program, sharding.make_mesh())
  of_params = ({**x.trainable, **x.frozen} for x in (shapes, shardings))
  return program, shardings, functools.partial(init.load, values, *of_params)

# All code runs once before its memory is looked at: compilers and their pages stay.
small, big = (json.loads(x) for x in sys.argv[1:])
slices._SMALL = 0
program, shardings, load = prepare(small)
jax.block_until_ready(init_on_mesh(program, shardings, load()))
program, shardings, load = prepare(big)
before = resident()
loaded = load()
at_load, arrays = peak() - before, sum(x.nbytes for x in loaded.values())
layer = np.asarray(loaded["model/text_tower/encoder/blocks/mlp/fc1/kernel"][5, :3, :3]).tolist()
jax.block_until_ready(init_on_mesh(program, shardings, loaded))
print(json.dumps(dict(loaded=at_load, arrays=arrays, born=peak() - before, layer=layer)))
"""


def bert_shapes(config):
  """{key: shape} of a BERT, without the memory."""
  given = {k: v for k, v in config.items() if k not in ("model_type", "projection_dim")}
  layout = LAYOUTS["bert"]({}, "", "", **given)
  tower = dict(layout.model["text"])
  made = TOWERS[tower.pop("name")](**tower).build()
  params = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"]
  ours = tree.flatten(params, "text_tower/")
  return {
    key: shape
    for row in layout.rows
    for conversion in table.conversions(row, ours)
    for key, shape in zip(conversion.theirs, table.expected(conversion))
  }


@pytest.mark.optimized
def test_memory_beyond_the_arrays_is_little(tmp_path):
  """A checkpoint of 8 shards of 33 MB: 1.3 times one of them at most beyond the arrays, though
  layers of all shards make one array; then a state is born with no random tower beside them."""
  sizes = dict(hidden_size=640, intermediate_size=5120, num_hidden_layers=8, num_attention_heads=10)
  checkpoint = dict(BERT, **sizes)
  path = folder(tmp_path / "big", checkpoint, {})
  (path / "model.safetensors").unlink()
  names, fc1 = {}, None
  empty = bert_shapes(checkpoint)
  for i in range(8):
    arrays = {
      key: np.random.default_rng(i).random(shape, np.float32)
      for key, shape in empty.items()
      if f"layer.{i}." in key or (i == 0 and "layer." not in key)
    }
    save(path / f"model-{i}.safetensors", arrays)
    names |= dict.fromkeys(arrays, f"model-{i}.safetensors")
    fc1 = arrays["encoder.layer.5.intermediate.dense.weight"] if i == 5 else fc1
  (path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=names)))
  largest = max(x.stat().st_size for x in path.glob("*.safetensors"))
  assert largest > 32e6
  image = dict(name="vit", patch=16, width=8, depth=1, heads=1, **FLOAT32)
  big = load("tiny").to_dict() | dict(
    model=dict(image=image, text=dict(init=str(path), **FLOAT32), embed_dim=4),
    frozen="text_tower",
    loss=dict(clip={}),
    ema=0.0,
  )
  big["data"]["tokenizer"]["length"] = 6
  few = folder(tmp_path / "small", BERT, bert_keys(BERT)[1])
  small = big | dict(model=dict(image=image, text=dict(init=str(few), **FLOAT32), embed_dim=4))
  env = os.environ | {
    "JAX_NUM_CPU_DEVICES": "1",
    "PYTHONPATH": str(ROOT),
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    # What malloc keeps of freed memory is no need of ours.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "0",
  }
  done = subprocess.run(
    [sys.executable, "-c", MEMORY, json.dumps(small), json.dumps(big)],
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  print(found, largest)
  np.testing.assert_array_equal(found["layer"], fc1.T[:3, :3])
  assert found["loaded"] <= found["arrays"] + 1.3 * largest
  assert found["born"] <= 1.5 * found["arrays"], "random towers beside the loaded ones"
