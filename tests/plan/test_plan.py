"""bigalign plan: verdicts, figures and prices of configs on TPU slices."""

from __future__ import annotations

import doctest
import functools
import json
import pathlib
import re
import subprocess
import sys
import time

import pytest
from helpers.shipped import ROOT, load
from helpers.tpu_compiler import compiled_for_tpus, needs_libtpu

from bigalign.config import resolve_config
from bigalign.plan import (
  calibrate,
  chips,
  compile_step,
  hlo_memory,
  largest_batch,
  main,
  table,
  variants,
)
from bigalign.program import make_program
from bigalign.run import provenance
from bigalign.towers import base
from bigalign.weights.init import completed

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def small(**parts):
  """Projectors on stored embeddings: a short program whose logits fill the memory."""
  return (
    dict(
      seed=0,
      total_steps=100,
      batch_size=4096,
      log_every=1,
      checkpoint_every=0,
      data=dict(source="x", image_size=32, tokenizer=dict(name="byte", length=8)),
      model=dict(
        image=dict(name="features", width=64), text=dict(name="features", width=48), embed_dim=32
      ),
      loss=dict(clip={}),
      optimizer=dict(name="adamw", lr=1e-3),
      rules=(("", ()),),
      logits=dict(way="dense", dtype="bfloat16"),
      topology="v5e:1x1",
    )
    | parts
  )


def made_up(batch, *, fits=True, **parts):
  """A plan of 4 v5e whose memory is 1 GB and 10 MB for each row of a chip."""
  rows = batch / 4
  plan = dict(
    topology="v5e:2x2",
    devices=4,
    mesh=dict(data=4, fsdp=1, tensor=1),
    batch_size=batch,
    batch_per_chip=rows,
    microbatches=1,
    fits=fits,
    total_steps=1000,
    memory_bytes_per_chip=dict(
      parameters=4e8, optimizer=6e8, batch=1e6 * rows, activations=9e6 * rows
    ),
    flops_per_chip=197e12 * 0.46,
    peak_flops_per_second=197e12,
    memory_traffic_bytes_per_chip=819e9 * 0.19,
    collectives={"all-reduce": dict(runs=1, bytes=40e9, asynchronous_bytes=0.0)},
  )
  needed = 1e9 + 1e7 * rows
  plan["peak_bytes_per_chip" if fits else "required_bytes_per_chip"] = needed
  return plan | parts


def test_time_and_price_follow_the_data_sheet():
  """Half a second of products at 92 %, traffic at 70 %, communication; 4 chips, 1,000 steps."""
  plan = chips.estimate(made_up(512), {"v5e": 2.0})
  assert plan["seconds_per_step"] == pytest.approx([0.46 / 0.55 + 40 / 200, 0.5])
  assert plan["images_per_second"][1] == pytest.approx(512 / 0.5)
  assert plan["total_samples"] == 512_000 and plan["measured"] is False
  assert plan["chip_hours"][1] == pytest.approx(4 * 500 / 3600)
  assert plan["cost"] == pytest.approx([2 * x for x in plan["chip_hours"]])
  assert chips.estimate(made_up(512), {"v4": 1.0})["cost"] is None
  # One chip of these is two devices.
  pair = chips.estimate(made_up(512, topology="tpu7x:2x2x1"), {})
  least, _ = chips.step_seconds(made_up(512, topology="tpu7x:2x2x1"))
  assert pair["chip_hours"][1] == pytest.approx(2 * 1000 * least / 3600)


