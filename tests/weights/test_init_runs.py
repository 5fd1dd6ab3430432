"""Runs that begin from a run: its parameters, averages, parts, one tower, other losses."""

from __future__ import annotations

import pathlib
import re

import jax
import numpy as np
import pytest
from helpers import made_runs
from helpers.made_runs import random_params, small, write
from helpers.shipped import load
from helpers.small_shards import samples, write_tar

from bigalign import sharding
from bigalign.config import resolve_and_compare, resolve_config
from bigalign.program import init_on_mesh, layout, make_program
from bigalign.run.workdir import Workdir
from bigalign.train import setup, train
from bigalign.weights import init


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """(the folder of a run, its parameters, a later checkpoint's, that one's averages)."""
  folder = tmp_path_factory.mktemp("runs") / "x"
  arrays, later, averages = (random_params(small(), seed) for seed in range(3))
  address = write(folder, small(), arrays)
  made_runs.add(folder, 5, later, ema=averages)
  return address, arrays, later, averages


def phase(model, **changes):
  """A config whose model is written so, in plain values."""
  return small(**changes) | dict(model=model)


def loaded(values):
  """{path: array} that come from checkpoints, on a mesh of eight devices."""
  program = make_program(resolve_config(values), dataset_size=100)
  shapes, shardings = layout(program, sharding.make_mesh(fsdp=2))
  every = [{**x.trainable, **x.frozen} for x in (shapes, shardings)]
  return {k: np.asarray(x) for k, x in init.load(values, *every).items()}


def same(found, wanted):
  assert found.keys() == wanted.keys()
  for path, x in wanted.items():
    np.testing.assert_array_equal(found[path], x, err_msg=path)


def test_a_phase_begins_with_the_bits_of_the_newest_checkpoint(first, caplog):
  """Of a run that is training: another process holds the lock of its folder."""
  address, _, later, _ = first
  caplog.set_level("INFO", logger="absl")
  with Workdir(address).locked():
    same(loaded(phase(dict(init=address))), later)
  assert f"loaded 58 of 59 tensors from {address} (run at step 5)" in re.sub(
    r"\d+ of \d+", "58 of 59", caplog.text
  )
  assert "No parameters were initialised at random" in caplog.text


def test_of_an_older_checkpoint_or_of_averages(first):
  address, arrays, _, averages = first
  same(loaded(phase(dict(init=address, step=3))), arrays)
  same(loaded(phase(dict(init=address, ema=True))), averages)
  with pytest.raises(ValueError, match=r"checkpoints/3 has no 'ema': its run keeps no averages"):
    loaded(phase(dict(init=address, step=3, ema=True)))
  with pytest.raises(FileNotFoundError, match=r"no checkpoint 4 in .*there are \[3, 5\]"):
    loaded(phase(dict(init=address, step=4)))


def test_options_and_view_are_those_of_the_run(first):
  address, *_ = first
  values = phase(dict(init=address, text=dict(dropout=0.25)))
  values["data"] = dict(source="glyphs", image_size=64)
  config, differences = resolve_and_compare(values)
  was = resolve_config(small())
  assert config.model.image == was.model.image and config.model.text.dropout == 0.25
  assert config.data.tokenizer == was.data.tokenizer and config.data.resize == was.data.resize
  assert len(differences) == 1 and "config.data.image_size is 64" in differences[0]
  values["data"] |= dict(image_size=32, tokenizer=dict(length=12))
  config, differences = resolve_and_compare(values)
  assert config.data.text_length == 12 and config.data.tokenizer.name == was.data.tokenizer.name
  assert len(differences) == 1 and "tokenizer.length is 12, but the run" in differences[0]


def test_layers_may_be_stacked_now_and_positions_of_another_grid(first):
  address, _, later, _ = first
  tower = dict(scan=True)
  found = loaded(phase(dict(init=address, image=tower, text=tower)))
  for path, x in found.items():
    parts = [path.replace("/blocks/", f"/block_{i}/") for i in range(2)]
    wanted = np.stack([later[k] for k in parts]) if "/blocks/" in path else later[path]
    np.testing.assert_array_equal(x, wanted, err_msg=path)
  values = phase(dict(init=address))
  values["data"]["image_size"] = 64
  found, path = loaded(values), "model/image_tower/positions"
  assert found[path].shape[1] == 4 * later[path].shape[1]
  same({k: x for k, x in found.items() if k != path}, {k: x for k, x in later.items() if k != path})


def test_parts_and_one_tower(first):
  address, _, later, _ = first
  image = {k: x for k, x in later.items() if k.startswith("model/image_tower/")}
  same(loaded(phase(dict(init=address, parts="image_tower/"))), image)
  both = {**image, "loss/clip/t": later["loss/clip/t"]}
  same(loaded(phase(dict(init=address, parts="image_tower/|loss/"))), both)
  alone = dict(image=dict(init=address), text=small()["model"]["text"], embed_dim=8)
  same(loaded(phase(alone)), image)
  with pytest.raises(ValueError, match=r"'nothing' matches no path"):
    loaded(phase(dict(init=address, parts="nothing")))


