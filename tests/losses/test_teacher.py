"""config.teacher: a frozen tower of another checkpoint, and what token_distill makes of it."""

from __future__ import annotations

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_heads
from helpers import small_checkpoints
from helpers.small_runs import config
from PIL import Image

from bigalign import reading, tree
from bigalign.config import resolve_config
from bigalign.evaluate import open_run
from bigalign.export import main as exporter
from bigalign.losses.heads import masks
from bigalign.model import PIXELS, TeacherOptions, make_model
from bigalign.options import resolve
from bigalign.program import first_state, init_params, make_program
from bigalign.run.metrics import read_metrics
from bigalign.towers import TOWERS
from bigalign.train import train

TOWER = dict(name="vit", patch=4, width=24, depth=1, heads=2, pool="cls", dtype="float32")
TEACHER = dict(image=TOWER, embed_dim=32, pixels="clip")
EVA = dict(teacher="frozen", mask="blocks")
UTA = dict(teacher="frozen", hidden_by="drop", mask="kept_blocks", space="embeddings")


def images(size=32, count=3, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, 255, (count, size, size, 3)), jnp.uint8)


def program_of(own, teacher=TEACHER, **changes):
  """The program of a small config with token_distill."""
  c = config({}, **{"ema": 0.0, "model.embed_dim": 32, **changes})
  with c.unlocked():
    c.loss = dict(siglip={}, token_distill=own)
    c.teacher = teacher
  return make_program(resolve_config(c))


@pytest.fixture(scope="module")
def drawn():
  """A teacher with random parameters, whose patches are 4 x 4."""
  options = resolve(TeacherOptions, TEACHER, "config.teacher")
  teacher = options.build(4)
  return teacher, teacher.init(jax.random.key(0), images(), 4, method="initialise")


@pytest.mark.slow
def test_each_tower_normalises_with_its_own_numbers(drawn):
  """The teacher's tokens are those of a model of its own with the teacher's pixels."""
  teacher, variables = drawn
  alone = dict(
    image=TOWER, text=dict(name="text", vocab_size=9, length=4, width=8, depth=1, heads=1)
  )
  found = teacher.apply(variables, images(16), 4)
  for pixels, is_equal in (("clip", True), ("half", False), ("imagenet", False)):
    model = make_model(**alone, embed_dim=32, pixels=pixels)
    output = model.apply(variables, images(16), method="image_output")
    assert np.array_equal(output.tokens, found) == is_equal


def test_a_teacher_sees_the_crop_of_the_model_at_its_own_size(drawn):
  teacher, variables = drawn
  assert teacher.size(4) == 16 and teacher.clone(image_size=20).size(4) == 20
  large = np.asarray(images(32))
  shrunk = np.zeros((3, 16, 16, 3), np.float32)  # as Pillow shrinks them, without rounding
  for i, c in np.ndindex(3, 3):
    channel = Image.fromarray(large[i, ..., c].astype(np.float32))
    shrunk[i, ..., c] = channel.resize((16, 16), Image.Resampling.BICUBIC)
  tower = {"params": variables["params"]["image_tower"]}
  mean, std = (255 * np.asarray(x, np.float32) for x in PIXELS["clip"])
  wanted = teacher.image_tower.apply(tower, (np.clip(shrunk, 0, 255) - mean) / std).tokens
  np.testing.assert_allclose(teacher.apply(variables, jnp.asarray(large), 4), wanted, atol=1e-4)


def test_a_frozen_teacher_is_neither_trained_nor_averaged():
  program = program_of(EVA, ema=0.9, twin=dict(decay=0.9))
  state = jax.eval_shape(functools.partial(first_state, program), program.params)
  paths = {path for path in program.params if path.startswith("teacher/")}
  assert paths and paths == program.fixed == {*state.frozen}
  assert not paths & ({*state.trainable} | {*state.ema} | {*state.twin})
  size = sum(x.size for x in state.trainable.values())
  assert sum(x.size for x in jax.tree.leaves(state.opt)) < 2.1 * size


def arguments(program, params):
  """Those of reading.apply after the loss, the batch with its draws as the fifth."""
  batch = {"image": images(), "text": jnp.ones((3, 48), jnp.int32)}
  batch["text_mask"] = jnp.ones_like(batch["text"], bool)
  variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
  feats = program.model.apply(variables, *batch.values())
  batch |= reading.draws(program.loss, jax.random.key(1), batch, program.sizes)
  return program.model, params, params, feats, batch, program.sizes, {"token_distill": {}}


