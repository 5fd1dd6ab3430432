"""Runs in stages: where they end, what they may change, their steps, resumption and plans."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_runs
from helpers.shipped import ROOT, load
from helpers.small_shards import samples, write_tar
from helpers.tpu_compiler import compiled_for_tpus
from ml_collections import ConfigDict

from bigalign import evaluate, sharding, stages, train
from bigalign.config import resolve_config
from bigalign.data.loader.options import resolve_data
from bigalign.inputs import open_data, staged_batches
from bigalign.options import plain
from bigalign.plan import chips, main, table
from bigalign.program import init_on_mesh, init_params, layout, make_program, make_programs
from bigalign.run import provenance
from bigalign.run.metrics import is_wall_clock, read_metrics
from bigalign.step import data_position, jitted
from bigalign.towers.vit import VitOptions, resampled

FIRST = dict(
  until=2,
  batch_size=32,
  microbatches=2,
  data=dict(image_size=16, tokenizer=dict(length=12)),
  model=dict(image=dict(patch_dropout=0.5)),
)


def tiny(**changes):
  """configs/tiny.py made smaller still, in two stages: 2 steps of 32 pairs, 2 of 16."""
  c = load("tiny").to_dict()
  c |= dict(total_steps=4, batch_size=16, log_every=1, checkpoint_every=1, keep=dict(last=9))
  c |= dict(evals={}, writer=dict(tensorboard=False), loss=dict(sogclr={}), stages=[FIRST])
  c["model"]["image"] |= dict(width=32, depth=1, dropout=0.1)
  c["model"]["text"] |= dict(width=32, depth=1)
  return c | changes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of a run that nothing disturbed, and its last state."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  return workdir, train.train(tiny(), workdir)


def exact(workdir):
  """The rows of metrics.jsonl without what a clock says."""
  return [{k: v for k, v in row.items() if not is_wall_clock(k)} for row in read_metrics(workdir)]


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def by_hand():
  """The last state and the losses of two programs' steps, on batches that are read one by one."""
  c, small = tiny(), tiny(stages=(), batch_size=32, microbatches=2)
  small["data"] |= dict(image_size=16, tokenizer=dict(name="byte", length=12))
  small["model"]["image"]["patch_dropout"] = 0.5
  mesh = sharding.make_mesh()
  c, small = resolve_config(c), resolve_config(small)
  inputs = open_data(c.data)
  size = len(inputs.source)
  last, first = (make_program(x, dataset_size=size) for x in (c, small))
  tower = first.model.image_tower.clone(grid=(4, 4))  # 32 pixels in patches of 8
  first = dataclasses.replace(
    last, model=first.model.clone(image_tower=tower), spec=first.spec, microbatches=2
  )
  _, shardings = layout(last, mesh)
  state, start, losses = init_on_mesh(last, shardings), 0, []
  for program, config in ((first, small), (last, c)):
    update = jitted(program, shardings, mesh)
    rows = np.arange(config.batch_size)
    for _ in range(2):
      batches = inputs._replace(options=config.data).batches(
        batch_size=config.batch_size,
        rows=rows,
        seed=c.seed,
        start=start,
        stop=start + config.batch_size,
        lane_rows=32,
        rejected_log="",
      )
      with jax.set_mesh(mesh):
        batch = sharding.global_batch(mesh, next(batches), rows, config.batch_size)
        state, metrics, _ = update(state, batch, data_position(start, size))
      batches.close()
      losses.append(float(metrics["loss"]))
      start += config.batch_size
  return state, losses


