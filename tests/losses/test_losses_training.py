"""Losses in the loop: their state is resumed and reshaped, diagnostics are logged, errors stop."""

from __future__ import annotations

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers.loss_oracles import AT, ids
from helpers.shipped import load
from helpers.small_runs import exact

from bigalign import losses, sharding, train
from bigalign.config import resolve_config
from bigalign.data.fields import column_files
from bigalign.data.loader import training
from bigalign.data.sources.base import open_source
from bigalign.losses.diagnostics import diagnose
from bigalign.losses.per_sample import tables
from bigalign.plan import loss_costs
from bigalign.program import check_loss, layout, make_program, make_programs
from bigalign.run.metrics import read_metrics
from bigalign.sphere import unit
from bigalign.step import jitted

STATEFUL = dict(
  isogclr=dict(tau_init=0.07),
  fastclip_v2=dict(gamma_over="4 steps"),
  albef_itc=dict(queue_size=64),
  # Heads: frequencies of words, and a centre of the logits of the averaged parameters.
  superclass={},
  ibot=dict(view="", prototypes=16, hidden=8, bottleneck=4, teacher_temp_updates=3),
)


@pytest.fixture
def tiny():
  """configs/tiny.py made smaller still: seconds for 8 steps."""
  c = load("tiny")
  c.total_steps, c.batch_size, c.log_every, c.checkpoint_every = 8, 16, 1, 4
  c.evals = {}
  c.model.image.update(width=32, depth=1)
  c.model.text.update(width=32, depth=1)
  c.writer = dict(tensorboard=False)
  return c


def run(workdir, c):
  return train.train(c.to_dict(), workdir)


@pytest.mark.slow
def test_the_state_of_losses_is_resumed(tiny, tmp_path):
  """To the bit on the same mesh; on another, equal to the rounding of float32."""
  tiny.loss = STATEFUL
  tiny.mesh = dict(data=4, fsdp=2)
  whole = run(tmp_path / "whole", tiny)
  for copy in ("same", "other"):
    shutil.copytree(tmp_path / "whole", tmp_path / copy)
    shutil.rmtree(tmp_path / copy / "checkpoints" / "8")
  same = run(tmp_path / "same", tiny)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, same
  )
  assert exact(tmp_path / "whole") == exact(tmp_path / "same")
  tiny.mesh = dict(data=2, fsdp=1, tensor=4)
  other = run(tmp_path / "other", tiny)
  changed = set()
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(whole.loss), jax.tree.leaves(other.loss), strict=True
  ):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
    a, b = (np.where(np.isfinite(x), x, 0) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    if np.unique(a).size > 2:
      changed.add(jax.tree_util.keystr(path, simple=True, separator="/").split("/")[0])
  assert changed == {*STATEFUL}


@pytest.mark.slow
def test_tables_are_sharded_over_the_mesh_and_found_by_id(tiny, tmp_path):
  tiny.loss = dict(sogclr={})
  tiny.total_steps, tiny.checkpoint_every = 2, 0
  tiny.mesh = dict(data=2, fsdp=2, tensor=2)
  state = run(tmp_path, tiny)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in jax.tree_util.tree_leaves_with_path(state.loss)
  }
  for name, x in arrays.items():
    assert x.sharding.shard_shape(x.shape)[0] * 8 == x.shape[0], name
  written = np.isfinite(np.asarray(arrays["sogclr/img/log_u"])).sum()
  assert written == 2 * 16, "as many images as two batches hold"


@pytest.mark.slow
def test_diagnostics_are_logged_at_their_interval(tiny, tmp_path):
  tiny.loss = dict(clip={}, isogclr=dict(tau_init=0.07), clip_gap=dict(weight=0.1))
  tiny.total_steps, tiny.checkpoint_every, tiny.diagnose_every = 4, 0, 2
  run(tmp_path, tiny)
  rows = [r for r in read_metrics(tmp_path) if "train/hardest_negative/image" in r]
  assert [row["step"] for row in rows] == [2, 4]
  for row in rows:
    shares = [row[f"train/gradient_share/{name}"] for name in ("clip", "isogclr", "clip_gap")]
    assert min(shares) > 0
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-5)
    assert -1 <= row["train/hardest_negative/text"] <= 1
    assert 0 <= row["train/rank_1/image"] <= 1 and 0 <= row["train/saturation/text"] <= 1
    assert row["train/temperature/image/p5"] <= row["train/temperature/image/p95"]
    histogram = {k: x for k, x in row.items() if re.search(r"temperature/text/\d", k)}
    np.testing.assert_allclose(sum(histogram.values()), 1, rtol=1e-6)
    median, shares = row["train/temperature/text/p50"], 0.0
    for name in sorted(histogram, key=lambda k: float(k.split("-")[-1])):
      shares += histogram[name]
      if median * (1 + 1e-6) < float(name.split("-")[-1]):  # 0.005 is a bound of both
        break
    assert shares >= 0.5 and histogram[name] > 0, "the median lies in this bin"


