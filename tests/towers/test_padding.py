"""Padding is cut off where a text tower does not read it, and only there."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bigalign.towers.bert import BertOptions
from bigalign.towers.features import FeaturesOptions
from bigalign.towers.padding import all_positions, cut, used_lengths
from bigalign.towers.text import TextOptions

LENGTH, EOS = 24, 9
SMALL = dict(vocab_size=12, length=LENGTH, width=16, depth=1, heads=2, dtype="float32", scan=False)


def text(**options):
  return TextOptions(**SMALL, **options)


def bert(**options):
  return BertOptions(**SMALL, **options)


IGNORE = {
  "CLIP": text(causal=True, pool="eos", eos=EOS, mask_padding=False),
  "open_clip": text(causal=True, pool="argmax", mask_padding=False),
  "causal, last token": text(causal=True, pool="eos", mask_padding=False),
  "masked, eos": text(pool="eos", eos=EOS),
  "masked, map": text(pool="map"),
  "masked, mean": text(pool="mean", causal=True),
  "BERT, mean": bert(pool="mean"),
  "BERT, cls": bert(pool="cls"),
  "RoBERTa, pooler": bert(pool="pooler", skip_padding=True, pad=1, types=0),
  "MPNet": bert(pool="mean", buckets=8, types=0, unit=True),
}
READ = {
  "SigLIP": text(pool="last", mask_padding=False),
  "SigLIP, masked": text(pool="last"),
  "unmasked, mean": text(pool="mean", mask_padding=False),
  "unmasked, map": text(pool="map", mask_padding=False, causal=True),
  "unmasked, eos": text(pool="eos", eos=EOS, mask_padding=False),
}


def batch(pad=0):
  """Texts of 1 to 7 tokens, each with its end."""
  rng = np.random.default_rng(0)
  ids = np.full((7, LENGTH), pad, np.int32)
  mask = np.zeros(ids.shape, bool)
  for i in range(7):
    ids[i, :i], ids[i, i] = rng.integers(2, 9, i), EOS
    mask[i, : i + 1] = True
  return ids, mask


def embedded(options, ids, mask):
  tower, rng = options.build(), np.random.default_rng(1)
  shapes = jax.eval_shape(tower.init, jax.random.key(0), ids, mask)
  params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  return np.asarray(jax.jit(tower.apply)(params, ids, mask).pooled)


@pytest.mark.parametrize("options", IGNORE.values(), ids=IGNORE)
def test_a_tower_that_ignores_padding_embeds_cut_texts_alike(options):
  ids, mask = batch(pad=getattr(options, "pad", 0))
  used = options.used_lengths(ids, mask)
  assert used.tolist() == [1, 2, 3, 4, 5, 6, 7] and cut(used, LENGTH) == 8
  whole = embedded(options, ids, mask)
  np.testing.assert_allclose(embedded(options, ids[:, :8], mask[:, :8]), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", READ.values(), ids=READ)
def test_a_tower_that_reads_padding_gets_all_of_it(options):
  ids, mask = batch()
  assert options.used_lengths(ids, mask).tolist() == [LENGTH] * 7
  whole = embedded(options, ids, mask)
  assert np.abs(embedded(options, ids[:, :8], mask[:, :8]) - whole).max() > 1e-3


@pytest.mark.parametrize("name", ["CLIP", "open_clip", "masked, eos"])
def test_padding_that_is_pooled_stays(name):
  ids, mask = batch(pad=10)  # of a higher id than any token
  ids[3] = np.where(mask[3], 4, EOS)  # and a text whose first end is padding
  options = IGNORE[name]
  used = options.used_lengths(ids, mask)
  assert (used > mask.sum(1)).tolist() == [name == "open_clip" or i == 3 for i in range(7)]
  whole = embedded(options, ids, mask)
  assert cut(used, LENGTH) == 8
  np.testing.assert_allclose(embedded(options, ids[:, :8], mask[:, :8]), whole, rtol=0, atol=1e-6)


def test_a_text_without_tokens_keeps_its_padding():
  ids, mask = batch()
  mask[2] = False
  assert IGNORE["BERT, mean"].used_lengths(ids, mask).tolist() == [1, 2, LENGTH, 4, 5, 6, 7]


def test_there_are_few_lengths():
  lengths = {cut(n, 4096) for n in range(1, 4097)}
  assert sorted(lengths)[:8] == [8, 16, 24, 32, 48, 64, 96, 128] and len(lengths) == 18
  assert all(cut(n, 77) >= n for n in range(1, 78)) and cut(np.zeros(0, int), 77) == 8


def test_a_tower_that_does_not_say_what_it_reads_gets_all():
  assert used_lengths(FeaturesOptions(width=4)) is all_positions
  assert used_lengths(None) is all_positions