@pytest.mark.slow
def test_two_stages_are_two_programs_to_the_last_digit(whole):
  """Resolution, token length, patch dropout, batch and microbatches change; what the loss remembers
  of samples stays."""
  workdir, state = whole
  wanted, losses = by_hand()
  assert_same_bits(wanted, state)
  rows = [row for row in read_metrics(workdir) if "train/loss" in row]
  assert [row["train/loss"] for row in rows] == losses and len(set(losses)) == 4
  assert [row["train/stage"] for row in rows] == [0, 0, 1, 1]
  assert [row["train/samples_seen"] for row in rows] == [32, 64, 80, 96]
  for row, size in zip(rows, (32, 32, 16, 16)):
    assert row["train/samples_per_second"] == pytest.approx(size / row["train/batch_time"])
  work = [row["perf/flops_per_step"] for row in rows]
  assert work[0] == work[1] != work[2] == work[3]
  run = evaluate.open_run(workdir)
  assert run.step == 4 and run.config.data.image_size == 32
  assert_same_bits(run.params, {**state.trainable, **state.frozen})


@pytest.mark.slow
@pytest.mark.parametrize(
  "step",
  [
    pytest.param(1, id="inside the first"),
    pytest.param(2, id="at the border"),
    pytest.param(3, id="behind it", marks=pytest.mark.long),
  ],
)
def test_resume_is_bitwise_and_compiles_no_stage_that_is_over(whole, step, tmp_path, monkeypatch):
  workdir, state = whole
  cut = tmp_path / "run"
  shutil.copytree(workdir, cut)
  for later in range(step + 1, 5):
    shutil.rmtree(cut / "checkpoints" / str(later))
  compiled, build = [], train.build_stages

  def building(left, *rest):
    compiled.extend(stage.number for stage in left)
    held = sum(x.nbytes for x in jax.live_arrays())
    built = build(left, *rest)
    assert sum(x.nbytes for x in jax.live_arrays()) == held  # of what is to come, shapes alone
    return built

  monkeypatch.setattr(train, "build_stages", building)
  assert_same_bits(state, train.train(tiny(), cut))
  assert exact(cut) == exact(workdir)
  assert compiled == ([0, 1] if step < 2 else [1])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_resume_of_what_pods_run_is_bitwise(tmp_path):
  """bfloat16, scan, remat, workers, all axes of a mesh, looks, sparse logs."""
  c = tiny(
    checkpoint_every=2,
    log_every=3,
    diagnose_every=2,
    ema=0.0,
    loss=dict(siglip={}),
    mesh=dict(data=2, fsdp=2, tensor=2),
  )
  c["stages"] = [FIRST | dict(until=3, model=dict(image=dict(remat="full", patch_dropout=0.5)))]
  for side in ("image", "text"):
    c["model"][side] |= dict(scan=True, remat="dots", dtype="bfloat16")
  c["data"]["workers"] = 2
  state = train.train(c, tmp_path / "whole")
  assert [row["step"] for row in exact(tmp_path / "whole") if "train/loss" in row] == [3, 4]
  shutil.copytree(tmp_path / "whole", tmp_path / "cut")
  shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
  assert_same_bits(state, train.train(c, tmp_path / "cut"))
  assert exact(tmp_path / "whole") == exact(tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
  """Each reads its rows of every stage's batches, and both enter a stage at the same step."""
  first = FIRST | dict(until=4, microbatches=1)
  changes = dict(total_steps=8, checkpoint_every=0, batch_size=16, stages=[first])
  mesh = dict(data=4, fsdp=1, tensor=2)
  c = small_runs.config(mesh, **changes)
  file = small_runs.write(tmp_path / "config.py", c)
  words = (f"--config={file}", "--workdir", tmp_path / "two")
  with small_runs.Run(tmp_path / "logs", 2, *words) as run:
    run.ends()
  train.train(c, tmp_path / "one")
  two, one = (small_runs.losses(tmp_path / name) for name in ("two", "one"))
  assert len(set(one.values())) == 8
  np.testing.assert_allclose([*two.values()], [*one.values()], rtol=0, atol=1e-5)


def resolved(**changes):
  """100 updates of 10 pairs in one stage, with changes."""
  return resolve_config(tiny(**{**dict(total_steps=100, batch_size=10, stages=()), **changes}))


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    dict(shuffle=False, order="exact"),
    dict(order="exact"),
    dict(order="block"),
  ],
  ids=str,
)
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_each_sample_is_seen_once_over_the_border(options, step, tmp_path):
  """2 batches of 6 and 3 of 4 of 24 samples, from any step on."""
  data = dict(
    source=write_tar(tmp_path / "00000.tar", samples(0, 24)),
    image_size=16,
    tokenizer=dict(name="byte", length=8),
    **options,
  )
  inputs = open_data(resolve_data(data))
  first = dict(until="12 samples", batch_size=6, data=dict(image_size=8))
  config = resolved(total_steps="1 epochs", batch_size=4, data=data, stages=(first,))
  run_stages = stages.split(config, dataset_size=24)
  assert [(x.begin, x.end) for x in run_stages] == [(0, 2), (2, 5)]
  rows = [{x.batch_size: np.arange(x.batch_size)} for x in run_stages]

  def run(step, start):
    batches = staged_batches(
      run_stages,
      inputs,
      rows=rows,
      step=step,
      start=start,
      seed=0,
      lane_rows=6,
      rejected_log="",
    )
    shown = [(stage, x["image"].shape, x["image_id"][:, 1].tolist()) for stage, _, x in batches]
    return [(stage.number, shape, *ids) for stage, shape, ids in shown]

  every = run(0, 0)
  assert [x[:2] for x in every] == [(0, (6, 8, 8, 3))] * 2 + [(1, (4, 16, 16, 3))] * 3
  ids = [i for x in every for i in x[2:]]
  assert sorted(ids) == [*range(24)] and (ids == sorted(ids)) == (not options.get("shuffle", True))
  assert run(step, sum(len(x) - 2 for x in every[:step])) == every[step:]