@pytest.mark.slow
def test_a_column_of_frequencies_is_compared_with_the_temperatures(tiny, tmp_path):
  source = open_source(tiny.data.source)
  out = f"{tmp_path}/often"
  column_files.write(out, source, [np.arange(1, len(source) + 1)], made_by=dict(what="frequency"))
  tiny.data.columns = dict(caption_frequency=dict(file=out))
  tiny.loss = dict(isogclr=dict(tau_init=0.07))
  tiny.total_steps, tiny.checkpoint_every, tiny.diagnose_every = 6, 0, 6
  run(tmp_path / "run", tiny)
  (row,) = [r for r in read_metrics(tmp_path / "run") if "train/hardest_negative/image" in r]
  for side in ("image", "text"):
    assert -1 <= row[f"train/temperature/{side}/caption_frequency_pearson_r"] <= 1


@pytest.mark.parametrize("loss,every", [("isogclr", 0), ("sogclr", 2)])
def test_a_column_of_frequencies_that_nothing_reads_is_an_error(tiny, loss, every):
  tiny.data.columns = dict(caption_frequency="json.often")
  tiny.loss, tiny.diagnose_every = dict(isogclr={}), 2
  check_loss(make_program(resolve_config(tiny)))
  first = dict(until="50%", loss=tiny.loss.to_dict())
  tiny.loss, tiny.stages = dict(clip={}), (first,)
  for program in (programs := make_programs(resolve_config(tiny))):
    check_loss(program, programs)  # a loss of another stage reads it
  tiny.stages = ()
  tiny.loss, tiny.diagnose_every = {loss: {}}, every
  with pytest.raises(ValueError, match=r"frequency is read by no loss.*diagnose_every"):
    check_loss(make_program(resolve_config(tiny)))


def test_hardest_negatives_and_saturation_by_hand():
  rng = np.random.default_rng(0)
  x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in rng.normal(size=(2, 12, 6)))
  y[:4] = x[:4]
  loss = losses.make_loss(dict(clip=dict(t_init=20.0)))
  params, state = loss.init({})
  feats = {"zimg": jnp.asarray(x, jnp.float32), "ztxt": jnp.asarray(y, jnp.float32)}
  found = diagnose(loss, params, state, feats, {}, AT)
  s = x @ y.T
  others = np.where(np.eye(12, dtype=bool), -np.inf, s)
  p = np.exp(20 * s) / np.exp(20 * s).sum(1, keepdims=True)
  np.testing.assert_allclose(found["hardest_negative/image"], others.max(1).mean(), rtol=1e-5)
  np.testing.assert_allclose(found["hardest_negative/text"], others.max(0).mean(), rtol=1e-5)
  np.testing.assert_allclose(found["rank_1/image"], (np.diag(s) > others.max(1)).mean())
  np.testing.assert_allclose(found["saturation/image"], (np.diag(p) > 0.99).mean())


def random_feats(seed=0, size=12, width=6):
  rng = np.random.default_rng(seed)
  raw = {k: jnp.asarray(3 * rng.normal(size=(size, width)), jnp.float32) for k in ("img", "txt")}
  return {f"z{k}": unit(x) for k, x in raw.items()} | {f"raw_{k}": x for k, x in raw.items()}


@pytest.mark.slow
def test_equal_terms_have_equal_shares_of_the_gradient():
  """CLIP reads normalised embeddings, Matryoshka of the whole width those before the norm."""
  feats = random_feats()
  loss = losses.make_loss(dict(clip={}, matryoshka=dict(dims=(6,))))
  found = diagnose(loss, *loss.init({"embed": 6}), feats, {}, AT)
  for name in ("clip", "matryoshka"):
    np.testing.assert_allclose(found[f"gradient_share/{name}"], 0.5, rtol=1e-4)


@pytest.mark.slow
def test_the_radial_part_of_a_gradient_has_no_share():
  """A loss of the lengths alone moves nothing, since embeddings are normalised."""

  def apply(params, state, feats, batch, context):
    value = (feats["zimg"] ** 2).sum() + (feats["ztxt"] ** 2).sum()
    return value, (state, {"loss": value})

  lengths = losses.Loss(frozenset(), lambda sizes: ({}, {}), apply)
  loss = losses.weighted_sum(dict(clip=(1.0, losses.LOSSES["clip"]()), lengths=(1.0, lengths)))
  feats = {k: x for k, x in random_feats().items() if k.startswith("z")}
  found = diagnose(loss, *loss.init({}), feats, {}, AT)
  assert found["gradient_share/lengths"] < 1e-5
  np.testing.assert_allclose(found["gradient_share/clip"], 1, rtol=1e-5)