@pytest.mark.slow
@pytest.mark.parametrize("own", [EVA, UTA], ids=["EVA", "UTA"])
def test_losses_of_a_teacher_in_numpy(own):
  """The mean of 1 - cosine over the hidden, and over the kept places."""
  program = program_of(own)
  params = init_params(program, jax.random.key(0))
  given = arguments(program, params)
  batch = given[4]
  read = functools.partial(reading.apply, program.loss, *given)
  found = read(teacher=program.teacher)
  with pytest.raises(ValueError, match=r"set config\.teacher=dict\(init=FOLDER\)"):
    read()

  def cosines(x, y):
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)

  variables = {"params": tree.unflatten(tree.subtree(params, "model/"))}
  apply = functools.partial(program.model.apply, variables)
  theirs = {"params": tree.unflatten(tree.subtree(params, "teacher/"))}
  target = np.asarray(program.teacher.apply(theirs, batch["image"], 4, projected=own is UTA))
  heads = tree.subtree(params, "heads/token_distill/")
  if own is EVA:
    places = batch["token_distill/hidden"]
    hidden = (places, heads["vector"])
    tokens = apply(batch["image"], hidden, method="image_output").tokens
    kernel, bias = (np.asarray(heads[f"out/{x}"]) for x in ("kernel", "bias"))
    each = cosines(np.asarray(tokens) @ kernel + bias, target)
    wanted = np.where(places, 1 - each, 0).sum(1)
    assert np.array_equal(found["token_distill/count"], [6, 6, 6])  # 0.4 of 16
  else:
    assert not heads  # nothing between the two spaces
    at = np.asarray(batch["token_distill/kept"])
    tokens = apply(batch["image"], None, at, method="image_output").tokens
    assert tokens.shape[1] == 8
    projected = tokens @ params["model/image_projector/out/kernel"]
    wanted = (1 - cosines(projected, np.take_along_axis(target, at[..., None], 1))).sum(1)
    assert np.array_equal(found["token_distill/count"], [8, 8, 8])
  np.testing.assert_allclose(found["token_distill/sum"], wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("hidden_by", ["vector", "drop"])
def test_a_student_that_is_its_teacher_has_no_loss_where_it_sees_all(hidden_by):
  """Nothing is hidden where the share rounds to no patch."""
  same = dict(TOWER, patch=8, width=32, heads=8)
  own = dict(UTA, hidden_by=hidden_by, mask="uniform", ratio=0.5 if hidden_by == "vector" else 0.01)
  changes = {"model.image": same, "model.pixels": "clip"}
  program = program_of(own, dict(TEACHER, image=same), **changes)
  params = dict(init_params(program, jax.random.key(0)))
  for path in [path for path in params if path.startswith("teacher/")]:
    params[path] = params[path.replace("teacher/", "model/")]
  found = reading.apply(program.loss, *arguments(program, params), program.teacher)
  if hidden_by == "drop":
    np.testing.assert_allclose(found["token_distill/sum"], 0, atol=1e-5)
  else:  # half of the patches are hidden from the student
    assert (np.asarray(found["token_distill/sum"]) > 0.01).all()


@pytest.mark.slow
def test_patches_that_are_left_out_are_not_seen():
  tower = TOWERS["vit"](**{k: x for k, x in TOWER.items() if k != "name"}).build()
  pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
  variables = tower.init(jax.random.key(0), pixels)
  kept = jnp.asarray([[1, 2, 7, 12], [0, 5, 6, 15]])
  found = tower.apply(variables, pixels, kept=kept)
  assert found.tokens.shape == (2, 4, 24)
  visible = np.zeros((2, 16), bool)
  np.put_along_axis(visible, np.asarray(kept), True, 1)
  visible = visible.reshape(2, 4, 4).repeat(4, 1).repeat(4, 2)[..., None]
  other = tower.apply(variables, jnp.where(visible, pixels, 9.0), kept=kept)
  np.testing.assert_array_equal(found.tokens, other.tokens)
  np.testing.assert_array_equal(found.pooled, other.pooled)
  assert np.abs(tower.apply(variables, pixels).pooled - found.pooled).max() > 1e-4
  every = jnp.tile(jnp.arange(16)[None], (2, 1))
  whole = tower.apply(variables, pixels)
  np.testing.assert_array_equal(tower.apply(variables, pixels, kept=every).tokens, whole.tokens)
  rope = TOWERS["vit"](patch=4, width=24, depth=1, heads=2, positions="rope", pool="mean").build()
  with pytest.raises(ValueError, match=r"positions='rope': a loss leaves patches out"):
    rope.init(jax.random.key(0), pixels, kept=kept)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.75])
def test_blocks_hide_as_many_patches_in_each_image_side_by_side(ratio):
  rows, cols, batch = 14, 12, 512
  hidden = np.asarray(masks.blocks(jax.random.key(0), batch, (rows, cols), ratio))
  uniform = np.asarray(masks.uniform(jax.random.key(0), batch, rows * cols, ratio))
  assert (hidden.sum(1) == round(ratio * rows * cols)).all()

  def neighbours(x):
    """The share of neighbouring patches of which both are hidden or both are seen."""
    x = x.reshape(batch, rows, cols)
    return np.mean(x[:, 1:] == x[:, :-1]) / 2 + np.mean(x[:, :, 1:] == x[:, :, :-1]) / 2

  assert 1 - neighbours(hidden) < 0.6 * (1 - neighbours(uniform))
  assert len({x.tobytes() for x in hidden}) > 0.95 * batch
  assert hidden.any(0).all()  # no place is always seen