def test_shares_of_a_step_follow_the_data_sheet():
  """0.4 s of products that hide 0.3 s of traffic; 0.2 s of traffic and 0.1 of 0.4 s to send."""

  def part(products, memory, communication=0.0, hidden=0.0):
    moved = dict(runs=1, bytes=200e9 * communication, asynchronous_bytes=200e9 * hidden)
    return dict(
      flops_per_chip=197e12 * products,
      memory_traffic_bytes_per_chip=819e9 * memory,
      collectives={"all-reduce": moved} if communication else {},
    )

  work = dict(
    encoders=part(0.4, 0.3),
    loss=part(0.1, 0.2, 0.4, 0.3),
    attention=part(0.05, 0.1),
    update=part(0, 0.2),
  )
  plan = made_up(512, parts=work)
  shares = chips.estimate(plan, {})["shares"]
  assert {k: x["share"] for k, x in shares.items()} == pytest.approx(
    dict(encoders=0.4, loss=0.3, attention=0.1, update=0.2)
  )
  assert shares["loss"] == pytest.approx(
    dict(products=0.1, memory=0.2, communication=0.4, overlapped=0.3, share=0.3)
  )
  shown = table.format_plan(
    "name", {**plan, **SHOWN, "trainable": 1, "shares": shares, "total_samples": 1}
  )
  rows = [line.split() for line in shown.splitlines()]
  assert ["encoders", "40%", "400", "ms", "300", "ms"] in rows
  assert ["loss", "30%", "100", "ms", "200", "ms", "400", "ms", "75%"] in rows
  assert ["update", "20%", "200", "ms"] in rows
  assert chips.estimate(made_up(512), {})["shares"] == {}


@pytest.mark.parametrize("start", [dict(batch=512), dict(batch=65_536, fits=False)])
def test_the_largest_batch_is_one_that_was_compiled(start):
  """From a batch that fits and one that does not; multiples of 8 rows on each of 4 chips."""
  room = chips.CHIPS["v5e"].memory
  most = int((room - 1e9) / 1e7) // 8 * 8 * 4
  asked = []

  def at(batch):
    asked.append(batch)
    return made_up(batch, fits=1e9 + 1e7 * batch / 4 <= room)

  assert largest_batch.predict([made_up(**start)]) == most
  assert largest_batch.search(made_up(**start), at) == most and asked == [most]
  untold = made_up(512, fits=False, required_bytes_per_chip=None)
  assert largest_batch.predict([untold]) == 0 and largest_batch.search(untold, at) == 0


def test_an_answer_is_kept_until_something_changes(tmp_path, monkeypatch):
  asked = []

  def measure(c, topology, *, samples, stage):
    asked.append((c["batch_size"], topology, samples))
    return {"fits": True}

  monkeypatch.setattr(compile_step, "measure", measure)
  model = tmp_path / "model"
  model.mkdir()
  (model / "config.json").write_text("{}")
  monkeypatch.setenv("MODEL", str(model))
  c = small(model=dict(image=dict(init="$MODEL"), text=dict(name="features", width=8)))
  ask = functools.partial(main.plan, cache=tmp_path / "cache")
  for _ in range(2):
    assert ask(c, "v5e:1x1") == {"fits": True}
  assert len(asked) == 1
  ask(variants.with_changes(c, batch=8), "v5e:1x1")
  ask(c, "v5e:2x2")
  ask(c, "v5e:1x1", samples=5)
  (model / "config.json").write_text('{"width": 8}')
  ask(c, "v5e:1x1")
  assert asked == [
    (4096, "v5e:1x1", 0),
    (8, "v5e:1x1", 0),
    (4096, "v5e:2x2", 0),
    (4096, "v5e:1x1", 5),
    (4096, "v5e:1x1", 0),
  ]


def test_a_sweep_is_all_combinations():
  c = load("clip_b16").to_dict()
  combinations = list(variants.combinations(c, ["remat", "mesh"], 8))
  assert len(combinations) == len(base.REMAT) * 2 and dict(remat="full", mesh=4) in combinations
  other = variants.with_changes(c, **combinations[-1], batch=64)
  assert other["model"]["text"]["remat"] == combinations[-1]["remat"] and other["batch_size"] == 64
  assert other["mesh"] == dict(data=-1, fsdp=combinations[-1]["mesh"], tensor=1)
  assert c["model"]["text"]["remat"] == "dots", "the config itself is unchanged"
  with pytest.raises(ValueError, match=r"known: .*remat"):
    list(variants.combinations(c, ["remats"], 8))
  whole = variants.with_changes(
    dict(model=dict(init="$CLIP", text=dict(name="features", width=4))), remat="full"
  )
  assert whole["model"] == dict(
    init="$CLIP", image=dict(remat="full"), text=dict(name="features", width=4)
  )


