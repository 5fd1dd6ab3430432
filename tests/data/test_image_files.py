"""Paths in tables: any file of the machine may be named, and few may be read."""

from __future__ import annotations

import logging
import os
import socket
import tracemalloc

import pytest
from helpers.small_shards import picture

from bigalign.data.files import storage
from bigalign.data.image.decode import decode
from bigalign.data.samples import image_files
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import open_source


def table(folder, *names, **options):
  """A table of images, the last of which is a good one."""
  folder.mkdir(exist_ok=True)
  (folder / "good.jpg").write_bytes(picture(0))
  rows = "".join(f"{name}\ta caption\n" for name in [*names, "good.jpg"])
  (folder / "t.tsv").write_text(f"filepath\ttitle\n{rows}")
  return open_source(f"{folder}/t.tsv", **options)


def reject(source, i=0):
  with pytest.raises(Rejected) as error:
    source[i]
  return error.value


def make_special(folder):
  """{name: what the message calls it} of files that are not regular."""
  os.mkfifo(folder / "fifo.jpg")
  (folder / "folder.jpg").mkdir()
  os.symlink("loop.jpg", folder / "loop.jpg")
  os.symlink("b.jpg", folder / "a.jpg")
  os.symlink("a.jpg", folder / "b.jpg")
  os.symlink("fifo.jpg", folder / "link.jpg")
  return {
    "fifo.jpg": "a FIFO",
    "folder.jpg": "a folder",
    "loop.jpg": "symbolic links",
    "a.jpg": "symbolic links",
    "link.jpg": "a FIFO",
    "folder.jpg/..": "a folder",
    "missing.jpg": "No such file",
    "good.jpg/x": "Not a directory",
  }


def test_only_regular_files_are_read(tmp_path):
  folder = tmp_path / "t"
  folder.mkdir()
  special = make_special(folder)
  server = socket.socket(socket.AF_UNIX)
  cwd = os.getcwd()
  os.chdir(folder)  # the name of a socket has at most 107 characters
  try:
    server.bind("socket.jpg")
  finally:
    os.chdir(cwd)
    server.close()
  special["socket.jpg"] = "a socket"
  source = table(folder, *special)
  for i, text in enumerate(special.values()):
    error = reject(source, i)
    assert error.reason == "no_image" and text in error.detail, (list(special)[i], error.detail)
  assert source[len(special)]["image"] == picture(0)


def test_devices_are_not_opened(tmp_path):
  names = ["/dev/zero", "/dev/stdin", "/dev/random", "/dev/tty"]
  source = table(tmp_path / "t", *names, root="/")
  for i in range(len(names)):
    assert reject(source, i).reason == "no_image"
  assert "a device" in reject(source, 0).detail


def test_a_sparse_file_is_not_read(tmp_path):
  source = table(tmp_path / "t", "sparse.jpg")
  with open(tmp_path / "t/sparse.jpg", "wb") as file:
    file.truncate(1 << 32)
  tracemalloc.start()
  try:
    error = reject(source)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
  finally:
    tracemalloc.stop()
  assert error.reason == "too_large" and "4294967296 bytes" in error.detail


def test_a_file_that_is_larger_than_the_system_says(tmp_path, monkeypatch):
  """Files in /proc have a size of 0."""
  monkeypatch.setattr(image_files, "MAX_BYTES", 8)
  monkeypatch.setattr(image_files, "_CHUNK", 3)
  (tmp_path / "a.jpg").write_bytes(b"12345678")
  assert image_files.read("a.jpg", folder=str(tmp_path), key="k") == b"12345678"
  with pytest.raises(Rejected, match="too_large"):
    image_files.read("/proc/self/status", folder=str(tmp_path), root="/", key="k")


