"""Damaged checkpoints: one changed bit anywhere is found, or changes nothing."""

from __future__ import annotations

import json
import logging
import random
import shutil

import jax
import numpy as np
import pytest

from bigalign.checkpoint import Checkpoints
from bigalign.data.files import checksums

PARTS = {"trainable": {"a/b": (40, 50)}, "opt": {"mu": (2000,)}}


def parts(step):
  """{part: {path: array}} that cannot be compressed to nothing."""
  keys = iter(jax.random.split(jax.random.key(step), 8))
  return {
    name: {path: jax.random.normal(next(keys), shape) for path, shape in arrays.items()}
    for name, arrays in PARTS.items()
  }


def abstract(arrays):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)


def written(workdir):
  """A run with two checkpoints and frozen parameters."""
  with Checkpoints(workdir, best="r") as checkpoints:
    checkpoints.save_frozen(parts(0)["trainable"])
    for step in (1, 2):
      checkpoints.save(step, parts(step), {"step": step, "seen": [1.5, step]}, {"r": step / 4})
  return workdir


def restored(workdir):
  """Everything of the newest checkpoint, as a program reads it."""
  with Checkpoints(workdir, best="r", read_only=True) as checkpoints:
    step = checkpoints.find("best")
    found = checkpoints.restore(step, abstract(parts(1)))
    frozen = checkpoints.restore_frozen(abstract(parts(0)["trainable"]))
    return step, checkpoints.meta(step), found, frozen


def flip(path, bit):
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << bit % 8
  path.write_bytes(data)


def is_right(values):
  step, meta, found, frozen = values
  same = jax.tree.map(np.array_equal, (found, frozen), (parts(2), parts(0)["trainable"]))
  # A changed letter of the key "checksum" leaves one key too many, and right values.
  known = {name: meta[name] for name in ("step", "seen")} == {"step": 2, "seen": [1.5, 2]}
  return step == 2 and known and all(jax.tree.leaves(same))


def silent(run, tmp_path, files, *, per_file, seed=0):
  """(tries, refused, wrong values that were restored) of single bits of these files."""
  draw, refused, wrong = random.Random(seed), 0, []
  tries = [
    (file, draw.randrange(8 * file.stat().st_size))
    for file in files
    for _ in range(per_file if file.stat().st_size else 0)
  ]
  for file, bit in tries:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    flip(copy / file.relative_to(run), bit)
    try:
      values = restored(copy)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
      assert str(copy) in str(error) and len(str(error).splitlines()) <= 8, error
      refused += 1
    else:
      if not is_right(values):
        wrong.append((file, bit))
    shutil.rmtree(copy)
  return len(tries), refused, wrong


