"""Recaptions in files next to the shards: by key, at random, drawn by weight, never stale."""

from __future__ import annotations

import contextlib
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.batches import data_options
from helpers.object_store_server import store
from helpers.small_shards import picture, write_tar

from bigalign.data.files.storage import FileChanged
from bigalign.data.sources.base import Spec, open_source
from bigalign.inputs import open_data
from bigalign.shards import index as program
from bigalign.shards.convert import convert

PARQUET, JSONL = "recap.parquet:caption", "more.jsonl:texts"


def two_shards(folder):
  """10 and 12 samples; every second has a recaption in Parquet, three have some in JSON."""
  for shard, count in enumerate((10, 12)):
    keys = [f"sub/{shard}{i:03d}" for i in range(count)]
    write_tar(
      folder / f"{shard}.tar",
      [
        member
        for i, key in enumerate(keys)
        for member in ((f"{key}.jpg", picture(i)), (f"{key}.txt", f"alt {key}".encode()))
      ],
    )
    odd = keys[::-2]  # in another order than the shard's
    pq.write_table(
      pa.table(
        dict(
          caption=[f"recap {key}" for key in odd] + ["second of the last", " ", "of nobody"],
          key=[*odd, keys[-1], keys[0], "elsewhere"],
          score=[0.5] * (len(odd) + 3),
        )
      ),
      folder / f"{shard}.recap.parquet",
    )
    (folder / f"{shard}.more.jsonl").write_text(
      "\n".join(
        json.dumps(dict(key=key, texts=[f"a\u2028{key}", "", f"b {key}"]), ensure_ascii=False)
        for key in keys[:3]
      )
      + "\n\n"
    )
  return f"{folder}/*.tar"


def read(pattern, *fields):
  return program.main([pattern, "--workers=1", "--sidecars", ",".join(fields)])


def test_captions_from_files_next_to_the_shards(tmp_path, capsys):
  pattern = two_shards(tmp_path)
  with pytest.raises(
    FileNotFoundError,
    match=r"the field 'recap\.parquet:caption' of 2 of 2 shards"
    r".*: bigalign index '.*\*\.tar' --sidecars recap\.parquet:caption",
  ):
    open_source(pattern, captions=(PARQUET, "txt"))
  assert read(pattern, PARQUET, JSONL) == 0
  assert "2 indexed" in capsys.readouterr().out
  source = pickle.loads(pickle.dumps(open_source(pattern, captions=(PARQUET, "txt", JSONL))))
  alone = open_source(pattern)
  assert (
    source.fingerprint == alone.fingerprint
  )  # the fingerprint depends on the samples, for views and runs
  for i in (21, 0, 9, 10, 13, 12, 1):
    key = f"sub/0{i:03d}" if i < 10 else f"sub/1{i - 10:03d}"
    place = i % 10 if i < 10 else i - 10
    recap = ((f"recap {key}",) if place % 2 else ()) + (
      ("second of the last",) if i in (9, 21) else ()
    )
    more = (f"a\u2028{key}", f"b {key}") if place < 3 else ()
    assert source[i]["texts"] == {PARQUET: recap, "txt": (f"alt {key}",), JSONL: more}
    assert source[i]["captions"] == (recap or (f"alt {key}",))
    assert source[i]["image"] == alone[i]["image"]
  assert open_source(pattern, captions=(JSONL,))[5]["captions"] == ()
  convert(Spec(pattern, source.captions), f"{tmp_path}/copy")
  copy = open_source(f"{tmp_path}/copy/*.array_record", captions=source.captions)
  assert [copy[i] for i in range(22)] == [source[i] for i in range(22)]


def test_recaptions_are_drawn_by_their_weights(tmp_path):
  pattern = two_shards(tmp_path)
  assert read(pattern, PARQUET) == 0
  inputs = open_data(
    data_options(
      source=pattern,
      captions=((PARQUET, 3), ("txt", 1)),
      second_captions=("txt",),
      image_size=8,
      tokenizer=dict(name="byte", length=32),
    )
  )
  with contextlib.closing(
    inputs.batches(rejected_log="", batch_size=22, rows=np.arange(22), seed=0, stop=660)
  ) as found:
    batches = list(found)
  ids = np.concatenate([batch["image_id"][:, 1] for batch in batches])
  drawn = np.concatenate([batch["text"] for batch in batches])
  said = [bytes((row[row > 2] - 3).tolist()).decode() for row in drawn]
  odd = [text.startswith("alt") for i, text in zip(ids, said) if i % 10 % 2 and i < 20]
  assert len(odd) == 300 and 0.15 < np.mean(odd) < 0.35
  assert all(text.startswith("alt") for i, text in zip(ids, said) if i in (2, 4, 12))


def test_faults_of_a_sidecar_are_named(tmp_path, capsys):
  pattern = two_shards(tmp_path)
  assert read(pattern, PARQUET) == 0 == read(pattern, PARQUET)
  assert "2 current" in capsys.readouterr().out.splitlines()[-2]
  path = tmp_path / "1.recap.parquet"
  os.utime(path, ns=(1, 1))
  with pytest.raises(FileChanged, match=r"1\.recap\.parquet changed since it was read; .*bigalign"):
    open_source(pattern, captions=(PARQUET,))
  assert read(pattern, PARQUET) == 0
  os.unlink(path)
  assert open_source(pattern, captions=(PARQUET,))[21]["captions"][0] == "recap sub/1011"
  for field, said in {
    "recap.parquet:text": "no column 'text'; the columns are: ['caption', 'key', 'score']",
    "none.jsonl:caption": "none.jsonl",
    "bad.jsonl:caption": "0.bad.jsonl, line 2: ",
    "list.jsonl:caption": "0.list.jsonl, line 1: a list, expected an object",
    "other.jsonl:caption": "has no row for any sample of 0.tar: its keys are like '7', and those"
    " of the shard like 'sub/0000'",
    "cut.parquet:caption": "not a complete Parquet file",
  }.items():
    (tmp_path / "0.bad.jsonl").write_text('{"key": "a", "caption": "b"}\n{')
    (tmp_path / "0.list.jsonl").write_text("[]")
    (tmp_path / "0.other.jsonl").write_text('{"key": 7, "caption": "b"}')
    (tmp_path / "0.cut.parquet").write_bytes(b"PAR1")
    assert read(f"{tmp_path}/0.tar", field) == 1
    assert said in capsys.readouterr().out
  with pytest.raises(SystemExit):
    read(pattern, "caption")


def test_remote_sidecars(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "index"))
  two_shards(tmp_path)
  with store(tmp_path) as server:
    pattern = f"{server.url}/{{0..1}}.tar"
    assert (
      program.main([pattern, f"--out={tmp_path}/index", "--sidecars", PARQUET, "--workers=1"]) == 0
    )
    source = open_source(pattern, captions=(PARQUET, "txt"))
    assert [source[i]["captions"][0] for i in (13, 12)] == ["recap sub/1003", "alt sub/1002"]
