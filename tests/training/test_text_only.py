"""Runs on texts alone, for which the image tower neither runs nor learns, and on pairs of texts."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from helpers.small_fields import SAMPLES, captions_of, key_of, vectors_of
from helpers.small_runs import config, evals
from helpers.small_shards import write_tar
from helpers.small_stores import write_store

from bigalign import evaluate
from bigalign.config import resolve_config
from bigalign.losses import check_needs, make_loss
from bigalign.model import provided
from bigalign.plan import compile_step
from bigalign.program import init_params, make_program
from bigalign.run import flops
from bigalign.run.metrics import read_metrics
from bigalign.train import train

LOSS = dict(feature_distill=dict(kind="mse", w_img=0.0))


def text_config(folder):
  """A student that learns the vectors of a teacher, 3 wide, from captions without images."""
  members = [
    (f"{i:03d}.json", json.dumps(dict(captions=captions_of(i))).encode()) for i in range(SAMPLES)
  ]
  write_tar(folder / "0.tar", members)
  rows = {key_of(i): vectors_of(i, width=3, scale=0.1) for i in range(SAMPLES)}
  c = config(dict(data=-1), batch_size=16, total_steps=8)
  data = dict(
    source=f"{folder}/0.tar",
    images=False,
    captions=("json.captions",),
    augment={},
    teachers=dict(a=dict(text=write_store(folder / "a", rows), width=3)),
  )
  with c.unlocked():
    c.data = {**c.data.to_dict(), **data}
    c.loss = LOSS
    c.model.embed_dim = 3
  return c


def test_a_plan_has_no_product_of_the_image_tower_which_is_frozen(tmp_path):
  c = resolve_config(text_config(tmp_path))
  step = compile_step.trace_on(c.mesh.make(), c, samples=SAMPLES)
  assert "image" not in step.batch
  scopes = "".join(flops.by_name(step.traced.jaxpr))
  assert "text_tower" in scopes and "image_tower" not in scopes
  sides = {path.split("/")[1] for path in step.state.trainable}
  assert sides == {"text_tower", "text_projector"}
  assert {path.split("/")[1] for path in step.state.frozen} == {"image_tower", "image_projector"}


def test_losses_that_need_images_are_refused():
  fields = provided(["text", "text_mask", "teacher_txt"])
  check_needs(make_loss(LOSS), fields)
  with pytest.raises(ValueError, match=r"loss\.clip compares .* config\.data\.images=False"):
    check_needs(make_loss(dict(clip={}, **LOSS)), fields)
  with pytest.raises(ValueError, match=r"'raw_image', .* Set config\.data\.images=True"):
    check_needs(make_loss(dict(feature_distill={})), fields)


@pytest.mark.slow
def test_a_student_learns_from_texts_alone_and_is_evaluated_with_images(tmp_path):
  c = text_config(tmp_path)
  c.evals = evals(tmp_path)
  c.evals.val.fields = ("txt",)
  c.ema, c.diagnose_every = 0.9, 4
  state = train(c, tmp_path / "run")
  rows = read_metrics(tmp_path / "run")
  losses = [row["train/loss"] for row in rows if "train/loss" in row]
  assert losses[-1] < 0.9 * losses[0]
  assert rows[-1]["val/image_to_text_R@5"] >= 0 and rows[-1]["ema/val/text_to_image_R@5"] >= 0
  program = make_program(evaluate.recorded_config(evaluate.read_config(tmp_path / "run")))
  begin = init_params(program, jax.random.key(c.seed))
  frozen = [path for path in begin if path.startswith("model/image_")]
  assert frozen and {*frozen} == {*state.frozen}
  for path in frozen:  # drawn by another program, so the last bits differ
    np.testing.assert_allclose(state.frozen[path], begin[path], atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_pairs_of_texts_train_beside_pairs_of_images_and_texts(tmp_path):
  rows = [dict(q=f"the number after {i}", d=f"it is {i + 1}") for i in range(16)]
  (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  c = config(dict(data=-1), batch_size=16, total_steps=8, diagnose_every=8, microbatches=2)
  with c.unlocked():
    pairs = dict(source=f"{tmp_path}/qa.jsonl", query="q", document="d")
    c.data = {**c.data.to_dict(), "text_pairs": pairs}
    c.loss = dict(clip=dict(weight=1.0), text_pairs=dict(weight=1.0))
  state = train(c, tmp_path / "run")
  rows = read_metrics(tmp_path / "run")
  for name in ("clip", "text_pairs"):
    losses = [row[f"train/{name}/loss"] for row in rows if f"train/{name}/loss" in row]
    assert losses[-1] < losses[0]
    assert rows[-1][f"train/gradient_share/{name}"] > 0
  assert {"loss/clip/t", "loss/text_pairs/t"} <= state.trainable.keys()