@pytest.mark.parametrize(
  "total,untils,ends",
  [
    (100, [dict(until=30), dict(until="90%")], [30, 90, 100]),
    (100, [dict(until="300 samples")], [30, 100]),
    # 600 samples are 30 steps of 20; what is left to 100 steps has 10 each.
    (100, [dict(until="600 samples", batch_size=20)], [30, 100]),
    (
      100,
      [dict(until="600 samples", batch_size=20), dict(until="1000 samples", batch_size=40)],
      [30, 40, 100],
    ),
    # 1000 samples: 900 in 45 steps of 20, 100 in 10 of 10.
    ("1000 samples", [dict(until="90%", batch_size=20)], [45, 55]),
    ("2 epochs", [dict(until="1 epochs", batch_size=20)], [25, 75]),
    ("1000 samples", [dict(until=5, batch_size=100)], [5, 55]),
  ],
)
def test_until_counts_updates_or_real_samples(total, untils, ends):
  config = resolved(total_steps=total, stages=untils)
  run_stages = stages.split(config, dataset_size=500)
  assert [stage.end for stage in run_stages] == ends
  assert [stage.begin for stage in run_stages] == [0, *ends[:-1]]
  assert run_stages[-1].config == dataclasses.replace(config, stages=())
  assert run_stages[-1].config.batch_size == 10


def test_what_a_stage_says_stands_in_its_config_alone():
  augment = dict(crop="squash")
  one = dict(
    until=9, data=dict(image_size=16, augment=augment), model=dict(text=dict(remat="full"))
  )
  first, last = stages.split(resolved(stages=[one]))
  c = tiny()
  data = c["data"] | dict(image_size=16, augment=augment)
  model = c["model"] | dict(text=c["model"]["text"] | dict(remat="full"))
  assert first.config == resolved(data=data, model=model) != resolved()
  assert last.config == resolved()


