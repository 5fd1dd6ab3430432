"""Where a text is split into lines: at line ends, and never inside a value."""

from __future__ import annotations

import io
import json

import pytest
from helpers.small_shards import samples, write_tar

from bigalign.data.files import lines
from bigalign.data.sources import keys
from bigalign.data.sources.base import Spec, open_source
from bigalign.data.sources.webdataset import read_classnames
from bigalign.data.text.tokenizers import make_tokenizer
from bigalign.evals.zeroshot import read_lines, read_templates
from bigalign.shards import index

# What str.splitlines() takes for a line end, besides "\n", "\r\n" and "\r".
INSIDE = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
BOM = "\ufeff"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_end_a_line(end):
  values = [f"a{character}b" for character in INSIDE] + ["", "last"]
  assert lines.split(end.join(values)) == values
  assert lines.split(end.join([*values, ""])) == values


def test_a_carriage_return_inside_a_line_belongs_to_it():
  assert lines.split("a\rb\nc\r\n") == ["a\rb", "c"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", BOM])
def test_pieces_of_a_vocabulary_keep_their_ids(tmp_path, end, mark):
  """bert-base-chinese has U+2028 and U+0085 as pieces; the id of a piece is its line number."""
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *INSIDE, "\u3000", "cat", "cat\x1c", "dog "]
  (tmp_path / "vocab.txt").write_bytes((mark + end.join([*pieces, ""])).encode())
  tokenizer = make_tokenizer("wordpiece", length=5, path=str(tmp_path / "vocab.txt"))
  ids, _ = tokenizer.encode_batch(["cat dog"])
  assert ids.tolist() == [[2, pieces.index("cat"), pieces.index("dog "), 3, 0]]
  assert tokenizer.vocab_size == len(pieces)


@pytest.mark.parametrize("mark", ["", BOM])
def test_names_of_classes_keep_their_labels(tmp_path, mark):
  names = ["red\u2028panda", "tree\x85frog", "fire\x0cfly", "cat"]
  path = tmp_path / "classnames.txt"
  path.write_text(mark + "\n".join(names) + f"\n{mark}\n\n", "utf-8")
  assert read_classnames(path) == tuple(names)
  assert read_lines(str(path), "classnames", labels=True) == names
  path.write_text(mark + "\n".join(f"a {{c}} {name}" for name in names), "utf-8")
  assert read_templates(str(path)) == [f"a {{c}} {name}" for name in names]
  path = tmp_path / "names.json"
  path.write_text(mark + json.dumps(names, ensure_ascii=False), "utf-8")
  assert read_lines(str(path), "classnames", labels=True) == names


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_named(tmp_path, encoding):
  path = tmp_path / "classnames.txt"
  path.write_text("café\nvélo\n", encoding)
  with pytest.raises(ValueError, match=r"classnames\.txt: .*UTF-8"):
    read_classnames(path)


def test_a_list_of_keys_names_what_it_holds(tmp_path):
  names = [f"a{character}b" for character in INSIDE]
  members = [(f"{name}.{kind}", b"a") for name in names for kind in ("jpg", "txt")]
  path = write_tar(tmp_path / "0.tar", members)
  for end in ("\n", f"\r\n{BOM}"):
    text = "".join(f"0.tar/{name}{end}" for name in names)
    (tmp_path / "keys.txt").write_text(text, "utf-8", newline="")
    found = keys.find(Spec(path), str(tmp_path / "keys.txt"), workers=1)
    assert found.indices.tolist() == list(range(len(names))) and not found.unknown


def test_captions_of_a_file_next_to_a_shard(tmp_path):
  path = write_tar(tmp_path / "0.tar", samples(0, 3))
  rows = [dict(key=f"{i:06d}", caption=f"c{i}\u2028\x85d") for i in range(3)]
  text = "".join(f"{BOM}{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
  (tmp_path / "0.re.jsonl").write_text(text, "utf-8")
  assert not index.main([path, "--sidecars", "re.jsonl:caption", "--workers=1"])
  source = open_source(path, captions=("re.jsonl:caption",))
  assert [source[i]["captions"] for i in range(3)] == [(row["caption"],) for row in rows]


def test_a_line_without_end_is_not_read_whole(monkeypatch):
  monkeypatch.setattr(lines, "LONGEST", 100)
  with pytest.raises(ValueError, match=r"keys\.txt: line 2 has more than 100 bytes"):
    list(lines.iterate(io.BytesIO(b"a\n" + b"b" * 1000), name="keys.txt"))


def test_a_byte_order_mark_is_not_a_part_of_a_caption_or_label(tmp_path):
  """Also alone, where the caption is blank."""
  texts = (f"{BOM}a cat", f" {BOM} a\u2028b\r\n", BOM)
  members = [
    (f"{i}.{kind}", data)
    for i, text in enumerate(texts)
    for kind, data in (("jpg", b"x"), ("txt", text.encode()), ("cls", f"{BOM}{i}".encode()))
  ]
  source = open_source(write_tar(tmp_path / "0.tar", members))
  assert [source[i]["captions"] for i in range(3)] == [("a cat",), ("a\u2028b",), ()]
  assert [source[i]["label"] for i in range(3)] == [0, 1, 2]
