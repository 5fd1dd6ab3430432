"""bigalign inspect: exact counts, a page that escapes all captions, any kind of source."""

from __future__ import annotations

import html.parser
import json

import numpy as np
import pytest
from helpers.every_format import VERSIONS
from helpers.small_shards import picture, write_tar

from bigalign.data.sources.base import Spec
from bigalign.shards import inspect, sample_stats, speed

HOSTILE = '</div><script>alert(1)</script><img src="http://x/y.png" onerror=alert(2)>'
CAPTIONS = [
  HOSTILE,
  "שלום עולם " * 5,
  "一只棕色的熊坐在河边",
  "x" * 1_000_000,
  "два слова",
  "熊がいる",
  "$body ${title}",
  "12 %",
  "",
  "кот и cat и пёс",
  "\u202eright to left\u202c",
]


class Page(html.parser.HTMLParser):
  """The tags of a page with their attributes, and its text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data


def hostile_shard(path):
  """A sample for each caption, and bad ones: HTML, half an image, no image, invalid language."""
  members = []
  for i, text in enumerate(CAPTIONS):
    key = f"{i:03d}" + ("<b>" if i == 2 else "")
    members += [(f"{key}.jpg", picture(i, size=(20 + i, 40))), (f"{key}.txt", text.encode())]
  members += [
    ("100.jpg", b"<html>"),
    ("100.txt", b"a"),
    ("101.jpg", picture(0, size=(90, 90))[:-200]),
    ("101.txt", b"b"),
    ("102.txt", b"c"),
    ("103.jpg", picture(0, size=(20, 40))),
    ("103.txt", b"12 %"),
    ("103.json", json.dumps(dict(lang="\ud800")).encode()),
    ("104.jpg", picture(7)),
    ("104.txt", b"d"),
    ("104.json", b'{"lang": "de"}'),
  ]
  return write_tar(path, members)


def test_a_page_of_captions_that_would_break_out(tmp_path):
  shard = hostile_shard(tmp_path / "0.tar")
  spec = Spec(shard, ("txt", "json.lang"))
  found = inspect.inspect(spec, tmp_path / "x.html", language="json.lang", seconds=0)
  assert found["samples"] == found["looked_at"] == 16
  assert found["bad"] == dict(undecodable=1, truncated=1, no_image=1, no_caption=1)
  assert found["repeated_images"] == 1 / 15  # of 15 images, that of 103 is that of 000
  assert found["repeated_captions"] == 1 / 14 and found["frequent"] == {"12 %": 2}
  assert found["kinds"] == dict(jpeg=14, other=1, none=1)
  assert found["images"]["height"]["most"] == 30 and found["images"]["width"]["least"] == 24
  assert found["scripts"] == {
    "Latin": 7,
    "no letters": 2,
    "Han or Kana": 2,
    "Cyrillic": 2,
    "Hebrew": 1,
  }
  assert found["languages"] == {"\ufffd": 1, "de": 1}  # half a surrogate pair, as in captions
  assert found["captions"]["txt"]["characters"]["most"] == 1_000_000

  text = (tmp_path / "x.html").read_text(encoding="utf-8")
  page = Page(text)
  assert len(text) < 300_000 and HOSTILE in page.text  # seen, not run
  names = [tag for tag, _ in page.tags]
  assert names.count("img") == 12 and "script" not in names
  for _, attributes in page.tags:
    assert not any(name.startswith("on") for name in attributes)
    assert attributes.get("src", "data:image/").startswith("data:image/")
  assert [
    attributes["dir"] for tag, attributes in page.tags if attributes.get("class") == "caption"
  ] == ["auto"] * 12
  assert "1,000,000 characters" in page.text and "$body ${title}" in page.text
  assert "xx…" in page.text and "x" * 300 not in page.text
  assert "sample 13no_image0.tar/102 has ['txt']" in page.text  # a row of the table
  assert names.count("b") == 2 and "0.tar/002<b>" in page.text


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kind_of_source_has_the_same_figures(tmp_path, version):
  records = [
    dict(image=picture(i), captions=(f"picture {i}", f"image {i}"), label=i % 3) for i in range(20)
  ]
  records[7]["image"] = records[3]["image"]
  spec = Spec(
    VERSIONS[version](tmp_path / "d", records),
    ("title",) if version == "folder" else ("captions",),
    (("data_dir", str(tmp_path / "d")),) if version == "tfds" else (),
  )
  found = inspect.inspect(spec, tmp_path / "x.html", seconds=0)
  assert found["samples"] == 20 and found["bad"] == {} and found["repeated_images"] == 1 / 20
  (field,) = found["captions"].values()
  assert field["samples_with_one"] == 1 and field["per_sample"] == 2
  assert field["characters"]["least"] == 7 and field["characters"]["most"] == 10
  assert found["images"]["aspect_ratio"]["median"] == 1.2
  assert Page((tmp_path / "x.html").read_text()).text.count("1 more · 24 × 20") == 20


def test_the_same_evenly_spread_samples_each_time():
  assert sum(sample_stats.spread(100, samples=100, block=1), ()) == tuple(range(100))
  for size, samples, block, length, longest in (
    (10**9, 1000, 1, 1, 64),
    (10**6, 1000, 20, 20, 20),
    (10_000, 320, 5000, 10, 10),
  ):
    tasks = sample_stats.spread(size, samples=samples, block=block)
    assert tasks == sample_stats.spread(size, samples=samples, block=block)
    chosen = np.array(sum(tasks, ()))
    assert len(chosen) == samples and max(map(len, tasks)) == longest
    assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < size
    # Every tenth of the source has a tenth of them.
    assert np.abs(np.histogram(chosen, 10, (0, size))[0] - samples / 10).max() <= 2 * length
    if block > 1:
      assert all(np.ptp(task) == len(task) - 1 for task in tasks)


@pytest.mark.slow
def test_the_program_measures_the_loader_and_counts_hosts(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  shard = write_tar(
    tmp_path / "0.tar",
    [
      member
      for i in range(300)
      for member in ((f"{i:03d}.jpg", picture(i)), (f"{i:03d}.txt", b"a"))
    ],
  )
  words = [shard, "--samples=100", "--workers=1", "--seconds=0.2", "--image_size=32"]
  found = inspect.main([*words, "--batch_size=64000", "--steps_per_second=10"])
  rates = found["throughput"]
  assert rates["read"] > rates["decoded"] > 0
  assert (
    rates["hosts"]
    == -(-640_000 // rates["decoded"])
    == speed.hosts_needed(640_000, rates["decoded"])
  )
  page = Page((tmp_path / "inspect.html").read_text()).text
  assert "Figures are of 100 samples, evenly spread over the source" in page
  assert f"{rates['hosts']:,.0f}for 640,000 images/s" in page
  assert capsys.readouterr().out.endswith("inspect.html\n")
  with pytest.raises(SystemExit):
    inspect.main([*words, "--batch_size=64"])
  broken = write_tar(tmp_path / "1.tar", [("0.jpg", b"x"), ("0.txt", b"a")])
  found = inspect.main([broken, "--workers=0", "--seconds=0.2"])
  assert "all rejected" in found["throughput"]["problem"] and found["bad"] == {"undecodable": 1}


def test_scripts():
  for text, script in {
    "two words": "Latin",
    "три слова и one": "Cyrillic",
    "한국어": "Hangul",
    "हिन्दी": "Devanagari",
    "123 🙂": "no letters",
    "漢字とかな": "Han or Kana",
    "عربي": "Arabic",
  }.items():
    assert sample_stats.script(text) == script
