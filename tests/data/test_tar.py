"""A sample's members are the same whichever way its bytes are gone through."""

from __future__ import annotations

import io
import tarfile

import pytest

from bigalign.data.tar import parse

FORMATS = dict(ustar=tarfile.USTAR_FORMAT, gnu=tarfile.GNU_FORMAT, pax=tarfile.PAX_FORMAT)
NAMES = [
  "a.jpg",
  "./deep/er/a.seg.png",
  "x" * 90 + "/" + "y" * 60 + ".jpg",
  "z" * 180 + ".txt",
  "a/ü.txt",
  "folder",
  ".hidden",
  "a.JPG",
]


def written(kind, names, size=700):
  """A tar without its end mark."""
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w", format=FORMATS[kind]) as archive:
    for name in names:
      info = tarfile.TarInfo(name)
      info.size = size
      try:
        archive.addfile(info, io.BytesIO(bytes([len(name)]) * size))
      except ValueError:  # too long a name for ustar
        continue
  end = data.getvalue()
  return end[: len(end.rstrip(b"\0")) // parse.BLOCK * parse.BLOCK + parse.BLOCK]


def resigned(block):
  """The header with its checksum computed again."""
  block[148:156] = b" " * 8
  block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
  return bytes(block)


def slowly(buffer):
  """The expected result of `sample`, from `members`, which checks everything."""
  found = {}
  key = ""
  for member in parse.members(buffer):
    name = parse.split_name(member.name) if member else None
    if name:
      key, found[name[1]] = name[0], buffer[member.start : member.start + member.size]
  return key, found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_format(kind, name):
  buffer = written(kind, [name, "folder", name[:100] + "2.txt"])
  assert parse.sample(buffer) == slowly(buffer)


@pytest.mark.parametrize(
  "digits",
  [
    b"00000001274\0",
    b"00000001274 ",
    b"      1274\0\0",
    b"000000001274",
    b"1274\0\0\0\0\0\0\0\0",
    b"\x80" + bytes(9) + b"\x02\xbc",
    b" 1274\0 7777\0",
  ],
)
def test_sizes_in_every_spelling(digits):
  """Twelve digits fill the field without an end mark; the last one counts."""
  block = bytearray(written("ustar", ["a.jpg"]))
  block[124:136] = digits
  buffer = resigned(bytearray(block[:512])) + bytes(block[512:]) + written("ustar", ["a.txt"])
  key, found = parse.sample(buffer)
  assert (key, found) == slowly(buffer)
  assert len(found["jpg"]) == 700 and len(found["txt"]) == 700


@pytest.mark.parametrize("digits", [b"0000000127x\0", b"-0000000001\0", b"77777777777\0"])
def test_bytes_that_were_not_indexed_are_an_error(digits):
  block = bytearray(written("ustar", ["a.jpg"]))
  block[124:136] = digits
  with pytest.raises(parse.BrokenTar, match=r"wrong number|ends inside"):
    parse.sample(resigned(block))
