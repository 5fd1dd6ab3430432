"""bigalign costs: what it measures, prints and writes."""

from __future__ import annotations

import json
import pathlib

import pytest

from bigalign import losses, sharding
from bigalign.plan import loss_costs

DOCS = pathlib.Path(__file__).parents[2] / "docs"
# A dense matrix of radzero, whose pairs have a number for each patch, does not fit.
FIGURES = ("MB", "does not fit")


def test_the_table_is_that_of_the_compiled_programs(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")  # of a terminal; in a pipe nothing is cut
  rows = loss_costs.main(
    [
      "--losses=clip,sogclr",
      "--ways=gather,ring",
      "--batch=64",
      "--width=16",
      "--samples=100000",
      "--json",
      str(tmp_path / "costs.json"),
    ]
  )
  assert json.loads((tmp_path / "costs.json").read_text()) == rows
  found = {(row["loss"], row["way"]): row for row in rows}
  for way in ("gather", "ring"):
    clip, sogclr = found["clip", way], found["sogclr", way]
    assert clip["flops"] == pytest.approx(8 * 64 * 64 * 16 / 8, rel=0.01)
    assert (clip["needs"], clip["state_bytes"]) == ([], 0)
    assert sogclr["needs"] == ["ids"] and sogclr["state_bytes"] >= 2 * 4 * 100_000
  assert found["clip", "gather"]["wire_bytes"]["all-gather"] >= 64 * 16 * 4
  assert found["clip", "ring"]["wire_bytes"]["collective-permute"] >= 3 * 64 * 16 * 4
  printed = capsys.readouterr().out.splitlines()
  for row in rows:
    assert any(all(cell in line for cell in loss_costs.cells(row)) for line in printed), printed


def test_every_field_that_a_loss_can_need_has_a_shape():
  wanted = {name for names in losses.PROVIDES.values() for name in names}
  assert wanted <= set(loss_costs.fields(8, 4))


def test_every_loss_is_in_the_document_of_losses():
  text = (DOCS / "losses.md").read_text()
  assert [name for name in losses.LOSSES if f"`{name}`" not in text] == []


def test_the_document_of_costs_has_every_loss_and_way():
  """After adding a loss: run the command at the top of docs/loss_costs.md with --losses=NAME."""
  lines = (DOCS / "loss_costs.md").read_text().splitlines()
  rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ")][2:]
  found = [(row[0].strip(), row[1].strip()) for row in rows if row[4].strip().endswith(FIGURES)]
  assert found == [(name, way) for name in sorted(losses.LOSSES) for way in loss_costs.WAYS]


def test_rows_of_a_loss_replace_older_ones_in_the_document(tmp_path):
  path = tmp_path / "costs.md"

  def row(name, flops):
    return dict(
      loss=name,
      way="gather",
      needs=[],
      state_bytes=0,
      batch=8,
      width=4,
      devices=2,
      flops=flops,
      temporary_bytes=1e6,
      wire_bytes={"all-gather": 2e6},
    )

  loss_costs.write_document(path, "bigalign costs --batch=8", [row("siglip", 1e9)])
  loss_costs.write_document(path, "bigalign costs --batch=8", [row("clip", 2e9)])
  loss_costs.write_document(path, "bigalign costs --batch=8", [row("siglip", 3e9)])
  rows = [line for line in path.read_text().splitlines() if line.startswith("| ")][2:]
  assert rows == [
    "| clip | gather |  |  | 1.0 MB | 2 GF = 15625000.0 | 2.0 MB |",
    "| siglip | gather |  |  | 1.0 MB | 3 GF = 23437500.0 | 2.0 MB |",
  ]
  with pytest.raises(ValueError, match=r"--out=.*not for 'bigalign costs --batch=16'"):
    loss_costs.write_document(path, "bigalign costs --batch=16", [row("clip", 2e9)])


def test_an_unknown_loss_names_the_nearest():
  with pytest.raises(ValueError, match="'siglip'"):
    loss_costs.main(["--losses=sigclip"])
  with pytest.raises(ValueError, match=r"--ways.*'gather'"):
    loss_costs.main(["--ways=gathre"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_every_loss_has_costs_at_any_batch(name):
  """No loss's defaults stop the table, at a batch that divides nothing."""
  row = loss_costs.measure(name, "gather", sharding.make_mesh(data=8), batch=24, width=8)
  # These compare an image with its own vectors only: no product of matrices, and sums are sent.
  of_own_rows = name in ("feature_distill", "hardneg_own", "vl2v")
  assert row["wire_bytes"] and (row["flops"] == 0) == of_own_rows