def test_memory_traffic_counts_slices_loops_and_no_vmem():
  text = """
%fused.1 (p0: f32[12,64], p1: s32[]) -> f32[1,64] {
  %p0 = f32[12,64]{1,0} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %ds = f32[1,64]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,64}
}

%fused.2 (p0: f32[12,64], p1: f32[1,64], p2: s32[]) -> f32[12,64] {
  %q0 = f32[12,64]{1,0} parameter(0)
  %q1 = f32[1,64]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %dus = f32[12,64]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

%body (t: (s32[], f32[12,64])) -> (s32[], f32[12,64]) {
  %t = (s32[]{:S(1)}, f32[12,64]{1,0}) parameter(0)
  %i = s32[]{:S(1)} get-tuple-element(%t), index=0
  %x = f32[12,64]{1,0} get-tuple-element(%t), index=1
  %row = f32[1,64]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%fused.1
  %next = f32[12,64]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%fused.2
  ROOT %r = (s32[]{:S(1)}, f32[12,64]{1,0}) tuple(%i, %next)
}

%condition (t: (s32[], f32[12,64])) -> pred[] {
  %n = s32[]{:S(1)} constant(12)
}

ENTRY %main (a: bf16[128,64], b: f32[12,64]) -> f32[128,64] {
  %a = bf16[128,64]{1,0} parameter(0)
  %c = (bf16[128,64]{1,0:S(1)}, bf16[128,64]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %d = bf16[128,64]{1,0:S(1)} copy-done(%c)
  %w = (s32[]{:S(1)}, f32[12,64]{1,0}) while(%t0), condition=%condition, body=%body
  ROOT %y = f32[128,64]{1,0} convert(%d)
}
"""
  row, prefetched, result = 64 * 4, 128 * 64 * 2, 128 * 64 * 4
  assert hlo_memory.traffic(text) == 12 * 2 * row + prefetched + result


def test_a_missing_checkpoint_can_be_replaced_by_sizes(tmp_path):
  model = load("lit").to_dict()["model"]
  model["image"]["init"] = str(tmp_path / "nowhere")
  model["text"] = dict(init=str(tmp_path / "either"), name="text", vocab_size=9, length=4)
  with pytest.raises(ValueError, match=r"write them next to `init`.*nowhere"):
    completed(model, {}, files_needed=False)
  model["image"] |= dict(name="vit", variant="S")
  sizes = completed(model, {}, files_needed=False).model
  assert sizes == dict(
    image=dict(name="vit", variant="S"),
    text=dict(name="text", vocab_size=9, length=4),
    embed_dim=512,
  )


