"""Classes that sentences describe: the mean of their embeddings, and what files are refused."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_oracles import cases2, oracles2
from test_evals import Tiny, embed_image, embed_text, make, make_params, tokenise

from bigalign import sharding
from bigalign.evals import embed
from bigalign.evals.embed import Context
from bigalign.evals.zeroshot import description_weights

SENTENCES = dict(
  ant=["small", "six legs", "works"],
  bee=["yellow"],
  cat=["soft", "sleeps a lot"],
  dog=["barks", "runs", "is loyal", "eats"],
  eel=["wet", "long"],
  fox=["red", "sly", "red"],
)


@pytest.mark.parametrize("case", cases2("descriptions"))
def test_scores_of_the_mean_of_descriptions(case):
  """By the embedder of the evaluator, whose texts are the numbers of the given rows.

  One class has fewer sentences; the expected values are the means of the own sentences of a class.
  """
  inputs = oracles2().inputs(case)
  rows = [x[there > 0] for x, there in zip(inputs["desc"], inputs["mask"])]
  with jax.enable_x64(True):
    flat = jnp.asarray(np.concatenate(rows))
    tokenizer = types.SimpleNamespace(
      encode_batch=lambda texts: (
        np.array([[int(text)] for text in texts], np.int32),
        np.ones((len(texts), 1), bool),
      )
    )
    data = types.SimpleNamespace(make_tokenizer=lambda: tokenizer)
    context = Context(
      "val", None, lambda params, ids, mask: flat[ids[:, 0]], sharding.make_mesh(), data
    )
    numbers = iter(range(len(flat)))
    sentences = [[str(next(numbers)) for _ in own] for own in rows]
    plain, unit = (
      np.asarray(
        description_weights(
          context, sentences=sentences, pad=False, renormalise=unit, batch_size=8
        )(None)
      )
      for unit in (False, True)
    )
  got = dict(
    scores_unnormalised=inputs["img"] @ plain.T,
    scores_mean_of_similarity=inputs["img"] @ plain.T,
    scores_normalised=inputs["img"] @ unit.T,
  )
  oracles2().check(case, got, rtol=1e-9, require=tuple(got))


@pytest.fixture
def tiny(monkeypatch):
  source = Tiny()
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: source)
  return source


def written(folder, named):
  (folder / "descriptions.json").write_text(json.dumps(named))
  return str(folder / "descriptions.json")


@pytest.mark.parametrize("axes", [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)])
@pytest.mark.parametrize("renormalise,pad", [(False, True), (True, True), (False, False)])
def test_shorter_lists_repeat_their_first_sentence(tiny, tmp_path, axes, renormalise, pad):
  params = make_params(1)
  file = written(tmp_path, SENTENCES)
  options = dict(type="zeroshot", source="tiny", descriptions=file, batch_size=10)
  options |= dict(renormalise=renormalise, pad_descriptions=pad)
  found = make("animals", options, **axes)(params)
  weights = []
  for name in tiny.classnames:
    own = SENTENCES[name] + SENTENCES[name][:1] * (4 - len(SENTENCES[name])) * pad
    weights.append(np.asarray(embed_text(params, *tokenise(own))).mean(0))
  weights = np.stack(weights)
  if renormalise:
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
  usable = [i for i in range(len(tiny)) if i not in tiny.broken]
  order = np.argsort(-(np.asarray(embed_image(params, tiny.images[usable])) @ weights.T), axis=1)
  kind = "renormalised" if renormalise else "unnormalised"
  hits = order == tiny.labels[usable][:, None]
  prefix = f"val/animals-zeroshot-val-descriptions_{kind}-"
  assert found[f"{prefix}top1"] == pytest.approx(hits[:, 0].mean())
  assert found[f"{prefix}top5"] == pytest.approx(hits[:, :5].mean() * 5)
  assert found[f"{prefix}num_samples"] == 36 and found[f"{prefix}rejected"] == 1


def test_a_class_of_one_sentence_is_that_of_a_template(tiny, tmp_path):
  file = written(tmp_path, {name: [f"a {name}"] for name in tiny.classnames})
  options = dict(type="zeroshot", source="tiny")
  described = make("x", options | dict(descriptions=file))(make_params())
  prompted = make("x", options | dict(templates=["a {c}"]))(make_params())
  middle = "descriptions_unnormalised-"
  assert {name.replace(middle, ""): x for name, x in described.items()} == prompted


@pytest.mark.parametrize(
  ("named", "message"),
  [
    ({"ant": ["x"]}, r"5 of 6 classes \(\['bee', .*have no sentence"),
    (SENTENCES | {"fox": []}, r"1 of 6 classes \(\['fox'\]\) have no sentence"),
    (SENTENCES | {"Fox": ["x"]}, r"1 of 7 classes \(\['Fox'\]\) are no class of the source"),
    (SENTENCES | {"fox": "red"}, r"1 of 6 classes \(\['fox'\]\) have something else than a list"),
    (SENTENCES | {"fox": [" "]}, r"1 of 6 classes \(\['fox'\]\) have something else than a list"),
    ([["x"]], "must hold an object"),
    ({}, "must hold an object"),
  ],
)
def test_descriptions_that_do_not_fit_are_counted_and_named(tiny, tmp_path, named, message):
  options = dict(type="zeroshot", source="tiny", descriptions=written(tmp_path, named))
  with pytest.raises(ValueError, match=rf"config\.evals\.x\.descriptions=.*{message}"):
    make("x", options)


def test_options_that_have_no_effect_are_named(tiny, tmp_path):
  with pytest.raises(ValueError, match=r"renormalise=True has an effect with `descriptions` only"):
    make("x", dict(type="zeroshot", source="tiny", renormalise=True))
  with pytest.raises(ValueError, match=r"pad_descriptions=False has an effect with `descriptions`"):
    make("x", dict(type="zeroshot", source="tiny", pad_descriptions=False))
  options = dict(type="zeroshot", source="tiny", descriptions=written(tmp_path, SENTENCES))
  with pytest.raises(ValueError, match=r"class_store='y' and descriptions=.* both give"):
    make("x", options | dict(class_store="y"))
  (tmp_path / "broken.json").write_text("{")
  with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
    make("x", options | dict(descriptions=f"{tmp_path}/broken.json"))
  with pytest.raises(FileNotFoundError, match=r"descriptions=.*none\.json does not exist"):
    make("x", options | dict(descriptions=f"{tmp_path}/none.json"))
