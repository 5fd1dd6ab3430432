"""Which member of a sample in a tar is its image, and errors about members."""

from __future__ import annotations

import io
import json

import pytest
from helpers.small_shards import picture, write_tar
from PIL import Image

from bigalign.data.image.decode import decode
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import open_source

KINDS = {
  **{kind: "jpeg" for kind in ("jpg", "jpeg", "jpe", "jfif")},
  **{kind: kind for kind in ("png", "webp", "gif", "bmp", "avif")},
  **dict(tif="tiff", tiff="tiff", ppm="ppm", pgm="ppm", jp2="jpeg2000"),
}


@pytest.mark.parametrize("name", [*KINDS, "image.jpg", "image.tif", "JPG", "Image.PNG"])
def test_every_kind_of_image_is_found(tmp_path, name):
  file = io.BytesIO()
  kind = KINDS[name.lower().rpartition(".")[2]]
  Image.open(io.BytesIO(picture(kind="png"))).save(file, kind)
  write_tar(tmp_path / "0.tar", [(f"0.{name}", file.getvalue()), ("0.txt", b"a")])
  source = open_source(f"{tmp_path}/0.tar")
  assert source[0]["image"] == file.getvalue() and source[0]["captions"] == ("a",)
  assert decode(source[0]["image"]).shape == (20, 24, 3)


def test_the_member_of_the_image_can_be_named(tmp_path):
  members = [("0.photo.jpg", b"photo"), ("0.seg.png", b"seg"), ("0.txt", b"a")]
  write_tar(tmp_path / "0.tar", members)
  with pytest.raises(ValueError) as error:
    open_source(f"{tmp_path}/0.tar")
  assert "no image member" in str(error.value) and "['photo', 'seg']" in str(error.value)
  assert "--source_options image=" in str(error.value)
  for image, data in (("photo", b"photo"), ("photo.jpg", b"photo"), ("seg", b"seg")):
    assert open_source(f"{tmp_path}/0.tar", image=image)[0]["image"] == data
  with pytest.raises(ValueError, match="no image member 'jpg'"):
    open_source(f"{tmp_path}/0.tar", image="jpg")


def test_a_mask_does_not_replace_a_missing_image(tmp_path):
  write_tar(
    tmp_path / "0.tar",
    [("0.jpg", b"i"), ("0.seg.png", b"s"), ("0.txt", b"a"), ("1.seg.png", b"s"), ("1.txt", b"b")],
  )
  source = open_source(f"{tmp_path}/0.tar")
  assert source[0]["image"] == b"i"
  with pytest.raises(Rejected, match=r"no_image: 0\.tar/1 has"):
    source[1]


def test_thousands_of_dotted_keys_are_a_short_error_with_the_cause(tmp_path):
  members = [
    member for i in range(3_000) for member in ((f"a.{i}.jpg", b"i"), (f"a.{i}.txt", b"t"))
  ]
  write_tar(tmp_path / "0.tar", members)
  with pytest.raises(ValueError) as error:
    open_source(f"{tmp_path}/0.tar")
  message = str(error.value)
  assert "and 5992 more" in message and "Keys end at the first dot" in message
  assert len(message) < 1_500


def test_an_optional_key_that_regular_samples_lack_is_found(tmp_path):
  """Every eighth of 64 samples lacks the key of the captions."""
  members = []
  for i in range(64):
    entries = {} if i % 8 == 0 else dict(caption="a")
    members += [(f"{i:02d}.jpg", picture(0)), (f"{i:02d}.json", json.dumps(entries).encode())]
  write_tar(tmp_path / "0.tar", members)
  assert open_source(f"{tmp_path}/0.tar", captions=("json.caption",))[1]["captions"] == ("a",)


def test_captions_of_lists_of_objects(tmp_path):
  entries = dict(sentences=[dict(raw="one", n=1), dict(raw="two"), dict(n=3), 4])
  write_tar(tmp_path / "0.tar", [("0.jpg", b"i"), ("0.json", json.dumps(entries).encode())])
  source = open_source(f"{tmp_path}/0.tar", captions=("json.sentences.raw",))
  assert source[0]["captions"] == ("one", "two")