def test_missing_stores_have_the_shapes_of_the_towers():
  c = load("tiny").to_dict()
  c["frozen"] = "_tower/"
  c["data"]["stores"] = dict(image="/nowhere/image", text="/nowhere/text")
  config = resolve_config(c)
  shapes = compile_step.shapes_of_batch(config, make_program(config))
  assert shapes["image"].shape == shapes["text"].shape == (64, 64)
  assert shapes["text_mask"].shape == (64, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_names_a_topology(name):
  c = load(name)
  assert chips.kind(c.topology) in chips.CHIPS
  assert provenance.HARMLESS.search("topology"), "the topology does not change the experiment"


@needs_libtpu
@pytest.mark.parametrize(
  "parts,topology,message",
  [
    (dict(mesh=dict(data=3)), "v5e:2x2", "must multiply to 4"),
    (dict(batch_size=4097), "v5e:2x2", "try 4096"),
    (dict(microbatches=3), "v5e:2x2", r"these do: \[1, 2, 4, 8"),
    (dict(mesh=dict(data=1, fsdp=-1)), "v5e:2x2*2", "does not divide over 2 slices"),
    ({}, "v5e:17x3", "are known: .*v5e:16x16"),
    ({}, "v5e", "known: .*v5e:16x16"),
    ({}, "v9:2x2", "Known: .*'v5e'"),
  ],
)
def test_impossible_plans_say_what_is_possible(parts, topology, message):
  with pytest.raises(ValueError, match=message):
    compile_step.measure(small(**parts), topology)


@compiled_for_tpus
def test_a_loss_that_reads_two_stored_teachers_is_planned_alone_too():
  teachers = {name: dict(image="a", text="b", width=16) for name in "ab"}
  c = small(loss=dict(mobileclip_dr=dict(teacher_scales=(70.0, 60.0))))
  c["data"]["teachers"] = teachers
  assert compile_step.measure(c, "v5e:1x1")["loss_alone_bytes_per_chip"] > 0


@compiled_for_tpus
def test_both_verdicts_from_the_command_line(tmp_path):
  """Exit status, JSON, prices, and a cached plan in seconds, without importing jax."""
  file, prices = tmp_path / "small.py", tmp_path / "prices.json"
  c = small(batch_size=16_384)
  file.write_text(
    f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({c!r})\n"
  )
  prices.write_text('{"v5e": 1.5}')
  run = [
    sys.executable,
    "-X",
    "importtime",
    "-m",
    "bigalign",
    "plan",
    f"--config={file}",
    f"--cache={tmp_path}",
    f"--json={tmp_path}/plan.json",
    f"--prices={prices}",
  ]

  def ask(*more):
    begin = time.perf_counter()
    done = subprocess.run([*run, *more], capture_output=True, text=True, cwd=ROOT)
    loaded = bool(re.search(r"\| +jax\n", done.stderr))
    return (
      done,
      json.loads(pathlib.Path(tmp_path / "plan.json").read_text()),
      loaded,
      (time.perf_counter() - begin),
    )

  first, plan, loaded, _ = ask()
  assert first.returncode == 0 and "FITS" in first.stdout and "not measured" in first.stdout, (
    first.stderr[-2000:]
  )
  assert loaded and plan["fits"]
  kinds = plan["memory_bytes_per_chip"]
  assert 16_384**2 * 4 < plan["peak_bytes_per_chip"] < chips.CHIPS["v5e"].memory
  assert kinds["parameters"] == 4 * plan["parameters"] == 4 * ((64 + 48) * 32 + 1)
  assert plan["cost"] == pytest.approx([1.5 * x for x in plan["chip_hours"]])
  second, again, loaded, seconds = ask()
  assert again == plan and second.stdout == first.stdout and not loaded and seconds < 5
  big, plan, _, _ = ask("--batch=262144")
  assert big.returncode == 1 and "DOES NOT FIT" in big.stdout
  assert (
    plan["required_bytes_per_chip"]
    > plan["available_bytes_per_chip"]
    == (chips.CHIPS["v5e"].memory)
  )


@needs_libtpu
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
  "batch", [4096, 8192, 16_384, 32_768, 49_152, 57_344, 65_536, 98_304, 131_072, 262_144]
)
def test_verdicts_on_both_sides_of_the_line(batch):
  """Verdict and size agree: ten batches, half of which fit."""
  plan, room = compile_step.measure(small(batch_size=batch), "v5e:1x1"), chips.CHIPS["v5e"].memory
  assert plan["fits"] == (batch < 52_000)
  if plan["fits"]:
    assert plan["peak_bytes_per_chip"] <= room
  else:
    assert plan["required_bytes_per_chip"] > room == plan["available_bytes_per_chip"]


def test_a_model_that_is_trained_from_the_start_names_no_checkpoint(tmp_path):
  (tmp_path / "weights").touch()
  towers = dict(image=dict(init=None), text=dict(init=str(tmp_path / "weights")), embed_dim=8)
  assert [x[0] for x in variants.named_files(dict(model=towers))] == [f"{tmp_path}/weights"]
  assert variants.named_files(dict(model=dict(init=None, image=dict(init="")))) == []


@pytest.mark.parametrize("data", [None, dict(tokenizer="byte"), dict(tokenizer=None), "glyphs"])
def test_what_is_not_a_section_names_no_file(data):
  """The resolver refuses it with its place in the config."""
  assert variants.named_files(dict(model={}, data=data)) == []