def test_one_changed_bit_of_an_array_is_found_and_the_older_checkpoint_named(tmp_path):
  run = written(tmp_path / "run")
  assert is_right(restored(run))
  for folder, older in (("checkpoints/2/opt", True), ("frozen", False)):
    data = max((run / folder).rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(data, 8 * (data.stat().st_size // 2))
    with pytest.raises(RuntimeError, match="its checksum differs") as error:
      restored(run)
    assert str(data) in str(error.value)
    if older:
      assert f"the run then resumes from {run / 'checkpoints' / '1'}." in str(error.value)
    else:
      assert "backup" in str(error.value)
    flip(data, 8 * (data.stat().st_size // 2))
  assert is_right(restored(run))


def test_a_changed_bit_of_the_json_of_a_checkpoint_is_found(tmp_path):
  run = written(tmp_path / "run")
  for name in ("meta/metadata", "metrics/metrics"):
    path = run / "checkpoints/2" / name
    good = path.read_text()
    path.write_text(good.replace("2", "3") if "meta/" in name else good.replace("0.5", "0.1"))
    with pytest.raises(RuntimeError, match="its checksum is") as error:
      restored(run)
    assert str(path) in str(error.value) and "/checkpoints/1" in str(error.value)
    path.write_text(good[: len(good) // 2])
    with pytest.raises(RuntimeError, match="it is not JSON") as error:
      restored(run)
    assert str(path) in str(error.value)
    path.write_text(good)
  (run / "checkpoints/2/opt" / checksums.FILE).unlink()
  with pytest.raises(RuntimeError, match=r"checksums\.json is missing"):
    restored(run)


def test_a_checkpoint_of_an_older_version_is_restored_with_a_line_in_the_log(tmp_path, caplog):
  run = written(tmp_path / "run")
  for path in run.rglob(checksums.FILE):
    path.unlink()
  for path in run.rglob("_METADATA"):
    content = json.loads(path.read_text())
    assert content.pop("custom_metadata")
    path.write_text(json.dumps(content))
  for path in [*run.rglob("meta/metadata"), *run.rglob("metrics/metrics")]:
    content = json.loads(path.read_text())
    del content[checksums.KEY]
    path.write_text(json.dumps(content))
  with caplog.at_level(logging.INFO):
    assert is_right(restored(run))
  assert "has no checksums: an older version wrote it" in caplog.text


def test_a_checkpoint_is_read_by_orbax_alone(tmp_path):
  import orbax.checkpoint as ocp

  run = written(tmp_path / "run")
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(run / "checkpoints/2/opt", abstract(parts(2)["opt"]))
  np.testing.assert_array_equal(found["mu"], parts(2)["opt"]["mu"])


def test_shares_of_several_processes_read_each_file_once(tmp_path, monkeypatch):
  for i in range(7):
    (tmp_path / f"{i}").write_bytes(bytes(1000 * i))
  checksums.record(tmp_path, ["1", "2"], 0)
  checksums.record(tmp_path, ["3"], 1)
  checksums.seal_folder(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [*"0123456", checksums.FILE]
  read = []
  real = checksums._sum
  monkeypatch.setattr(checksums, "_sum", lambda path: read.append(path.name) or real(path))
  assert [checksums.damaged_file(tmp_path, i, 3) for i in range(3)] == ["", "", ""]
  assert sorted(read) == [*"0123456"]
  flip(tmp_path / "3", 5)
  found = [checksums.damaged_file(tmp_path, i, 3) for i in range(3)]
  assert sum(map(bool, found)) == 1 and str(tmp_path / "3") in "".join(found)
  (tmp_path / "3").unlink()
  assert "cannot be read" in checksums.damaged_file(tmp_path)


def test_sealed_json_survives_another_layout_and_nothing_else(tmp_path):
  value = {"b": 1.1, "a": {"1": [None, True, "é"]}, "n": float("inf")}
  sealed = json.loads(json.dumps(checksums.seal(value), indent=3))
  assert checksums.unseal(dict(reversed(sealed.items())), "x") == value
  with pytest.raises(checksums.Damaged, match="x was damaged or edited"):
    checksums.unseal({**sealed, "b": 1.2}, "x")
  assert checksums.unseal(value, "x") == value  # of an older version
  with pytest.raises(checksums.Damaged, match="x is damaged"):
    checksums.unseal([], "x")
  (tmp_path / "y").write_bytes(b"\xff{")
  with pytest.raises(checksums.Damaged, match="y is damaged: it is not JSON"):
    checksums.read_json(tmp_path / "y")


@pytest.mark.slow
def test_fifty_damaged_checkpoints_are_never_silent(tmp_path):
  run = written(tmp_path / "run")
  files = sorted(x for x in run.rglob("*") if x.is_file() and "checkpoints/1" not in str(x))
  large = [x for x in files if x.parent.name == "d"]
  tries, refused, wrong = silent(run, tmp_path, [*files, *large], per_file=2)
  assert not wrong
  assert tries >= 50 and refused >= tries // 2


@pytest.mark.long
def test_hundreds_of_damaged_checkpoints_are_never_silent(tmp_path):
  run = written(tmp_path / "run")
  files = sorted(x for x in run.rglob("*") if x.is_file() and "checkpoints/1" not in str(x))
  assert not silent(run, tmp_path, files, per_file=10, seed=1)[2]


@pytest.mark.parametrize(
  "error",
  [
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes."),
    RuntimeError("Gloo AllReduce failed: connection closed by peer"),
    ValueError('PERMISSION_DENIED: Error opening "zarr" driver: Error reading "gs://b/c"'),
    PermissionError("permission denied"),
  ],
)
def test_an_error_of_another_cause_calls_no_checkpoint_damaged(tmp_path, monkeypatch, error):
  """Nobody should move a good checkpoint away because another process was lost."""

  def restore(*_, **__):
    raise error

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"opt": parts(1)["opt"]}, {}, {})
    checkpoints._manager.wait_until_finished()
    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    with pytest.raises(type(error)) as raised:
      checkpoints.restore(1, {"opt": abstract(parts(1)["opt"])})
    assert raised.value is error
    monkeypatch.setattr(checkpoints._manager, "restore", lambda *_, **__: 1 / 0)
    with pytest.raises(RuntimeError, match=r"1 was committed but cannot be read: ZeroDivision.*\n"):
      checkpoints.restore(1, {"opt": abstract(parts(1)["opt"])})
