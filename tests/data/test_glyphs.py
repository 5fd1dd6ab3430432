"""The glyphs: what is drawn, what is held out, and how the zero-shot figure is computed."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys

import freetype
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from helpers.batches import data_options

from bigalign import sharding
from bigalign.data.sources import glyphs, glyphs_heldout
from bigalign.evals.embed import Context
from bigalign.evals.glyphs import glyphs as evaluate
from bigalign.evals.glyphs import score

HELD = ("heldout", "heldout_dev")


def characters(source: glyphs.Glyphs) -> set[int]:
  return set(source.items[:, 0].tolist())


def test_a_record_says_what_it_shows():
  source = glyphs.Glyphs("heldout")
  record = next(
    r for r in map(source.__getitem__, range(len(source))) if r["key"] == "U+00E9/DejaVuSerif-Bold"
  )
  assert record["captions"] == ("latin small letter e with acute, bold serif",)
  assert source.classnames[record["label"]] == "latin small letter e with acute"
  assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
  ink = record["image"][:, :, 0] < 128
  assert ink.any() and not ink[:, :4].any() and not ink[:, -4:].any(), "black, centred, on white"
  assert ink[:10].any() and not ink[25:].any(), "the accent is above, and e has no descender"


def test_records_depend_only_on_the_index():
  order = np.random.default_rng(0).permutation(2000)
  one, two = glyphs.Glyphs(), pickle.loads(pickle.dumps(glyphs.Glyphs()))
  straight = [one[i] for i in range(2000)]
  for i in order.tolist():
    np.testing.assert_array_equal(two[i]["image"], straight[i]["image"])
    assert {**two[i], "image": 0} == {**straight[i], "image": 0}
  assert one.fingerprint == two.fingerprint
  assert one.fingerprint != glyphs.Glyphs(size=48).fingerprint
  assert glyphs.Glyphs(size=48)[0]["image"].shape == (48, 48, 3)


def test_every_name_is_drawn_and_none_twice():
  letters = glyphs.alphabet()
  assert len(letters.names) == len(set(letters.names)) == 7336
  assert set(letters.items[:, 0].tolist()) == set(range(7336))
  # Labels must not change between versions, except with matplotlib's fonts.
  digest = hashlib.sha256("\n".join(letters.names).encode()).hexdigest()
  assert digest[:16] == "e7141300505cf9de"


@pytest.mark.parametrize("stem", ["DejaVuSans", "STIXGeneralBol"])
def test_outlines_are_those_that_freetype_loads(stem):
  font = glyphs.font_folder() / f"{stem}.ttf"
  face, outlined = freetype.Face(str(font)), glyphs._outlined(font.read_bytes())
  assert len(outlined) == face.num_glyphs
  for glyph in range(face.num_glyphs):
    face.load_glyph(glyph, freetype.FT_LOAD_NO_SCALE)
    assert outlined[glyph] == (face.glyph.outline.n_points > 0), glyph


def test_no_glyph_is_blank_and_wide_ones_are_reduced():
  letters, pen = glyphs.alphabet(), glyphs.Pen(32)
  for _, cut, glyph in letters.items[::7].tolist():
    assert pen.draw(cut, glyph).min() < 128
  wide = letters.names.index("long rightwards arrow")
  _, cut, glyph = letters.items[letters.items[:, 0] == wide][0].tolist()
  before = pen.draw(0, 40)
  picture = pen.draw(cut, glyph)
  assert (picture[:, 0] == 255).all() and (picture[:, -1] == 255).all()
  np.testing.assert_array_equal(pen.draw(0, 40), before, "the reduced size stayed in the font")


def test_held_out_characters_are_in_train_in_no_font():
  held = set().union(*(characters(glyphs.Glyphs(split)) for split in HELD))
  assert len(characters(glyphs.Glyphs("heldout"))) >= 200
  assert len(held) == 300, "the list for the report and the one for tuning overlap"
  train, seen = characters(glyphs.Glyphs()), characters(glyphs.Glyphs("seen"))
  assert not held & train
  assert held | train == set(range(7336))
  assert seen <= train and len(seen) == 210


def test_parts_of_held_out_characters_are_in_train():
  names = glyphs.alphabet().names
  train = {names[i] for i in characters(glyphs.Glyphs())}
  letters, marks = collections.defaultdict(set), collections.defaultdict(set)
  for name in train:
    letter, _, mark = name.partition(" with ")
    if mark:
      letters[letter].add(mark)
      marks[letter.split()[0], mark].add(letter)
  for split in HELD:
    for i in characters(glyphs.Glyphs(split)):
      letter, _, mark = names[i].partition(" with ")
      assert letter in train, names[i]
      assert len(letters[letter]) >= 2, names[i]
      assert len(marks[letter.split()[0], mark]) >= 2, names[i]


@pytest.mark.slow
def test_no_train_image_equals_one_of_a_held_out_character():
  def pictures(split):
    source = glyphs.Glyphs(split)
    rows = np.unique(source.items, axis=0, return_index=True)[1]  # train repeats some
    image = np.stack([source[i]["image"][:, :, 0].ravel() for i in rows.tolist()])
    return source.items[rows, 1], image

  cuts, shown = pictures("train")
  every = {row.tobytes() for row in shown}
  for split in HELD:
    cut, image = pictures(split)
    assert not every & {row.tobytes() for row in image}
    for k in range(len(glyphs.CUTS)):
      x, y = image[cut == k] / np.float32(255), shown[cuts == k] / np.float32(255)
      apart = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
      assert apart.min() > 0.99 * glyphs_heldout.TWIN  # 1 % for float32 sums of 1,024 squares


@pytest.mark.slow
def test_the_committed_list_is_the_rule():
  committed = pathlib.Path(glyphs_heldout.__file__).with_name(glyphs.LIST).read_text("utf-8")
  assert glyphs_heldout.as_text(glyphs_heldout.choose()) == committed


def test_six_of_ten_train_samples_are_letters_with_marks():
  source = glyphs.Glyphs()
  marked = np.array([glyphs.parts(name) is not None for name in source.classnames])
  assert marked[source.items[:, 0]].mean() == pytest.approx(0.6, abs=1e-4)
  assert marked[list(characters(source))].mean() < 0.15
  assert len(np.unique(source.items, axis=0)) == len(glyphs.alphabet().items) - sum(
    len(glyphs.Glyphs(split)) for split in HELD
  ), "a picture of train is never shown"


def test_the_vocabulary_holds_every_word_of_every_caption():
  vocabulary = set(glyphs.vocabulary())
  for split in glyphs.SPLITS:
    source = glyphs.Glyphs(split)
    for i in range(0, len(source), 17):
      assert vocabulary.issuperset(glyphs.words(source[i]["captions"][0]))


def test_cuts_select_fonts_and_misspelt_ones_are_named():
  source = glyphs.Glyphs("heldout", cuts=glyphs.PROBES)
  assert len(source) == 2 * 210
  assert {source[i]["key"].split("/")[1] for i in range(len(source))} == set(glyphs.PROBES)
  with pytest.raises(ValueError, match=r"'valid'.*heldout_dev"):
    glyphs.Glyphs("valid")
  with pytest.raises(ValueError, match=r"LastResort.*DejaVuSans"):
    glyphs.Glyphs(cuts=("LastResort",))


DATA = data_options(
  image_size=32, tokenizer=dict(name="words", vocabulary="glyphs", length=16), workers=0
)


@jax.jit
def embed_image(params, image):
  z = rearrange(image, "b h w c -> b (h w c)").astype(jnp.float32) @ params["image"]
  return z / jnp.linalg.norm(z, axis=1, keepdims=True)


@jax.jit
def embed_text(params, ids, mask):
  place = 1 + jnp.arange(ids.shape[1]) / 10
  z = jnp.einsum("ble,bl->be", params["text"][ids], mask * place[None])
  return z / jnp.linalg.norm(z, axis=1, keepdims=True)


@pytest.mark.slow
def test_the_evaluator_equals_ten_lines_of_numpy():
  rng = np.random.default_rng(0)
  tokenizer = DATA.make_tokenizer()
  params = dict(
    image=rng.normal(size=(32 * 32 * 3, 12)).astype(np.float32),
    text=rng.normal(size=(tokenizer.vocab_size, 12)).astype(np.float32),
  )
  context = Context("glyphs", embed_image, embed_text, sharding.make_mesh(data=4, fsdp=2), DATA)
  # 420 images and 14,672 captions: neither divides by 104, which the mesh's 8 devices do.
  metrics = evaluate(context, split="heldout", batch_size=100)(params)

  names = glyphs.alphabet().names
  letters = [name.split(" with ")[0] if glyphs.parts(name) else name for name in names]
  unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)  # noqa: E731
  captions = [[f"{name}, {cut}" for name in names] for cut in ("sans", "bold serif")]
  weights = unit(
    sum(np.asarray(embed_text(params, *tokenizer.encode_batch(texts))) for texts in captions)
  )
  expected = {}
  for kind, split in (("unseen", "heldout"), ("seen", "seen")):
    source = glyphs.Glyphs(split)
    records = {r["key"]: r for r in map(source.__getitem__, range(len(source)))}
    codes = sorted({key.split("/")[0] for key in records}, key=lambda key: int(key[2:], 16))
    z = unit(
      sum(
        np.asarray(embed_image(params, np.stack([records[f"{c}/{cut}"]["image"] for c in codes])))
        for cut in ("DejaVuSans", "DejaVuSerif-Bold")
      )
    )
    labels = [records[f"{code}/DejaVuSans"]["label"] for code in codes]
    groups = dict(all=range(7336), heldout=labels, letter=None)
    for group, among in groups.items():
      places, chance = [], []
      for x, label in zip(z, labels):
        same = [i for i in range(7336) if letters[i] == letters[label]]
        named = np.asarray(same if among is None else among)
        places.append(named[np.argsort(-(weights[named] @ x), kind="stable")].tolist().index(label))
        chance.append(1 / len(named))
      if (kind, group) != ("seen", "heldout"):
        expected[f"val/glyphs-{kind}-{group}-top1"] = np.mean(np.array(places) < 1)
        expected[f"val/glyphs-{kind}-{group}-top5"] = np.mean(np.array(places) < 5)
        expected[f"val/glyphs-{kind}-{group}-chance"] = np.mean(chance)
  assert metrics == pytest.approx(expected, abs=1e-9)
  assert metrics["val/glyphs-unseen-all-chance"] == pytest.approx(1 / 7336)


def test_ties_and_nan_are_not_hits():
  label, allowed = np.array([1, 0, 2]), np.ones((3, 3), bool)
  flat = np.ones((3, 2))
  assert score(flat, flat, label=label, allowed=allowed)["top1"] == pytest.approx(1 / 3)
  assert score(flat * np.nan, flat, label=label, allowed=allowed)["top5"] == 0
  perfect = np.eye(3)
  assert score(perfect[label], perfect, label=label, allowed=allowed)["top1"] == 1


def test_the_evaluator_refuses_characters_that_are_trained_on():
  context = Context("glyphs", embed_image, embed_text, sharding.make_mesh(), DATA)
  with pytest.raises(ValueError, match=r"config.evals.glyphs.split='seen'.*heldout_dev"):
    evaluate(context, split="seen")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_names_characters_it_has_never_seen(tmp_path, seed):
  root = pathlib.Path(__file__).parents[2]
  # One device, as the quickstart has on a laptop, and not the eight of the tests.
  env = {name: x for name, x in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
  subprocess.run(
    [
      sys.executable,
      "-m",
      "bigalign.train",
      f"--config={root}/configs/quickstart.py",
      f"--config.seed={seed}",
      f"--workdir={tmp_path}",
    ],
    check=True,
    env=env,
    cwd=root,
  )
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  scores = next(row for row in reversed(rows) if "val/glyphs-unseen-all-top1" in row)
  assert scores["val/glyphs-unseen-all-top1"] >= 0.20
  assert scores["val/glyphs-unseen-all-top5"] >= 0.65
  assert scores["val/glyphs-unseen-letter-top1"] >= 0.30