@pytest.mark.slow
def test_scalars_that_both_losses_have_are_taken(first, caplog):
  """The log of the scale of a softmax for a sigmoid; the bias begins at its initial value."""
  address, _, later, _ = first
  caplog.set_level("INFO", logger="absl")
  found = loaded(phase(dict(init=address), loss=dict(siglip={})))
  assert {k for k in found if k.startswith("loss/")} == {"loss/siglip/t"}
  np.testing.assert_array_equal(found["loss/siglip/t"], later["loss/clip/t"])
  assert "Initialised at random with config.seed: loss/siglip/b" in caplog.text
  t_init = resolve_config(small()).loss["clip"].option("t_init")
  assert "loss/clip/t" in loaded(phase(dict(init=address), loss=dict(clip=dict(t_init=t_init))))
  other = dict(clip=dict(t_init=t_init / 2))
  assert "loss/clip/t" not in loaded(phase(dict(init=address), loss=other))


@pytest.mark.slow
def test_the_layers_of_a_head_that_both_have_are_taken(tmp_path, caplog):
  """Another run may leave them out, or begin with new ones, which the log names."""
  caplog.set_level("INFO", logger="absl")
  loss = dict(clip={}, mask_regularization={})
  values = small(loss=loss)
  arrays = random_params(values)
  address = write(tmp_path / "x", values, arrays)
  assert "heads/mask_regularization/vector" in arrays
  same(loaded(phase(dict(init=address), loss=loss)), arrays)
  rest = {k: x for k, x in arrays.items() if not k.startswith("heads/")}
  same(loaded(phase(dict(init=address))), rest)
  caplog.clear()
  same(loaded(phase(dict(init=write(tmp_path / "y", small(), rest)), loss=loss)), rest)
  assert "at random with config.seed: heads/mask_regularization" in caplog.text


@pytest.mark.slow
def test_what_no_stage_trained_is_read_too(tmp_path):
  """Frozen parameters are stored once per run, in the dtype of their tower."""
  arrays, folder = random_params(small()), tmp_path / "x"
  address = write(folder, small(), arrays)
  fixed = [k for k in arrays if k.startswith("model/image_tower/")]
  made_runs.add(folder, 4, arrays, fixed=fixed)
  same(loaded(phase(dict(init=address))), arrays)


def test_a_step_of_files_that_are_not_a_run_is_an_error(tmp_path):
  (tmp_path / "model.npz").touch()
  with pytest.raises(
    ValueError, match=r"config.model.step=5: .*model.npz is not a run of bigalign"
  ):
    resolve_config(phase(dict(init=str(tmp_path / "model.npz"), step=5)))


@pytest.mark.slow
def test_the_optimizer_is_fresh_and_the_run_resumes_without_its_source(first, tmp_path):
  address, _, later, _ = first
  c = phase(dict(init=address), total_steps=2, checkpoint_every=1, keep=dict(last=9), frozen="text")
  run = setup(c, Workdir(tmp_path / "y"))
  same({k: np.asarray(x) for k, x in {**run.state.trainable, **run.state.frozen}.items()}, later)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(run.state.opt))
  run.checkpoints.close()
  train(c, tmp_path / "y")
  gone = pathlib.Path(address).rename(tmp_path / "gone")
  try:
    resumed = setup(c, Workdir(tmp_path / "y"))
    assert resumed.resumed_from == 2
    resumed.checkpoints.close()
  finally:
    gone.rename(address)


def test_a_new_run_is_made_of_it_without_random_arrays(first):
  """What is loaded becomes the state's own, on any mesh."""
  address, _, later, _ = first
  values = phase(dict(init=address))
  program = make_program(resolve_config(values), dataset_size=100)
  shapes, shardings = layout(program, sharding.make_mesh(devices=jax.devices()[:1]))
  made = init.load(values, shapes.trainable, shardings.trainable)
  state = init_on_mesh(program, shardings, made)
  same({k: np.asarray(x) for k, x in state.trainable.items()}, later)


@pytest.mark.slow
def test_the_shipped_config_of_a_second_stage(tmp_path, monkeypatch):
  """AltCLIP: towers, projectors and scale come from the run of the first stage."""
  values = small(loss=dict(clip={}))
  values["model"]["text"] = dict(
    name="bert", vocab_size=300, length=12, width=16, depth=1, heads=2, dtype="float32", scan=False
  )
  values["data"]["tokenizer"] = dict(name="byte", length=12)
  arrays = random_params(values)
  monkeypatch.setenv("ALTCLIP_1", write(tmp_path / "first", values, arrays))
  c = load("altclip_2").to_dict()
  for side in ("image", "text"):  # for `bigalign plan`; the run has its own
    del c["model"][side]
  del c["model"]["embed_dim"], c["data"]["tokenizer"]
  c["model"]["pixels"] = values["model"].get("pixels", "half")
  c["data"] |= dict(source=write_tar(tmp_path / "0.tar", samples(0, 12)), image_size=32, workers=0)
  c |= dict(total_steps=1, batch_size=8, writer=dict(tensorboard=False), mesh={})
  c["optimizer"]["warmup"] = 0
  state = train(c, tmp_path / "second")
  towers = {path.split("/")[1] for path in state.frozen}
  assert towers == {"image_tower", "image_projector"}
  same({k: np.asarray(x) for k, x in state.frozen.items()}, {k: arrays[k] for k in state.frozen})
  moved = [k for k, x in state.trainable.items() if not np.array_equal(x, arrays[k])]
  assert len(moved) > len(state.trainable) / 2
