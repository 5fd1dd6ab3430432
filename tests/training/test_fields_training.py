"""Runs whose losses read teachers, several texts and columns."""

from __future__ import annotations

import contextlib
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.shipped import load
from helpers.small_fields import OPTIONS, SAMPLES, every_field, write_dataset
from helpers.small_runs import config

from bigalign import sharding, step
from bigalign.config import resolve_config
from bigalign.inputs import open_data
from bigalign.losses import check_needs, make_loss
from bigalign.model import make_model, provided
from bigalign.plan import compile_step
from bigalign.program import check_loss, make_programs
from bigalign.run.metrics import read_metrics
from bigalign.train import train

# Every loss that the data of a pair alone cannot train, and those that take several texts.
LOSSES = dict(
  clip=dict(weight=1.0, texts="uniform"),
  siglip=dict(weight=1.0, texts="texts"),
  mobileclip_dr=dict(weight=1.0, teacher_scales=(30.0, 20.0), soft_share=0.5),
  siglip_distill=dict(weight=0.2, teacher_scales=(10.0, 10.0), teacher_biases=(-5.0, -5.0)),
  clip_distill=dict(weight=0.2, teacher_scales=(10.0, 20.0)),
  alignclip=dict(weight=0.1),
  nitc=dict(weight=0.1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_dataset(tmp_path_factory.mktemp("fields"))


def read_fields(folder) -> dict:
  """config.data of the dataset with all fields that LOSSES read."""
  data = every_field(folder)
  del data["views"], data["regions"], data["columns"]["boxes"]
  return data


def metrics_of(folder, workdir, *, mesh: dict, **changes) -> list[dict]:
  """What a run of a few steps with all fields and LOSSES logs."""
  c = config(mesh, batch_size=16, **changes)
  with c.unlocked():
    c.data = {**c.data.to_dict(), **read_fields(folder), "augment": {"scale": (0.9, 1.0)}}
    c.loss = LOSSES
  train(c, workdir)
  return read_metrics(workdir)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
  """What a run on eight devices logs."""
  return metrics_of(folder, tmp_path_factory.mktemp("run"), mesh=dict(data=-1), total_steps=6)


@pytest.mark.slow
def test_losses_of_all_fields_train(trained):
  losses = [row["train/loss"] for row in trained]
  assert losses[-1] < 0.9 * losses[0]
  for name in LOSSES:
    assert all(np.isfinite(row[f"train/{name}/loss"]) for row in trained)


@pytest.mark.long
def test_losses_of_all_fields_are_equal_on_another_mesh_in_microbatches(folder, trained, tmp_path):
  """The matrix of test_engine.py shows it for each loss."""
  (first, *_) = metrics_of(
    folder, tmp_path / "b", mesh=dict(data=2, fsdp=2, tensor=-1), total_steps=1, microbatches=2
  )
  for name in ("loss", *(f"{name}/loss" for name in LOSSES)):
    np.testing.assert_allclose(first[f"train/{name}"], trained[0][f"train/{name}"], rtol=2e-5)


@pytest.mark.slow
def test_the_part_of_a_batch_that_a_teacher_recommends_trains_equally_on_any_mesh(folder, tmp_path):
  """A share of 1 chooses all pairs, which is no choice; a rejected half is still seen."""

  def rows(name, mesh, loss=None, **selection):
    c = config(mesh, batch_size=16, total_steps=2)
    teacher = dict(image=f"{folder}/a/image", text=f"{folder}/a/text")
    data = dict(source=f"{folder}/0.tar", captions=("json.captions",))
    if selection:
      data["teachers"] = dict(a=teacher)
    with c.unlocked():
      c.data = {**c.data.to_dict(), **OPTIONS, **data}
      c.loss, c.selection = loss or dict(clip={}), selection
    train(c, tmp_path / name)
    return read_metrics(tmp_path / name)

  plain = rows("plain", dict(data=8))
  every = rows("all", dict(data=8), share=1.0, chunks=4)
  half = rows("half", dict(data=8), share=0.5, chunks=4)
  again = rows("again", dict(data=2, fsdp=2, tensor=-1), share=0.5, chunks=4)
  for x, y in zip(plain, every):
    np.testing.assert_allclose(y["train/loss"], x["train/loss"], rtol=1e-5)
  for x, y, z in zip(half, again, plain):
    np.testing.assert_allclose(y["train/loss"], x["train/loss"], rtol=2e-5)
    assert x["train/samples_seen"] == z["train/samples_seen"]
  assert half[0]["train/loss"] < plain[0]["train/loss"]  # a softmax over half as many texts
  # A scale that is not learned, beside temperatures per sample: clip's first one chooses as clip.
  constant = dict(clip=dict(t_learned=False), isogclr=dict(weight=0.1))
  given = rows("given", dict(data=8), constant, share=0.5, chunks=4, scale=1 / 0.07)
  np.testing.assert_allclose(given[0]["train/clip/loss"], half[0]["train/loss"], rtol=2e-5)
  assert all(np.isfinite(x["train/isogclr/loss"]) for x in given)
  with pytest.raises(ValueError, match=r"config.selection chooses share=0.3 of 16 pairs, 4.8"):
    rows("odd", dict(data=8), share=0.3)
  with pytest.raises(ValueError, match=r"config.selection compares the model with one teacher"):
    make_programs(resolve_config(load("tiny").to_dict() | dict(selection=dict(share=0.5))))


def test_a_selection_needs_the_scale_of_the_logits(folder):
  """Learned or given: with another one, the scores of the model would not be those of its loss."""
  values = load("tiny").to_dict() | dict(selection=dict(share=0.5, chunks=4), batch_size=16)
  values["data"] |= dict(
    teachers=dict(a=dict(image=f"{folder}/a/image", text=f"{folder}/a/text")), **OPTIONS
  )
  make_programs(resolve_config(values))
  for loss in (dict(sogclr={}), dict(clip=dict(t_learned=False))):
    with pytest.raises(ValueError, match=r"no loss .* learns their scale; set .*selection\.scale"):
      make_programs(resolve_config(values | dict(loss=loss)))
    given = values["selection"] | dict(scale=100.0)
    make_programs(resolve_config(values | dict(loss=loss, selection=given)), dataset_size=8)
  with pytest.raises(ValueError, match=r"config\.selection\.scale=0\.0 must be above 0"):
    resolve_config(values | dict(selection=dict(scale=0.0)))


@pytest.mark.slow
def test_several_texts_are_embedded_as_single_ones_are():
  model = load("tiny").model.to_dict()
  for side in ("image", "text"):
    model[side] |= dict(depth=1, width=32)
  model = make_model(**model)
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
  ids = rng.integers(3, 200, (3, 4, 16), np.int32)
  mask = np.arange(16) < rng.integers(2, 16, (3, 4, 1))
  params = model.init(jax.random.key(0), image, ids[:, 0], mask[:, 0])
  apply = jax.jit(functools.partial(model.apply, params))
  feats = apply(image, ids[:, 0], mask[:, 0], others=(ids[:, 1:], mask[:, 1:]))
  assert feats["ztxts"].shape == (3, 4, feats["ztxt"].shape[-1])
  for m in range(4):
    alone = apply(image, ids[:, m], mask[:, m])
    np.testing.assert_allclose(feats["ztxts"][:, m], alone["ztxt"], atol=2e-6)
    if not m:
      for name in alone:
        np.testing.assert_allclose(feats[name], alone[name], atol=5e-6, err_msg=name)
  one = apply(image, ids[:, 0], mask[:, 0], others=())
  np.testing.assert_array_equal(one["ztxts"][:, 0], one["ztxt"])
  np.testing.assert_array_equal(one["ztxt"], apply(image, ids[:, 0], mask[:, 0])["ztxt"])


@pytest.mark.slow
def test_a_plan_has_all_fields_of_a_batch(folder):
  """Traced as `bigalign plan` does: texts, teachers, columns, views and regions at once."""
  data = every_field(folder)
  del data["columns"]["boxes"]  # which no loss reads
  c = config(dict(data=-1), batch_size=16).to_dict() | dict(twin=dict(decay=0.9))
  c["data"] |= data | dict(augment=dict(flip=0.5))
  c["loss"] = {name: LOSSES[name] for name in ("clip", "mobileclip_dr", "nitc")} | dict(
    silc=dict(teacher="wide", student="local", prototypes=16, hidden=8, bottleneck=4),
    region_phrase={},
  )
  resolved = resolve_config(c)
  traced = compile_step.trace_on(sharding.make_mesh(), resolved, samples=SAMPLES)
  inputs = open_data(resolved.data)
  with contextlib.closing(
    inputs.batches(rejected_log="", batch_size=16, rows=range(16), seed=0)
  ) as batches:
    batch = next(batches)
  assert {"texts_kind", "teacher_txts", "noise_prob", "view/wide", "region_boxes"} < {*batch}
  assert {k: x.shape for k, x in traced.batch.items()} == {k: x.shape for k, x in batch.items()}


def test_vectors_of_each_teacher_have_unit_norm():
  class Program:
    sizes: ClassVar = dict(teachers=(3, 5))

  rng = np.random.default_rng(0)
  given = jnp.asarray(rng.normal(size=(4, 2, 8)), jnp.bfloat16)
  found = step._for_loss(Program, dict(teacher_txts=given, label=jnp.zeros(4)))
  wide = np.asarray(given, np.float32)
  for part in (slice(0, 3), slice(3, 8)):
    expected = wide[..., part] / np.linalg.norm(wide[..., part], axis=-1, keepdims=True)
    np.testing.assert_allclose(found["teacher_txts"][..., part], expected, rtol=1e-6)
  np.testing.assert_array_equal(found["teacher_txt"], found["teacher_txts"][:, 0])
  assert found["teacher_txt"].dtype == jnp.float32 and not found["label"].any()


def test_texts_that_no_loss_reads_are_an_error():
  fields = provided(["image", "text", "texts_kind"])
  check_needs(make_loss(dict(clip=dict(texts="uniform"))), fields)
  with pytest.raises(ValueError, match=r"config\.data\.texts .* no loss reads them"):
    check_needs(make_loss(dict(clip=dict(weight=1.0))), fields)
  with pytest.raises(ValueError, match=r"sogclr_unimodal compares two views of one modality"):
    check_needs(make_loss(dict(sogclr_unimodal={})), fields)


# Of every_field: the part of config.data, a loss that reads it, and what the error says without it.
READ = [
  ("second_captions", dict(sail={}), r"config\.data\.second_captions .* two texts, such as sail"),
  ("stores", dict(sail={}), r"config\.data\.stores\.second .* two texts, such as sail"),
  ("teachers", dict(mobileclip_dr={}), r"config\.data\.teachers .* such as clip_distill"),
  ("columns", dict(nitc={}), r"config\.data\.columns\.noise_prob .* such as nitc"),
  ("views", dict(silc=dict(teacher="wide", student="local")), r"config\.data\.views\.wide .* silc"),
  ("regions", dict(region_phrase={}), r"config\.data\.regions .* such as region_phrase"),
  ("text_pairs", dict(text_pairs={}), r"config\.data\.text_pairs .* the loss text_pairs"),
  ("locations", dict(caption=dict(tasks=True)), r"config\.data\.locations .*caption=dict\(tasks"),
]


@pytest.mark.parametrize("name,reader,message", READ, ids=[name for name, _, _ in READ])
def test_a_field_that_no_loss_reads_is_an_error(folder, name, reader, message):
  given = every_field(folder) | dict(
    text_pairs=dict(source="pairs.jsonl", query="q", document="d"),
    locations=dict(field="json.regions"),
    second_captions=("json.captions",),
    stores=dict(text="captions", second="recaptions"),
  )
  given["columns"] = dict(noise_prob="json.noise")
  values = load("tiny").to_dict() | dict(twin=dict(decay=0.9))
  values["data"] |= OPTIONS | {name: given[name], "source": given["source"]}

  def check(loss, *others):
    def programs_of(loss):
      return make_programs(resolve_config(values | dict(loss=loss)))

    check_loss(programs_of(loss)[-1], [one for x in others for one in programs_of(x)])

  check(dict(clip={}) | reader)
  check(dict(clip={}), dict(clip={}) | reader)  # another stage reads it
  with pytest.raises(ValueError, match=rf"{message}.*, or leave it out"):
    check(dict(clip={}))


@pytest.mark.parametrize(
  "negatives,weight,message",
  [
    (0, 5.0, r"reads the field 'region_negatives'.* Set config\.data\.regions\.negatives"),
    (2, 0.0, r"config\.data\.regions\.negatives is read by no loss .*own_negatives"),
  ],
)
def test_wrong_phrases_of_regions_are_both_given_and_read(folder, negatives, weight, message):
  values = load("tiny").to_dict()

  def check(negatives, weight):
    values["loss"] = dict(region_phrase=dict(own_negatives=weight))
    regions = every_field(folder)["regions"] | dict(negatives=negatives)
    values["data"] |= OPTIONS | dict(regions=regions)
    check_loss(make_programs(resolve_config(values))[-1])

  check(2, 5.0)
  check(0, 0.0)
  with pytest.raises(ValueError, match=message):
    check(negatives, weight)


def test_a_teacher_may_be_read_by_the_selection_alone(folder):
  values = load("tiny").to_dict()
  values["data"] |= OPTIONS | dict(teachers=dict(a=every_field(folder)["teachers"]["a"]))
  values["selection"] = dict(share=0.5, chunks=4)
  check_loss(make_programs(resolve_config(values))[-1])


def test_own_hard_negatives_need_hard_negatives(folder):
  """Without them hardneg_own would be 0."""
  values = load("tiny").to_dict() | dict(loss=dict(hardneg_own={}, clip=dict(texts="uniform")))

  def check(**negatives):
    values["data"] |= dict(texts=dict(count=2, negatives=negatives))
    check_loss(make_programs(resolve_config(values))[-1])

  check(count=1, rule="swap")
  with pytest.raises(ValueError, match=r"hardneg_own .* Set config\.data\.texts\.negatives=dict"):
    check()
