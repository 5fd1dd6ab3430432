"""Thousands of damaged images, tars and tables: samples are rejected, or the file is refused.

Run as a program, this file tries some of them: PATH NAME FIRST END FOLDER.
"""

from __future__ import annotations

import functools
import io
import json
import pathlib
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import mutations
from helpers.every_format import example, write_array_record
from helpers.small_shards import picture, samples, write_tar
from PIL import Image, TiffImagePlugin

from bigalign.data.image import transforms
from bigalign.data.loader.options import resolve_data
from bigalign.data.order.permutation import philox
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import base

MEBIBYTE = 1 << 20


def small_images() -> list[bytes]:
  """An image of each format and each way to encode it."""
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8))
  image = small.resize((40, 56), Image.Resampling.BICUBIC)
  exif = Image.Exif()
  exif[0x0112] = 6
  tiles = TiffImagePlugin.ImageFileDirectory_v2()
  frames = dict(save_all=True, append_images=[image.rotate(90), image.rotate(180)])
  wide = Image.fromarray(rng.integers(0, 65536, (30, 20)).astype(np.uint16))
  every = [
    (image, "jpeg", dict(quality=90, exif=exif)),
    (image, "jpeg", dict(progressive=True, restart_marker_rows=1)),
    (image.convert("L"), "jpeg", {}),
    (image.convert("CMYK"), "jpeg", {}),
    (image, "mpo", frames),
    (image, "png", dict(exif=exif)),
    (image.convert("RGBA"), "png", {}),
    (image.quantize(16), "png", dict(transparency=3)),
    (wide, "png", {}),
    (image, "png", frames),
    (image, "webp", dict(exif=exif)),
    (image.convert("RGBA"), "webp", dict(lossless=True)),
    (image, "webp", frames),
    (image.quantize(32), "gif", {}),
    (image, "gif", frames),
    (image, "bmp", {}),
    (image.quantize(16), "bmp", {}),
    (image, "tiff", dict(tiffinfo=tiles)),
    (image, "tiff", dict(compression="tiff_lzw", exif=exif)),
    (image, "tiff", dict(compression="jpeg")),
    (image.convert("1"), "tiff", dict(compression="group4")),
    (image, "ppm", {}),
    (image, "jpeg2000", {}),
    (image, "avif", dict(speed=10)),
  ]
  encoded = []
  for picture_, kind, options in every:
    file = io.BytesIO()
    picture_.save(file, kind, **options)
    encoded.append(file.getvalue())
  return encoded