def secrets(tmp_path):
  (tmp_path / "secret.jpg").write_bytes(picture(1))
  (tmp_path / "other").mkdir()
  (tmp_path / "other/secret.jpg").write_bytes(picture(1))
  folder = tmp_path / "t"
  folder.mkdir()
  os.symlink(tmp_path / "secret.jpg", folder / "link.jpg")
  os.symlink(tmp_path / "other", folder / "linked")
  (tmp_path / "t2").mkdir()
  (tmp_path / "t2/secret.jpg").write_bytes(picture(1))
  return [
    "../secret.jpg",
    f"{tmp_path}/secret.jpg",
    "../../../../../../../../../../etc/passwd",
    "/etc/passwd",
    "link.jpg",
    "linked/secret.jpg",
    "linked/../secret.jpg",
    "../t2/secret.jpg",
    "x/../../secret.jpg",
  ]


def test_images_are_below_the_folder_of_the_table(tmp_path):
  names = secrets(tmp_path)
  (tmp_path / "t/x").mkdir()
  source = table(tmp_path / "t", *names)
  for i, name in enumerate(names):
    error = reject(source, i)
    assert error.reason == "no_image" and "source_options=dict(root=" in error.detail, name
  assert source[len(names)]["image"] == picture(0)


def test_root_allows_another_folder(tmp_path):
  names = secrets(tmp_path)
  (tmp_path / "t/x").mkdir()
  source = table(tmp_path / "t", *names, root=str(tmp_path / "other"))
  assert source[names.index("linked/secret.jpg")]["image"] == picture(1)
  assert "not below" in reject(source, 0).detail
  source = table(tmp_path / "t", *names, root=str(tmp_path))
  read = [source[i]["image"] for i, name in enumerate(names) if "etc" not in name]
  assert read == [picture(1)] * len(read)
  assert "not below" in reject(source, 3).detail
  source = table(tmp_path / "t", *names, root="/")
  assert source[0]["image"] == picture(1) and b"root" in source[3]["image"]


def test_a_table_inside_of_a_linked_folder(tmp_path):
  table(tmp_path / "real")
  os.symlink(tmp_path / "real", tmp_path / "link")
  assert open_source(f"{tmp_path}/link/t.tsv")[0]["image"] == picture(0)
  source = table(tmp_path / "link", f"{tmp_path}/real/good.jpg", f"{tmp_path}/link/good.jpg")
  assert [source[i]["image"] for i in range(3)] == [picture(0)] * 3


def test_a_table_of_absolute_paths_says_what_to_set(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images/0.jpg").write_bytes(picture(0))
  (tmp_path / "t").mkdir()
  path = tmp_path / "t/a.csv"
  path.write_text(f"filepath,title\n{tmp_path}/images/0.jpg,a\n")
  with pytest.raises(ValueError, match=r"is not below .*data\.source_options=dict\(root="):
    open_source(str(path))
  source = open_source(str(path), root=f"{tmp_path}/images")
  assert source[0]["image"] == picture(0)


def test_no_bytes_of_other_files_are_logged(tmp_path, caplog):
  secret = b"root:x:0:0:top secret"
  (tmp_path / "secret.jpg").write_bytes(secret * 100)
  source = table(tmp_path / "t", "../secret.jpg", root=str(tmp_path))
  with (
    caplog.at_level(logging.DEBUG),
    pytest.raises(Rejected, match="undecodable: 2100 bytes of text"),
  ):
    decode(source[0]["image"])
  assert "x:0" not in caplog.text
  for data in (secret, b"<html>secret</html>", b"\x1f\x8bsecret", b"\0" * 9, b"\xffsecret", b""):
    assert "secret" not in image_files.describe(data)
  assert image_files.describe(b" <!DOCTYPE html><p>secret") == "an HTML page"


@pytest.mark.parametrize("kind", ["tar", "tsv", "jsonl", "parquet", "array_record"])
def test_sources_that_are_no_files_do_not_hang(tmp_path, kind):
  os.mkfifo(tmp_path / f"0.{kind}")
  with pytest.raises((OSError, ValueError), match=rf"0\.{kind}"):
    open_source(f"{tmp_path}/0.{kind}")
  with pytest.raises(OSError, match="a FIFO, expected a regular file"):
    storage.read(f"{tmp_path}/0.{kind}", 0, 4)
