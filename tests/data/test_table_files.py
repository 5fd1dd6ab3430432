"""Tables of image files: rows are neither merged nor lost, whoever wrote the table."""

from __future__ import annotations

import logging
import time

import pytest

from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import table_files
from bigalign.data.sources.base import open_source

BOM = "\ufeff"
# Captions of a table that was written without quoting, which begin with a double quote.
STRAY = dict(
  closed_inside_another=['"hello there', "a dog", 'say "hi" to', "last"],
  closed_at_an_end=['"hello there', "a dog", 'say hi"', "last"],
  closed_by_the_next=['"hello', '"bye', "a dog", "last"],
  never_closed=["a dog", '"hello there', "b", "last"],
  in_the_last_row=["a dog", "b", "c", '"hello'],
  closed_in_the_row=['"hello" he said', "a dog", '"', "last"],
  doubled=['""hello', 'a "" dog', '"""', "last"],
)


def write(path, rows, separator="\t", names=("filepath", "title"), end="\n"):
  text = "".join(separator.join(row) + end for row in [names, *rows])
  path.write_text(text, "utf-8", newline="")
  return str(path)


def texts_of(source):
  return [source.fields(i)["title"] for i in range(len(source))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", [".jpg", ""])
@pytest.mark.parametrize("first", [True, False], ids=["path_first", "path_last"])
@pytest.mark.parametrize("name", STRAY)
def test_a_quote_that_begins_a_caption_merges_no_rows(tmp_path, caplog, name, first, ending, end):
  captions = STRAY[name]
  rows = [(f"img/{i}{ending}", text) for i, text in enumerate(captions)]
  names = ("filepath", "title")
  if not first:
    rows, names = [row[::-1] for row in rows], names[::-1]
  with caplog.at_level(logging.WARNING):
    source = open_source(write(tmp_path / "a.tsv", rows, names=names, end=end))
  assert texts_of(source) == captions
  assert [source.fields(i)["filepath"] for i in range(4)] == [f"img/{i}{ending}" for i in range(4)]
  if name != "closed_in_the_row" and name != "doubled":
    assert "a.tsv: " in caplog.text and "is read as a character" in caplog.text


@pytest.mark.parametrize("name", ["closed_at_an_end", "closed_by_the_next", "never_closed"])
def test_commas_too(tmp_path, name):
  rows = [(f"img/{i}.jpg", text) for i, text in enumerate(STRAY[name])]
  source = open_source(write(tmp_path / "a.csv", rows, ","))
  assert texts_of(source) == STRAY[name]


def test_a_row_with_a_wrong_number_of_fields_takes_no_other_with_it(tmp_path):
  """The caption has a comma, so its line is not a row; it is rejected alone."""
  rows = [("0.jpg", '"hello, there'), ("1.jpg", "a dog"), ("2.jpg", 'say hi"'), ("3.jpg", "last")]
  source = open_source(write(tmp_path / "a.csv", rows, ","))
  assert len(source) == 4
  with pytest.raises(Rejected, match=r"3 fields, but 2 columns"):
    source.fields(0)
  assert [source.fields(i)["title"] for i in (1, 2, 3)] == ["a dog", 'say hi"', "last"]


def test_quoted_captions_may_have_many_lines(tmp_path, caplog):
  captions = ["one\ntwo, three\nfour", "a\n1.jpg and more", '"\n"', "e.g, this\nin the U.S, that"]
  for first in (True, False):
    rows = [
      (f"{i}.jpg", f'"{text.replace(chr(34), chr(34) * 2)}"') for i, text in enumerate(captions)
    ]
    names = ("filepath", "title")
    if not first:
      rows, names = [row[::-1] for row in rows], names[::-1]
    for separator in (",", "\t"):
      source = open_source(write(tmp_path / "a.csv", rows, separator, names))
      assert texts_of(source) == captions
  assert not caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_byte_order_marks_are_not_text(tmp_path, kind):
  """Also before later rows, where files with marks were concatenated."""
  rows = [f'{{"filepath": "{i}.jpg", "title": "c{i}"}}' for i in range(3)]
  if kind != "jsonl":
    separator = "," if kind == "csv" else "\t"
    rows = [f"{i}.jpg{separator}c{i}" for i in range(3)]
    rows[0] = f'"filepath"{separator}title\n{rows[0]}'
  path = tmp_path / f"a.{kind}"
  path.write_text(f"{BOM}{rows[0]}\n{BOM}{rows[1]}\n{rows[2]}\n", "utf-8")
  source = open_source(str(path))
  assert texts_of(source) == ["c0", "c1", "c2"]
  assert [source.fields(i)["filepath"] for i in range(3)] == [f"{i}.jpg" for i in range(3)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_other_encodings_are_refused(tmp_path, kind):
  path = tmp_path / f"a.{kind}"
  path.write_text('filepath,title\n{"filepath": "0.jpg"},a\n', "utf-16")
  with pytest.raises(ValueError, match=rf"a\.{kind}: the text is in UTF-16"):
    open_source(str(path))


def test_line_ends_of_old_macs_are_named(tmp_path):
  path = write(tmp_path / "a.csv", [("0.jpg", "a"), ("1.jpg", "b")], ",", end="\r")
  with pytest.raises(ValueError, match=r"a\.csv: a carriage return in the names of the columns"):
    open_source(path)


def test_characters_that_are_no_line_ends_stay(tmp_path):
  captions = ["a\u2028b", "c\x85d", "e\x0cf", "g\x1ch"]
  rows = [(f"{i}.jpg", text) for i, text in enumerate(captions)]
  assert texts_of(open_source(write(tmp_path / "a.tsv", rows))) == captions
  lines = [f'{{"filepath": "{i}.jpg", "title": "{text}"}}' for i, text in enumerate(captions[:2])]
  (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
  assert texts_of(open_source(f"{tmp_path}/a.jsonl")) == captions[:2]


def test_short_rows_are_not_blank_lines(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(b"f\n\na\n\r\nb")
  assert table_files.row_starts(str(path), separator=b",").tolist() == [3, 7, 8]


def test_a_long_row_is_not_read(tmp_path, monkeypatch):
  path = write(tmp_path / "a.tsv", [("0.jpg", "b" * 200), ("1.jpg", "c")])
  monkeypatch.setattr(table_files, "_LONGEST", 100)
  source = open_source(path)
  with pytest.raises(Rejected, match="a row of 207 bytes"):
    source.key(0)
  assert source.key(1) == "a.tsv/1/1.jpg"


@pytest.mark.parametrize(
  "row",
  [("{i}.jpg", '"a', "b"), ("{i}.jpg", '"a', '"b'), ('"{i}', '"', "b"), ('"""', '""', '"""')],
  ids=["one", "two", "paths", "doubled"],
)
def test_the_time_to_find_rows_grows_with_the_table(tmp_path, row):
  """Each double quote could swallow all rows after it."""

  def seconds(count):
    rows = [[field.format(i=i) for field in row] for i in range(count)]
    path = write(tmp_path / "a.tsv", rows, names=("filepath", "title", "x"))
    spent = []
    for _ in range(3):
      start = time.process_time()
      table_files.row_starts(path, separator=b"\t", shape=table_files.Shape(3, 0))
      spent.append(time.process_time() - start)
    return min(spent)

  assert seconds(8000) < 20 * seconds(1000) + 0.01  # quadratic time would be 64-fold