def test_small_models_are_counted_in_full():
  plan = dict(
    topology="v5e:1x1",
    devices=1,
    device_kind="TPU v5 lite",
    mesh=dict(data=1),
    batch_size=8,
    batch_per_chip=8,
    microbatches=1,
    parameters=7_233,
    trainable=1_250_000,
    fits=False,
    required_bytes_per_chip=None,
    compiler="out of memory",
    memory_bytes_per_chip={},
    not_checked="",
  )
  text = table.format_plan("tiny", plan)
  assert "7,233 parameters, 1.2 million of them trained" in text


def test_figures_of_a_tiny_config_have_units_that_fit():
  plan = dict(
    topology="v5e:1x1",
    devices=1,
    device_kind="TPU v5 lite",
    mesh=dict(data=1),
    batch_size=64,
    batch_per_chip=64,
    microbatches=1,
    parameters=291_330,
    trainable=291_330,
    fits=True,
    peak_bytes_per_chip=9.6e6,
    memory_bytes_per_chip=dict(parameters=1.17e6, code=900),
    not_checked="",
    loss_alone_bytes_per_chip=3e5,
    flops_per_chip=2.79e9,
    memory_traffic_bytes_per_chip=3.3e7,
    collectives={},
    total_samples=2560,
    seconds_per_step=[6.8e-5, 4.2e-5],
    images_per_second=[9.4e5, 1.5e6],
    samples_per_day=[8.1e10, 1.3e11],
    chip_hours=[7.6e-7, 4.7e-7],
    cost=[0.25, 1200],
  )
  text = " ".join(table.format_plan("tiny", plan).split())
  assert "time of a step 42 µs to 68 µs" in text and "matrix products 2.79 GFLOP" in text
  assert "code 0.90 KB" in text and "samples per day 81.0 billion to 130.0 billion" in text
  assert "chip-hours of 2,560 pairs less than 0.001 not measured" in text
  assert "cost 0.25 to 1,200" in text and "0.000" not in text


def test_interconnect_and_memory_of_v6e_are_those_of_its_page():
  assert (chips.CHIPS["v6e"].bandwidth, 2 * chips.CHIPS["v6e"].links) == (1638e9, 800e9)


def test_flags_of_the_compiler_are_part_of_what_is_cached(monkeypatch):
  ask = functools.partial(main._key, small(), "v5e:2x2", 0, 0)
  plain = ask()
  for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
    with monkeypatch.context() as patch:
      patch.setenv(name, "--xla_tpu_scoped_vmem_limit_kib=1")
      assert ask() != plain
  assert ask() == plain


def test_files_of_the_tokenizer_are_part_of_what_is_cached(tmp_path):
  config = small()
  file = tmp_path / "vocab.txt"
  file.write_text("one")
  config["data"]["tokenizer"] = dict(name="wordpiece", path=str(file), length=8)
  ask = functools.partial(main._key, config, "v5e:2x2", 0, 0)
  keys = [ask(), ask()]
  file.write_text("one\ntwo")
  keys.append(ask())
  (tmp_path / "tokenizer_config.json").write_text("{}")
  keys.append(ask())
  assert keys[0] == keys[1] and len({*keys}) == 3


def test_a_combination_that_is_not_possible_does_not_end_a_sweep():
  def plan_run(batch, mesh):
    if mesh == 16:
      raise ValueError("config.mesh: fsdp=16 does not divide over 2 slices")
    needed = dict(required_bytes_per_chip=None, fits=False)
    sizes = dict(stage=0, batch_size=batch, remat={}, mesh=dict(fsdp=mesh), flops_per_chip=1e12)
    return {**sizes, **needed}

  plans = main.sweep([dict(batch=8, mesh=n) for n in (1, 16, 4)], plan_run)
  assert [plan.get("error", "")[:11] for plan in plans] == ["", "config.mesh", ""]
  text = table.format_sweep(plans)
  assert text.count("does not fit") == 2 and "not possible: config.mesh" in text


