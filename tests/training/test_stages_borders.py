"""Stages that change what is trained: learning rates, frozen parameters, losses, mixtures."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marks import slow_unless
from helpers.shipped import load
from helpers.small_shards import samples, write_tar

from bigalign import border, evaluate, sharding, stages, train, tree
from bigalign.checkpoint import Checkpoints
from bigalign.config import resolve_config
from bigalign.data.order.schedule import MixtureSchedule
from bigalign.inputs import open_data, with_stage_weights
from bigalign.losses import make_loss
from bigalign.optim import OPTIMIZERS, by_age, learning_rate
from bigalign.program import layout, make_programs
from bigalign.run.metrics import is_wall_clock, read_metrics
from bigalign.state import parts, restore

# The image tower is locked, then the text tower with another loss, then both learn, with a head.
# The logit scale of `clip` vanishes and appears again.
HEADLESS = dict(mask_regularization=dict(weight=0.0), silc=dict(weight=0.0))
STAGES = (
  dict(
    until=2,
    frozen="image_tower",
    optimizer=dict(lr=1e-3, warmup=0),
    loss=HEADLESS,
    data=dict(views={}),
  ),
  dict(until=4, frozen="text_tower", loss=dict(clip=dict(weight=0.0), siglip={}) | HEADLESS),
)
SILC = dict(teacher="local", prototypes=16, hidden=8, bottleneck=4, teacher_temp_updates=3)
LOSS = dict(clip={}, mask_regularization=dict(every=2), silc=SILC)
NEVER = "model/text_projector/out/kernel"  # frozen in each stage


def config(**changes):
  """configs/tiny.py made smaller still, with averages."""
  c = load("tiny").to_dict()
  c |= dict(total_steps=6, batch_size=16, log_every=1, checkpoint_every=1, keep=dict(last=9))
  c |= dict(evals={}, writer=dict(tensorboard=False), loss=LOSS, ema=0.5, stages=STAGES)
  c["data"] |= dict(views=dict(local=dict(count=2, size=16)))
  c |= dict(frozen="text_projector", twin=dict(paths="image_tower/|heads/", decay=0.5))
  for side in ("image", "text"):
    c["model"][side] |= dict(width=16, depth=1, heads=2)
  locked = [dict(x, frozen=f"{x['frozen']}|text_projector") for x in STAGES]
  return c | dict(stages=locked) | changes


def same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def exact(workdir):
  """The rows of metrics.jsonl without what a clock says."""
  return [{k: v for k, v in row.items() if not is_wall_clock(k)} for row in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of a run that nothing disturbed, and its last state."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return workdir, train.train(config(), workdir)


def restored(workdir, step, mesh=None):
  """(state of a checkpoint, the programs of its run, the mesh)."""
  mesh = mesh or sharding.make_mesh()
  c = resolve_config(config())
  programs = make_programs(c, dataset_size=evaluate.open_run(workdir).meta["dataset_size"])
  one = programs[stages.at(stages.split(c), step).number]
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return restore(checkpoints, step, *layout(one, mesh), one.fixed), programs, mesh


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_resume_is_bitwise_at_and_between_borders(whole, step, tmp_path):
  workdir, state = whole
  cut = tmp_path / "run"
  shutil.copytree(workdir, cut)
  for later in range(step + 1, 7):
    shutil.rmtree(cut / "checkpoints" / str(later))
  same_bits(state, train.train(config(), cut))
  assert exact(cut) == exact(workdir)


@pytest.mark.slow
def test_frozen_parameters_keep_their_bytes_and_others_learn(whole):
  workdir, last = whole
  runs = {step: evaluate.open_run(workdir, step) for step in range(1, 7)}
  learns = {step: {k for k in runs[step].params if _moved(runs, step, k)} for step in range(2, 7)}
  towers = {step: {k.split("/")[1] for k in paths} for step, paths in learns.items()}
  both = {"image_tower", "image_projector"}
  assert towers[2] == {"text_tower", "image_projector", "clip"}
  assert towers[3] == both and towers[4] == both | {"siglip"}  # a new scalar has no value before
  assert towers[5] == both | {"text_tower"}
  assert towers[6] == both | {"text_tower", "clip", "mask_regularization", "silc"}
  scalars = {n: {k for k in runs[n].params if k.startswith("loss/")} for n in (2, 4, 6)}
  assert scalars[2] == scalars[6] == {"loss/clip/t"}
  assert scalars[4] == {"loss/siglip/t", "loss/siglip/b"}
  assert runs[3].config.loss["siglip"].option("weight") == 1 and [*runs[3].config.loss] == [
    "siglip"
  ]
  same_bits(runs[6].params, {**last.trainable, **last.frozen})
  assert "heads/mask_regularization/vector" in runs[5].params.keys() - runs[4].params.keys()
  # Averages are those of what is trained; a frozen parameter is its own average.
  for path, x in runs[4].ema.items():
    is_average = not np.array_equal(x, runs[4].params[path])
    assert is_average == (path.split("/")[1] in towers[4]), path
  # What no stage trains is stored once, the rest with each checkpoint.
  held = {p.name for p in (workdir / "checkpoints/2").iterdir()}
  assert {"frozen", "trainable"} <= held and (workdir / "frozen").exists()
  assert [*last.frozen] == [NEVER]


def _moved(runs, step, path):
  before = runs[step - 1].params.get(path)
  return before is not None and not np.array_equal(before, runs[step].params[path])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_a_border_is_crossed_to_the_same_bits_on_any_mesh(whole, step, caplog, monkeypatch):
  """One device, eight, and eight with sharded parameters; moments of what goes on are kept."""
  workdir, _ = whole
  monkeypatch.setattr(tree, "SHOWN", 99)  # the log names all
  caplog.set_level("INFO", logger="absl")
  found = []
  meshes = (
    sharding.make_mesh(devices=jax.devices()[:1]),
    sharding.make_mesh(),
    sharding.make_mesh(fsdp=4),
  )
  for mesh in meshes:
    state, programs, _ = restored(workdir, step, mesh)
    before = jax.device_get(parts(state, ()))
    program = programs[step // 2]
    after = border.crossed(state, program, *layout(program, mesh))
    found.append(jax.device_get(parts(after, ())))
  same_bits(found[0], found[1])
  same_bits(found[0], found[2])
  after = found[0]
  of_all = [before["trainable"] | before["frozen"], after["trainable"] | after["frozen"]]
  for path in of_all[0].keys() & of_all[1].keys():
    np.testing.assert_array_equal(*(x[path] for x in of_all), err_msg=path)
  carried = set()
  for key, x in after["opt"].items():
    if "/mu/" not in key and "/nu/" not in key:
      continue
    path = key.partition("/mu/")[2] or key.partition("/nu/")[2]
    if path in before["trainable"]:
      carried.add(path)
      np.testing.assert_array_equal(x, before["opt"][key])
    else:
      assert not x.any(), key
      np.testing.assert_array_equal(after["ema"][path], after["trainable"][path])
  assert carried and "Initialised: " in caplog.text
  loss = "loss/siglip/b" if step == 2 else "loss/clip/t"
  assert loss in caplog.text and loss not in before["trainable"]


@pytest.mark.slow
def test_stages_of_other_numbers_share_a_step(tmp_path, monkeypatch):
  """A learning rate of their own, or another mixture, and nothing is compiled or moved."""
  built, crossings = [], []
  build, differ = train.build_stages, train.differ

  def building(left, *rest):
    compiled = build(left, *rest)
    built.append(len({id(x) for x in compiled.values()}))
    return compiled

  monkeypatch.setattr(train, "build_stages", building)
  monkeypatch.setattr(train, "differ", lambda *x: crossings.append(differ(*x)) or crossings[-1])
  c = config(
    total_steps=3,
    frozen="",
    ema=0.0,
    stages=[dict(until=1, optimizer=dict(lr=1e-3, warmup=0)), dict(until=2, data=dict(augment={}))],
  )
  train.train(c, tmp_path)
  assert built == [1] and crossings == [False, False]


def test_the_learning_rate_of_a_stage_is_its_own():
  """The schedule of the config counts the updates of the other stages alone."""
  own = dict(lr=0.5, schedule="linear", warmup="10%")
  c = config(total_steps=100, stages=[dict(until=20, optimizer=own), dict(until=50)], frozen="")
  c["stages"].append(dict(until=60, optimizer=dict(lr=0.25, warmup=0)))
  c["optimizer"] = dict(lr=1.0, schedule="cosine", warmup=7)
  rate = make_programs(resolve_config(c))[0].rate
  shape = dict(cooldown=0, end=0.0)
  linear = learning_rate(name="linear", lr=0.5, total_steps=20, warmup=2, **shape)
  cosine = learning_rate(name="cosine", lr=1.0, total_steps=70, warmup=7, **shape)
  third = learning_rate(name="cosine", lr=0.25, total_steps=10, warmup=0, **shape)
  steps = np.arange(100)
  wanted = [linear(i) for i in range(20)] + [cosine(i) for i in range(30)]
  wanted += [third(i) for i in range(10)] + [cosine(i) for i in range(30, 70)]
  # Compiled together, the last digit may be another.
  np.testing.assert_allclose(jax.vmap(rate)(steps), np.asarray(wanted), rtol=0, atol=2e-7)


def test_without_a_block_of_its_own_the_schedule_is_as_without_stages():
  c = config(total_steps=50, stages=[dict(until=20, optimizer=dict(weight_decay=0.5))], frozen="")
  first, last = make_programs(resolve_config(c))
  alone = make_programs(resolve_config(c | dict(stages=())))[0]
  steps = np.arange(50)
  rates = [np.asarray(jax.vmap(x.rate)(steps)) for x in (first, last, alone)]
  np.testing.assert_array_equal(rates[0], rates[2])
  np.testing.assert_array_equal(rates[1], rates[2])
  assert first.optimizer is not last.optimizer and first.fixed == frozenset()


def test_young_moments_are_corrected_by_their_own_count():
  """As two optimizers, of which one begins three updates later."""
  adam, rng = optax.scale_by_adam(0.9, 0.999), np.random.default_rng(0)
  grads = [{k: jnp.asarray(rng.normal(size=3)) for k in ("old", "young")} for _ in range(5)]
  both = by_age(adam, {"old": 0, "young": 1})
  state = both.init(grads[0])
  old, young = adam.init({"old": grads[0]["old"]}), adam.init({"young": grads[0]["young"]})
  for i, grad in enumerate(grads):
    a, old = adam.update({"old": grad["old"]}, old)
    if i < 3:
      state["0"] = old
      continue
    b, young = adam.update({"young": grad["young"]}, young)
    updates, state = both.update(grad, state)
    same_bits(updates, {**a, **b})
    if i == 3:  # the first update of Adam is as large as the learning rate; 1 - b2 has 4 digits
      np.testing.assert_allclose(np.abs(updates["young"]), 1, rtol=1e-4)


@pytest.mark.parametrize("name", slow_unless(OPTIMIZERS, ["muon"].__contains__))
def test_each_optimizer_takes_parameters_that_are_trained_later(name):
  c = config(optimizer=dict(name=name, lr=1e-3, weight_decay=0.1))
  c["optimizer"]["multipliers"] = [("image_tower/", 0.1)]  # frozen in the first stage
  c["stages"][1] |= dict(optimizer=dict(weight_decay=0.0))
  programs = make_programs(resolve_config(c))
  mesh = sharding.make_mesh()
  shapes = [layout(x, mesh)[0] for x in programs]
  for before, after in itertools.pairwise(shapes):
    kept = border._in_both(border._with_arrays(before.opt), border._with_arrays(after.opt))
    goes_on = before.trainable.keys() & after.trainable.keys()
    assert goes_on and all(any(k.endswith(f"/{path}") for k in kept) for path in goes_on)
  tried = jax.eval_shape(
    lambda s: programs[2].optimizer.update(s.trainable, s.opt, s.trainable), shapes[2]
  )
  assert jax.tree.structure(tried[1]) == jax.tree.structure(shapes[2].opt)


def test_a_loss_of_weight_zero_is_not_a_part_of_the_sum():
  assert [*make_loss(dict(clip={}, siglip=dict(weight=0.0))).terms] == ["clip"]
  with pytest.raises(ValueError, match=r"config.loss: each of \['clip'\] has weight 0"):
    make_loss(dict(clip=dict(weight=0)))


def test_a_stage_reads_a_mixture_with_weights_of_its_own(tmp_path):
  """As if config.data.schedule gave them at the samples where the stages begin."""
  names = ("a", "b")
  for i, name in enumerate(names):
    (tmp_path / name).mkdir()
    write_tar(tmp_path / name / "00000.tar", samples(100 * i, 64))
  mixture = [
    dict(name=x, source=str(tmp_path / x / "00000.tar"), weight=w) for x, w in zip(names, (3, 1))
  ]
  c = config(total_steps=8, batch_size=8, frozen="")
  c["data"] |= dict(source="", mixture=mixture)
  c["stages"] = [dict(until=2, data=dict(mixture=dict(b=1.0))), dict(until=5, batch_size=16)]
  resolved = resolve_config(c)
  inputs, run_stages = open_data(resolved.data), stages.split(resolved)
  source = with_stage_weights(inputs, run_stages).source
  assert source.phases == ((0, dict(b=1.0)), ("16 samples", dict(a=3, b=1)))
  of, _ = MixtureSchedule(source, batch_size=8)(np.arange(80))
  assert set(of[:16]) == {1} and np.bincount(of[16:]).tolist() == [48, 16]
  plain = dataclasses.replace(resolved, stages=())
  assert with_stage_weights(inputs, stages.split(plain)) is inputs
  c["data"]["schedule"] = (("8 samples", dict(a=1.0)),)
  with pytest.raises(ValueError, match=r"config.stages\[0\].data.mixture and config.data.schedule"):
    with_stage_weights(inputs, stages.split(resolve_config(c)))