@pytest.mark.parametrize(
  "own, teacher, changes, message",
  [
    (dict(teacher="frozen"), None, {}, r"set config\.teacher=dict\(init=FOLDER\)"),
    ({}, TEACHER, {"twin": dict(decay=1.0)}, r"config\.teacher is read by no loss"),
    (EVA, dict(TEACHER, image_size=32), {}, "makes 64 tokens of an image, and the model has 16"),
    (UTA, dict(TEACHER, embed_dim=0), {}, r"config\.teacher, which has no projector"),
    (UTA, dict(TEACHER, embed_dim=8), {}, "are 32 wide, those of the teacher 8"),
    (
      dict(hidden_from="teacher", hidden_by="drop"),
      None,
      {},
      r"hidden_by='drop'.* are options of hidden_from='student'",
    ),
    (EVA, dict(TEACHER, pixels="clap"), {}, r"config\.teacher\.pixels"),
  ],
)
def test_what_does_not_fit_is_named(own, teacher, changes, message):
  with pytest.raises(ValueError, match=message):
    program_of(own, teacher, **changes)


def test_a_teacher_needs_a_checkpoint(tmp_path):
  c = config({}, total_steps=1, batch_size=16)
  with c.unlocked():
    c.teacher = TEACHER
    c.loss = dict(token_distill=EVA)
  with pytest.raises(ValueError, match=r"config\.teacher\.init is missing"):
    train(c, tmp_path / "run")


def test_the_frozen_pattern_of_the_config_still_needs_a_path():
  with pytest.raises(ValueError, match=r"config\.frozen: 'nothing' matches no path"):
    program_of(EVA, frozen="nothing")


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_to_the_bit_without_its_files(tmp_path):
  """It is saved once, learns nothing, lowers the loss, and is in no export."""
  keys = small_checkpoints.clip_keys()
  folder = small_checkpoints.folder(tmp_path / "clip", small_checkpoints.CLIP, keys)

  def run(where, steps):
    c = config({}, total_steps=steps, batch_size=16, checkpoint_every=4)
    c.optimizer.lr, c.optimizer.schedule = 3e-3, "constant"
    with c.unlocked():
      c.teacher = dict(init=str(folder), image=dict(dtype="float32"))
      c.loss = dict(siglip=dict(weight=0.1), token_distill=EVA)
    return train(c, where)

  whole = run(tmp_path / "whole", 8)
  rows = read_metrics(tmp_path / "whole")
  assert rows[-1]["train/token_distill/loss"] < 0.9 * rows[0]["train/token_distill/loss"]
  positions = whole.frozen["teacher/image_tower/positions"]
  theirs = keys["vision_model.embeddings.position_embedding.weight"]
  np.testing.assert_array_equal(positions[0], theirs[1:])
  steps = sorted((tmp_path / "whole/checkpoints").glob("[0-9]*"))
  assert steps and not any((step / "frozen").exists() for step in steps)
  assert (tmp_path / "whole/frozen").exists()
  # The run of the config, cut at step 4, goes on where its teacher is not to be had.
  shutil.copytree(tmp_path / "whole", tmp_path / "part")
  shutil.rmtree(tmp_path / "part/checkpoints/8")
  shutil.rmtree(folder)
  again = run(tmp_path / "part", 8)
  for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(one, other)
  opened = open_run(str(tmp_path / "whole"))
  trained = exporter.trained_model(opened)
  assert not any(path.startswith("teacher/") for path in trained.arrays)
  assert {path.split("/")[0] for path in trained.arrays if "/" in path} == {
    f"{side}_{part}" for side in ("image", "text") for part in ("tower", "projector")
  }


@pytest.mark.slow
def test_equal_over_the_mesh_in_microbatches(monkeypatch):
  case = (UTA | dict(space="tokens"), dict(teacher=TEACHER))
  monkeypatch.setitem(test_heads.CASES, "token_distill", case)
  step = test_heads.step.__wrapped__  # without the results of the other case
  gradients, _, scalars, _ = step("token_distill")
  assert any(np.abs(x).max() > 0 for k, x in gradients.items() if k.startswith("heads/"))
  again = step("token_distill", microbatches=2, remat="full", mesh=(2, 2, 2))
  test_heads.same(again[0], gradients)
  for key, x in scalars.items():
    np.testing.assert_allclose(again[2][key], x, rtol=5e-5, atol=1e-9, err_msg=key)
