"""bigalign index: any number of processes, again and again, with the same result."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import time

import numpy as np
import pytest
from helpers.object_store_server import store
from helpers.small_shards import picture, samples, write_tar
from PIL import Image

from bigalign.data.files import processes
from bigalign.data.sources.base import open_source
from bigalign.data.tar import index
from bigalign.shards import index as program


def _shards(folder: pathlib.Path, count: int = 4) -> str:
  for i in range(count):
    write_tar(folder / f"{i:05d}.tar", samples(10 * i, 3 + i))
  return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def test_the_index_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
  pattern = _shards(tmp_path / "shards")
  for workers in (1, 2):
    assert program.main([pattern, f"--out={tmp_path}/{workers}", f"--workers={workers}"]) == 0
  one, two = (
    (pathlib.Path(index.home(str(tmp_path / "shards"), str(tmp_path / n))) / index.FILE)
    for n in "12"
  )
  assert one.read_bytes() == two.read_bytes()
  monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "2"))
  monkeypatch.setattr("bigalign.data.tar.shards.UNASKED", -1)
  assert len(open_source(pattern)) == 3 + 4 + 5 + 6


def test_unchanged_shards_are_not_read_again(tmp_path, monkeypatch, capsys):
  pattern = _shards(tmp_path)
  assert program.main([pattern, "--workers=1"]) == 0
  first = (tmp_path / index.FILE).read_bytes()
  seen = []
  scan = index.parse.scan
  monkeypatch.setattr(
    index.parse, "scan", lambda buffer, *, path: seen.append(path) or scan(buffer, path=path)
  )
  assert program.main([f"{tmp_path}/*.tar", "--workers=1"]) == 0
  assert not seen and (tmp_path / index.FILE).read_bytes() == first
  assert "18 samples in 4 shards: 0 indexed, 4 current, 0 failed" in capsys.readouterr().out
  os.utime(tmp_path / "00002.tar", (1, 1))
  assert program.main([pattern, "--workers=1"]) == 0
  assert seen == [str(tmp_path / "00002.tar")]
  assert len(open_source(pattern)) == 18


def test_an_interrupted_build_resumes(tmp_path):
  pattern = _shards(tmp_path)

  def stopped(tasks):
    yield from map(program.process_shard, tasks[:2])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    program.build([pattern], stopped)
  outcomes = program.build(
    [pattern], functools.partial(processes.run, program.process_shard, workers=1)
  )
  assert [outcome.state for outcome in outcomes] == ["current"] * 2 + ["indexed"] * 2
  assert len(open_source(pattern)) == 18


def test_truncated_and_invalid_shards_are_listed(tmp_path, capsys):
  pattern = _shards(tmp_path)
  cut = tmp_path / "00001.tar"
  cut.write_bytes(cut.read_bytes()[:3000])
  assert program.main([pattern, "--workers=1"]) == 0
  printed = capsys.readouterr().out
  assert "00001.tar" in printed and "00000.tar" not in printed
  (tmp_path / "00003.tar").write_bytes(b"<html>404</html>" * 100)
  assert program.main([pattern, "--workers=1", f"--json={tmp_path}/totals.json"]) == 1
  printed = capsys.readouterr().out
  assert "0 indexed, 3 current, 1 failed" in printed
  totals = json.loads((tmp_path / "totals.json").read_text())
  assert [totals[x] for x in ("shards", "indexed", "current", "failed")] == [4, 0, 3, 1]
  assert [x["shard"][-9:] for x in totals["problems"]] == ["00001.tar", "00003.tar"]
  assert totals["indexes"] == [str(tmp_path / index.FILE)]
  with pytest.raises(OSError, match=r"00003\.tar: the shard changed"):
    open_source(pattern)
  assert len(open_source(f"{tmp_path}/{{00000,00002}}.tar")) == 3 + 5


def test_no_error_of_a_shard_ends_the_program(tmp_path, monkeypatch, capsys):
  """A gzip file in an object store, a missing object, an unexpected error, torn files."""
  folder = tmp_path / "shards"
  _shards(folder)
  packed = gzip.compress((folder / "00001.tar").read_bytes())
  (folder / "00001.tar").write_bytes(packed)
  with store(folder) as server:
    pattern = f"{server.url}/{{00000..00004}}.tar"
    assert program.main([pattern, f"--out={tmp_path}/index", "--workers=1"]) == 1
  printed = capsys.readouterr().out
  assert "00001.tar: not indexed: not an uncompressed tar" in printed and "gunzip" in printed
  assert "00004.tar: not indexed: there is no such object" in printed
  assert "12 samples in 5 shards: 3 indexed, 0 current, 2 failed" not in printed
  assert "3 indexed, 0 current, 2 failed" in printed

  scan = index.parse.scan

  def failing(buffer, *, path):
    if "00002" in path:
      raise ZeroDivisionError("what nobody expected")
    return scan(buffer, path=path)

  monkeypatch.setattr(index.parse, "scan", failing)
  assert program.main([f"{folder}/*.tar", "--stats", "--workers=1"]) == 1
  printed = capsys.readouterr().out
  assert "00002.tar: not indexed: ZeroDivisionError('what nobody expected')" in printed
  assert "2 indexed, 0 current, 2 failed" in printed
  monkeypatch.setattr(index.parse, "scan", scan)
  (torn,) = (folder / "bigalign.stats").glob("00000.tar.*")
  torn.write_bytes(torn.read_bytes()[:50])
  (folder / index.PARTS).mkdir()
  (folder / index.PARTS / "00002.tar.index").write_bytes(b"BAINDEX1")
  assert program.main([f"{folder}/*.tar", "--stats", "--workers=1"]) == 1
  assert "2 indexed, 1 current, 1 failed" in capsys.readouterr().out


def test_remote_shards_are_checked_at_the_same_time(tmp_path):
  """One by one, 40 shards would take 40 times the latency, twice with their sidecars."""
  folder = tmp_path / "shards"
  _shards(folder, 40)
  for i in range(40):
    rows = [json.dumps(dict(key=f"{n:06d}", text="x")) for n in range(10 * i, 10 * i + 3 + i)]
    (folder / f"{i:05d}.recap.jsonl").write_text("\n".join(rows))
  with store(folder) as server:
    argv = [f"{server.url}/{{00000..00039}}.tar", f"--out={tmp_path}/index", "--workers=1"]
    argv += ["--sidecars=recap.jsonl:text"]
    assert program.main(argv) == 0
    server.latency = 0.1
    begin = time.monotonic()
    assert program.main(argv) == 0
    assert time.monotonic() - begin < 40 * server.latency / 2


def test_lists_and_variables(tmp_path, monkeypatch):
  _shards(tmp_path / "a", 2)
  _shards(tmp_path / "b", 1)
  monkeypatch.setenv("BIGALIGN_TEST_ROOT", str(tmp_path))
  assert program.main(["$BIGALIGN_TEST_ROOT/a/*.tar::$BIGALIGN_TEST_ROOT/b/00000.tar"]) == 0
  assert (tmp_path / "a" / index.FILE).exists() and (tmp_path / "b" / index.FILE).exists()


def test_stats_are_rows_of_the_samples(tmp_path, monkeypatch):
  bomb = io.BytesIO()
  Image.new("L", (30, 40)).save(bomb, "png")
  header = bytearray(bomb.getvalue())
  header[16:24] = (60_000).to_bytes(4) * 2
  pictures = [
    picture(0, size=(20, 24)),
    picture(1, size=(7, 9), kind="png"),
    bytes(header),
    picture(3, size=(5, 6), kind="webp"),
    b"<html>",
  ]
  members = []
  for i, data in enumerate(pictures):
    members += [
      (f"{i}.jpg", data),
      (f"{i}.txt", b" a caption \n"[i:]),
      (f"{i}.json", json.dumps(dict(caption="x" * i, nsfw=i == 1, url="u")).encode()),
    ]
  members[2] = ("0.json", b"{oops")
  members[5] = ("1.json", b'{"caption": "y", "similarity": 0.25, "id": 9007199254740991}')
  write_tar(tmp_path / "0.tar", members)
  write_tar(tmp_path / "1.tar", [("9.txt", "no image, ünicode".encode())])
  argv = [f"{tmp_path}/*.tar", "--stats", "--captions=txt,json.caption", "--workers=1"]
  assert program.main(argv) == 0
  first, second = open_source(f"{tmp_path}/{{0,1}}.tar").columns()
  sizes = list(zip(first["width"].tolist(), first["height"].tolist()))
  assert sizes == [(24, 20), (9, 7), (60_000, 60_000), (6, 5), (0, 0)]
  assert first["image_bytes"].tolist() == [len(data) for data in pictures]
  assert [row.tobytes() for row in first["sha256"]] == [
    hashlib.sha256(data).digest() for data in pictures
  ]
  assert first["length.txt"].tolist() == [9, 9, 7, 7, 6]
  assert first["length.json.caption"].tolist() == [0, 1, 2, 3, 4]
  assert [name for name in first.dtype.names if name.startswith("json.")] == [
    "json.id",
    "json.nsfw",
    "json.similarity",
  ]
  np.testing.assert_array_equal(first["json.nsfw"], [np.nan, np.nan, 0, 0, 0])
  assert first["json.id"][1] == 9007199254740991
  assert second["length.txt"].tolist() == [17] and not second["sha256"].any()
  monkeypatch.setattr(index.parse, "members", None)  # would fail if called
  assert program.main(argv) == 0


def test_outdated_stats_are_an_error(tmp_path):
  pattern = _shards(tmp_path, 1)
  with pytest.raises(FileNotFoundError, match=r"00000\.tar has no stats .*index --stats"):
    list(open_source(pattern).columns())
  assert program.main([pattern, "--stats", "--workers=1"]) == 0
  assert [len(rows) for rows in open_source(pattern).columns()] == [3]
  os.utime(tmp_path / "00000.tar", (1, 1))
  assert program.main([pattern, "--workers=1"]) == 0
  with pytest.raises(FileNotFoundError, match="no stats"):
    list(open_source(pattern).columns())