@pytest.mark.slow
def test_terms_and_widths_with_temperatures_have_their_own_diagnostics():
  feats = random_feats(size=4)
  number = ids(np.arange(4))
  batch, sizes = {"image_id": number, "text_id": number}, {"image": 4, "text": 4, "embed": 6}
  terms = dict(
    clip=dict(t_init=10.0),
    siglip=dict(t_init=50.0),
    isogclr=dict(tau_init=0.05),
    fastclip_v2=dict(tau_init=0.3),
    matryoshka=dict(base="isogclr", base_options=dict(tau_init=0.4), dims=(2, 6)),
  )
  loss = losses.make_loss(terms)
  found = diagnose(loss, *loss.init(sizes), feats, batch, AT)
  wanted = {"isogclr": 0.05, "fastclip_v2": 0.3, "matryoshka/d2": 0.4, "matryoshka/d6": 0.4}
  for owner, tau in wanted.items():
    for side in ("image", "text"):
      np.testing.assert_allclose(found[f"temperature/{owner}/{side}/p50"], tau, rtol=1e-6)
  assert {f"saturation/{name}/image" for name in ("clip", "siglip")} <= {*found}


def test_temperatures_against_the_frequency_of_captions_by_hand():
  number, rng = ids(np.arange(12)), np.random.default_rng(0)
  frequency = 10 ** rng.uniform(0, 5, 12).astype(np.float32)
  frequency[[2, 5]] = 0, np.nan  # samples without a caption that is counted
  batch = {"image_id": number, "text_id": number, "caption_frequency": jnp.asarray(frequency)}
  loss = losses.make_loss(dict(isogclr=dict(tau_init=0.05)))
  params, state = loss.init({"image": 12, "text": 12})
  found = diagnose(loss, params, state, random_feats(), batch, AT)
  assert found["temperature/image/caption_frequency_slope"] == 0, "all temperatures are equal"
  taus = rng.uniform(0.01, 0.9, 12).astype(np.float32)
  table = state["isogclr"]["img"]["tau"]
  state["isogclr"]["img"]["tau"] = table.at[:12].set(taus)
  found = diagnose(loss, params, state, random_feats(), batch, AT)
  used = frequency > 0
  fitted = scipy.stats.linregress(np.log10(frequency[used]), taus[used])
  name = "temperature/image/caption_frequency"
  np.testing.assert_allclose(found[f"{name}_slope"], fitted.slope, rtol=1e-4)
  np.testing.assert_allclose(found[f"{name}_pearson_r"], fitted.rvalue, rtol=1e-4)
  assert found["temperature/text/caption_frequency_pearson_r"] == 0


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_reported_for_any_width():
  number = ids(np.arange(12))
  batch, sizes = {"image_id": number, "text_id": number}, {"image": 12, "text": 12, "embed": 6}
  loss = losses.make_loss(dict(matryoshka=dict(base="isogclr", dims=(2, 4, 6))))
  params, state = loss.init(sizes)
  for broken in (None, "d2", "d4", "d6"):
    widths = state["matryoshka"]
    if broken:
      table = widths[broken]["img"]["m"]
      of_images = widths[broken]["img"] | {"m": jnp.full_like(table, jnp.nan)}
      widths = widths | {broken: widths[broken] | {"img": of_images}}
    _, (_, logs) = loss.apply(params, {"matryoshka": widths}, random_feats(), batch, AT)
    assert bool(logs["finite_state"]) == (broken is None), broken


@pytest.mark.slow
def test_an_id_out_of_range_stops_the_run(tiny, tmp_path, monkeypatch):
  tiny.loss = dict(sogclr={})
  words = training.words
  beyond = 1 << 40
  monkeypatch.setattr(training, "words", lambda ids: words(np.where(ids == ids.max(), beyond, ids)))
  with pytest.raises(ValueError, match=r"image_id: id 1099511627776 in row \d+ .*with ids 0 to"):
    run(tmp_path, tiny)


@pytest.mark.slow
def test_only_a_loss_with_tables_bounds_the_ids(tiny, tmp_path, monkeypatch):
  """SigLIP compares ids and has no table: any 64 bits will do."""
  tiny.loss, tiny.total_steps, tiny.checkpoint_every = dict(siglip=dict(positives="ids")), 1, 0
  words = training.words
  monkeypatch.setattr(training, "words", lambda ids: words(ids + (1 << 40)))
  assert int(run(tmp_path, tiny).step) == 1


