"""Lists of keys are views: local and far, compressed, with keys that are twice there or not."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest
from helpers.every_format import VERSIONS
from helpers.object_store_server import store
from helpers.small_shards import picture, samples, write_tar

from bigalign.data.files import storage
from bigalign.data.sources import base, keys
from bigalign.data.sources.base import Spec, open_source
from bigalign.data.sources.mixture import Mixture
from bigalign.data.sources.views import View
from bigalign.shards import index, view


def two_shards(folder):
  """110 samples; one is bad, two keys are not ASCII and not UTF-8."""
  members = samples(0, 50)
  members[9] = ("000003.jpg", b"")
  write_tar(folder / "a/0.tar", members)
  write_tar(
    folder / "a/1.tar",
    [
      *samples(50, 58),
      ("été.jpg", picture()),
      ("été.txt", b"a"),
      ("\udcff.jpg", picture()),
      ("\udcff.txt", b"a"),
    ],
  )
  return f"{folder}/a/*.tar"


def test_a_list_of_keys_is_a_view(tmp_path, capsys):
  pattern = two_shards(tmp_path)
  listed = [
    "1.tar/été",
    "0.tar/000049",
    "1.tar/000050",
    "0.tar/000003",
    "1.tar/none",
    "",
    "0.tar/000049",
    "1.tar/000107",
  ]
  (tmp_path / "keys.txt.gz").write_bytes(gzip.compress("\r\n".join(listed).encode()))
  found = view.main(
    [pattern, "--keys", f"{tmp_path}/keys.txt.gz", "--out", f"{tmp_path}/v", "--workers=1"]
  )
  assert ["keys", "unknown", "1"] in [x.split() for x in capsys.readouterr().out.splitlines()]
  assert found["kept"] == 5 and found["keys_listed"] == 6
  assert found["samples_that_share_a_key"] == 0
  kept = View(open_source(pattern), f"{tmp_path}/v")
  assert [kept[i]["key"] for i in range(5)] == [
    "0.tar/000003",
    "0.tar/000049",
    "1.tar/000050",
    "1.tar/000107",
    "1.tar/été",
  ]
  # The same names in another folder: both samples are kept and counted.
  write_tar(tmp_path / "b/0.tar", samples(40, 20))
  both = keys.find(Spec(f"{pattern}::{tmp_path}/b/0.tar"), f"{tmp_path}/keys.txt.gz", workers=1)
  assert both.indices.tolist() == [3, 49, 50, 107, 108, 119] and both[1:] == (6, 1, 1)
  (tmp_path / "other.txt").write_text("000007\n")
  with pytest.raises(
    ValueError,
    match=r"other\.txt names no sample of .*: its keys are like"
    r" '000007', and those of the source like '0\.tar/000000'",
  ):
    keys.find(Spec(pattern), f"{tmp_path}/other.txt", workers=1)
  (tmp_path / "empty.txt").write_text("\n")
  with pytest.raises(ValueError, match=r"empty\.txt: no keys; expected one sample key per line"):
    keys.find(Spec(pattern), f"{tmp_path}/empty.txt", workers=1)


def test_remote_shards_and_remote_lists(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "index"))
  two_shards(tmp_path)
  with store(tmp_path) as server:
    pattern = f"{server.url}/a/{{0..1}}.tar"
    assert index.main([pattern, f"--out={tmp_path}/index", "--workers=1"]) == 0
    (tmp_path / "keys.txt").write_text("1.tar/000050\n0.tar/000001")
    server.requests.clear()
    found = keys.find(Spec(pattern), f"{server.url}/keys.txt", workers=1)
    assert found.indices.tolist() == [1, 50]
    assert len(server.requests) < 12  # blocks of samples, not a request for each


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_are_those_of_the_records(tmp_path, version):
  records = [dict(image=picture(i), captions=(f"picture {i}",), label=1) for i in range(13)]
  options = dict(data_dir=str(tmp_path / "d")) if version == "tfds" else {}
  source = open_source(VERSIONS[version](tmp_path / "d", records), **options)
  assert [base.key(source, i) for i in range(13)] == [source[i]["key"] for i in range(13)]


def test_only_headers_of_local_shards_are_read(tmp_path, monkeypatch):
  source = open_source(two_shards(tmp_path))
  read, sizes = storage.read, []
  monkeypatch.setattr(
    storage, "read", lambda *args, **kw: sizes.append(len(data := read(*args, **kw))) or data
  )
  assert [base.key(source, i) for i in range(110)] == [
    *(f"{n // 50 if n < 50 else 1}.tar/{n:06d}" for n in range(108)),
    "1.tar/été",
    "1.tar/\udcff",
  ]
  assert sum(sizes) <= 110 * 2 * 513


def test_a_long_list_is_held_as_numbers(tmp_path):
  pattern = two_shards(tmp_path)
  path = tmp_path / "keys.txt"
  path.write_text("".join(f"{i % 2}.tar/{i:06d}\n" for i in range(100_000)))
  open_source(pattern)
  tracemalloc.start()
  try:
    found = keys.find(Spec(pattern), str(path), workers=1)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert found.listed == 100_000 and len(found.indices) == 54
  assert peak < 6e6  # a list of the texts alone has 7 MB


def test_rows_of_a_table_with_one_row_per_caption_have_different_keys(tmp_path):
  (tmp_path / "0.jpg").write_bytes(b"i")
  (tmp_path / "t.csv").write_text("filepath,title\n0.jpg,one\n0.jpg,two\n")
  source = open_source(f"{tmp_path}/t.csv")
  assert [base.key(source, i) for i in range(2)] == ["t.csv/0/0.jpg", "t.csv/1/0.jpg"]
  assert source[1]["key"] == base.key(source, 1)


def test_keys_that_repeat_in_files_of_one_name_are_found(tmp_path):
  for folder, first in (("a", 0), ("b", 0), ("c", 9)):
    write_tar(tmp_path / folder / "0.tar", samples(first, 3))
    write_tar(tmp_path / folder / "1.tar", samples(3, 3))
  assert base.repeated_key(open_source(f"{tmp_path}/a/*.tar")) == ""
  assert base.repeated_key(open_source(f"{tmp_path}/{{a,b}}/0.tar")) == "0.tar/000000"
  assert base.repeated_key(open_source(f"{tmp_path}/{{a,c}}/0.tar")) == ""
  assert base.repeated_key(open_source(f"{tmp_path}/a/0.tar::{tmp_path}/b/0.tar"))
  parts = {name: open_source(f"{tmp_path}/{name}/0.tar") for name in "ab"}
  mixture = Mixture(parts, [(0, dict(a=1.0, b=1.0))])
  assert base.repeated_key(mixture) == ""
  assert base.key(mixture, 4) == mixture[4]["key"] == "b/0.tar/000001"