def test_prices_are_checked_before_anything_is_compiled(tmp_path, capsys):
  path = tmp_path / "prices.json"
  for text, message in (
    ('{"v5e": "1.2"}', "the price of 'v5e' is '1.2', not a number"),
    ('{"v5e": NaN}', "is nan"),
    ("[1.2]", "an object such as"),
    ("{'v5e': 1.2}", r"--prices=.*prices\.json is not JSON: .*line 1"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      main.read_prices(str(path), "v5e")
  path.write_text('{"v5p": 4, "v5e": 1.2}')
  assert main.read_prices(str(path), "v5e") == {"v5p": 4, "v5e": 1.2}
  assert not capsys.readouterr().err
  main.read_prices(str(path), "v6e")
  assert "no price for v6e" in capsys.readouterr().err


def step_work(products, memory, communication, topology="v5e:2x2"):
  """A plan whose parts take these seconds at the full speed of the data sheet of v5e."""
  return made_up(
    512,
    topology=topology,
    flops_per_chip=197e12 * products,
    memory_traffic_bytes_per_chip=819e9 * memory,
    collectives={"all-reduce": dict(runs=1, bytes=200e9 * communication, asynchronous_bytes=0.0)},
  )


@pytest.mark.parametrize("seconds", [0.1, 0.6, 0.75, 3.0])
@pytest.mark.parametrize("parts", [(0.4, 0.2, 0.2), (0.1, 0.3, 0.0), (0.2, 0.2, 0.9)])
def test_the_measured_step_itself_is_predicted_to_take_what_it_took(parts, seconds):
  work = step_work(*parts)
  least, _ = chips.step_seconds(work)
  found = calibrate.step_seconds(work, calibrate.Measured(seconds, work, "run"))
  assert found == pytest.approx((max(seconds, least), max(seconds, least)))


@pytest.mark.parametrize("hidden", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("other", [(0.5, 0.1, 0.2), (0.2, 0.3, 0.4), (0.8, 0.8, 0.1)])
def test_the_range_holds_every_step_that_the_measured_one_allows(other, limit, hidden):
  """A chip at 70 % of its products or traffic, which hides none, half or all of communication."""

  def took(parts):
    rest = parts[limit] / 0.7
    return max(rest + (1 - hidden) * parts[2], parts[2])

  parts = (0.4, 0.35, 0.1)
  measured = calibrate.Measured(took(parts), step_work(*parts), "run")
  plan = step_work(*other)
  shortest, longest = calibrate.step_seconds(plan, measured)
  floor, _ = chips.step_seconds(plan)
  assert shortest - 1e-9 <= max(took(other), floor) <= longest + 1e-9


def test_one_measured_run_narrows_the_range():
  plan = step_work(0.3, 0.2, 0.1)
  measured = calibrate.Measured(0.62, step_work(0.4, 0.25, 0.1), "run")
  shortest, longest = calibrate.step_seconds(plan, measured)
  before, after = chips.step_seconds(plan), (shortest, longest)
  assert before[0] <= shortest < longest <= before[1]
  assert (longest - shortest) < 0.4 * (before[1] - before[0]), (before, after)


@pytest.fixture
def benchmarked(tmp_path):
  """The JSON of a benchmark of a step of 0.62 s."""

  def write(**changes):
    figures = dict(
      config="clip_b16",
      device=dict(device_kind="TPU v5 lite"),
      step=dict(seconds_per_step=0.62),
      plan=step_work(0.4, 0.25, 0.1),
    )
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({**figures, **changes}))
    return path

  return write


def test_plan_takes_the_measured_step_and_says_so(benchmarked, monkeypatch):
  monkeypatch.setattr(main, "plan", lambda *_, **__: step_work(0.3, 0.2, 0.1) | SHOWN)
  shown = []
  asked = dict(topology="v5e:2x2", show=shown.append)
  found = main.predict(small(), measured=str(benchmarked()), **asked)
  known = calibrate.Measured(0.62, step_work(0.4, 0.25, 0.1), "")
  expected = calibrate.step_seconds(step_work(0.3, 0.2, 0.1), known)
  assert found["seconds_per_step"] == [expected[1], expected[0]]
  assert found["images_per_second"][0] == pytest.approx(512 / expected[1])
  assert found["calibrated_by"] == "clip_b16 on v5e:2x2" and "from clip_b16 on v5e" in shown[0]
  assert "not measured" not in shown[0]
  assert "calibrated_by" not in main.predict(small(), **asked) and "not measured" in shown[2]


SHOWN = dict(
  device_kind="TPU v5 lite",
  parameters=1,
  trainable=1,
  not_checked="",
  loss_alone_bytes_per_chip=1,
  remat={},
)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(plan=step_work(1, 1, 1, "v4:2x2x1")), "was measured on v4, and this plan is for v5e"),
    (
      dict(plan={}, device=dict(device_kind="cpu")),
      "measured on cpu, and plans are for TPUs",
    ),
    (dict(step={}), "is neither the JSON of `bigalign benchmark --json` nor a run's folder"),
  ],
)
def test_a_file_that_cannot_calibrate_says_why(changes, message, benchmarked):
  with pytest.raises(ValueError, match=re.escape(message)):
    calibrate.read(benchmarked(**changes), "v5e", lambda *_: {})


