"""The classes of a sample in an .npy file: zeros and ones; no pickles, no memory for a header."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest

from bigalign.data.samples.label_sets import LabelSets, read


def npy(values, **options):
  file = io.BytesIO()
  np.save(file, values, **options)
  return file.getvalue()


def header(text, version=b"\x01\x00"):
  """An .npy file with a header of our own, and 16 bytes of zeros."""
  size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
  return b"\x93NUMPY" + version + size + text.encode() + bytes(16)


@pytest.mark.parametrize(
  "values",
  [
    np.array([0, 1, 1], dtype)
    for dtype in ("bool", "int8", "uint8", "int64", ">i4", "float16", "float32", ">f8")
  ],
  ids=lambda x: x.dtype.str,
)
def test_numbers_of_any_type(values):
  assert read(npy(values)).tolist() == [False, True, True]
  for shape in ((1, 3), (3, 1), (1, 1, 3)):
    assert read(npy(values.reshape(shape))).tolist() == [False, True, True]


@pytest.mark.parametrize(
  "data, problem",
  {
    "empty": (b"", "not an .npy file"),
    "text": (b"0 1 1", "not an .npy file"),
    "pickle": (npy(np.array([{}, None]), allow_pickle=True), "array of object"),
    "names": (npy(np.array(["cat"])), "an array of <U3"),
    "complex": (npy(np.array([1j])), "an array of complex"),
    "matrix": (npy(np.eye(2)), r"shape \(2, 2\); expected \[K\]"),
    "none": (npy(np.zeros(0)), r"shape \(0,\)"),
    "class numbers": (npy(np.array([3, 7])), "numbers other than 0 and 1"),
    "unknown": (npy(np.array([1, -1, 0])), "numbers other than 0 and 1"),
    "NaN": (npy(np.array([1, np.nan])), "numbers other than 0 and 1"),
    "cut off": (npy(np.ones(9))[:-1], "71 bytes for 9 numbers of 8 bytes each"),
    "more": (npy(np.ones(9)) + b"0", "73 bytes for 9 numbers"),
    "huge": (
      header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000,)}"),
      "16 bytes for 1000000 numbers",
    ),
    "too many": (
      header("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,)}"),
      "expected",
    ),
    "negative": (
      header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -2)}"),
      "expected",
    ),
    "nested": (header("(" * 9_000), "not an .npy file"),
    "minus": (header("-" * 9_000 + "1"), "not an .npy file"),
    "long": (header(" " * 60_000), "not an .npy file"),
    "version 3": (header("{}", b"\x03\x00"), "not an .npy file"),
  }.values(),
)
@pytest.mark.filterwarnings("ignore")
def test_anything_else_is_refused_in_little_memory(data, problem):
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=problem) as error:
      read(data)
    assert tracemalloc.get_traced_memory()[1] < 10e6
  finally:
    tracemalloc.stop()
  assert len(str(error.value)) < 200


def test_what_cannot_be_read_is_logged_once(caplog):
  sets = LabelSets()
  assert sets(None, key="a") is None and not caplog.records
  assert sets(b"x", key="a") is None and sets(b"y", key="b") is None
  assert len(caplog.records) == 1 and "a.npy: not an .npy file" in caplog.text
  assert sets(npy(np.ones(2)), key="c").tolist() == [True, True]
