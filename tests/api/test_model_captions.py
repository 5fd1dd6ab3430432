"""What bigalign.load(RUN).caption and a report write for images."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from helpers import made_runs

import bigalign
from bigalign import captions
from bigalign.evaluate import open_run
from bigalign.export import check

CAPTION = dict(clip={}, caption=dict(depth=1, heads=2, scan=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run whose parameters are random, so that captions depend on the image."""
  return written(tmp_path_factory.mktemp("runs") / "run", CAPTION)


def written(folder, loss):
  c = made_runs.small(loss=loss)
  c["data"]["tokenizer"]["length"] = c["model"]["text"]["length"] = 12
  return made_runs.write(folder, c, made_runs.random_params(c))


@pytest.fixture(scope="module")
def model(folder):
  return bigalign.load(folder)


@pytest.mark.slow
def test_captions_are_those_of_the_decoder_of_the_run(folder, model, pictures):
  """Greedy and with beams, as in a report, whatever the batch size."""
  run = open_run(folder)
  squares = np.stack([run.config.data.evaluation_view(np.asarray(x)) for x in pictures])
  greedy = model.caption(pictures)
  shown = captions.of_run(run.config, run.params, squares)
  assert greedy == [one.greedy for one in shown]
  assert model.caption(pictures, beams=captions.BEAMS) == [one.beams for one in shown]
  assert len(greedy) == len(pictures) and len({*greedy}) > 1
  captioner = captions.of_config(
    run.config, run.config.model.build(), run.config.data.make_tokenizer()
  )
  for penalty in (0.0, 1.0):
    ids = jax.jit(functools.partial(captioner.ids, beams=3, length_penalty=penalty))
    wanted = captioner.texts(np.asarray(ids(run.params, squares)))
    assert model.caption(pictures, beams=3, length_penalty=penalty, batch_size=8) == wanted
  assert model.caption([]) == []


@pytest.mark.slow
def test_a_model_that_writes_no_captions_says_what_does(folder, model, tmp_path, monkeypatch):
  image = np.zeros((8, 8, 3), np.uint8)
  with pytest.raises(ValueError, match="beams=0: at least 1"):
    model.caption([image], beams=0)
  plain = bigalign.load(written(tmp_path / "run", dict(clip={})))
  with pytest.raises(ValueError, match=r"config\.loss=\['clip'\] has no term that writes captions"):
    plain.caption([image])
  monkeypatch.setattr(check, "missing", lambda kind: ["torch"])
  bigalign.export(folder, tmp_path / "out", "torch")
  with pytest.raises(ValueError, match="writes no captions: load the run itself"):
    bigalign.load(tmp_path / "out").caption([image])
