"""Learnt tokens that say of which kind the source of a text is: config.data.prefix_tokens."""

from __future__ import annotations

import functools
import pickle
import re
import types
from typing import Any

import jax
import numpy as np
import pytest
from helpers import small_models
from helpers.batches import data_options
from helpers.hosts import B, assert_equal_on_hosts, take
from helpers.small_fields import write_dataset
from helpers.small_shards import samples, write_tar

from bigalign import inputs
from bigalign.config import resolve_config, tokenizer_digest
from bigalign.data.text.prefix_tokens import PrefixTokens, WithPrefix
from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.export.main import write
from bigalign.model import make_model
from bigalign.options import plain

TOKENS = dict(of=dict(web="caption", places="class", objects="class"), evaluation="caption")
CAPTION, CLASS = 259, 260  # after the ids of bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = write_dataset(tmp_path_factory.mktemp("prefix"))
  write_tar(root / "places.tar", samples(100, 12))
  write_tar(root / "objects.tar", samples(200, 12))
  return root


def options(folder, **changes) -> dict:
  parts = dict(web="0.tar", places="places.tar", objects="objects.tar")
  captions = dict(web=("json.captions",), places=("txt",), objects=("txt",))
  return dict(
    image_size=16,
    tokenizer=dict(name="byte", length=24),
    mixture=tuple(
      dict(name=name, source=f"{folder}/{file}", captions=captions[name])
      for name, file in parts.items()
    ),
    texts=dict(count=2),
    prefix_tokens=TOKENS,
    **changes,
  )


@pytest.mark.parametrize(
  "name,start", [("byte", []), ("wordpiece", [3])], ids=["without a start", "with a start"]
)
def test_a_text_has_its_token_after_the_start_and_one_position_less(name, start, tmp_path):
  spec = dict(name="byte", length=6)
  if name == "wordpiece":
    words = "[PAD] [UNK] [MASK] [CLS] [SEP] a dog"
    (tmp_path / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    spec = dict(name=name, path=str(tmp_path / "vocab.txt"), length=6)
  plain_one = make_tokenizer(**spec)
  shorter = make_tokenizer(**{**spec, "length": 5})
  tokenizer = pickle.loads(pickle.dumps(WithPrefix(plain_one, PrefixTokens(**TOKENS))))
  assert tokenizer.vocab_size == plain_one.vocab_size + 2 and tokenizer.length == 6
  texts, n = ["a", "a dog a dog a dog"], len(start)
  words, mask = shorter.encode_batch(texts)
  for which, added in ((None, [0, 0]), (np.array([1, 0]), [1, 0])):
    ids, seen = tokenizer.encode_batch(texts, which)
    assert ids.dtype == np.int32 and ids[:, :n].tolist() == [start] * 2
    np.testing.assert_array_equal(ids[:, n], plain_one.vocab_size + np.array(added))
    np.testing.assert_array_equal(np.delete(ids, n, 1), words)
    np.testing.assert_array_equal(np.delete(seen, n, 1), mask)
    assert seen[:, n].all()
  assert (ids[0] != tokenizer.pad).sum() == seen[0].sum()


def test_each_text_of_a_batch_has_the_token_of_its_source(folder):
  found = set()
  for batch in take(options(folder), 6):
    wanted = np.array([CAPTION, CLASS, CLASS])[batch["source"]]
    np.testing.assert_array_equal(batch["text"][:, 0], wanted)
    np.testing.assert_array_equal(batch["text_others"][:, 0, 0], wanted)
    found |= {*batch["source"].tolist()}
  assert found == {0, 1, 2}
  alone = {k: x for k, x in options(folder).items() if k != "prefix_tokens"}
  for a, b in zip(take(alone), take(options(folder)), strict=True):
    np.testing.assert_array_equal(a["image_id"], b["image_id"])
    np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_tokens_are_equal_on_any_hosts_and_workers_and_after_a_resume(folder, hosts, workers):
  assert_equal_on_hosts(options(folder, pure_batches=True), hosts, workers)


def test_a_batch_of_one_source_has_one_token(folder):
  for batch in take(options(folder, pure_batches=True)):
    assert len({*batch["text"][:, 0].tolist()}) == 1 and len(batch["text"]) == B


@pytest.mark.slow
def test_the_token_changes_an_embedding_and_the_caption_s_is_that_of_evaluation():
  model = make_model(**small_models.siglip(dict(small_models.SIZE, depth=1), vocab_size=261))
  tokenizer = WithPrefix(make_tokenizer("byte", length=16), PrefixTokens(**TOKENS))
  ids, mask = tokenizer.encode_batch(["a dog"] * 3, np.array([0, 1, 0]))
  evaluated = tokenizer.encode_batch(["a dog"])
  np.testing.assert_array_equal([ids[0], mask[0]], [x[0] for x in evaluated])
  z, _ = jax.jit(functools.partial(model.init_with_output, method="embed_text"))(
    jax.random.key(0), ids, mask
  )
  assert np.abs(z[0] - z[1]).max() > 1e-4
  np.testing.assert_array_equal(z[0], z[2])


def test_another_tokenizer_has_another_digest_and_the_table_must_hold_the_tokens(folder):
  numbers = dict(seed=0, batch_size=4, total_steps=3, log_every=1, checkpoint_every=0)
  digests = set()
  for tokens in (None, TOKENS, TOKENS | dict(evaluation="class")):
    data = options(folder) | dict(prefix_tokens=tokens)
    rest = dict(model=small_models.siglip(length=24), loss=dict(siglip={}), optimizer=dict(lr=1e-3))
    config = resolve_config(dict(data=plain(data), **rest, **numbers))
    digests.add(tokenizer_digest(config))
  assert len(digests) == 3
  error = "vocab_size=259 is too small for config.data.prefix_tokens (2 more ids)"
  with pytest.raises(ValueError, match=re.escape(error)):
    inputs.check_tokenizer(config.model.text.build(), config.data)


def test_an_export_is_refused(folder, tmp_path):
  trained: Any = types.SimpleNamespace(data=data_options(**options(folder)))
  with pytest.raises(ValueError, match=r"prefix_tokens .* use the run itself with bigalign\.load"):
    write(trained, "hf", tmp_path / "out", lambda family: {})


def test_errors(folder):
  data = options(folder)
  with pytest.raises(ValueError, match=r"evaluation='label' is the token of no source"):
    data_options(**data | dict(prefix_tokens=TOKENS | dict(evaluation="label")))
  wrong = dict(of=dict(web="caption", place="class"), evaluation="caption")
  with pytest.raises(ValueError, match=r"they differ in \['objects', 'place', 'places'\]"):
    take(data | dict(prefix_tokens=wrong), 1)
  single = {k: x for k, x in data.items() if k != "mixture"} | dict(source=f"{folder}/places.tar")
  with pytest.raises(ValueError, match="there is no mixture"):
    inputs.open_data(data_options(**single))
