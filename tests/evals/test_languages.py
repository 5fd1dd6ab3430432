"""Class names in several languages: each on the images of its classes, as a loop finds."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from helpers.shipped import load
from test_evals import Tiny, embed_image, embed_text, make, make_params, numpy_zeroshot, tokenise

from bigalign.config import originals, resolve_config
from bigalign.evals import embed
from bigalign.evals.zeroshot import fill
from bigalign.run import copies

MESHES = [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)]
SETS = dict(
  en=[[*range(6)], [*Tiny.classnames]],
  de=[[4, 0, 1, 2, 3], ["Aal", "Ameise", "Biene", "Katze", "Hund"]],
  fr=[[1, 3], ["abeille", "chien"]],
)


@pytest.fixture
def tiny(monkeypatch):
  source = Tiny()
  monkeypatch.setattr(embed, "open_source", lambda spec, captions=None, frames=False: source)
  return source


def written(folder, sets=SETS):
  """{language: file}: the English names one a line, the others with their labels."""
  files = {}
  for language, (labels, names) in sets.items():
    file = folder / f"{language}.{'txt' if language == 'en' else 'json'}"
    file.write_text("\n".join(names) if language == "en" else json.dumps([labels, names]))
    files[language] = str(file)
  return files


def expected(tiny, params, templates, sets=SETS):
  found = {}
  for language, (labels, names) in sets.items():
    own = templates[language]
    prompts = [fill(template, name) for name in names for template in own]
    z = np.asarray(embed_text(params, *tokenise(prompts)))
    weights = z.reshape(len(names), len(own), -1).mean(1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    rows = [i for i in range(37) if i not in tiny.broken and tiny.labels[i] in labels]
    numbers = np.array([labels.index(tiny.labels[i]) for i in rows])
    values = numpy_zeroshot(np.asarray(embed_image(params, tiny.images[rows])), numbers, weights)
    if len(names) < 5:
      del values["top5"]
    values["num_classes"] = len(names)
    if empty := len(names) - len({*numbers.tolist()}):
      values["num_empty_classes"] = empty
    found |= {f"{language}-{name}": x for name, x in values.items()}
  for name in ("top1", "mean_per_class_recall", "macro_f1"):
    found[f"mean_{name}"] = np.mean([found[f"{language}-{name}"] for language in sets])
  return found | dict(num_languages=len(sets), num_samples=36, rejected=1)


@pytest.mark.parametrize("axes", MESHES)
def test_each_language_is_measured_on_its_classes(tiny, tmp_path, axes, caplog):
  params = make_params(1)
  templates = dict(en=["a {}", "{c}s"], de=["ein {}"], fr=["un {}", "le {}", "la {}"])
  options = dict(type="zeroshot", source="tiny", batch_size=10)
  found = make("x", options | dict(classnames=written(tmp_path), templates=templates), **axes)
  wanted = expected(tiny, params, templates)
  start = "val/x-zeroshot-val-"
  assert found(params) == pytest.approx({start + k: x for k, x in wanted.items()}, abs=1e-6)
  assert wanted["fr-num_samples"] < wanted["de-num_samples"] == 36
  (tmp_path / "all.json").write_text(json.dumps(SETS))
  one_file = options | dict(classnames=f"{tmp_path}/all.json", templates=["a {}"])
  found = make("x", one_file, **axes)(params)
  wanted = expected(tiny, params, {language: ["a {}"] for language in SETS})
  assert found == pytest.approx({start + k: x for k, x in wanted.items()}, abs=1e-6)


def test_languages_that_cannot_be_measured_are_named(tiny, tmp_path):
  def fails(message, sets=None, **options):
    if sets is not None:
      (tmp_path / "all.json").write_text(json.dumps(sets))
      options["classnames"] = f"{tmp_path}/all.json"
    with pytest.raises(ValueError, match=message):
      make("x", dict(type="zeroshot", source="tiny", **options))(make_params())

  where = r"x\.classnames='.*all\.json'"
  fails(f"{where} names no language", {})
  fails(f"{where}: 'de' must hold a list of class names", dict(de={"0": "Hund"}))
  fails(f"{where}: 'de': 1 of 2 class names are blank, the first at 1", dict(de=["a", " "]))
  fails("there are 2 labels, 1 of them different, and 2 names", dict(de=[[1, 1], ["a", "b"]]))
  fails("there are 1 labels, 1 of them different, and 2 names", dict(de=[[1], ["a", "b"]]))
  fails("the classes that \\['de'\\] names have no image", SETS | dict(de=[[5, 9], ["a", "b"]]))
  fails(r"[1-9]\d* of 36 samples have no label, or one that no language names", dict(fr=SETS["fr"]))
  fails("x.ood goes with class names in one language only", SETS, ood="tiny")
  fails("x.widths goes with class names in one language only", SETS, widths=(4,))
  fails("x.renormalise goes with class names in one language only", SETS, renormalise=True)
  fails("x.pad_descriptions goes with .* one language only", SETS, pad_descriptions=False)
  fails(r"templates has none for 1 languages, \['de'\]", SETS, templates=dict(en="name", fr="name"))
  fails("templates has languages, but", templates=dict(en="name"))
  with pytest.raises(FileNotFoundError, match=r"x\.classnames\.de='none\.txt'"):
    make("x", dict(type="zeroshot", source="tiny", classnames=dict(de="none.txt")))


def test_files_of_languages_travel_with_the_run(tmp_path):
  config = load("tiny")
  files = written(tmp_path)
  (tmp_path / "de.txt").write_text("ein {c}\n")
  templates = dict(en="name", de=f"{tmp_path}/de.txt", fr=["un {}"])
  config.evals = dict(x=dict(type="zeroshot", source="a", classnames=files, templates=templates))
  options = resolve_config(config)
  read = copies.read(originals(options))
  copies.write(read, tmp_path / "run")
  given = dict(evals=dict(x=dict(classnames=files, templates=templates)))
  used = copies.used(given, read.record, tmp_path / "run")["evals"]["x"]
  for language, file in used["classnames"].items():
    assert file.startswith(f"{tmp_path}/run/copies/classnames.{language}-")
  assert used["templates"] == templates | dict(de=used["templates"]["de"])
  assert used["templates"]["de"].startswith(f"{tmp_path}/run/copies/templates.de-")
