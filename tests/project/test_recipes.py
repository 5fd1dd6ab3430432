"""The recipe cards: each is listed, has a source, a state, and commands that the programs take."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest
from helpers.shipped import ROOT

from bigalign.config import Config
from bigalign.run.configs import load_config, shipped
from bigalign.run.overrides import read_words, take_words

FOLDER = ROOT / "docs" / "recipes"
README = (FOLDER / "README.md").read_text()
CARDS = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")
ROWS = {
  row[1]: row for row in re.findall(r"^\| \[([^\]]+)\]\((\w+)\.md\) \|(.*) \|$", README, re.M)
}
HEADINGS = ("Data", "Train", "What differs from the source", "Evaluate")


def card(name):
  return (FOLDER / f"{name}.md").read_text()


def facts(name):
  """{first column: second column} of the table at the top of a card."""
  return dict(re.findall(r"^\| (\w+) \| (.*) \|$", card(name).partition("\n## ")[0], re.M))


def commands(name):
  """The words of each command of bigalign; a command ends with its line."""
  blocks = "".join(re.findall(r"```bash\n(.*?)```", card(name), re.DOTALL))
  lines = blocks.replace("\\\n", " ").splitlines()
  return [shlex.split(line) for line in lines if line.strip().startswith("bigalign ")]


def test_each_card_is_listed():
  assert sorted(ROWS) == CARDS and len(CARDS) >= 8


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_all_of_its_parts(name):
  headings = re.findall(r"^## (.*)$", card(name), re.M)
  assert [x for x in headings if x in HEADINGS] == [*HEADINGS]
  assert {"config", "expected", "source", "spread", "chips", "time", "cost"} <= facts(name).keys()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_whether_somebody_has_run_it(name):
  state = r"Not run|Run on 20\d\d-\d\d-\d\d"
  assert re.match(rf"# .*\n\n\*\*({state})\b", card(name))
  assert ("Not run" in card(name)) == ROWS[name][2].endswith("not run")


@pytest.mark.parametrize("name", CARDS)
def test_a_figure_has_a_source(name):
  assert re.search(
    r"https://(arxiv\.org/abs/\d{4}\.\d{5}|huggingface\.co/\w+)", facts(name)["source"]
  )


@pytest.mark.parametrize("name", CARDS)
def test_time_and_cost_are_called_estimates_and_stand_in_the_list(name):
  time, cost, row = facts(name)["time"], facts(name)["cost"], ROWS[name][2]
  assert "by `bigalign plan`, not measured" in time
  (chip_hours,) = re.findall(r"([\d.,]+ to [\d.,]+) chip-hours", time)
  (dollars,) = re.findall(r"([\d.,]+ to [\d.,]+) USD at 1\.20 USD per chip-hour", cost)
  assert f"| {chip_hours} | {dollars} |" in row


@pytest.mark.parametrize("name", CARDS)
def test_the_commands_name_a_config_and_options_that_exist(name):
  found = commands(name)
  programs = [words[1] for words in found]
  assert {"train", "index", "inspect", "evaluate"} <= {*programs}
  trained = []
  for words in found:
    if words[1] not in ("train", "embed", "reinforce", "plan"):
      continue
    options, others = take_words(words)
    (config,) = [x.removeprefix("--config=") for x in others if x.startswith("--config=")]
    assert config in shipped()
    read_words(options, Config, load_config(config))
    trained += [config] * (words[1] == "train")
  (config,) = trained
  assert f"configs/{config}.py" in facts(name)["config"] and f"`{config}`" in ROWS[name][2]


@pytest.mark.parametrize("name", CARDS)
def test_a_suite_of_its_own_is_one(name):
  suites = re.findall(r"```toml\n# (\S+)\n(.*?)```", card(name), re.DOTALL)
  for file, text in suites:
    assert all(task["type"] == "zeroshot" for task in tomllib.loads(text).values())
    assert any(f"--suite={file}" in words for words in commands(name))