def test_warmup_and_cooldown_are_the_samples_of_their_own_batches():
  run_stages = stages.split(resolved(stages=[dict(until=10, batch_size=100)]))
  steps = functools.partial(stages.steps, where="here", stages=run_stages, dataset_size=2000)
  asked = ("500 samples", "1 samples", "1100 samples", "1 epochs", "20%", 7, 0, "0 samples")
  assert [steps(x) for x in asked] == [5, 1, 20, 100 + 10, 20, 7, 0, 0]
  assert steps("100 samples", back=True) == 10 and steps("1100 samples", back=True) == 92


@pytest.mark.parametrize(
  "said,error,told",
  [
    (
      [dict(until=50), dict(until=20)],
      ValueError,
      r"config.stages\[1\].until=20 is update 20 of the run, but config.stages\[0\] before it ends"
      r" at 50\. Stages must end in ascending order, .* before config.total_steps=100",
    ),
    (
      [dict(until=50), dict(until="50%")],
      ValueError,
      r"config.stages\[1\].until='50%' is update 50",
    ),
    ([dict(until="100%")], ValueError, r"total_steps=100 is update 100 .*\[0\] before it ends at"),
    ([dict(until=0)], ValueError, r"config.stages\[0\].until=0 is update 0 .* begins at 0"),
    ([dict(until="soon")], ValueError, r"config.stages\[0\].until: 'soon' is not a duration"),
    (
      [dict(batch_size=8)],
      ValueError,
      r"config.stages\[0\]=.*with the key until, such as until='90%'",
    ),
    (
      [dict(until=5, batch_size=1)],
      ValueError,
      r"config.stages\[0\].batch_size=1: a contrastive loss needs at least 2 pairs",
    ),
    ([dict(until=5, batch_size="8")], TypeError, r"stages\[0\].batch_size='8' is of type str"),
    (
      [dict(until=5, data=dict(image_sise=8))],
      ValueError,
      r"config.stages\[0\]: 'data.image_sise' is the same in all stages. Did you mean"
      r" 'data.image_size'\? A stage may change batch_size, .*model.text.remat",
    ),
    ([dict(until=5, optimizer=dict(b2=0.5))], ValueError, r"'optimizer.b2' is the same in all"),
    (
      [dict(until=5, optimizer=dict(lr=1.0, warmup=6))],
      ValueError,
      r"config.stages\[0\], with its overrides: .*warmup \(6\) and cooldown \(0\) exceed",
    ),
    (
      [dict(until=5, frozen="image_towr")],
      ValueError,
      r"stages\[0\].*'image_towr' matches no path",
    ),
    ([dict(until=5, frozen=".")], ValueError, r"config.stages\[0\].frozen='.' leaves no parameter"),
    ([dict(until=5, loss=dict(clipp={}))], ValueError, r"stages\[0\].*Did you mean 'clip'"),
    ([dict(until=5, loss=dict(clip=dict(lab=1)))], TypeError, r"stages\[0\].*unknown option 'lab'"),
    (
      [dict(until=5, loss=dict(sogclr=dict(weight=0.0)))],
      ValueError,
      r"stages\[0\].*each of \['sogclr'\] has weight 0",
    ),
    (
      [dict(until=5, data=dict(mixture=dict(a=1.0)))],
      ValueError,
      r"stages\[0\].*no source 'a'. Known: \[\]",
    ),
    (
      [dict(until=5, model=dict(image=dict(width=8)))],
      ValueError,
      "'model.image.width' is the same",
    ),
  ],
)
def test_stages_that_cannot_be_say_what_can(said, error, told):
  with pytest.raises(error, match=told):
    make_programs(resolved(stages=said))


