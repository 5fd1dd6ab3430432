"""Configs by name, by path and as values, and overrides of their options."""

from __future__ import annotations

import doctest

import pytest
from helpers.shipped import ROOT
from helpers.shipped import load as load_shipped
from ml_collections import ConfigDict

from bigalign.run import configs
from bigalign.run.configs import find_file, load_config, set_option, shipped, split_path, summary


def test_examples():
  assert not doctest.testmod(configs).failed


def test_the_shipped_configs_are_those_of_the_checkout():
  assert shipped() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", ["tiny", "siglip_b16"])
def test_a_name_works_from_any_folder(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load_config(name).to_dict() == load_shipped(name).to_dict()
  assert load_config(ROOT / "configs" / f"{name}.py") == load_config(name)


def test_a_file_of_this_name_is_read_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "tiny").write_text("")
  assert find_file("tiny").absolute() == tmp_path / "tiny"


def test_every_shipped_config_has_a_summary():
  assert all(10 < len(summary(name)) < 100 for name in shipped())


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("nope.py", r"^No config file nope\.py\. Shipped configs: .*siglip_b16, tiny$"),
    ("siglip_b17", r"^No config file siglip_b17\. Did you mean 'siglip_b16'\? Shipped"),
    ("configs/siglip_b16.py", r"configs/siglip_b16\.py\. --config=siglip_b16 is a shipped config"),
  ],
)
def test_a_config_that_does_not_exist_is_named_with_the_shipped_ones(
  name, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)  # outside the checkout
  with pytest.raises(FileNotFoundError, match=message):
    load_config(name)


@pytest.mark.parametrize(
  ("text", "error", "message"),
  [
    ("", ValueError, r"mine\.py has no function get_config\(\)"),
    ("def get_config():\n  return (\n", ValueError, r"mine\.py:2: '\(' was never closed"),
    ("def get_config():\n  return 3\n", TypeError, r"returned int; it must return a ConfigDict"),
  ],
)
def test_files_that_are_not_configs(text, error, message, tmp_path):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(error, match=message):
    load_config(tmp_path / "mine.py")


def test_text_after_a_colon_is_the_argument_of_get_config(tmp_path):
  (tmp_path / "mine.py").write_text("def get_config(size):\n  return dict(size=size)\n")
  assert load_config(f"{tmp_path}/mine.py:B/16").size == "B/16"


def test_overrides_reach_options_that_the_config_does_not_write():
  changed = load_config(
    "tiny",
    {
      "data.tokenizer.path": "x.model",
      "loss__siglip__bias": -3.0,
      "data.source_options.image": "jpg",
      "total_steps": "3 epochs",  # a number in the file
      "evals": {},
    },
  )
  assert changed.data.tokenizer.to_dict() == dict(name="byte", length=48, path="x.model")
  assert changed.loss.to_dict() == dict(siglip=dict(weight=1.0, bias=-3.0))
  assert changed.data.source_options.image == "jpg"
  assert changed.total_steps == "3 epochs" and changed.evals.to_dict() == {}


def test_overrides_do_not_change_what_was_given():
  for given in (load_shipped("photos_frozen"), load_shipped("photos_frozen").to_dict()):
    changed = load_config(given, {"data.mixture[1].weight": 2.0, "data.mixture[0].name": "a"})
    assert [part.get("weight") for part in changed.data.mixture] == [None, 2.0]
    assert changed.data.mixture[0]["name"] == "a"
    assert [part.get("weight") for part in given["data"]["mixture"]] == [None, None]
    assert given["data"]["mixture"][0]["name"] == "coco2k"
  for given in (load_shipped("clipa_b16"), load_shipped("clipa_b16").to_dict()):
    before = given["stages"][0]["data"]["image_size"]
    changed = load_config(given, {"stages[0].data.image_size": 64})
    assert changed.stages[0]["data"]["image_size"] == 64
    assert given["stages"][0]["data"]["image_size"] == before != 64


def test_references_between_options_follow_an_override(tmp_path):
  (tmp_path / "mine.py").write_text(
    "from ml_collections import ConfigDict\n\n"
    "def get_config():\n"
    "  c = ConfigDict(dict(steps=10))\n"
    "  c.half = c.get_ref('steps') // 2\n"
    "  return c\n"
  )
  assert load_config(tmp_path / "mine.py", {"steps": 100}).half == 50


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("a.b.c", r"config\.a\.b=1 is not a group of options, so it has no 'c'"),
    ("a.b[0]", r"config\.a\.b has no element 0; its length is 0"),
    ("a.d[2].x", r"config\.a\.d has no element 2; its length is 1"),
    ("a..b", r"'a\.\.b' does not name an option"),
  ],
)
def test_places_that_cannot_hold_an_option(name, message):
  with pytest.raises(ValueError, match=message):
    load_config({"a": {"b": 1, "d": ({"x": 1},)}}, {name: 3})


def test_an_element_is_replaced():
  values = ConfigDict({"a": (1, 2, 3)})
  set_option(values, split_path("a[-1]"), 5)
  assert values.a == (1, 2, 5)
