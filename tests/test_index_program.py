"""bigalign index: any number of processes, again and again, with the same result."""

from __future__ import annotations

import functools
import os
import pathlib

import pytest
from shards import samples, write_tar

from bigalign import index as program
from bigalign.data import index
from bigalign.data.sources import open_source


def _shards(folder: pathlib.Path, count: int = 4) -> str:
  for i in range(count):
    write_tar(folder / f"{i:05d}.tar", samples(10 * i, 3 + i))
  return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def test_processes_make_no_difference(tmp_path, monkeypatch):
  pattern = _shards(tmp_path / "shards")
  for workers in (1, 2):
    assert program.main([pattern, f"--out={tmp_path}/{workers}", f"--workers={workers}"]) == 0
  one, two = ((pathlib.Path(index.home(str(tmp_path / "shards"), str(tmp_path / n))) / index.FILE)
              for n in "12")
  assert one.read_bytes() == two.read_bytes()
  monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "2"))
  monkeypatch.setattr("bigalign.data.shards.UNASKED", -1)
  assert len(open_source(pattern)) == 3 + 4 + 5 + 6


def test_what_is_current_is_not_read_again(tmp_path, monkeypatch, capsys):
  pattern = _shards(tmp_path)
  assert program.main([pattern, "--workers=1"]) == 0
  first = (tmp_path / index.FILE).read_bytes()
  seen = []
  scan = index.tar.scan
  monkeypatch.setattr(index.tar, "scan", lambda buffer, *, path: seen.append(path) or
                      scan(buffer, path=path))
  assert program.main([f"{tmp_path}/*.tar", "--workers=1"]) == 0
  assert not seen and (tmp_path / index.FILE).read_bytes() == first
  assert "18 samples in 4 shards: 0 indexed, 4 current, 0 failed" in capsys.readouterr().out
  os.utime(tmp_path / "00002.tar", (1, 1))
  assert program.main([pattern, "--workers=1"]) == 0
  assert seen == [str(tmp_path / "00002.tar")]
  assert len(open_source(pattern)) == 18


def test_a_build_that_was_stopped_goes_on(tmp_path):
  pattern = _shards(tmp_path)

  def stopped(tasks):
    yield from map(program.process_shard, tasks[:2])
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    program.build([pattern], stopped)
  outcomes = program.build([pattern], functools.partial(program.run_local, workers=1))
  assert [outcome.state for outcome in outcomes] == ["current"] * 2 + ["indexed"] * 2
  assert len(open_source(pattern)) == 18


def test_shards_that_break_off_and_what_are_none_are_told(tmp_path, capsys):
  pattern = _shards(tmp_path)
  cut = tmp_path / "00001.tar"
  cut.write_bytes(cut.read_bytes()[:3000])
  assert program.main([pattern, "--workers=1"]) == 0
  said = capsys.readouterr().out
  assert "00001.tar" in said and "00000.tar" not in said
  (tmp_path / "00003.tar").write_bytes(b"<html>404</html>" * 100)
  assert program.main([pattern, "--workers=1"]) == 1
  said = capsys.readouterr().out
  assert "0 indexed, 3 current, 1 failed" in said
  with pytest.raises(OSError, match=r"00003\.tar: the shard changed"):
    open_source(pattern)
  assert len(open_source(f"{tmp_path}/{{00000,00002}}.tar")) == 3 + 5


def test_lists_and_variables(tmp_path, monkeypatch):
  _shards(tmp_path / "a", 2)
  _shards(tmp_path / "b", 1)
  monkeypatch.setenv("BIGALIGN_TEST_ROOT", str(tmp_path))
  assert program.main(["$BIGALIGN_TEST_ROOT/a/*.tar::$BIGALIGN_TEST_ROOT/b/00000.tar"]) == 0
  assert (tmp_path / "a" / index.FILE).exists() and (tmp_path / "b" / index.FILE).exists()
