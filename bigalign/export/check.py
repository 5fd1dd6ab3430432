"""Compares the outputs of an exported folder with those of the run."""

from __future__ import annotations

import importlib.util
import pathlib

import numpy as np
from PIL import Image

from bigalign.export.formats import FORMATS
from bigalign.weights.files import read_json

TOLERANCE = 2e-5  # relative to the largest output
SAMPLES = "samples.npz"  # images, texts, and the run's logits or embeddings of them


def difference(folder: pathlib.Path) -> float:
  """The largest difference between the folder's outputs and the run's, relative to the largest.

  Raises:
    FileNotFoundError: for a folder that bigalign did not write.
    ModuleNotFoundError: without the library of the format.
    ValueError: if the library misses a key, or does not know one.
  """
  about = folder / "bigalign.json"
  if not about.is_file():
    raise FileNotFoundError(f"{about}: no such file; was {folder} written by bigalign export?")
  name = read_json(about)["format"]
  if missing(name):
    raise ModuleNotFoundError(
      f"comparing a folder of the format {name} needs {' and '.join(missing(name))}:"
      " pip install 'bigalign[interop]', for open_clip also open_clip_torch"
    )
  with np.load(folder / SAMPLES) as stored:
    texts, expected = stored["texts"].tolist(), stored[FORMATS[name].output]
    count = sum(key.startswith("image_") for key in stored.files)
    images = [Image.fromarray(stored[f"image_{i}"]) for i in range(count)]
  outputs = FORMATS[name].compute(folder, images, texts)
  return float(np.abs(outputs - expected).max() / np.abs(expected).max())


def possible(name: str) -> bool:
  """Whether the libraries that read a format are installed."""
  return not missing(name)


def missing(name: str) -> list[str]:
  """The packages that comparing a format needs and that are not installed."""
  return [x for x in FORMATS[name].packages if importlib.util.find_spec(x) is None]
