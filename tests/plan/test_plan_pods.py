"""Configs compiled for TPU slices: programs, memory, communication, the targets of docs/plan.md."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.shipped import ROOT, load
from helpers.tpu_compiler import compiled_for_tpus, needs_libtpu

from bigalign.config import resolve_config
from bigalign.plan import compile_step, main, variants
from bigalign.program import init_state, make_program
from bigalign.run import flops
from bigalign.step import train_step, useful_flops

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Sizes of DINOv2 and MiniLM, instead of their checkpoints.
TOWERS = dict(
  image=dict(name="vit", variant="B", patch=14),
  text=dict(name="text", vocab_size=30_522, length=77, width=384, depth=6, heads=12, scan=False),
)
# Products of float32 logits take the compiler ten times as long.
LOGITS = dict(way="gather", dtype="bfloat16")


@compiled_for_tpus
def test_what_a_small_step_moves():
  """Data parallelism, FSDP, bfloat16 gradients: half the bytes; weights and no activations."""
  c = load("siglip_b16").to_dict()
  for side in ("image", "text"):
    c["model"][side] |= dict(width=256, heads=2, depth=2, remat="full", pool="mean")
  c["model"]["text"] |= dict(vocab_size=512, length=16)
  c["data"] |= dict(image_size=64, tokenizer=dict(c["data"]["tokenizer"], length=16))
  c |= dict(
    batch_size=128, logits=LOGITS, gradient_dtype="bfloat16", mesh=dict(data=2, fsdp=2, tensor=1)
  )
  c["model"] |= dict(embed_dim=256)
  c["optimizer"]["name"] = "adamw"
  plan = compile_step.measure(c, "v5e:2x2")
  moved, weights = plan["collectives"], 2 * plan["parameters"]
  assert plan["fits"] and moved["all-gather"]["bytes"] <= 2.6 * weights
  assert moved.get("reduce-scatter", dict(bytes=0))["bytes"] <= 1.1 * weights
  assert moved.get("all-to-all", dict(bytes=0))["bytes"] <= 1e6
  assert plan["not_checked"], "the vocabulary file is missing"


@compiled_for_tpus
def test_a_step_with_heads_is_planned():
  """Their layers are a part of the plan, and so are the losses beside them."""
  c = load("tiny").to_dict() | dict(batch_size=16)
  for side in ("image", "text"):
    c["model"][side] |= dict(depth=1, dtype="bfloat16")
  c["loss"] = dict(siglip={}, caption=dict(depth=1))
  plan = compile_step.measure(c, "v5e:1x1")
  work = {name: x["flops_per_chip"] for name, x in plan["parts"].items()}
  assert work["heads"] > 0.2 * work["encoders"]
  assert plan["loss_alone_bytes_per_chip"] > 0
  c["loss"] = dict(caption=dict(depth=1))
  assert compile_step.measure(c, "v5e:1x1")["loss_alone_bytes_per_chip"] == 0


@pytest.mark.long
def test_gradients_in_bfloat16_are_those_of_float32():
  """One step of SGD from the same loss, to the digits of bfloat16; kernels alone are rounded."""
  c = load("tiny").to_dict() | dict(
    batch_size=8, ema=0.0, optimizer=dict(name="sgd", lr=1.0, momentum=0.0, clip_norm=None)
  )
  for side in ("image", "text"):
    c["model"][side] |= dict(depth=1, dtype="bfloat16")
  c["data"]["tokenizer"]["length"] = c["model"]["text"]["length"] = 8
  moved, losses, state = {}, {}, None
  for dtype in ("float32", "bfloat16"):
    program = make_program(resolve_config(c | dict(gradient_dtype=dtype)))
    state = state or jax.jit(functools.partial(init_state, program))(jax.random.key(0))
    batch = {name: jnp.ones(*x) for name, x in program.spec.items()}
    after, metrics, _ = jax.jit(functools.partial(train_step, program=program))(
      state, batch, jnp.zeros(2)
    )
    losses[dtype] = float(metrics["loss"])
    moved[dtype] = {k: np.asarray(x - state.trainable[k]) for k, x in after.trainable.items()}
  assert losses["float32"] == losses["bfloat16"]
  for path, wide in moved["float32"].items():
    np.testing.assert_allclose(moved["bfloat16"][path], wide, rtol=0, atol=2e-2 * abs(wide).max())
  kernel = "model/image_tower/encoder/block_0/mlp/fc1/kernel"
  assert (moved["bfloat16"][kernel] != moved["float32"][kernel]).any()


@pytest.mark.optimized
def test_flops_are_those_that_xla_counts():
  """Within 1 % on an unrolled program, of which XLA counts the elementwise work too."""
  c = load("siglip_b16").to_dict()
  for side in ("image", "text"):
    c["model"][side] |= dict(depth=2, scan=False, remat="none", dtype="float32")
  c["batch_size"] = 32
  program = make_program(resolve_config(c))
  state = jax.eval_shape(functools.partial(init_state, program), jax.random.key(0))
  batch = {name: jax.ShapeDtypeStruct(*x) for name, x in program.spec.items()}
  traced = jax.jit(functools.partial(train_step, program=program)).trace(
    state, batch, jax.ShapeDtypeStruct((2,), "float32")
  )
  theirs = traced.lower().cost_analysis()["flops"]
  assert flops.of_jaxpr(traced.jaxpr) == pytest.approx(theirs, rel=0.01)


@pytest.mark.slow
def test_float32_logits_of_a_million_pairs_take_a_seventh_of_the_towers():
  """In passes of products on a TPU, at E = 1152 and without microbatches; six passes take 42 %."""
  c = load("siglip_b16").to_dict() | dict(batch_size=8)
  program = make_program(resolve_config(c, files_needed=False))
  state = jax.eval_shape(functools.partial(init_state, program), jax.random.key(0))
  batch = {name: jax.ShapeDtypeStruct(*x) for name, x in program.spec.items()}
  args = (state, batch, jax.ShapeDtypeStruct((2,), "float32"))
  traced = jax.jit(functools.partial(train_step, program=program)).trace(*args)
  towers = useful_flops(program, traced.jaxpr, *args) / 8

  def share(passes):  # of the logits, of the same logits in the backward pass, of two gradients
    return sum(passes) * 2 * 2**20 * 1152 / towers

  assert share([3, 3, 1, 1]) <= 0.15 < 0.41 < share([6, 6, 6, 6])


def shipped(name):
  """A shipped config, with sizes next to its checkpoints."""
  c = load(name).to_dict()
  for side, tower in TOWERS.items():
    given = c["model"][side]
    if "init" in given:
      sizes = dict(name="mobilenet_v2") if "mobilenet" in given["init"] else tower
      c["model"][side] = {**sizes, **given, "init": "/nowhere"}
  return c


@compiled_for_tpus
@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_a_program_for_its_topology(name):
  """Mesh, batch and rules are valid without data; test_every_config_fits compiles the program."""
  c = shipped(name)
  step = compile_step.trace(c, c["topology"])
  with jax.set_mesh(step.mesh):
    assert f"num_partitions = {step.mesh.size} " in step.traced.lower().as_text()


FLAGS = """
import sys, jax
from bigalign import sharding
from bigalign.plan import chips, topologies, variants
from bigalign.run import runtime
runtime.set_libtpu_flags(chips.kind(sys.argv[1]))
mesh = sharding.make_mesh(devices=topologies.devices(sys.argv[1]))
x = jax.ShapeDtypeStruct((1024, 128), "float32", sharding=sharding.batch_sharding(mesh))
with jax.set_mesh(mesh):
  topologies.compile_without_cache(jax.jit(lambda x: sharding.replicate(x) @ x[:128]).lower(x))