@pytest.fixture
def trained(tmp_path):
  """The folder of a run of 16 chips of v5e, whose second stage begins after step 4."""
  (tmp_path / "config.json").write_text(
    json.dumps(
      dict(config=dict(topology="v5e:4x4"), hardware=dict(device_kind="TPU v5 lite", devices=16))
    )
  )
  rows = [
    {"step": step, "train/batch_time": seconds + 0.25, "train/data_time": 0.25}
    for step, seconds in ((2, 9.0), (6, 0.5), (8, 0.7), (10, 0.6))
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path


def test_a_run_calibrates_by_the_median_of_its_last_stage(trained):
  asked = []

  def plan(config, topology):
    asked.append((config, topology))
    return {**step_work(0.4, 0.2, 0.1), "first_step": 4}

  known = calibrate.read(trained, "v5e", plan)
  assert known.seconds == pytest.approx(0.6) and known.name == f"{trained.name} on v5e:4x4"
  assert asked == [(dict(topology="v5e:4x4"), "v5e:4x4")]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x4", ""])
def test_a_run_on_a_slice_of_unknown_shape_does_not_calibrate(topology, trained):
  record = json.loads((trained / "config.json").read_text())
  record["config"]["topology"] = topology
  (trained / "config.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match=r"16 x TPU v5 lite, .* the JSON of `bigalign benchmark`"):
    calibrate.read(trained, "v5e", lambda *_: {})


def test_devices_of_a_topology_and_kinds_of_devices():
  assert [chips.devices(x) for x in ("v5e:16x16*2", "v4:2x2x4", "tpu7x:2x2x1")] == [512, 16, 8]
  kinds = ("TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x", "NVIDIA H100", "cpu")
  assert [chips.of_device(kind) for kind in kinds] == ["v5e", "v5p", "v6e", "tpu7x", "", ""]


def test_the_example_of_the_docs_gives_its_figures(tmp_path):
  assert doctest.testmod(calibrate).failed == 0
  text = (ROOT / "docs/plan.md").read_text().partition("## Narrow the times")[2]
  file = tmp_path / "v5e.json"
  file.write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
  planned = dict(
    topology="v5e:16x16",
    flops_per_chip=59.1e12,
    peak_flops_per_second=197e12,
    memory_traffic_bytes_per_chip=164e9,
    collectives={"all-reduce": dict(bytes=25e9)},
  )
  measured = calibrate.read(file, "v5e", lambda *_: {})
  times = (*calibrate.step_seconds(planned, measured), *chips.step_seconds(planned))
  said = re.search(r"takes ([\d.]+) to\s+([\d.]+) s; .* ([\d.]+) to ([\d.]+) s", text)
  assert times == pytest.approx([float(x) for x in said.groups()], abs=0.0005)
