"""Parquet files of every schema: read where it is plain, refused on opening where it is not."""

from __future__ import annotations

import base64
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.small_shards import picture

from bigalign.data.samples import image_files
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import open_source, read
from bigalign.data.sources.parquet import Parquet

IMAGES = [picture(i) for i in range(3)]


def write(path, image, captions=None, **others):
  captions = pa.array([f"caption {i}" for i in range(len(image))]) if captions is None else captions
  pq.write_table(pa.table(dict(image=image, caption=captions, **others)), path)
  return str(path)


KINDS = {
  "binary": pa.array(IMAGES, pa.binary()),
  "large binary": pa.array(IMAGES, pa.large_binary()),
  "dictionary": pa.array(IMAGES, pa.binary()).dictionary_encode(),
  "base64": pa.array([base64.b64encode(x).decode() for x in IMAGES]),
  "base64 in lines": pa.array([base64.encodebytes(x).decode() for x in IMAGES]),
  "url-safe base64": pa.array([base64.urlsafe_b64encode(x).decode() for x in IMAGES]),
  "data uri": pa.array(["data:image/jpeg;base64," + base64.b64encode(x).decode() for x in IMAGES]),
  "list of uint8": pa.array([list(x) for x in IMAGES], pa.list_(pa.uint8())),
  "large list of uint8": pa.array([list(x) for x in IMAGES], pa.large_list(pa.uint8())),
  "list of int64": pa.array([list(x) for x in IMAGES]),
  "list of int8": pa.array([np.frombuffer(x, np.int8) for x in IMAGES], pa.list_(pa.int8())),
  "path": pa.array([f"img/{i}.jpg" for i in range(3)]),
  "struct of bytes": pa.array([dict(bytes=x, path="x.jpg") for x in IMAGES]),
  "struct of paths": pa.array([dict(bytes=None, path=f"img/{i}.jpg") for i in range(3)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_read_in_every_plain_form(tmp_path, kind):
  (tmp_path / "img").mkdir()
  for i, image in enumerate(IMAGES):
    (tmp_path / "img" / f"{i}.jpg").write_bytes(image)
  source = open_source(write(tmp_path / "0.parquet", KINDS[kind]))
  assert [source[i]["image"] for i in range(3)] == IMAGES
  assert [source.fields(i)["image"] for i in range(3)] == IMAGES


REFUSED = {
  "list of structs": pa.array([[dict(bytes=x)] for x in IMAGES]),
  "numbers": pa.array([1, 2, 3]),
  "pixels": pa.array([[[[1, 2, 3]]]] * 3),
  "struct of numbers": pa.array([dict(bytes=3)] * 3),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_images_are_refused_on_opening(tmp_path, kind):
  path = write(tmp_path / "0.parquet", REFUSED[kind])
  with pytest.raises(
    ValueError, match=r"0\.parquet: the image column 'image' has the type"
  ) as error:
    open_source(path)
  assert "Accepted are binary" in str(error.value) and "source_options" in str(error.value)
  assert str(REFUSED[kind].type).replace("item:", "element:") in str(error.value)


def test_cells_that_hold_no_image_are_rejected(tmp_path):
  outside = tmp_path / "secret.jpg"
  outside.write_bytes(IMAGES[0])
  (tmp_path / "d").mkdir()
  cells = {
    "none.jpg": "no_image",
    "": "no_image",
    "../secret.jpg": "no_image",
    str(outside): "no_image",
    "https://host/a.jpg": "no_image",
    "a\0b": "no_image",
    base64.b64encode(IMAGES[0]).decode()[:-3] + "!": "truncated",
    "x" * 5000: "undecodable",
    "data:image/png;base64,~": "undecodable",
  }
  source = open_source(write(tmp_path / "d" / "0.parquet", pa.array([*cells])))
  for i, (cell, reason) in enumerate(cells.items()):
    with pytest.raises(Rejected) as error:
      source[i]
    assert error.value.reason == reason, cell
    assert len(error.value.detail) < 500 and error.value.detail.startswith("0.parquet/0.")
  numbers = open_source(write(tmp_path / "1.parquet", pa.array([[1, 256], [-1], [None]])))
  for i in range(3):
    with pytest.raises(Rejected, match=r"undecodable: 1\.parquet"):
      numbers[i]


def test_root_names_another_folder_of_images(tmp_path):
  for folder in ("d", "img"):
    (tmp_path / folder).mkdir()
  (tmp_path / "img/0.jpg").write_bytes(IMAGES[0])
  os.mkfifo(tmp_path / "img/pipe.jpg")
  with open(tmp_path / "img/sparse.jpg", "wb") as file:
    file.truncate(image_files.MAX_BYTES + 1)
  names = ["../img/0.jpg", str(tmp_path / "img/0.jpg"), "../img/pipe.jpg", "../img/sparse.jpg"]
  path = write(tmp_path / "d/0.parquet", pa.array(names))
  source = open_source(path, root=str(tmp_path / "img"))
  assert source[0]["image"] == source[1]["image"] == IMAGES[0]
  for i, reason in ((2, "no_image"), (3, "too_large")):
    with pytest.raises(Rejected) as error:
      read(source, i)
    assert error.value.reason == reason
  for i in range(2):
    with pytest.raises(Rejected, match=r"source_options=dict\(root="):
      read(open_source(path), i)


def test_a_file_with_other_columns_is_refused_on_opening(tmp_path):
  write(tmp_path / "0.parquet", pa.array(IMAGES))
  pq.write_table(pa.table(dict(jpg=IMAGES, text=["a"] * 3)), tmp_path / "1.parquet")
  with pytest.raises(ValueError, match=r"1\.parquet: no image column 'image'.*'jpg', 'text'"):
    open_source(f"{tmp_path}/*.parquet")
  pq.write_table(pa.table(dict(image=IMAGES, words=["a"] * 3)), tmp_path / "1.parquet")
  with pytest.raises(ValueError, match=r"1\.parquet: no caption column .*'image', 'words'"):
    open_source(f"{tmp_path}/*.parquet")
  write(tmp_path / "1.parquet", pa.array([1, 2, 3]))
  with pytest.raises(ValueError, match=r"1\.parquet: the image column 'image' has the type int64"):
    open_source(f"{tmp_path}/*.parquet")


def test_files_may_differ_in_what_is_optional(tmp_path, caplog):
  write(tmp_path / "0.parquet", pa.array(IMAGES), label=[0, 1, 2], extra=["x"] * 3)
  text = pa.array([base64.b64encode(x).decode() for x in IMAGES])
  pq.write_table(pa.table(dict(image=text, text=["t"] * 3, more=[1] * 3)), tmp_path / "1.parquet")
  pq.write_table(pa.table(dict(image=pa.array([], pa.null()))), tmp_path / "2.parquet")
  source = open_source(f"{tmp_path}/*.parquet")
  assert len(source) == 6 and [source[i]["image"] for i in range(6)] == [*IMAGES, *IMAGES]
  assert [source[i]["label"] for i in range(6)] == [0, 1, 2, -1, -1, -1]
  assert source[0]["captions"] == ("caption 0",) and source[4]["captions"] == ("t",)
  assert source.fields(0)["extra"] == "x" and source.fields(3)["more"] == 1
  assert any("1 of 2 files have no column 'caption'" in m for m in caplog.messages)


SENTENCES = pa.array([[dict(raw="a", n=1), dict(raw="b", n=2)], [], None])


def test_captions_in_lists_of_structs(tmp_path):
  deep = pa.array([dict(de=["x", " "], en=None)] * 3)
  path = write(tmp_path / "0.parquet", pa.array(IMAGES), SENTENCES, names=deep)
  source = open_source(path, captions=("caption.raw", "names.de"))
  assert source[0]["texts"] == {"caption.raw": ("a", "b"), "names.de": ("x",)}
  assert source[1]["captions"] == source[2]["captions"] == ("x",)
  for wrong in ("caption.rw", "caption.raw.x", "names.fr"):
    with pytest.raises(ValueError, match=rf"0\.parquet: no caption field '{wrong}': the column"):
      open_source(path, captions=("caption.raw", wrong))
  for wrong in ("caption", "names", "caption.n"):
    with pytest.raises(ValueError, match=rf"the caption field '{wrong}' has the type"):
      open_source(path, captions=(wrong,))


def test_invalid_utf8_is_replaced_as_in_tars(tmp_path):
  bad = pa.Array.from_buffers(
    pa.string(), 3, pa.array([b"caf\xe9", b"ok", b"x"], pa.binary()).buffers()
  )
  many = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), bad)
  source = Parquet(write(tmp_path / "0.parquet", pa.array(IMAGES), bad, many=many))
  assert source[0]["captions"] == ("caf\ufffd",) and source.fields(0)["many"] == ["caf\ufffd"]


def test_a_corrupt_page_rejects_the_rows_of_its_row_group(tmp_path, monkeypatch):
  images = [np.random.default_rng(i).bytes(4_000) for i in range(6)]
  path = tmp_path / "0.parquet"
  table = pa.table(dict(image=images, caption=["a"] * 6))
  pq.write_table(table, path, row_group_size=3, compression="zstd", use_dictionary=False)
  column = pq.read_metadata(path).row_group(1).column(0)
  data = bytearray(path.read_bytes())
  start = column.data_page_offset
  data[start : start + 60] = bytes(60)
  path.write_bytes(data)
  source = open_source(str(path))
  assert [source[i]["image"] for i in range(3)] == images[:3]
  reads = []
  whole = source._read
  monkeypatch.setattr(source._groups, "_make", lambda g: (reads.append(g), whole(g))[1])
  for i in (3, 4, 5):
    with pytest.raises(Rejected, match=rf"undecodable: {path}: row group 1"):
      read(source, i)
  assert reads == [1]


def test_any_damage_of_the_footer_names_the_file(tmp_path):
  path = tmp_path / "0.parquet"
  write(path, pa.array(IMAGES))
  whole = path.read_bytes()
  length = int.from_bytes(whole[-8:-4], "little")
  rng = np.random.default_rng(0)
  for _ in range(150):
    data = bytearray(whole)
    for place in rng.integers(len(whole) - 8 - length, len(whole), 3):
      data[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    try:
      source = Parquet(str(path))
      for i in range(min(len(source), 5)):
        try:
          read(source, i)
        except Rejected as error:
          assert "0.parquet" in str(error) or error.reason == "failed"
    except ValueError as error:
      assert "0.parquet" in str(error), error
