"""WinoGAViL's Jaccard index is scikit-learn's, over files in the published form."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import jaccard_score
from test_evals import SIZE, E, embed_image, embed_text, make, make_params, tokenise

from bigalign.evals.associations import jaccard, prompt
from bigalign.suites.suite import read_suite

NAMES = [f"thing{i}" for i in range(20)]
OPTIONS = dict(type="associations", batch_size=10)


@pytest.fixture
def folder(tmp_path):
  """A .csv with the cues of 5 to 12 images, and a folder of images."""
  rng = np.random.default_rng(0)
  (tmp_path / "some_images").mkdir()
  for name in NAMES:
    pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"some_images/{name}.png")
  records = []
  for i, count in enumerate((5, 6, 10, 12, 7, 5, 12)):
    candidates = rng.permutation(NAMES)[:count].tolist()
    records.append((["Owl", "moon", "pie"][i % 3], candidates, candidates[1 : 3 + i % 2]))
  write(tmp_path / "cues.csv", records)
  return tmp_path, records


def write(path, records):
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["cue", "candidates", "associations"])
    writer.writerows([cue, json.dumps(names), json.dumps(own)] for cue, names, own in records)


def expected(folder, records):
  params, found, counts = make_params(), [], []
  for cue, names, own in records:
    images = np.stack([np.asarray(Image.open(folder / f"some_images/{n}.png")) for n in names])
    z = np.asarray(embed_image(params, images))
    text = np.asarray(embed_text(params, *tokenise([f"A{'n' * (cue == 'Owl')} {cue.lower()}"])))[0]
    best = np.argsort(-(z @ text), kind="stable")[: len(own)]
    found.append(jaccard_score(np.isin(names, own), np.isin(np.arange(len(names)), best)))
    counts.append(len(names))
  found, counts = np.array(found), np.array(counts)
  values = {"": found, "_5-6": found[counts <= 6], "_10-12": found[counts >= 10]}
  return {f"jaccard{kind}": some.mean() for kind, some in values.items() if len(some)}


@pytest.mark.parametrize("axes", [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)])
def test_the_jaccard_index_equals_scikit_learn(folder, axes):
  path, records = folder
  options = OPTIONS | dict(file=f"{path}/cues.csv", images=f"{path}/some_images")
  found = make("w", options, **axes)(make_params())
  wanted = expected(path, records) | dict(num_samples=7)
  assert found == pytest.approx({f"val/w-associations-{k}": x for k, x in wanted.items()}, abs=1e-6)


def test_a_suite_finds_the_file_and_the_images(folder):
  path, _ = folder
  (path / "s.toml").write_text(f'[w]\ntype = "associations"\ndataset = "{path}"\n')
  (task,) = read_suite(f"{path}/s.toml")
  assert task.evaluator.option("file") == f"{path}/cues.csv"
  assert task.evaluator.option("images") == f"{path}/some_images"


def test_a_cue_with_an_image_that_is_broken_or_missing_is_counted(folder, caplog):
  path, records = folder
  (path / f"some_images/{records[0][1][0]}.png").write_bytes(b"no image")
  (path / f"some_images/{records[3][1][2]}.png").unlink()
  lost = {records[0][1][0], records[3][1][2]}
  left = [record for record in records if not lost & {*record[1]}]
  found = make("w", OPTIONS | dict(file=f"{path}/cues.csv", images=f"{path}/some_images"))(
    make_params()
  )
  wanted = expected(path, left) | dict(num_samples=len(left), rejected=7 - len(left))
  assert found == pytest.approx({f"val/w-associations-{k}": x for k, x in wanted.items()}, abs=1e-6)
  assert "leaves out rejected samples" in caplog.text


def test_ties_go_to_the_earlier_image_and_nan_is_never_found():
  chosen = np.array([True, False, True])
  assert jaccard(np.ones(3), chosen) == 1 / 3
  assert jaccard(np.array([1, np.nan, np.nan]), chosen) == 1 / 2
  assert jaccard(np.full(3, np.nan), chosen) == 0
  assert prompt("ice") == "An ice" and prompt("Zoo") == "A zoo"


def test_files_of_another_form_are_refused(folder):
  path, records = folder

  def fails(message, records, error=ValueError):
    write(path / "bad.csv", records)
    with pytest.raises(error, match=message):
      make("w", OPTIONS | dict(file=f"{path}/bad.csv", images=f"{path}/some_images"))(make_params())

  cue, names, own = records[0]
  fails("holds no list of records", [])
  fails(r"record 2: \['cue'\] are missing", [records[0], ("", names, own)])
  fails("must be among its candidates", [(cue, names, ["else"])])
  fails("must be among its candidates", [(cue, [*names, names[0]], own)])
  (path / "bad.json").write_text('[{"cue": "a", "candidates": "a, b", "associations": ["a"]}]')
  with pytest.raises(ValueError, match="'a, b' is no list of names"):
    make("w", OPTIONS | dict(file=f"{path}/bad.json"))
  with pytest.raises(FileNotFoundError, match=r"w\.file='none\.csv'"):
    make("w", OPTIONS | dict(file="none.csv"))
  nan = (lambda p, x: np.full((len(x), E), np.nan), embed_text)
  options = OPTIONS | dict(file=f"{path}/cues.csv", images=f"{path}/some_images")
  assert make("w", options, towers=nan)(make_params())["val/w-associations-jaccard"] == 0
