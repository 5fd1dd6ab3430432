"""Shards with every oddity that occurs, read as they are."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.small_shards import picture, samples, write_tar
from PIL import Image

from bigalign.data.files import patterns
from bigalign.data.files.patterns import expand_shards
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import open_source

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
def test_every_sample_of_every_shard(tmp_path, format):
  for shard in range(3):
    write_tar(tmp_path / f"{shard:05d}.tar", samples(10 * shard, 10), format=FORMATS[format])
  source = open_source(f"{tmp_path}/{{00000..00002}}.tar")
  assert len(source) == 30
  for i in (0, 9, 10, 29):
    assert source[i] == dict(
      image=picture(i),
      captions=(f"picture number {i}",),
      label=i % 3,
      key=f"{i // 10:05d}.tar/{i:06d}",
    )
  with pytest.raises(IndexError, match="asked for 30"):
    source[30]


@pytest.mark.parametrize("format", FORMATS)
def test_long_names_folders_and_prefixes(tmp_path, format):
  deep = "/".join(["a-rather-long-folder-name"] * 5)
  member = [(f"./{deep}/k.jpg", picture(1)), (f"{deep}/k.txt", b"one")]
  long = [("x" * 120 + ".jpg", picture(2)), ("x" * 120 + ".txt", "zwölf ünicode".encode())]
  if format == "ustar":
    long = [("ü" * 20 + ".jpg", picture(2)), ("ü" * 20 + ".txt", "zwölf ünicode".encode())]
  write_tar(
    tmp_path / "a.tar",
    [
      ("./", None),
      (deep, None),
      *member,
      ("._k2.jpg", b"macOS"),
      ("README", b"no extension"),
      ("k2.seg.png", b"another field"),
      ("k2.JPG", picture(3)),
      ("k2.txt", b"two"),
      *long,
    ],
    format=FORMATS[format],
  )
  source = open_source(f"{tmp_path}/*.tar")
  assert [source[i]["captions"] for i in range(len(source))] == [
    ("one",),
    ("two",),
    ("zwölf ünicode",),
  ]
  assert [source[i]["image"] for i in range(3)] == [picture(1), picture(3), picture(2)]
  assert source[0]["key"] == f"a.tar/{deep}/k"


def test_equal_keys_in_two_shards_are_two_samples(tmp_path):
  write_tar(tmp_path / "0.tar", samples(0, 1))
  write_tar(tmp_path / "1.tar", [(name, data) for name, data in samples(0, 1)])
  assert len(open_source(f"{tmp_path}/{{0..1}}.tar")) == 2


def test_members_of_a_sample_that_are_not_adjacent_are_an_error(tmp_path):
  members = samples(0, 4)
  write_tar(tmp_path / "0.tar", sorted(members, key=lambda member: member[0][-3:]))
  with pytest.raises(
    ValueError, match=r"0\.tar: members of sample '000000' are not adjacent.*--sort"
  ):
    open_source(f"{tmp_path}/0.tar")


@pytest.mark.parametrize("cut", ["inside the last image", "between its members", "inside a header"])
def test_a_truncated_shard_keeps_its_complete_samples(tmp_path, caplog, cut):
  path = pathlib.Path(write_tar(tmp_path / "0.tar", samples(0, 5)))
  with tarfile.open(path) as tar:
    last = tar.getmember("000004.jpg" if cut == "inside the last image" else "000004.txt")
  end = {
    "inside the last image": last.offset_data + 100,
    "between its members": last.offset,
    "inside a header": last.offset + 30,
  }[cut]
  path.write_bytes(path.read_bytes()[:end])
  source = open_source(str(path))
  assert len(source) == 4
  assert source[3]["captions"] == ("picture number 3",)
  assert (
    "0.tar" in caplog.text
    and "at byte" in caplog.text
    and "first 4 samples, which are complete" in caplog.text
  )


def test_a_flipped_header_bit_is_found(tmp_path, caplog):
  path = pathlib.Path(write_tar(tmp_path / "0.tar", samples(0, 5)))
  data = bytearray(path.read_bytes())
  with tarfile.open(path) as tar:
    offset = tar.getmember("000002.jpg").offset
  data[offset + 3] ^= 1
  path.write_bytes(data)
  assert len(open_source(str(path))) == 2
  assert f"wrong header checksum at byte {offset}" in caplog.text


def test_a_file_that_is_not_a_tar_is_an_error(tmp_path):
  (tmp_path / "0.tar").write_bytes(b"<html>404</html>" * 100)
  with pytest.raises(ValueError, match=r"0\.tar: not an uncompressed tar.*<html>404"):
    open_source(f"{tmp_path}/0.tar")
  (tmp_path / "0.tar").write_bytes(b"")
  with pytest.raises(ValueError, match=r"0\.tar: the shard is an empty file"):
    open_source(f"{tmp_path}/0.tar")
  write_tar(tmp_path / "0.tar", [("README", b"hello")])
  with pytest.raises(ValueError, match="no samples in 1 shards"):
    open_source(f"{tmp_path}/0.tar")


def test_missing_shards_are_named(tmp_path):
  write_tar(tmp_path / "00001.tar", samples(0, 1))
  with pytest.raises(FileNotFoundError) as error:
    open_source(f"{tmp_path}/{{00000..00012}}.tar")
  message = str(error.value)
  assert "12 of 13 shards" in message and "00008.tar and 4 more" in message
  assert all(f"{i:05d}.tar," in message for i in (0, *range(2, 8))) and "00009.tar" not in message
  assert "holds 1 .tar files: 00001.tar" in message


def test_errors_of_empty_patterns_and_unknown_sources_help(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match=r"No file matches '.*/nowhere/\*.tar'.*not exist"):
    open_source(f"{tmp_path}/nowhere/*.tar")
  with pytest.raises(ValueError, match=r"range {00005\.\.00001} is empty"):
    open_source("x/{00005..00001}.tar")
  with pytest.raises(ValueError, match="neither a range"):
    open_source("x/{0000-0005}.tar")
  with pytest.raises(ValueError, match="a brace is not closed"):
    open_source("x/{00000..00005.tar")
  with pytest.raises(ValueError, match=r"Unknown source 'glyph'.*known: 'glyphs"):
    open_source("glyph")
  monkeypatch.delenv("BIGALIGN_NOWHERE", raising=False)
  with pytest.raises(KeyError, match="BIGALIGN_NOWHERE is not set"):
    open_source("$BIGALIGN_NOWHERE/0.tar")


def test_synthetic_samples_are_different_and_reproducible_noise():
  source = open_source("synthetic:5000", size=40)
  assert len(source) == 5000 and len(open_source("synthetic")) == 10_000
  images = [source[i]["image"] for i in (0, 1, 64, 4095)]
  assert all(x.shape == (40, 40, 3) and x.dtype == np.uint8 for x in images)
  assert len({x.tobytes() for x in images}) == 4 and 120 < np.mean(images) < 135
  again = pickle.loads(pickle.dumps(source))
  assert again.fingerprint == source.fingerprint != open_source("synthetic:5001").fingerprint
  assert (again[64]["image"] == images[2]).all() and source[7]["captions"] == (
    "synthetic picture number 7",
  )
  with pytest.raises(IndexError, match="asked for 5000"):
    source[5000]
  for wrong in ("synthetic:0", "synthetic:-3", "synthetic:1e6"):
    with pytest.raises(ValueError, match=r"write how many samples, 'synthetic:1000000'"):
      open_source(wrong)


def test_patterns(tmp_path, monkeypatch):
  for name in ("a/08", "a/09", "a/10", "b/08", "b/09", "b/10"):
    write_tar(tmp_path / f"{name}.tar", samples(0, 1))
  monkeypatch.setenv("BIGALIGN_TEST_ROOT", str(tmp_path))
  paths = expand_shards(f"{tmp_path}/{{b,a}}/{{08..10}}.tar")
  names = [os.path.relpath(path, tmp_path) for path in paths]
  assert names == ["b/08.tar", "b/09.tar", "b/10.tar", "a/08.tar", "a/09.tar", "a/10.tar"]
  assert len(open_source("${BIGALIGN_TEST_ROOT}/{a,b}/*.tar")) == 6
  with pytest.raises(ValueError, match="more than once"):
    expand_shards(f"{tmp_path}/{{a,a}}/08.tar")


def test_the_number_of_names_of_a_pattern_is_bounded(monkeypatch):
  with pytest.raises(ValueError, match="has more than 10000000 numbers"):
    expand_shards("s3://bucket/{000000000..999999999}.tar")
  monkeypatch.setattr(patterns, "MOST_NAMES", 1000)
  assert len(expand_shards("s3://bucket/{0..9}{0..99}.tar")) == 1000
  with pytest.raises(ValueError, match="names more than 1000 files"):
    expand_shards("s3://bucket/{0..10}{0..99}.tar")


def test_caption_fields_in_order_of_preference(tmp_path):
  def meta(**entries):
    return json.dumps(entries).encode()

  write_tar(
    tmp_path / "0.tar",
    [
      ("0.jpg", b"i"),
      ("0.txt", b" alt \n"),
      ("0.json", meta(long=["a", " ", "b "], short="s")),
      ("1.jpg", b"i"),
      ("1.txt", b"alt"),
      ("1.json", meta(long=[], short="s")),
      ("2.jpg", b"i"),
      ("2.txt", b"caf\xe9"),
      ("2.json", meta(long=None)),
      ("3.jpg", b"i"),
      ("3.txt", b"  \n"),
      ("3.json", meta()),
    ],
  )

  def captions(*fields):
    source = open_source(f"{tmp_path}/0.tar", captions=fields)
    return [source[i]["captions"] for i in range(4)]

  assert captions("txt") == [("alt",), ("alt",), ("caf\N{REPLACEMENT CHARACTER}",), ()]
  assert captions("json.long", "json.short", "txt") == [
    ("a", "b"),
    ("s",),
    ("caf\N{REPLACEMENT CHARACTER}",),
    (),
  ]
  assert captions() == [()] * 4
  with pytest.raises(ValueError) as error:
    captions("json.caption", "caption")
  assert "['jpg', 'json', 'json.long', 'json.short', 'txt']" in str(error.value)


def test_captions_in_objects_of_the_json_are_languages(tmp_path):
  names = [
    {"names": {"de": "Hund", "en": ["dog", "hound"]}},
    {"names": {"de.at": "x", "en": "cat"}},
    {"names.de": "Maus", "names": 3},
  ]
  write_tar(
    tmp_path / "0.tar",
    [
      member
      for i, entries in enumerate(names)
      for member in ((f"{i}.jpg", b"i"), (f"{i}.json", json.dumps(entries).encode()))
    ],
  )
  source = open_source(f"{tmp_path}/0.tar", captions=("json.names.de", "json.names.en"))
  assert [list(source[i]["texts"].values()) for i in range(3)] == [
    [("Hund",), ("dog", "hound")],
    [(), ("cat",)],
    [("Maus",), ()],
  ]
  assert open_source(f"{tmp_path}/0.tar", captions=("json.names.de.at",))[1]["captions"] == ("x",)
  with pytest.raises(ValueError, match=r"no caption field \['json\.title\.de'\].*'json\.names'"):
    open_source(f"{tmp_path}/0.tar", captions=("json.title.de",))


def test_broken_samples_are_rejected_with_a_reason(tmp_path):
  write_tar(
    tmp_path / "0.tar",
    [
      ("0.txt", b"no image"),
      ("1.jpg", b"i"),
      ("1.cls", b"cat"),
      ("2.jpg", b"i"),
      ("2.json", b"{oops"),
    ],
  )
  source = open_source(f"{tmp_path}/0.tar", captions=("json.caption",))
  assert source[1]["label"] == -1  # a label is optional, so it rejects nothing
  for i, reason in ((0, "no_image"), (2, "bad_metadata")):
    with pytest.raises(Rejected) as error:
      source[i]
    assert error.value.reason == reason and f"0.tar/{i}" in str(error.value)


@pytest.mark.parametrize("folder", ["", "train/"])
def test_class_names_are_next_to_the_shards_or_in_the_parent_folder(tmp_path, folder):
  write_tar(tmp_path / f"{folder}0.tar", [("0.jpg", b"i"), ("0.cls", b"1\n")])
  (tmp_path / "classnames.txt").write_text("cat\nbig dog\n\n")
  source = open_source(f"{tmp_path}/{folder}0.tar")  # labels are enough without captions
  assert source.classnames == ("cat", "big dog")
  assert source[0]["label"] == 1 and source[0]["captions"] == ()
  (tmp_path / "classnames.txt").write_text("cat\n \nbig dog\n")  # dropped, dog would be 1
  with pytest.raises(ValueError, match=r"classnames\.txt: line 2 is blank"):
    open_source(f"{tmp_path}/{folder}0.tar")


def test_concatenation_reads_each_sample_once(tmp_path):
  a = write_tar(tmp_path / "a" / "0.tar", samples(0, 3))
  b = write_tar(tmp_path / "b" / "0.tar", samples(3, 4))
  source = open_source(f"{a}::{b}")
  assert [source[i]["captions"][0] for i in range(len(source))] == [
    f"picture number {i}" for i in range(7)
  ]
  assert source.fingerprint != open_source(f"{b}::{a}").fingerprint
  mixed = open_source(f"{a}::glyphs", captions=("txt",))
  assert mixed[2]["captions"] == ("picture number 2",)
  assert mixed[3]["key"] == open_source("glyphs")[0]["key"]


def test_the_fingerprint_follows_the_data_not_the_folder(tmp_path):
  def print_of(path: str) -> str:
    return open_source(path).fingerprint

  first = print_of(write_tar(tmp_path / "a" / "0.tar", samples(0, 3)))
  assert first == print_of(write_tar(tmp_path / "b" / "0.tar", samples(0, 3)))
  assert first != print_of(write_tar(tmp_path / "c" / "0.tar", samples(0, 4)))
  assert first != print_of(write_tar(tmp_path / "d" / "1.tar", samples(0, 3)))


def test_a_source_pickles_without_its_files(tmp_path):
  source = open_source(write_tar(tmp_path / "0.tar", samples(0, 3)))
  source[0]
  again = pickle.loads(pickle.dumps(source))
  assert again[2] == source[2] and again.fingerprint == source.fingerprint


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path):
  path = pathlib.Path(write_tar(tmp_path / "0.tar", samples(0, 30)))
  source = open_source(str(path))
  path.write_bytes(path.read_bytes()[100:])
  with pytest.raises(OSError, match=r"0\.tar: the shard changed .* bytes then.*bigalign index"):
    source[20]


def test_more_shards_than_open_files(tmp_path):
  for i in range(140):
    write_tar(tmp_path / f"{i:03d}.tar", samples(i, 1))
  source = open_source(f"{tmp_path}/*.tar")
  for i in [*range(140), *range(140)]:
    assert source[i]["captions"] == (f"picture number {i}",)
  assert len(os.listdir("/proc/self/fd")) < 140 + 60


def test_real_shards(data_root):
  source = open_source(
    f"{data_root}/flickr8k/train/{{00000..00002}}.tar", captions=("json.captions",)
  )
  assert len(source) == 762
  assert sum(len(source[i]["captions"]) for i in range(762)) == 3810
  cifar = open_source("$BIGALIGN_DATA/cifar10/train/*.tar")
  assert np.bincount([cifar[i]["label"] for i in range(len(cifar))]).tolist() == [500] * 10
  assert all(cifar[i]["captions"] == (cifar.classnames[cifar[i]["label"]],) for i in range(100))


def test_tfds_without_tensorflow(tmp_path):
  def png(i: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), i, np.uint8)).save(file, "png")
    file.seek(0)
    return file

  class AlignTiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          dict(
            image=tfds.features.Image(shape=(None, None, 3)),
            label=tfds.features.ClassLabel(names=["red_fox", "cat"]),
            captions=tfds.features.Sequence(dict(text=tfds.features.Text())),
          )
        ),
      )

    def _split_generators(self, dl_manager):
      return dict(train=self._generate_examples())

    def _generate_examples(self):
      for i in range(6):
        yield (
          i,
          dict(
            image=png(i), label=i % 2, captions=[dict(text=f"image {i}"), dict(text=f"picture {i}")]
          ),
        )

  root = str(tmp_path)
  tfds.disable_progress_bar()
  AlignTiny(data_dir=root, file_format="array_record").download_and_prepare()
  source = open_source("tfds:align_tiny:train", data_dir=root)
  records = [source[i] for i in range(len(source))]
  assert {record["captions"] for record in records} == {
    (f"image {i}", f"picture {i}") for i in range(6)
  }
  assert all(isinstance(record["image"], bytes) for record in records)
  assert source.classnames == ("red_fox", "cat")
  labels = open_source("tfds:align_tiny:1.0.0:train[:50%]", data_dir=root, captions=())
  assert len(labels) == 3
  assert {labels[i]["captions"] for i in range(3)} <= {("red fox",), ("cat",)}
  assert pickle.loads(pickle.dumps(labels))[0] == labels[0]
  assert labels.fingerprint != source.fingerprint
  with pytest.raises(ValueError, match=r"no feature \['caption'\]; it has \['captions', 'image'"):
    open_source("tfds:align_tiny:train", data_dir=root, captions=("caption",))
  with pytest.raises(ValueError, match=r"no feature \['captions.txt'\]"):
    open_source("tfds:align_tiny:train", data_dir=root, captions=("captions.txt",))
  with pytest.raises(ValueError, match="names no split"):
    open_source("tfds:align_tiny", data_dir=root)
  with pytest.raises(FileNotFoundError, match="download_and_prepare"):
    open_source("tfds:align_tiny:train", data_dir=f"{root}/elsewhere")
  info = next(tmp_path.glob("**/dataset_info.json"))
  info.write_text(info.read_text().replace("array_record", "parquet"))
  with pytest.raises(ValueError, match=r"prepared as \['parquet'\]; random access needs"):
    open_source("tfds:align_tiny:train", data_dir=root)