@pytest.mark.optimized
def test_a_step_updates_tables_in_place(tiny):
  """The whole step, compiled for 10^8 images: no second table, whatever a step decides."""
  tiny.loss = dict(isogclr={})
  tiny.data.captions_per_image = 1
  mesh = sharding.make_mesh(data=4, fsdp=2)
  program = make_program(resolve_config(tiny), dataset_size=10**8)
  shapes, shardings = layout(program, mesh)

  def array(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  state = jax.tree.map(array, shapes, shardings)
  batch = {
    name: array(jax.ShapeDtypeStruct(*shape), sharding.batch_sharding(mesh))
    for name, shape in program.spec.items()
  }
  with jax.set_mesh(mesh):
    step_fn = jitted(program, shardings, mesh)
    compiled = step_fn.lower(state, batch, jax.ShapeDtypeStruct((2,), jnp.float32)).compile()
  memory = compiled.memory_analysis()
  tables_of_a_device = 6 * 4 * 10**8 / 8  # u, tau and momentum, of images and texts
  assert memory.alias_size_in_bytes >= tables_of_a_device
  assert memory.temp_size_in_bytes < 0.1 * tables_of_a_device / 6


@pytest.mark.slow
def test_a_state_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):
  """A table of NaNs, as from a damaged disk: the error names the first step that reads it.

  The NaNs are in iSogCLR's momentum, which changes the temperatures but not the loss of this step.
  """
  tiny.loss = dict(isogclr={})
  make = tables.make
  monkeypatch.setattr(tables, "make", lambda n, fill: make(n, fill if fill else float("nan")))
  with pytest.raises(FloatingPointError, match=r"step 1: state not finite.*per-sample state"):
    run(tmp_path, tiny)


def test_a_field_that_the_data_lacks_is_named_before_the_first_step(tiny, tmp_path):
  tiny.loss = dict(clip_distill={})
  with pytest.raises(ValueError, match=r"needs 'teacher'.*'teacher_img'"):
    run(tmp_path, tiny)
  tiny.loss, tiny.ema = dict(albef_itc=dict(queue_size=64)), 0.0
  with pytest.raises(ValueError, match=r"config\.ema"):
    run(tmp_path, tiny)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  "terms,text",
  [
    (
      dict(siglip={}),
      "Loss: siglip (weight 1). Extra inputs: none. Per-sample state: none. Logits: 1 BxB matrix,"
      " 16 floats communicated per pair.",
    ),
    (
      dict(sail=dict(weight=0.5)),
      "Loss: sail (weight 0.5). Extra inputs: second_text (ztxt_second). Per-sample state: none."
      " Logits: 2 BxB matrices, 16 + 16 floats communicated per pair.",
    ),
    # SogCLR: a matrix for g, a matrix for the weights, whose columns have scalars of their own.
    (
      dict(sogclr={}, clip=dict(weight=0.5)),
      "Loss: sogclr (weight 1) + clip (weight 0.5). Extra inputs: ids (image_id, text_id)."
      " Per-sample state: 8,000.5 MB over all devices. Logits: 3 BxB matrices, 18 + 19 + 17 floats"
      " communicated per pair.",
    ),
    (
      dict(albef_itc=dict(queue_size=1024)),
      "Loss: albef_itc (weight 1). Extra inputs: ema_teacher (teacher_img, teacher_txt)."
      " Per-sample state: none. Other state: 0.1 MB over all devices. Logits: 8 BxB matrices,"
      " 16 + 16 + 16 + 35 + 16 + 16 + 16 + 35 floats communicated per pair.",
    ),
  ],
)
def test_the_summary_names_inputs_state_and_communication(terms, text):
  sizes = {"image": 10**9, "text": 10**9, "embed": 16}
  batch = loss_costs.fields(64, 16)
  assert losses.summary(losses.make_loss(terms), sizes, batch, batch) == text


def test_only_per_sample_tables_are_marked_as_tables():
  sizes = {"image": 10, "text": 10, "embed": 4}
  terms = dict(
    siglip={}, sogclr={}, albef_itc=dict(queue_size=8), matryoshka=dict(base="isogclr", dims=(2, 4))
  )
  for name, options in terms.items():
    loss = losses.make_loss({name: options})
    mask = jax.tree.leaves(losses.table_mask(loss, loss.init(sizes)[1]))
    expected = name in ("sogclr", "matryoshka")
    assert losses.has_tables(loss) == expected and all(x == expected for x in mask)