"""


@compiled_for_tpus
def test_kinds_of_chips_are_planned_in_one_process(tmp_path, monkeypatch):
  """libtpu refuses v5e's flags for other kinds, and reads those of its variable once."""
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
  config = load("tiny").to_dict()
  for topology in ("v5e:2x2", "v5p:2x2x1"):
    assert main.plan(config, topology, cache=tmp_path)["fits"]
  assert os.environ["LIBTPU_INIT_ARGS"] == ""


@needs_libtpu
@pytest.mark.parametrize(
  "topology",
  [
    *(pytest.param(x, marks=pytest.mark.optimized) for x in ("v5p:2x2x1", "v6e:2x2")),
    *(
      pytest.param(x, marks=pytest.mark.long)
      for x in ("v4:2x2x1", "v5e:2x2", "tpu7x:2x2x1", "v5e:2x2*2")
    ),
  ],
)
def test_every_kind_of_chip_takes_our_flags(topology):
  """In a process of its own: libtpu reads flags once. It refuses flags for another kind."""
  env = {k: x for k, x in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
  subprocess.run([sys.executable, "-c", FLAGS, topology], check=True, cwd=ROOT, env=env)


GRADIENTS = """
import jax, jax.numpy as jnp
from bigalign import sharding
from bigalign.plan import hlo_collectives, topologies
from bigalign.run import runtime
options = runtime.libtpu_options("v5e")
mesh = sharding.make_mesh(devices=topologies.devices("v5e:2x2"))
def shape(axes, dtype, place):
  return jax.ShapeDtypeStruct(axes, dtype, sharding=place(mesh))
def layer(x, kernel):
  return jnp.tanh(x @ kernel.astype(x.dtype)), None
def stacked(kernels, x):
  return jax.lax.scan(layer, x, kernels)[0].astype("float32").sum()
def separate(kernels, x):
  for kernel in kernels:
    x, _ = layer(x, kernel)
  return x.astype("float32").sum()
x = shape((4 * 4096, 2048), "bfloat16", sharding.batch_sharding)
place = sharding.replicated_sharding
for loss, kernels in (
  (stacked, shape((4, 2048, 2048), "float32", place)),
  (separate, [shape((2048, 2048), "float32", place)] * 4),
):
  def step(kernels, x):
    return jax.tree.map(lambda w, g: w - g, kernels, jax.grad(loss)(kernels, x))
  with jax.set_mesh(mesh):
    places = jax.tree.map(lambda x: x.sharding, kernels)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=places).lower(kernels, x)
    compiled = topologies.compile_without_cache(lowered, options)
  moved = hlo_collectives.collectives(compiled.as_text())["all-reduce"]
  print("hidden", moved.hidden / moved.bytes)
"""


@needs_libtpu
@pytest.mark.long
def test_gradients_are_summed_during_the_backward_pass_on_v5e():
  """Of stacked layers all four, of separate ones three; without our flags, none."""
  env = {k: x for k, x in os.environ.items() if k != "LIBTPU_INIT_ARGS"}
  said = subprocess.run(
    [sys.executable, "-c", GRADIENTS], check=True, cwd=ROOT, env=env, capture_output=True, text=True
  ).stdout
  assert [float(x) for x in said.split() if x != "hidden"] == [1.0, 0.75]


def l14(**parts):
  """CLIP L/14 with changes, as in plan.variants.with_changes."""
  c = variants.with_changes(load("clip_b16").to_dict(), **parts)
  c["model"]["image"] |= dict(variant="L", patch=14)
  c["model"]["text"] |= dict(width=768, heads=12)
  return c


@compiled_for_tpus
def test_layers_are_one_program():
  """L/14: the number of lines of the lowered program does not grow with the layers."""
  step = compile_step.trace(l14(remat="full"), "v5e:16x16")
  with jax.set_mesh(step.mesh):
    assert step.traced.lower().as_text().count("\n") <= 10_000


@pytest.fixture
def ask(tmp_path_factory):
  """plan.main.plan, which compiles once what several tests need."""
  return functools.partial(main.plan, cache=tmp_path_factory.getbasetemp() / "plans")


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_every_config_fits(name, ask):
  c = shipped(name)
  assert ask(c, c["topology"])["fits"]


def b16(name="clip_b16", **parts):
  """A config of B/16 with changes, as in plan.variants.with_changes."""
  return variants.with_changes(load(name).to_dict(), **parts)


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
  "name,remat,rows,most",
  [
    ("clip_b16", "full", 128, 5e9),
    ("clip_b16", "dots", 128, 10e9),
    ("siglip_b16", "full", 512, 9e9),
  ],
)
def test_memory_of_b16(name, remat, rows, most, ask):
  plan = ask(b16(name, remat=remat, batch=256 * rows), "v5e:16x16")
  assert plan["peak_bytes_per_chip"] <= most


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_memory_traffic_of_a_pair_of_b16(ask):
  """With attention by XLA it is 0.97 GB. The parts of the step add up to the whole."""
  plan = ask(b16(remat="dots", batch=256 * 128), "v5e:16x16")
  assert plan["memory_traffic_bytes_per_chip"] / 128 <= 0.55e9
  for figure in ("memory_traffic_bytes_per_chip", "flops_per_chip"):
    assert sum(x[figure] for x in plan["parts"].values()) == pytest.approx(plan[figure])
  assert plan["parts"]["loss"]["collectives"]["all-gather"]["bytes"] == 256 * 128 * 512 * 4


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_gradients_of_b16_are_communicated_once_in_bfloat16(ask):
  """All-reduces are counted as twice their operand; the loss's statistics are among them."""
  c = b16(remat="full") | dict(gradient_dtype="bfloat16")
  plan = ask(c, "v5e:16x16")
  assert plan["collectives"]["all-reduce"]["bytes"] / 2 <= 1.01 * 2 * plan["parameters"]


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_pairs_fit_in_microbatches(ask):
  c = b16(remat="full", batch=1 << 20) | dict(microbatches=32)
  assert ask(c, "v5e:16x16")["fits"]


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_so400m_gathers_weights_and_no_activations(ask):
  c = b16("siglip_b16", remat="full", batch=32_768, mesh=16) | dict(gradient_dtype="bfloat16")
  for side in ("image", "text"):
    c["model"][side]["variant"] = "So400m"
  c["model"]["image"]["patch"], c["model"]["embed_dim"] = 14, 1152
  moved = ask(c, "v5e:16x16")["collectives"]
  assert moved["all-gather"]["bytes"] <= 4.3e9
  assert moved["reduce-scatter"]["bytes"] <= 1.8e9
  assert moved.get("all-to-all", dict(bytes=0))["bytes"] <= 1e6


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_bytes_of_a_chip_of_l14_stay_from_16_chips_to_256(ask):
  sent = []
  for topology, chips in (("v5e:4x4", 16), ("v5e:16x16", 256)):
    c = l14(remat="full", batch=128 * chips) | dict(logits=dict(dtype="bfloat16"))
    c["model"]["embed_dim"] = 768
    sent.append(sum(x["bytes"] for x in ask(c, topology)["collectives"].values()))
  assert sent[1] / sent[0] <= 1.05, sent
