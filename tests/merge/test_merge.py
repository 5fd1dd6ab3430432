"""Averages of weights: interpolation, soups, sweeps, and the folders that they make."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import small_runs
from helpers.loss_oracles import cases2, oracles2
from helpers.made_runs import random_params, small, write

import bigalign
from bigalign import evaluate
from bigalign.merge import main, members
from bigalign.merge.average import Mean, interpolated
from bigalign.weights import init


def random(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  arrays = {"a/kernel": rng.normal(size=(3, 4)), "ln/scale": rng.normal(size=4), "t": rng.normal()}
  return {k: np.asarray(x, dtype) for k, x in arrays.items()}


def same_bits(a, b):
  assert a.keys() == b.keys()
  for path, x in a.items():
    assert x.dtype == b[path].dtype and x.shape == b[path].shape, path
    assert np.asarray(x).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.parametrize("dtype,rtol", [(np.float64, 1e-9), (np.float32, 1e-4)], ids=["64", "32"])
@pytest.mark.parametrize("case", cases2("merge"))
def test_the_expected_averages(case, dtype, rtol):
  thetas = [{"theta": x.astype(dtype)} for x in oracles2().inputs(case).values()]
  alpha = case["params"].get("alpha")
  if alpha is None:
    mean = Mean()
    for i, theta in enumerate(thetas):
      mean.add(theta, str(i))
    found = mean.arrays()
  else:
    found = interpolated(*thetas, alpha)
  oracles2().check(case, found, rtol=rtol, require=("theta",))
  assert found["theta"].dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_ends_are_the_models_and_a_model_with_itself_is_itself(dtype):
  a, b = random(0, dtype), random(1, dtype)
  a["zero"], b["zero"] = np.asarray(-0.0, dtype), np.asarray(0.0, dtype)
  same_bits(interpolated(a, b, 0.0), a)
  same_bits(interpolated(a, b, 1.0), b)
  for alpha in (0.1, 0.3, 2 / 3):
    same_bits(interpolated(a, a, alpha), a)
  mean = Mean()
  for i in range(7):
    mean.add(a, str(i))
  same_bits(mean.arrays(), a)


def test_every_floating_array_is_averaged():
  a, b = random(0), random(1)
  found = interpolated(a, b, 0.25)
  for path in a:
    wanted = 0.75 * a[path].astype(np.float64) + 0.25 * b[path]
    np.testing.assert_array_equal(found[path], wanted.astype(np.float32), err_msg=path)


@pytest.mark.parametrize(
  "change,told",
  [
    (dict(extra=np.zeros(2, np.float32)), "only Y has extra"),
    (dict(t=None), "only X has t"),
    ({"a/kernel": np.zeros((4, 3), np.float32)}, r"of different shapes are a/kernel \[3, 4\] and"),
    (dict(count=np.int32(4)), "integers, which have no mean, but differ, are count"),
  ],
)
def test_models_that_do_not_fit_are_an_error_by_name(change, told):
  a = random(0) | {"count": np.int32(3)}
  b = {k: x for k, x in {**random(1), "count": np.int32(3), **change}.items() if x is not None}
  with pytest.raises(ValueError, match=f"X and Y cannot be merged: {told}"):
    interpolated(a, b, 0.0, ("X", "Y"))
  assert interpolated(a, random(1) | {"count": np.int32(3)}, 0.5)["count"] == 3


@pytest.mark.parametrize(
  "text,wanted",
  [
    ("0,0.5,1", [0, 0.5, 1]),
    ("0,0.1,...,1", [i / 10 for i in range(11)]),
    ("0.2, 0.4, ..., 0.8", [0.2, 0.4, 0.6, 0.8]),
  ],
)
def test_alphas(text, wanted):
  np.testing.assert_allclose(main.parse_alphas(text), wanted, atol=1e-12)


@pytest.mark.parametrize(
  "text", ["", "a", "0,2", "...", "0,...,1", "0,0.1,0.2,...,1", "1,0,...,0.5"]
)
def test_alphas_that_are_none(text):
  with pytest.raises(ValueError, match=r"write numbers from 0 to 1, such as"):
    main.parse_alphas(text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Three runs of random numbers with a small retrieval; their addresses and parameters."""
  folder = tmp_path_factory.mktemp("runs")
  values = small(evals=small_runs.evals(folder, count=12, batch_size=16))
  arrays = [random_params(values, seed) for seed in range(3)]
  return [write(folder / x, values, a) for x, a in zip("abc", arrays)], arrays


def read(folder):
  return members.on_host(members.opened(str(folder)))


