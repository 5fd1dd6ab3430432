"""Columns of probabilities: that a pair is wrong, and that a sample is kept for its concepts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.loss_oracles import cases2, oracles2
from helpers.small_shards import picture, write_tar

from bigalign.data.fields import column_files
from bigalign.data.sources.base import Spec, open_source
from bigalign.data.sources.views import make_view
from bigalign.shards import balance, noise


@pytest.mark.parametrize("case", cases2("gmm_noise"))
def test_two_groups_of_losses(case):
  losses = oracles2().inputs(case)["losses"]
  found = noise.fit(losses)
  names = ("weight", "mean", "var")
  got = {
    f"{n}_{side}": x[k] for n, x in zip(names, found) for k, side in enumerate(("low", "high"))
  }
  got |= dict(noise_prob=found.posterior(losses))
  oracles2().check(case, got, rtol=1e-4, require=("noise_prob", *got))


def test_the_probability_grows_with_the_loss_and_bins_do_not_matter(monkeypatch):
  rng = np.random.default_rng(0)
  losses = np.append(rng.normal(1, 0.2, 3000), rng.normal(2, 0.7, 1000)).astype(np.float32)
  found = noise.fit(losses)
  ordered = np.linspace(-3, 5, 500)
  assert (np.diff(found.noise(ordered)) >= 0).all() and found.noise(ordered)[0] == 0
  assert found.posterior(ordered)[0] > 0.9  # the wider group alone reaches this far
  monkeypatch.setattr(noise, "EXACT", 100)
  monkeypatch.setattr(noise, "CHUNK", 700)
  losses = np.insert(losses, 5, np.nan)
  values, counts = noise._counted(losses)
  assert counts.sum() == 4000
  for one, two in zip(noise.fit(values, counts), found):
    np.testing.assert_allclose(one, two, rtol=1e-3)
  with pytest.raises(ValueError, match="all equal"):
    noise.fit(np.ones(5))


def test_a_column_from_a_column(tmp_path):
  members = [(f"{i}.{end}", x) for i in range(6) for end, x in (("jpg", picture(i)), ("txt", b"a"))]
  source = open_source(write_tar(tmp_path / "0.tar", members))
  losses = np.array([0.1, 0.2, np.nan, 0.1, 5.0, 5.1], np.float32)
  column_files.write(f"{tmp_path}/losses", source, [losses], made_by=dict(what="loss", step=7))
  made = noise.main([f"{tmp_path}/losses", "--out", f"{tmp_path}/noise"])
  assert made["losses"]["step"] == 7 and made["samples"] == 6
  numbers = column_files.ColumnFile(f"{tmp_path}/noise", source, "noise").numbers
  np.testing.assert_allclose(numbers, [0, 0, np.nan, 0, 1, 1], atol=1e-6)


@pytest.mark.parametrize("case", cases2("metaclip"))
def test_probabilities_of_entries_and_texts(case):
  inputs, params = oracles2().inputs(case), case["params"]
  probability = balance.entry_probability(inputs["counts"], params["t"])
  got = dict(
    entry_prob=probability,
    keep_prob=balance.keep_probability(probability, [x[x >= 0] for x in inputs["matches"]]),
    tail_share=balance.tail_share(inputs["counts"], params["t"]),
    t_from_p=balance.threshold(inputs["counts"], params["p"]),
  )
  oracles2().check(case, got, rtol=1e-9, require=tuple(got))


def spaced(text):
  """A text with its punctuation apart, as MetaCLIP's automaton reads it."""
  text = f" {text} "
  for mark in ",.;:?!`":
    text = text.replace(mark, f" {mark} ")
  return text.replace("\n", " ").replace("\t", " ")


@pytest.mark.parametrize("spaces", [True, False])
def test_entries_are_found_as_by_a_search_for_each(spaces):
  rng = np.random.default_rng(0)
  letters = [*"ab c,. \n"]
  texts = ["".join(rng.choice(letters, 30)) for _ in range(200)]
  entries = [*{"".join(rng.choice(letters[:6], n)) for n in rng.integers(1, 6, 60)}]
  matcher = balance.Matcher(entries, spaces=spaces)
  some = 0
  for text in texts:
    expected = {
      i for i, x in enumerate(entries) if (f" {x} " in spaced(text) if spaces else x in text)
    }
    assert matcher.find(text) == expected
    some += bool(expected)
  assert some > 100


def test_frequent_concepts_are_thinned_and_rare_ones_stay(tmp_path):
  names = ["cat"] * 90 + ["dog"] * 8 + ["unknown"] * 2 + ["cat dog"] * 2
  members = []
  for i, name in enumerate(names):
    captions = [f"a {part}." for part in name.split()]
    members += [
      (f"{i:03}.jpg", picture(i % 4)),
      (f"{i:03}.json", json.dumps(dict(captions=captions)).encode()),
    ]
  shard = write_tar(tmp_path / "0.tar", members)
  (tmp_path / "entries.txt").write_text("cat\ndog\nbird\n\n")
  out = f"{tmp_path}/made/keep"
  words = [shard, "--captions=json.captions", f"--entries={tmp_path}/entries.txt", f"--out={out}"]
  made = balance.main([*words, "--t=10", "--workers=1"])
  assert json.loads((tmp_path / "made/keep.counts.json").read_text()) == dict(
    cat=92, dog=10, bird=0
  )
  keep = np.load(f"{out}.npy")
  np.testing.assert_allclose(keep, [10 / 92] * 90 + [1] * 8 + [0] * 2 + [1] * 2, rtol=1e-6)
  assert made["expected"] == pytest.approx(keep.sum()) and made["matched"] == 2
  often = np.load(f"{out}.frequency.npy")
  wanted = [92] * 90 + [10] * 8 + [np.nan] * 2 + [np.sqrt(92 * 10)] * 2
  np.testing.assert_allclose(often, wanted, rtol=1e-6)
  source = open_source(shard, captions=("json.captions",))
  view = make_view(source, f"{tmp_path}/view", columns=dict(keep=keep), draw="keep", seed=1)
  assert abs(view["kept"] - keep.sum()) < 3 * np.sqrt((keep * (1 - keep)).sum())
  (tmp_path / "other.txt").write_text("Cat\n")
  with pytest.raises(ValueError, match="no line of it occurs in a caption"):
    balance.balance(Spec(shard, ("json.captions",)), f"{tmp_path}/other.txt", out)
