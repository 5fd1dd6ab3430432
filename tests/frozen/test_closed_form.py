"""Maps in closed form as runs: what `bigalign compare` fitted, evaluated and exported."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers import small_checkpoints
from helpers.shipped import load
from helpers.small_checkpoints import CLIP, clip_keys
from helpers.small_shards import picture, write_tar
from helpers.small_stores import write_store

from bigalign.evaluate import open_run
from bigalign.export import main as export
from bigalign.frozen import alignment, compare
from bigalign.frozen.closed_form import linear
from bigalign.frozen.embed import embed
from bigalign.suites import main as program

COUNT, IMAGE, TEXT = 400, 12, 9


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
  """Two stores that share four directions, and a config of them."""
  folder, draws = tmp_path_factory.mktemp("closed"), np.random.default_rng(0)
  shared = draws.normal(size=(COUNT, 4))

  def noisy(width):
    rows = shared @ draws.normal(size=(4, width)) + 0.3 * draws.normal(size=(COUNT, width)) + 1
    return {f"{i}": x for i, x in enumerate(rows)}

  image = write_store(folder / "image", noisy(IMAGE))
  text = write_store(folder / "text", {key: x[None] for key, x in noisy(TEXT).items()})
  c = load("tiny").to_dict() | dict(evals={})
  c["model"] = dict(
    image=dict(name="features", width=IMAGE),
    text=dict(name="features", width=TEXT),
    embed_dim=4,
  )
  (folder / "config.py").write_text(f"def get_config():\n  return {c!r}\n")
  return folder, image, text


@pytest.mark.slow
@pytest.mark.parametrize("name", compare.MAPS[1:])
def test_the_projectors_of_the_run_are_the_map(fitted, name, tmp_path):
  folder, image, text = fitted
  words = ["--image", image, "--text", text, "--save", name, "--config", f"{folder}/config.py"]
  (row,) = compare.main([*words, "--workdir", f"{tmp_path}/run"])
  maps: dict = {}
  compare.compare(image, text, fitted=maps)
  run = open_run(tmp_path / "run")
  assert run.step == 0 and run.meta["closed_form"]["map"] == name
  for side, f, width in zip(("image", "text"), maps[name], (IMAGE, TEXT)):
    x = np.random.default_rng(1).normal(size=(8, width)).astype(np.float32)
    kernel, bias = linear(f, width)
    np.testing.assert_allclose(f(x), x @ kernel + bias, atol=1e-9)
    more = () if side == "image" else (np.ones((8, 1), bool),)
    with jax.set_mesh(run.mesh):
      found = run.embed[f"embed_{side}"](run.params, x, *more)
    np.testing.assert_allclose(found, alignment.unit(f(x)), atol=1e-5)
  found = program.main([str(tmp_path / "run"), "--image_store", image, "--text_store", text])
  assert found["val/num_samples"] == COUNT
  assert abs(found["val/text_to_image_R@5"] - row[name][compare.SHOWN]) < 0.35  # of fewer images
  assert found["val/text_to_image_R@5"] > 0.15


@pytest.mark.slow
def test_a_map_of_pretrained_towers_is_evaluated_from_pixels_and_exported(tmp_path):
  clip = str(small_checkpoints.folder(tmp_path / "clip", CLIP, clip_keys()))
  (tmp_path / "words.txt").write_text(" ".join(f"word{i}" for i in range(8)))
  c = load("tiny").to_dict() | dict(evals={})
  c["model"] = {side: dict(init=clip, dtype="float32") for side in ("image", "text")}
  c["model"]["embed_dim"] = 4
  draws, members = np.random.default_rng(0), []
  for i in range(80):
    text = " ".join(f"word{k}" for k in draws.integers(0, 8, 4))
    members += [(f"{i:02}.jpg", picture(i)), (f"{i:02}.txt", text.encode())]
  shard = write_tar(tmp_path / "0.tar", members)
  tokenizer = dict(name="words", vocabulary=str(tmp_path / "words.txt"), length=6)
  c["data"] = dict(source=shard, image_size=16, tokenizer=tokenizer, workers=0)
  (tmp_path / "config.py").write_text(f"def get_config():\n  return {c!r}\n")
  stores = {k: str(x) for k, x in embed(c, tmp_path / "stores", dtype="float32").items()}
  words = ["--image", stores["image"], "--text", stores["text"], "--save", "procrustes"]
  compare.main([*words, "--config", f"{tmp_path}/config.py", "--workdir", f"{tmp_path}/run"])
  run = [f"{tmp_path}/run"]
  pixels = program.main([*run, "--retrieval", shard])
  vectors = ["--image_store", stores["image"], "--text_store", stores["text"]]
  assert program.main([*run, *vectors]) == pytest.approx(pixels, abs=0.03)
  export.main([*run, "--format=torch", f"--out={tmp_path}/torch"])
  export.main(["--check", f"{tmp_path}/torch"])
  c["model"]["text"]["init"] = str(small_checkpoints.folder(tmp_path / "b", CLIP, clip_keys(1)))
  (tmp_path / "config.py").write_text(f"def get_config():\n  return {c!r}\n")
  with pytest.raises(ValueError, match="made another way"):
    compare.main([*words, "--config", f"{tmp_path}/config.py", "--workdir", f"{tmp_path}/other"])


def test_what_cannot_be_saved_is_named(fitted, tmp_path):
  folder, image, text = fitted
  words = ["--image", image, "--text", text, "--save", "ridge"]
  with pytest.raises(SystemExit):
    compare.main(words)
  words += ["--config", f"{folder}/config.py", "--workdir", f"{folder}"]
  with pytest.raises(FileExistsError, match=r"--workdir=.* exists and is not an empty folder"):
    compare.main(words)
  with pytest.raises(SystemExit):
    compare.main(["--image", image, image, *words[2:]])