@pytest.mark.parametrize(
  "stage,error,told",
  [
    (dict(batch_size=12), ValueError, r"config.stages\[0\].*batch_size=12 does not divide over 8"),
    (dict(microbatches=3), ValueError, r"config.stages\[0\].*these do: \[1, 2\]"),
    (
      dict(data=dict(image_size=20)),
      ValueError,
      r"config.stages\[0\].*patch=8 does not divide the image of 20 x 20",
    ),
    (
      dict(data=dict(tokenizer=dict(length=99))),
      ValueError,
      r"config.stages\[0\].*model.text.length=48 is too small",
    ),
    (
      dict(data=dict(augment=dict(flipp=1.0))),
      TypeError,
      r"config.stages\[0\].*unknown option 'flipp'. Did you mean 'flip'",
    ),
    (dict(model=dict(text=dict(remat="some"))), ValueError, r"config.stages\[0\].*unknown 'some'"),
    (dict(batch_size=10**6), ValueError, r"config.stages\[0\].*fewer than a batch of 1000000"),
  ],
)
def test_a_stage_that_does_not_fit_is_named_before_the_run(stage, error, told, tmp_path):
  with pytest.raises(error, match=told):
    train.train(tiny(stages=[dict(stage, until=2)]), tmp_path)
  assert not (tmp_path / "config.json").exists()


def test_stages_are_part_of_what_a_run_is():
  def differences(**changes):
    return provenance.differences(tiny(), tiny(stages=[FIRST | changes]))

  assert differences(until=3) == {"stages/0/until": (2, 3)}
  assert not differences(microbatches=4)
  assert provenance.differences(tiny(stages=()), tiny())["stages/0/batch_size"] == ("(absent)", 32)


def test_positions_of_the_same_grid_are_untouched():
  """The same parameters, whatever image they are made with, and the same program, as without."""
  tower = VitOptions(patch=8, width=32, depth=1, heads=4, dtype="float32", scan=False).build()
  image = jnp.zeros((2, 32, 16, 3))
  grid = tower.clone(grid=(4, 2))
  shapes = jax.eval_shape(tower.init, jax.random.key(1), image)
  assert shapes == jax.eval_shape(grid.init, jax.random.key(1), image[:, :8])

  def programs(tower):
    init = jax.make_jaxpr(tower.init)(jax.random.key(1), image)
    return str(init), str(jax.make_jaxpr(tower.apply)(shapes, image))

  assert programs(tower) == programs(grid)


@pytest.mark.slow
def test_positions_begin_as_smooth_as_the_coarsest_grid():
  """Numbers of 2 x 2 patches on 4 x 4; a run without stages begins as it always did."""
  key, path = jax.random.key(0), "model/image_tower/positions"

  def drawn(**changes):
    program = make_program(resolve_config(tiny(**changes)), dataset_size=1000)
    return jax.jit(lambda: init_params(program, key)[path])()

  coarse = drawn(stages=(), data={**tiny()["data"], "image_size": 16})
  np.testing.assert_array_equal(drawn(), resampled(coarse, (2, 2), (4, 4)))
  same = FIRST | dict(data=dict(tokenizer=dict(length=12)))
  np.testing.assert_array_equal(drawn(stages=[same]), drawn(stages=()))


@pytest.mark.parametrize("rows,cols", [(2, 3), (4, 4), (8, 5), (1, 1)])
def test_positions_are_resampled_as_a_triangle_says(rows, cols):
  """Against sums in float64: a filter as wide as an output pixel where that is the larger."""
  positions = np.random.default_rng(0).normal(size=(1, 24, 32)).astype(np.float32)

  def weights(n, size):
    scale = n / size
    center = (np.arange(size)[:, None] + 0.5) * scale
    triangle = np.maximum(1 - abs(center - np.arange(n) - 0.5) / max(scale, 1), 0)
    return triangle / triangle.sum(1, keepdims=True)

  found = resampled(jnp.asarray(positions), (4, 6), (rows, cols))
  wanted = np.einsum(
    "yi,xj,ijd->yxd", weights(4, rows), weights(6, cols), positions.reshape(4, 6, 32)
  )
  np.testing.assert_allclose(found[0], wanted.reshape(-1, 32), rtol=0, atol=2e-6)
  constant = resampled(jnp.full((1, 24, 32), 0.7), (4, 6), (rows, cols))
  np.testing.assert_allclose(constant, 0.7, rtol=1e-6)


