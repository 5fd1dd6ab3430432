"""A small searchable dataset: squares of one colour each, and a model that knows colours."""

from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.small_shards import write_tar
from PIL import Image

from bigalign.data.image.decode import decode
from bigalign.data.samples.ids import sample_id
from bigalign.data.sources.base import open_source
from bigalign.data.stores import writer
from bigalign.data.stores.reader import Store
from bigalign.search.collection import Collection
from bigalign.search.index import Exact
from bigalign.search.searcher import Searcher

COLOURS = {
  "red": (230, 30, 30),
  "orange": (240, 140, 20),
  "yellow": (240, 230, 30),
  "green": (30, 180, 40),
  "blue": (30, 60, 220),
  "violet": (150, 30, 220),
}
# Captions that would run if they became HTML; the sample of each has its own colour.
SCRIPTS = {
  "<script>window.hit = 1</script> magenta": (255, 0, 128),
  "<img src=x onerror='window.hit = 2'> teal": (0, 140, 140),
  "\"><svg onload='window.hit = 3'></svg> brown": (120, 70, 20),
}


def square(colour, size=(48, 64)):
  """A PNG of one colour."""
  file = io.BytesIO()
  Image.new("RGB", size, colour).save(file, "png")
  return file.getvalue()


class Colours:
  """Embeds images by their mean colour, and texts by the colour that they name."""

  source = "colours"

  def embed_images(self, images, *, progress=True):
    return unit([decode(x).mean((0, 1)) for x in images])

  def embed_texts(self, texts, *, progress=True):
    known = COLOURS | {caption.split()[-1]: colour for caption, colour in SCRIPTS.items()}
    return unit([next((c for name, c in known.items() if name in x), (1, 1, 1)) for x in texts])


def unit(colours):
  z = np.asarray(colours, np.float32) - 110
  return z / np.linalg.norm(z, axis=1, keepdims=True)


def write_store(
  folder, vectors, *, side="image", dtype="float16", keys=None, fingerprint="f", **header
):
  """A store of these vectors, whose keys are those of write_tar's samples, or `keys`."""
  keys = [f"{i:06d}" for i in range(len(vectors))] if keys is None else keys
  header = dict(side=side, width=vectors.shape[1], dtype=dtype, projected=True) | header
  writer.begin(folder, header)
  writer.claim(folder, fingerprint, len(vectors), "s", batch_size=64, batches=1, write=True)
  samples = np.array([[sample_id(key), i] for i, key in enumerate(keys)], np.uint64)
  for piece, start in enumerate(range(0, len(vectors), 64)):
    rows = slice(start, start + 64)
    writer.write(folder, piece, vectors[rows].astype(header["dtype"]), samples[rows])
  writer.finish(folder, captions=side == "text")
  return Store(folder)


@pytest.fixture(scope="session")
def captions():
  """{caption: colour}, in the order of the rows."""
  return {f"{name} square": colour for name, colour in COLOURS.items()} | SCRIPTS


@pytest.fixture(scope="session")
def shards(tmp_path_factory, captions):
  members = []
  for i, (caption, colour) in enumerate(captions.items()):
    members += [(f"{i:06d}.png", square(colour)), (f"{i:06d}.txt", caption.encode())]
  return write_tar(tmp_path_factory.mktemp("colours") / "0.tar", members)


@pytest.fixture(scope="session")
def searcher(tmp_path_factory, captions, shards):
  source = open_source(shards)
  keys = [source[i]["key"] for i in range(len(source))]
  vectors = unit(list(captions.values()))
  store = write_store(tmp_path_factory.mktemp("store") / "image", vectors, keys=keys)
  return Searcher(Colours(), Exact(store), Collection(store, source))
