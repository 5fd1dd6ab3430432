"""bigalign convert: the same ids and batches, nothing lost, complete after any kill."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.batches import PHOTO_SHARDS, first_photo_batches, train_batches
from helpers.every_format import VERSIONS
from helpers.object_store_server import store
from helpers.small_shards import picture, samples, write_tar
from PIL import Image

from bigalign.data.files.storage import locked
from bigalign.data.image.decode import decode
from bigalign.data.samples.rejects import REASONS, Rejected
from bigalign.data.sources.base import Spec, open_source
from bigalign.shards import convert as program
from bigalign.shards import index
from bigalign.shards.convert import convert


def batches(pattern, captions):
  source = open_source(pattern, captions=captions)
  with contextlib.closing(
    train_batches(
      source,
      batch_size=16,
      rows=np.arange(16),
      seed=0,
      image_size=16,
      stop=96,
      order="exact",
      tokenizer=dict(name="byte", length=24),
      stop_at_bad_shard=False,
    )
  ) as found:
    return list(found)


def assert_equal(found, expected):
  assert len(found) == len(expected) > 0
  for a, b in zip(found, expected):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def tar_with_bad_samples(path):
  """Samples without image, with a broken image, an invalid label, invalid JSON, no text."""
  members = dict(samples(0, 60))
  del members["000000.jpg"]
  members["000007.jpg"] = b"<html>"
  members["000011.cls"] = b"a dog"
  members["000013.json"] = b"{"
  members["000017.txt"] = b" \n"
  members["000019.txt"] = b"caf\xe9"
  members["000021.json"] = json.dumps(dict(caption=["one", "two"], nsfw=0.25)).encode()
  return write_tar(path, sorted(members.items()))


def test_bad_samples_keep_their_position_and_their_reason(tmp_path):
  captions = ("json.caption", "txt")
  shard = tar_with_bad_samples(tmp_path / "0.tar")
  found = convert(Spec(shard, captions), f"{tmp_path}/out", records=25)
  assert found | dict(bytes=0) == dict(
    files=3,
    already_there=0,
    records=60,
    smaller=0,
    bytes=0,
    refused=dict(no_image=1, bad_metadata=1),
  )
  copy = f"{tmp_path}/out/*.array_record"
  expected = batches(shard, captions)
  assert (
    sum(batch["rejects"] for batch in expected)
    .any(0)[[REASONS.index(r) for r in ("no_image", "undecodable", "no_caption", "bad_metadata")]]
    .all()
  )
  assert_equal(batches(copy, captions), expected)
  a, b = open_source(shard, captions=captions), open_source(copy, captions=captions)
  for i in range(60):
    try:
      record = a[i]
    except Rejected as error:
      with pytest.raises(Rejected, match=error.reason):
        b[i]
    else:
      assert b[i] == record  # with its key
  assert b.where(30) == (f"{tmp_path}/out/00001-of-00003.array_record", 5, 25)
  # The copy still contains what was broken.
  assert b.fields(11)["cls"] == [b"a dog"] and b.fields(13)["json"] == [b"{"]
  assert b.fields(13)["image"] == [picture(13)]
  assert json.loads(b.fields(21)["json"][0])["nsfw"] == 0.25


@pytest.mark.slow
def test_photos_have_equal_batches_from_a_copy(data_root, tmp_path):
  """Ids, pixels, tokens and labels of three collections in one source."""
  captions = ("json.captions", "txt")
  convert(Spec(PHOTO_SHARDS, captions), f"{tmp_path}/out", records=400)
  assert_equal(
    first_photo_batches(f"{tmp_path}/out/*.array_record", captions),
    first_photo_batches(PHOTO_SHARDS, captions),
  )


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kind_of_source_is_copied(tmp_path, version):
  records = [
    dict(image=picture(i), captions=(f"picture {i}", f"image {i}"), label=i % 3) for i in range(12)
  ]
  name = "title" if version == "folder" else "captions"
  options = (("data_dir", str(tmp_path / "d")),) if version == "tfds" else ()
  spec = Spec(VERSIONS[version](tmp_path / "d", records), (name,), options)
  convert(spec, f"{tmp_path}/out", records=5)
  source = open_source(spec.source, captions=spec.captions, **dict(options))
  copy = open_source(f"{tmp_path}/out/*.array_record", captions=spec.captions)
  assert [copy[i] for i in range(12)] == [source[i] for i in range(12)]
  assert [copy[i]["texts"][name] for i in range(12)] == [each["captions"] for each in records]


def test_all_other_columns_are_copied_too(tmp_path):
  pq.write_table(
    pa.table(
      dict(
        jpg=[picture(0), picture(1)],
        caption=["a", "b"],
        score=[0.5, 0.25],
        key=["k0", "k1"],
        boxes=[[[1, 2]], []],
        small=[2, 1 << 62],
        none=[None, None],
      )
    ),
    tmp_path / "0.parquet",
  )
  convert(Spec(f"{tmp_path}/0.parquet"), f"{tmp_path}/out")
  copy = open_source(f"{tmp_path}/out/*.array_record")
  assert copy[1] == open_source(f"{tmp_path}/0.parquet")[1] | dict(texts=copy[1]["texts"])
  assert copy.fields(1) | dict(image=0) == dict(
    image=0,
    caption=[b"b"],
    captions=[],
    text=[],
    txt=[],
    title=[],
    score=[0.25],
    key=[b"k1"],
    boxes=[],
    small=[1 << 62],
    none=[],
  )
  assert copy.fields(0)["boxes"] == [b"[[1, 2]]"]
  convert(Spec("glyphs:heldout"), f"{tmp_path}/glyphs", records=50_000)
  pixels = open_source(f"{tmp_path}/glyphs/*.array_record")[3]
  glyph = open_source("glyphs:heldout")[3]
  np.testing.assert_array_equal(decode(pixels["image"]), decode(glyph["image"]))
  assert pixels["captions"] == glyph["captions"] and pixels["label"] == glyph["label"]


def test_a_missing_label_is_missing_in_the_copy(tmp_path, caplog):
  """Nulls, blanks, NaN; labels alone, where the first sample has none; another column `label`."""
  labels = [None, 1, None, 2, 0]
  columns = dict(
    jpg=[picture(i) for i in range(5)],
    caption=["a", "b", "c", "d", "e"],
    label=labels,
    floats=[None, 1.0, float("nan"), 2.0, 0.0],
    texts=[None, "1", " ", "2", "0"],
    lists=[None, [1], [], [2], [0]],
  )
  pq.write_table(pa.table(columns), tmp_path / "0.parquet")
  for name in ("label", "floats", "texts", "lists"):
    for captions in (("caption",), ()):
      spec = Spec(f"{tmp_path}/0.parquet", captions, (("label", name),))
      convert(spec, f"{tmp_path}/{name}{len(captions)}")
      source = open_source(spec.source, captions=captions, label=name)
      copy = open_source(f"{tmp_path}/{name}{len(captions)}/*.array_record", captions=captions)
      expected = [-1 if label is None else label for label in labels]
      assert [source[i]["label"] for i in range(5)] == expected, name
      assert [copy[i]["label"] for i in range(5)] == expected, name
  shards = [(f"{i}.jpg", picture(i)) for i in range(3)] + [("1.cls", b"7"), ("2.cls", b"8")]
  shard = write_tar(tmp_path / "0.tar", sorted(shards))
  convert(Spec(shard), f"{tmp_path}/classes")
  copy = open_source(f"{tmp_path}/classes/*.array_record")
  assert [copy[i]["label"] for i in range(3)] == [-1, 7, 8]
  assert not caplog.records


def test_remote_shards_are_fetched_once(tmp_path, monkeypatch):
  monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "index"))
  write_tar(tmp_path / "0.tar", samples(0, 320))
  with store(tmp_path) as server:
    assert index.main([f"{server.url}/0.tar", f"--out={tmp_path}/index", "--workers=1"]) == 0
    source = open_source(f"{server.url}/0.tar")
    server.requests.clear()
    convert(Spec(f"{server.url}/0.tar"), f"{tmp_path}/out")
    assert len(server.requests) < 10 + 4  # runs of 32, and what opening looks at
    copy = open_source(f"{tmp_path}/out/*.array_record")
    assert copy[319]["image"] == source[319]["image"]


def test_large_images_are_resized_and_others_unchanged(tmp_path):
  turned = io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.open(io.BytesIO(picture(1, size=(80, 100)))).save(turned, "jpeg", exif=exif)
  images = [
    picture(0, size=(64, 200)),
    turned.getvalue(),
    picture(2, size=(200, 100), kind="png"),
    picture(3, size=(300, 300))[:-300],
  ]
  shard = write_tar(
    tmp_path / "0.tar",
    [
      member
      for i, image in enumerate(images)
      for member in ((f"{i}.jpg", image), (f"{i}.txt", b"a"))
    ],
  )
  found = convert(Spec(shard), f"{tmp_path}/out", short_side=64, quality=90)
  assert found["smaller"] == 2
  copy = open_source(f"{tmp_path}/out/*.array_record")
  assert copy[0]["image"] == images[0] and copy[3]["image"] == images[3]
  assert decode(copy[1]["image"]).shape == (64, 80, 3)
  assert decode(copy[1]["image"], apply_exif=True).shape == (80, 64, 3)
  assert decode(copy[2]["image"]).shape == (128, 64, 3) and copy[2]["image"][:2] == b"\xff\xd8"
  small = Image.fromarray(decode(images[2])).resize((64, 128), Image.Resampling.LANCZOS)
  assert np.abs(decode(copy[2]["image"]).astype(int) - np.asarray(small)).mean() < 3
  # Without the option no byte changes.
  convert(Spec(shard), f"{tmp_path}/same")
  same = open_source(f"{tmp_path}/same/*.array_record")
  assert [same[i]["image"] for i in range(4)] == images


def test_totals_are_a_table_for_people_and_json_for_programs(tmp_path, capsys):
  shard = tar_with_bad_samples(tmp_path / "0.tar")
  words = [shard, f"--out={tmp_path}/out", "--workers=1", f"--json={tmp_path}/new/totals.json"]
  totals = program.main(words)
  assert json.loads((tmp_path / "new/totals.json").read_text()) == totals
  *_, files, records, size, resized, bad, _, end = capsys.readouterr().out.splitlines()
  assert files.split() == ["files", "1"] and records.split() == ["records", f"{totals['records']}"]
  assert size.split()[0] == "size" and resized.split() == ["resized", "images", "0"]
  reason, count = next(iter(totals["refused"].items()))
  assert f"bad samples      {reason} {count}" in bad and "{" not in bad
  assert end == f"{tmp_path}/out/*.array_record"


@pytest.mark.slow
def test_a_killed_copy_resumes(tmp_path):
  shard = write_tar(tmp_path / "0.tar", samples(0, 1200))
  words = [
    sys.executable,
    "-m",
    "bigalign",
    "convert",
    shard,
    f"--out={tmp_path}/out",
    "--records=10",
    "--workers=2",
    f"--json={tmp_path}/totals.json",
  ]
  part = tmp_path / "out.part"
  with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()  # the workers end too
  finished = 1 + rest.count("\n")
  assert finished < 120 and not (tmp_path / "out").exists()
  with open(part / program.LOG, "a") as log:
    log.write('{"file": "00119-of')  # a torn line, as a full disk leaves it
  (part / "00119-of-00120.array_record.tmp").write_bytes(b"half")
  before = {path.name: path.stat().st_mtime_ns for path in part.glob("*.array_record")}
  subprocess.run(words, capture_output=True, check=True)
  found = json.loads((tmp_path / "totals.json").read_text())
  assert found["records"] == 1200 and found["already_there"] >= finished
  assert not part.exists()
  whole = tmp_path / "whole"
  convert(Spec(shard), str(whole), records=10)
  names = sorted(os.listdir(whole))
  assert sorted(os.listdir(tmp_path / "out")) == names and len(names) == 121
  for name in names[:-1]:
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
  kept = [
    name for name, time in before.items() if (tmp_path / "out" / name).stat().st_mtime_ns == time
  ]
  assert len(kept) == found["already_there"]


def test_obstacles_are_named(tmp_path):
  shard = write_tar(tmp_path / "0.tar", samples(0, 30))
  out = f"{tmp_path}/out"
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:  # as on a full disk: files end at this size
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    with pytest.raises(
      OSError,
      match=r"00000-of-00002\.array_record: .*File too large.* MB are "
      r"free there; free some space and run the same command again",
    ):
      convert(Spec(shard), out, records=20)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert os.listdir(f"{out}.part") == [program.LOG]
  with pytest.raises(ValueError, match=r"out\.part was started with short_side=0, now 8\. Finish"):
    convert(Spec(shard), out, records=20, short_side=8)
  with locked(f"{out}.part", "x"), pytest.raises(BlockingIOError, match="another bigalign"):
    convert(Spec(shard), out, records=20)
  assert convert(Spec(shard), out, records=20)["records"] == 30
  with pytest.raises(FileExistsError, match=f"{out} exists; remove it, or choose another folder"):
    convert(Spec(shard), out)
  (tmp_path / "mine.part").mkdir()
  (tmp_path / "mine.part/photo.jpg").write_bytes(b"")
  with pytest.raises(FileExistsError, match=r"mine\.part holds \['photo\.jpg'\] and no convert"):
    convert(Spec(shard), f"{tmp_path}/mine")
  with pytest.raises(ValueError, match="records=0"):
    convert(Spec(shard), f"{tmp_path}/none", records=0)
