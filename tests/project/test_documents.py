"""The README and docs/: links lead to files, journeys are short, figures are the measured ones."""

from __future__ import annotations

import re

import pytest
from helpers.shipped import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()


def anchors(page):
  """The anchors of the headings of a page, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if "://" in target:
      continue
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    assert file.exists(), target
    assert not anchor or anchor in anchors(file), target


def test_the_readme_says_near_its_top_what_has_not_run():
  assert "**Not yet run on real TPUs, GPUs or clouds:**" in README.partition("## ")[0]


def test_each_journey_has_at_most_ten_lines():
  journeys = README.partition("## Three journeys")[2].partition("\n## ")[0]
  blocks = re.findall(r"```\w+\n(.*?)```", journeys, re.DOTALL)
  assert len(blocks) == 3
  assert all(len(block.splitlines()) <= 10 for block in blocks)


@pytest.mark.parametrize(
  "figure, source",
  [
    ("533", "benchmarks/README.md"),
    ("216", "benchmarks/README.md"),
    ("1.11", "benchmarks/README.md"),
    ("1.03", "benchmarks/README.md"),
    ("127", "docs/frozen.md"),
    ("7,336", "docs/quickstart.md"),
  ],
)
def test_figures_of_the_readme_stand_where_they_were_measured(figure, source):
  for text in (README, (ROOT / source).read_text()):
    assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,]*\d)", text)