def made_up(stage, fits=True):
  """A plan of 4 v5e: a step of half a second at best."""
  return dict(
    topology="v5e:2x2",
    device_kind="TPU v5 lite",
    devices=4,
    mesh=dict(data=4, fsdp=1, tensor=1),
    stage=stage,
    first_step=100 * stage,
    total_steps=100,
    image_size=112,
    text_length=16,
    batch_size=512 * (stage + 1),
    batch_per_chip=128,
    microbatches=1,
    fits=fits,
    parameters=10**8,
    trainable=10**8,
    remat=dict(image="dots", text="dots"),
    not_checked="",
    peak_bytes_per_chip=8e9,
    required_bytes_per_chip=20e9,
    available_bytes_per_chip=16.9e9,
    memory_bytes_per_chip=dict(parameters=4e8),
    compiler="too much",
    loss_alone_bytes_per_chip=1e9,
    flops_per_chip=197e12 * 0.46,
    peak_flops_per_second=197e12,
    memory_traffic_bytes_per_chip=1e9,
    collectives={},
  )


def test_a_plan_of_stages_adds_up_and_has_the_worst_verdict():
  def of(*plans):
    found = main.combine_stages([{**x, **chips.estimate(x, {"v5e": 2.0})} for x in plans])
    return found, table.format_plan("name", found)

  found, text = of(made_up(0), made_up(1))
  assert found["fits"] and found["total_steps"] == 200 and len(found["stages"]) == 2
  assert found["total_samples"] == 100 * (512 + 1024)
  assert found["chip_hours"][1] == pytest.approx(4 * 200 * 0.5 / 3600)
  assert found["cost"] == pytest.approx([2 * x for x in found["chip_hours"]])
  # Both stages take as long; the second reads twice as many samples.
  assert found["samples_per_day"][1] == pytest.approx(86_400 * (512 + 1024) / 2 / 0.5)
  assert "FITS in all stages" in text and "stage 1, updates 101 to 200, 112 pixels" in text
  found, text = of(made_up(0), made_up(1, fits=False))
  assert not found["fits"] and "cost" not in found and "DOES NOT FIT: stage 1" in text
  json.dumps(found)


@pytest.mark.parametrize("fits", [True, False])
def test_the_exit_status_is_that_of_all_stages(tmp_path, fits):
  """From answers that are kept, of which the last stage's fits."""
  c = plain(tiny())
  for stage, found in enumerate((made_up(0, fits=fits), made_up(1))):
    kept = tmp_path / f"{main._key(c, 'v5e:2x2', 0, stage)}.json"
    kept.write_text(json.dumps(found))
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "bigalign",
      "plan",
      f"--cache={tmp_path}",
      "--topology=v5e:2x2",
      f"--config={small_runs.write(tmp_path / 'tiny.py', ConfigDict(c))}",
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == (0 if fits else 1), done.stderr
  assert ("FITS in all stages" if fits else "DOES NOT FIT: stage 0") in done.stdout


@compiled_for_tpus
def test_each_stage_is_compiled_for_a_pod_and_kept(tmp_path, monkeypatch):
  """The very program of the stage: the parameters of the last one's images, a batch of its own."""
  c = tiny(logits=dict(way="gather", dtype="bfloat16"), loss=dict(clip={}), rules=(("", ()),))
  ask = functools.partial(main.plan, c, "v5e:2x2", cache=tmp_path)
  first, last = ask(stage=0), ask(stage=1)
  assert ask() == last and len(list(tmp_path.glob("*.json"))) == 2
  assert first["parameters"] == last["parameters"] and first["fits"] and last["fits"]
  assert (first["batch_size"], first["image_size"], first["text_length"]) == (32, 16, 12)
  assert (last["batch_size"], last["image_size"], last["text_length"]) == (16, 32, 48)
  assert [(x["first_step"], x["total_steps"]) for x in (first, last)] == [(0, 2), (2, 2)]