def images(folder: pathlib.Path) -> mutations.Trial:
  """Decodes images, and makes views of them as training and evaluation do."""
  del folder
  wholes = small_images()
  views = [
    resolve_data(dict(image_size=32, resize=resize, apply_exif=exif, tokenizer=BYTES))
    for resize, exif in (("squash", True), ("shortest", False), ("longest", True))
  ]
  training = views[0]
  shrink = functools.partial(transforms.shrink, size=32, **training.augment.options)

  def read(data: bytes, n: int) -> str:
    try:
      if n % 2:
        view = training.training_view(training.decode(data, shrink=shrink), philox(0, n))
      else:
        options = views[n // 2 % len(views)]
        view = options.evaluation_view(options.decode(data))
    except Rejected:
      return "rejected"
    assert view.shape == (32, 32, 3) and view.dtype == np.uint8
    return "read"

  assert {read(data, n) for data in wholes for n in range(6)} == {"read"}

  def trial(n: int) -> str:
    data = mutations.mutated(wholes[n % len(wholes)], np.random.default_rng([1, n]))
    return read(data, n // len(wholes))

  return trial


BYTES = dict(name="byte", length=8)


def outcome(pattern: str, **options) -> str:
  """Opens a source, and reads all that it has."""
  try:
    source = base.open_source(pattern, **options)
  except (ValueError, OSError) as error:
    text = str(error)
    assert pattern in text and len(text) < 3_000 and len(text.splitlines()) < 9, text
    return "refused"
  rejected = False
  for i in range(len(source)):
    for read in (base.read, base.fields, base.key):
      try:
        read(source, i)
      except Rejected as error:
        assert error.reason != "failed", error
        rejected = True
  return "rejected" if rejected else "read"


def members(first: int, *, long: bool = False) -> list[tuple[str, bytes]]:
  """Samples with captions in .json as well, and perhaps with names beyond 100 bytes."""
  every = []
  for name, data in samples(first, 4):
    key, _, field = name.partition(".")
    key = f"{'folder/' * 9}é{key * 9}" if long else key
    every.append((f"{key}.{field}", data))
    if field == "txt":
      captions = json.dumps(dict(captions=["one", "zwei"], label=3, deep=[{"a": 1.5}]))
      every.append((f"{key}.json", captions.encode()))
  return every


def tars(folder: pathlib.Path) -> mutations.Trial:
  """Indexes tars of three formats, and reads their samples and statistics."""
  wholes = []
  for n, (format, long) in enumerate(
    [
      (tarfile.USTAR_FORMAT, False),
      (tarfile.PAX_FORMAT, True),
      (tarfile.GNU_FORMAT, True),
    ]
  ):
    path = write_tar(folder / f"whole{n}.tar", members(4 * n, long=long), format=format)
    wholes.append(pathlib.Path(path).read_bytes())
  wholes.append(wholes[0] + wholes[1])  # concatenated
  return each(folder, [("tar", data, {}) for data in wholes], seed=2)


def records() -> list[dict]:
  return [
    dict(image=picture(i), captions=("a dog", "zwei"), label=i % 3, score=i / 7) for i in range(9)
  ]


def parquet_files(folder: pathlib.Path) -> list[tuple[str, bytes, dict]]:
  """Parquet files of several types, codecs and encodings."""
  kinds = [
    (pa.struct(dict(bytes=pa.binary(), path=pa.string())), dict(compression="snappy")),
    (pa.binary(), dict(compression="none", use_dictionary=False, write_page_checksum=True)),
    (pa.binary(), dict(compression="zstd", data_page_version="2.0")),
    (pa.large_binary(), dict(compression="gzip", store_schema=False)),
  ]
  every = []
  for kind, options in kinds:
    rows = records()
    if pa.types.is_struct(kind):
      rows = [row | dict(image=dict(bytes=row["image"], path="a.jpg")) for row in rows]
    columns = dict(image=kind, captions=pa.list_(pa.string()), label=pa.int64(), score=pa.float32())
    path = folder / "whole.parquet"
    pq.write_table(
      pa.Table.from_pylist(rows, pa.schema(columns)), path, row_group_size=4, **options
    )
    every.append(("parquet", path.read_bytes(), {}))
  return every


def array_records(folder: pathlib.Path) -> list[tuple[str, bytes, dict]]:
  """An ArrayRecord file."""
  examples = [
    example(
      image=[row["image"]],
      captions=[text.encode() for text in row["captions"]],
      label=[row["label"]],
      __key__=[f"key {i}".encode()],
    )
    for i, row in enumerate(records())
  ]
  path = write_array_record(folder / "whole.array_record", examples)
  return [("array_record", pathlib.Path(path).read_bytes(), {})] * 3


def columns_of(folder: pathlib.Path) -> mutations.Trial:
  """Opens and reads Parquet and ArrayRecord files."""
  return each(folder, [*parquet_files(folder), *array_records(folder)], seed=3)


def rows_of(folder: pathlib.Path) -> mutations.Trial:
  """Opens and reads tables of image files."""
  (folder / "images").mkdir()
  names = []
  for i in range(6):
    (folder / f"images/{i}.jpg").write_bytes(picture(i))
    names.append(f"../images/{i}.jpg")
  captions = ["a dog", 'a "quoted" cat', "two\tdogs, ünd", "x" * 50, "0", "ein Hund"]
  csv = "filepath,title,label\n" + "".join(
    f'{name},"{text.replace(chr(34), chr(34) * 2)}",{i % 3}\r\n'
    for i, (name, text) in enumerate(zip(names, captions))
  )
  tsv = "\ufefffilepath\ttitle\tlabel\n" + "".join(
    f"{name}\t{text.replace(chr(9), ' ')}\t{i % 3}\n"
    for i, (name, text) in enumerate(zip(names, captions))
  )
  jsonl = "".join(
    json.dumps(dict(filepath=name, title=[text, "b"], label=i % 3, deep={"a": [1, {"b": 2}]}))
    + "\n"
    for i, (name, text) in enumerate(zip(names, captions))
  )
  root = dict(root=str(folder / "images"))
  tables = [(kind, x.encode(), root) for kind, x in dict(csv=csv, tsv=tsv, jsonl=jsonl).items()]
  return each(folder, tables, seed=4)


def each(
  folder: pathlib.Path, wholes: list[tuple[str, bytes, dict]], *, seed: int
) -> mutations.Trial:
  """Reads damaged copies of files, (ending, bytes, options of the source), in turn."""

  def read(n: int, data: bytes, name: str) -> str:
    ending, _, options = wholes[n % len(wholes)]
    own = mutations.fresh(folder / name)  # new ones, because a file must not change in use
    (own / f"x.{ending}").write_bytes(data)
    found = outcome(f"{own}/x.{ending}", **options)
    shutil.rmtree(own)
    shutil.rmtree(folder / "index", ignore_errors=True)
    return found

  for n, (_, data, _) in enumerate(wholes):
    assert read(n, data, f"whole{n}") == "read", n

  def trial(n: int) -> str:
    whole = wholes[n % len(wholes)][1]
    return read(n, mutations.mutated(whole, np.random.default_rng([seed, n])), f"{n:06d}")

  return trial


TRIALS = dict(images=images, tars=tars, columns=columns_of, rows=rows_of)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_damaged_images_are_read_or_rejected():
  tally = mutations.tally(__file__, "images", 24_000)
  # 64 million pixels in four channels, and copies while they are blended with white.
  tally.check(24_000, seconds=20, memory=1536 * MEBIBYTE)
  assert min(tally.outcomes["read"], tally.outcomes["rejected"]) > 2_000


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name,count", [("tars", 1000), ("columns", 500), ("rows", 200)])
def test_damaged_files_of_samples_are_read_or_refused(name, count):
  tally = mutations.tally(__file__, name, count)
  tally.check(count, seconds=10, memory=256 * MEBIBYTE)
  usable = tally.outcomes["read"] + tally.outcomes["rejected"]
  assert min(usable, tally.outcomes["refused"]) > count / 10


if __name__ == "__main__":
  mutations.serve(TRIALS)
