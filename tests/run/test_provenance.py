"""Two configs that train differently never compare as equal."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest
from helpers.shipped import load

from bigalign.config import resolve_config
from bigalign.options import plain
from bigalign.run import provenance


def _tiny(**changes):
  return {**load("tiny").to_dict(), **changes}


def _resolved(**changes):
  return plain(resolve_config(_tiny(**changes)))


def _data(**changes):
  return {"data": {**load("tiny").data.to_dict(), **changes}}


LOSS = {"siglip": {"weight": 1.0}}
DIFFERENT = {
  "a loss with its defaults": ({"loss": LOSS}, {"loss": {**LOSS, "clip_gap": {}}}),
  "another loss without state": ({"loss": LOSS}, {"loss": {"clip": {"weight": 1.0}}}),
  "the defaults of a loss": ({"loss": {"clip": {}}}, {"loss": {"clip": {"weight": 0.5}}}),
  "an augmentation": (_data(augment={}), _data(augment={"flip": 0.5})),
  "no augmentation in a stage": (
    {"stages": [{"until": 2, "data": {"augment": {}}}]},
    {"stages": [{"until": 2}]},
  ),
  "an augmentation in a stage": (
    {"stages": [{"until": 2, "data": {"augment": {}}}]},
    {"stages": [{"until": 2, "data": {"augment": {"flip": 0.5}}}]},
  ),
  "stages at all": ({"stages": ()}, {"stages": [{"until": 2}]}),
}


@pytest.mark.parametrize("configs", DIFFERENT.values(), ids=DIFFERENT)
@pytest.mark.parametrize("form", [_tiny, _resolved], ids=["written", "resolved"])
def test_configs_that_differ_never_compare_as_equal(configs, form):
  one, other = (form(**changes) for changes in configs)
  assert provenance.differences(one, other) and provenance.differences(other, one)
  assert not provenance.differences(one, one) and not provenance.differences(other, other)


def test_what_means_the_same_compares_as_equal():
  model = load("tiny").model.to_dict()
  for one, other in (
    (_tiny(), _tiny(stages=())),
    (_tiny(), _tiny(model={**model, "image_projector": {}})),  # as the user wrote it
    (_resolved(**_data(augment={})), _resolved(**_data(augment=None))),
    (_tiny(), _tiny(evals={}, writer={}, keep={})),
  ):
    assert not provenance.differences(one, other)


def test_a_process_with_another_value_says_whose_value_it_shows(monkeypatch):
  def gather(digests):
    return {name: np.stack([own + 1, *[own] * 20]) for name, own in digests.items()}

  monkeypatch.setattr(jax, "process_count", lambda: 21)
  monkeypatch.setattr(jax, "process_index", lambda: 3)
  monkeypatch.setattr(provenance.multihost_utils, "process_allgather", gather)
  with pytest.raises(RuntimeError) as error:
    provenance.check_hosts_agree({"config": {"seed": 7, "long": "x" * 5000}})
  text = str(error.value)
  assert "another config than process 0. Process 3 has" in text and '"seed": 7' in text
  assert "and 12 more" in text and len(text) < 1500


@pytest.mark.parametrize(
  "revisions, message",
  [
    (["a1", "unknown", "a1"], None),  # a host without git
    (["unknown", "a1", "a1"], None),
    (["unknown"] * 3, None),
    (["unknown", "a1", "b2"], r"processes \[2\] have another revision than process 1"),
    (["a1", "b2", "unknown"], r"processes \[1\] have another revision than process 0"),
  ],
)
def test_a_host_that_does_not_know_its_revision_ends_no_run(revisions, message, monkeypatch):
  sent = []
  monkeypatch.setattr(jax, "process_count", lambda: 3)

  def alone(digests):
    sent.append(digests["revision"])
    return {"revision": digests["revision"][None]}

  monkeypatch.setattr(provenance.multihost_utils, "process_allgather", alone)
  for revision in revisions:
    provenance.check_hosts_agree({"revision": revision})
  every = {"revision": np.stack(sent)}
  monkeypatch.setattr(provenance.multihost_utils, "process_allgather", lambda x: every)
  with pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext():
    provenance.check_hosts_agree({"revision": revisions[0]})
