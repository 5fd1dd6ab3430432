"""A thousand damaged tars: each has the samples that the standard library's headers tell of."""

from __future__ import annotations

import io
import pathlib
import tarfile

import numpy as np
import pytest
from helpers.small_shards import samples, write_tar

from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import open_source
from bigalign.data.tar import parse

BLOCK = 512


def _expected(data: bytes) -> int | None:
  """Counts the complete samples with tarfile; None if the shard must be refused."""
  groups: list[tuple[str, set[str]]] = []
  offset, whole, broken = 0, False, True
  while offset < len(data):
    header = data[offset : offset + BLOCK]
    if header == bytes(BLOCK):  # an end mark, after which another tar may follow
      whole = True
      offset += BLOCK
      continue
    if whole and not header.strip(b"\0"):
      offset += BLOCK
      continue
    try:
      info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
      break
    if offset + BLOCK + info.size > len(data):
      break
    offset += BLOCK + -(-info.size // BLOCK) * BLOCK
    key, _, field = info.name.partition(".")
    if not groups or groups[-1][0] != key or whole:
      groups.append((key, set()))
    whole = False
    if field in groups[-1][1]:
      return None
    groups[-1][1].add(field)
  else:
    broken = not whole
  if not whole and len(groups) > 1 and groups[-1][1] < groups[-2][1]:
    groups.pop()
  keys = [key for key, _ in groups]
  return None if len(set(keys)) < len(keys) or (broken and not groups) else len(groups)


def _mutate(data: bytes, random: np.random.Generator) -> bytes:
  """Damages a tar in one to three places, as disks, networks and partial writes do."""
  for _ in range(random.integers(1, 4)):
    blocks = len(data) // BLOCK
    first, count = int(random.integers(max(blocks, 1))), int(random.integers(1, 4))
    start, end = first * BLOCK, (first + count) * BLOCK
    place = int(random.integers(max(len(data), 1)))
    noise, bit = random.bytes(end - start), 1 << int(random.integers(8))
    kind = random.choice(["cut", "flip", "zero", "lose", "twice", "noise", "shift"])
    if kind == "cut":
      data = data[:place]
    elif kind == "flip":
      data = (
        data[:place] + bytes([byte ^ bit for byte in data[place : place + 1]]) + data[place + 1 :]
      )
    elif kind == "shift":
      data = data[:place] + b"x" + data[place:]
    elif kind == "twice":
      data = data[:end] + data[start:]
    else:
      put = dict(zero=bytes(end - start), lose=b"", noise=noise)[kind]
      data = data[:start] + put + data[end:]
  return data


def test_damaged_tars_have_exact_counts(tmp_path):
  random = np.random.default_rng(0)
  whole = pathlib.Path(write_tar(tmp_path / "whole.tar", samples(0, 6))).read_bytes()
  (tmp_path / "kept").mkdir()
  refused = counted = total = 0
  for n in range(1000):
    data = _mutate(whole, random)
    expected = _expected(data)
    if expected is None:
      refused += 1
      with pytest.raises(
        ValueError, match=r"are not adjacent|occurs twice|not an uncompressed tar"
      ):
        parse.scan(data, path="x.tar")
      continue
    assert len(parse.scan(data, path="x.tar").starts) - 1 == expected, n
    counted += expected
    if n % 5 == 0:
      (tmp_path / "kept" / f"{n:04d}.tar").write_bytes(data)
      total += expected
  assert 50 < refused < 500 and counted > 1000  # both kinds were met
  source = open_source(f"{tmp_path}/kept/*.tar")
  assert len(source) == total
  read = 0
  for i in range(total):
    try:
      read += len(source[i]["image"]) > 0
    except Rejected:
      read += 1
  assert read == total


@pytest.mark.parametrize("where", ["header", "pax"])
def test_a_negative_size_does_not_loop(where):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
    for n in range(2):
      info = tarfile.TarInfo(f"{n}.jpg")
      info.size = 5
      if n and where == "pax":
        info.pax_headers = {"size": "-2048"}
      archive.addfile(info, io.BytesIO(b"image"))
  data = bytearray(file.getvalue())
  if where == "header":
    header = data[1024:1536]
    header[124:136] = b"-0000004000\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[1024:1536] = header
  found = parse.scan(bytes(data), path="x.tar")
  assert len(found.starts) == 2 and "wrong number in a header" in found.problem