@pytest.mark.slow
def test_the_folder_of_a_merged_model_is_a_run(runs, tmp_path):
  """It is evaluated, loaded, exported, merged again, and begins a run, to the same bits."""
  (a, b, _), (x, y, _) = runs
  for alpha, wanted in ((0.0, x), (1.0, y), (0.5, interpolated(x, y, 0.5))):
    out = tmp_path / f"at {alpha}"
    main.merge(a, b, alpha, out)
    same_bits(read(out), wanted)
  run = evaluate.open_run(out)
  about = run.meta["merged"]
  assert about["alpha"] == 0.5 and [one["run"] for one in about["from"]] == [a, b]
  assert evaluate.evaluate(run)["val/num_samples"] == 12
  model = bigalign.load(out)
  assert model.embed_texts(["a b"]).shape == (1, model.embed_dim)
  values = small() | dict(model=dict(init=str(out)))
  shapes = evaluate.make_programs(evaluate.recorded_config(run.meta))[0].params
  sharding = jax.sharding.NamedSharding(run.mesh, jax.P())
  begun = init.load(values, shapes, dict.fromkeys(shapes, sharding))
  same_bits({k: np.asarray(v) for k, v in begun.items()}, wanted)
  with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
    main.merge(a, b, 0.5, out)


@pytest.mark.slow
def test_a_sweep_is_one_table_and_ends_at_the_models(runs, tmp_path, capsys):
  (a, b, _), _ = runs
  file = tmp_path / "alphas.json"
  main.main([a, b, "--alphas=0,0.5,1", f"--json={file}"])
  shown = capsys.readouterr().out
  written = json.loads(file.read_text())
  assert written["alphas"] == [0, 0.5, 1] and "val/image_to_text_R@1" in shown
  assert [len(x) for x in written["metrics"]] == [len(written["metrics"][0])] * 3
  for address, metrics in ((a, written["metrics"][0]), (b, written["metrics"][2])):
    assert evaluate.evaluate(evaluate.open_run(address)) == metrics


@pytest.mark.slow
def test_soups(runs, tmp_path, capsys):
  """The mean of all; greedy: the mean of those that do not make the metric worse."""
  addresses, arrays = runs
  main.main(["--soup", *addresses, f"--out={tmp_path / 'all'}"])
  mean = Mean()
  for i, x in enumerate(arrays):
    mean.add(x, str(i))
  same_bits(read(tmp_path / "all"), mean.arrays())
  metric = "val/image_to_text_R@5"
  rows = main.greedy_soup(addresses, tmp_path / "greedy", metric=metric)
  assert [x["alone"] for x in rows] == sorted((x["alone"] for x in rows), reverse=True)
  best = rows[0]["alone"]
  assert rows[0]["taken"] and rows[0]["mean"] == best
  for row in rows[1:]:
    assert row["taken"] == (row["mean"] >= best)
    best = max(best, row["mean"])
  found = evaluate.evaluate(evaluate.open_run(tmp_path / "greedy"))
  assert found[metric] == best
  taken = {x["model"] for x in rows if x["taken"]}
  about = evaluate.open_run(tmp_path / "greedy").meta["merged"]
  assert {x["run"] for x in about["from"]} == taken
  with pytest.raises(ValueError, match=r"--metric='val/r1': no such metric"):
    main.greedy_soup(addresses, tmp_path / "other", metric="val/r1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "torch"])
def test_exported_folders_are_merged_too(tmp_path, kind):
  """A folder and its run give the same model: of big_vision's form, a SigLIP."""
  values = small(loss=dict(siglip={}))
  values["model"] |= dict(embed_dim=16, image_projector=dict(name="identity"))
  values["model"]["text_projector"] = dict(name="linear", bias=True)
  for side in ("image", "text"):
    values["model"][side] |= dict(activation="gelu_tanh")
  values["model"]["image"] |= dict(pool="map")
  values["model"]["text"] |= dict(pool="last", mask_padding=False)
  arrays = random_params(values)
  run = write(tmp_path / "run", values, arrays)
  bigalign.export(run, tmp_path / "exported", format=kind)
  main.merge(str(tmp_path / "exported"), run, 0.5, tmp_path / "out")
  same_bits(read(tmp_path / "out"), arrays)


@pytest.mark.slow
def test_models_that_learned_from_texts_alone_keep_their_image_side(tmp_path):
  """The image tower is frozen in such a run, and belongs to the model all the same."""
  values = small(loss=dict(feature_distill=dict(w_img=0.0)), twin=dict(decay=0.9))
  values["data"] = {k: x for k, x in values["data"].items() if k != "augment"} | dict(images=False)
  arrays = random_params(values)
  assert any("image_tower" in path for path in arrays)
  run = write(tmp_path / "run", values, arrays)
  same_bits(read(tmp_path / "run"), arrays)
  main.merge(run, run, 0.5, tmp_path / "out")
  same_bits(read(tmp_path / "out"), arrays)


@pytest.mark.parametrize(
  "words,told",
  [
    (["a", "b"], "--out DIR is missing, or --alphas"),
    (["a", "b", "c", "--out=x"], "3 models: --alpha and --alphas take two"),
    (["a", "b", "--greedy", "--out=x"], "--greedy needs --soup"),
    (["a", "b", "--soup", "--alphas=0,1"], "choose one"),
    (["a", "b", "--alphas=0,1", "--out=x"], "--alphas evaluates"),
  ],
)
def test_flags_that_do_not_go_together(words, told, capsys):
  with pytest.raises(SystemExit) as ended:
    main.main(words)
  assert ended.value.code == 2 and told in capsys.readouterr().err
