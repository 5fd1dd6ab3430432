"""A sample's members are the same whichever way its bytes are gone through."""

from __future__ import annotations

import io
import tarfile
import time

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


def concatenated(*parts):
  """What `cat` makes of tars, each with its end mark and its padding."""
  return b"".join(written("ustar", names) + bytes(zeros) for names, zeros in parts)


@pytest.mark.parametrize("zeros", [512, 1024, 10240, 200_192])
def test_concatenated_tars_are_read_to_the_end(zeros):
  data = concatenated(
    (["a.jpg", "a.txt", "b.jpg"], zeros), (["c.jpg", "c.txt"], zeros), ([], zeros)
  )
  scan = parse.scan(data, path="x.tar")
  assert scan.keys == ("a", "b", "c") and not scan.problem
  for i, key in enumerate(scan.keys):
    first, end = (int(x) * parse.BLOCK for x in scan.starts[i : i + 2])
    assert parse.sample(data[first:end]) == slowly(data[first:end])
    assert parse.sample(data[first:end])[0] == key


def test_a_sample_does_not_go_on_in_the_next_tar():
  with pytest.raises(ValueError, match="members of sample 'a' are not adjacent"):
    parse.scan(concatenated((["a.jpg"], 1024), (["a.txt"], 1024)), path="x.tar")


def test_data_after_the_end_mark_are_reported():
  data = concatenated((["a.jpg", "a.txt", "b.jpg"], 1024))
  scan = parse.scan(data + b"no tar" * 100, path="x.tar")
  assert scan.keys == ("a", "b") and "after its end mark: wrong" in scan.problem
  broken = bytearray(concatenated((["a.jpg"], 1024), (["b.jpg"], 1024), (["c.jpg"], 1024)))
  broken[1024 + 512 + 1024 + 10] ^= 1  # in the second tar's header
  assert parse.scan(bytes(broken), path="x.tar").problem


def extended(kind, data, name="a.jpg"):
  """A header of a kind with its data, then a member."""
  block = bytearray(written("ustar", [name])[:512])
  block[124:136] = f"{len(data):011o}\0".encode()
  block[156:157] = kind
  return resigned(block) + data + bytes(-len(data) % 512) + written("ustar", [name]) + bytes(1024)


def test_the_time_of_pax_records_grows_with_their_number():
  """The 26 s of a megabyte were quadratic."""

  def seconds(count):
    data = extended(b"x", b"".join(b"%d k%06d=v\n" % (13, i) for i in range(count)))
    spent = []
    for _ in range(3):
      start = time.process_time()
      assert len(list(parse.members(data))) == 2
      spent.append(time.process_time() - start)
    return min(spent)

  assert seconds(64_000) < 24 * seconds(8_000)  # quadratic time would be 64-fold


def test_pax_records_hold_only_what_is_used():
  data = extended(b"x", b"13 k000001=v\n" + b"15 path=bb.png\n" + b"9 a=bcdef\n"[:0] + bytes(9))
  member = next(parse.members(data))
  assert member is not None and member.name == "bb.png"


@pytest.mark.parametrize(
  "records",
  [b"9" * 5000 + b" a=b\n", b"0 a=b\n", b"3 a=b\n", b"-9 a=b\n", b"99 a=b\n", b"abc\n", b" 5=a\n"],
)
def test_wrong_pax_records_are_an_error(records):
  with pytest.raises(parse.BrokenTar, match=r"wrong pax record at byte 512"):
    list(parse.members(extended(b"x", records)))


class Sparse:
  """A tar whose first member claims many bytes; slices of them are counted."""

  def __init__(self, header, size):
    self.header, self.size, self.read = header, size, 0

  def __getitem__(self, part):
    stop = min(part.stop, self.size)
    self.read = max(self.read, stop - part.start)
    return self.header[part.start : stop].ljust(max(stop - part.start, 0), b"a")


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_a_name_of_gigabytes_is_not_read(kind):
  block = bytearray(written("ustar", ["a.jpg"])[:512])
  block[124:136] = f"{1 << 32:011o}\0".encode()
  block[156:157] = kind
  buffer = Sparse(resigned(block), 1 << 33)
  with pytest.raises(parse.BrokenTar, match="a name or pax records of 4294967296 bytes"):
    list(parse.members(buffer))
  assert buffer.read <= 1 << 20


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_long_names_are_bounded(kind):
  name = b"a" * 70_000 + b".jpg"
  data = name if kind == b"L" else b"%d path=%s\n" % (len(name) + 12, name)
  with pytest.raises(parse.BrokenTar, match="a name of 70004 characters"):
    list(parse.members(extended(kind, data)))
  short = b"a" * 5000 + b".jpg"
  data = short if kind == b"L" else b"%d path=%s\n" % (len(short) + 11, short)
  member = next(parse.members(extended(kind, data)))
  assert member is not None and member.name == short.decode()


def test_impossible_sizes_are_an_error():
  for size in (b"\xff" * 200, b"9" * 30, b"9" * 6000):
    record = b" size=" + size + b"\n"
    length = len(record) + 3 if len(record) < 97 else len(record) + (3 if len(record) < 990 else 4)
    data = extended(b"x", b"%d%s" % (length, record))
    with pytest.raises(parse.BrokenTar, match=r"wrong number|wrong pax record"):
      list(parse.members(data))
