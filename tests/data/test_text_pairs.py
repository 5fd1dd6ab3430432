"""Pairs of texts of another source in each batch: config.data.text_pairs."""

from __future__ import annotations

import collections
import json
import re

import numpy as np
import pytest
from helpers.batches import data_options
from helpers.hosts import B, assert_equal_on_hosts, take
from helpers.small_fields import every_field, write_dataset

from bigalign.data.loader.training import batch_spec
from bigalign.data.samples.rejects import REASONS
from bigalign.inputs import open_data

PAIRS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = write_dataset(tmp_path_factory.mktemp("pairs"))
  rows = [dict(question=[f"q{i}", f"Q{i}"], answer=f"answer {i}") for i in range(PAIRS)]
  (root / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return root


def options(folder, **pairs) -> dict:
  given = dict(source=f"{folder}/qa.jsonl", query="question", document="answer") | pairs
  data = {k: x for k, x in every_field(folder).items() if k not in ("views", "texts", "teachers")}
  return data | dict(text_pairs=given)


def text_of(ids, mask) -> str:
  """What the byte tokenizer made of a text, undone."""
  return bytes((ids[mask][:-1] - 3).tolist()).decode()


def pairs_of(batch) -> list[tuple[str, str]]:
  names = ("query", "query_mask", "document", "document_mask")
  return [(text_of(a, b), text_of(c, d)) for a, b, c, d in zip(*(batch[x] for x in names))]


def test_each_row_has_a_pair_and_each_pair_is_read_once_per_epoch(folder):
  batches = take(options(folder), 5)
  assert {k: x.shape for k, x in batches[0].items()} == {
    k: x for k, (x, _) in batch_spec(data_options(**options(folder)), batch_size=B).items()
  }
  pairs = [pair for batch in batches for pair in pairs_of(batch)]
  assert all(query[1:] == document.split()[1] for query, document in pairs)
  seen = collections.Counter(document for _, document in pairs)
  assert len(seen) == PAIRS and {*seen.values()} == {5 * B // PAIRS}
  assert {query[0] for query, _ in pairs} == {"q", "Q"}, "of several texts one is drawn"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_pairs_are_equal_on_any_hosts_and_workers_and_after_a_resume(folder, hosts, workers):
  assert_equal_on_hosts(options(folder), hosts, workers)


def test_pairs_do_not_change_the_samples_of_the_run(folder):
  alone = {k: x for k, x in options(folder).items() if k != "text_pairs"}
  for a, b in zip(take(alone), take(options(folder)), strict=True):
    for name, x in a.items():
      np.testing.assert_array_equal(x, b[name], err_msg=name)


def test_a_pair_without_a_document_is_replaced_and_counted(folder, tmp_path):
  rows = [dict(question=f"q{i}", answer="" if i % 4 == 0 else f"answer {i}") for i in range(PAIRS)]
  (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  batches = take(options(folder, source=f"{tmp_path}/qa.jsonl"), 5)
  rejects = sum(batch["rejects"].sum(0) for batch in batches)
  assert rejects[REASONS.index("no_caption")] == rejects.sum() >= 10
  assert all(document for batch in batches for _, document in pairs_of(batch))


def test_errors(folder):
  for changes, error in (
    (dict(document="question"), "query and document are both 'question'"),
    (dict(query="title", document="text"), "no caption column ['title', 'text']"),
  ):
    with pytest.raises(ValueError, match=re.escape(error)):
      open_data(data_options(**options(folder, **changes)))
  with pytest.raises(ValueError, match="64 pairs in a row cannot be used"):
    take(options(folder, document="text"), 1)
  stored = {k: x for k, x in options(folder).items() if k != "captions"}
  with pytest.raises(ValueError, match=r"config\.data\.text_pairs are embedded by the text tower"):
    open_data(data_options(**stored | dict(stores=dict(text=f"{folder}/a/text"))))
