"""Hundreds of damaged safetensors and npz files: refused by their name, or read as other numbers.

In test_weights_fuzz.py and test_weights_npz.py headers lie on purpose; here any byte can change.
Run as a program, this file tries some of them: PATH NAME FIRST END FOLDER.
"""

from __future__ import annotations

import io
import json
import pathlib

import numpy as np
import pytest
from helpers import mutations, small_checkpoints
from helpers.damaged_files import shapes_of
from helpers.small_checkpoints import CLIP, clip_keys
from helpers.tower_oracles import ROOT

from bigalign import weights

MEBIBYTE = 1 << 20


def safetensors(folder: pathlib.Path) -> dict[str, bytes]:
  """{name: bytes} of a CLIP of Hugging Face."""
  arrays = clip_keys()
  path = small_checkpoints.folder(folder / "clip", CLIP, arrays)
  return {file.name: file.read_bytes() for file in path.iterdir()}


def sharded(folder: pathlib.Path) -> dict[str, bytes]:
  """The same in two files with an index."""
  arrays = clip_keys()
  keys, where = sorted(arrays), {}
  files = {"config.json": json.dumps(CLIP).encode()}
  for n, part in enumerate((keys[::2], keys[1::2])):
    name = f"model-{n}.safetensors"
    path = small_checkpoints.folder(folder / f"part{n}", CLIP, {key: arrays[key] for key in part})
    files[name] = (path / "model.safetensors").read_bytes()
    where |= dict.fromkeys(part, name)
  files["model.safetensors.index.json"] = json.dumps(dict(weight_map=where)).encode()
  return files


def npz(folder: pathlib.Path, *, packed: bool = False) -> dict[str, bytes]:
  """A SigLIP of big_vision, perhaps compressed."""
  del folder
  with np.load(ROOT / "bv_siglip_npz/weights.npz") as archive:
    arrays = {key: archive[key] for key in archive.files}
  file = io.BytesIO()
  (np.savez_compressed if packed else np.savez)(file, **arrays)
  return {"weights.npz": file.getvalue()}


# (function that writes the files, what is opened in their folder)
KINDS = [
  (safetensors, ""),
  (npz, "weights.npz"),
  (sharded, ""),
  (lambda folder: npz(folder, packed=True), "weights.npz"),
]


def checkpoints(folder: pathlib.Path) -> mutations.Trial:
  """Describes a checkpoint of which one file is damaged, and loads it."""
  own = folder / "damaged"
  wholes, shapes = [], []

  def read(kind: int, files: dict[str, bytes]) -> str:
    mutations.fresh(own)
    for name, data in files.items():
      (own / name).write_bytes(data)
    try:
      checkpoint = weights.describe(own / KINDS[kind][1])
      arrays = checkpoint.load(shapes[kind])
    except (ValueError, FileNotFoundError) as error:
      text = str(error)
      assert str(own) in text and len(text) < 3_000, text
      return "refused"
    for path, shape in shapes[kind].items():
      assert arrays[path].shape == shape.shape and arrays[path].dtype == shape.dtype
      np.array(arrays[path])  # reads a memory map
    return "read"

  for kind, (write, opened) in enumerate(KINDS):
    files = write(folder)
    wholes.append(files)
    mutations.fresh(own)
    for name, data in files.items():
      (own / name).write_bytes(data)
    checkpoint = weights.describe(own / opened)
    size = checkpoint.layout.data.get("image_size", 16)
    shapes.append(shapes_of(checkpoint, np.zeros((1, size, size, 3), np.float32)))
    assert read(kind, files) == "read"

  def trial(n: int) -> str:
    random = np.random.default_rng([6, n])
    files = dict(wholes[n % len(KINDS)])
    name = sorted(files)[random.integers(len(files))]
    files[name] = mutations.mutated_file(name, files[name], random)
    return read(n % len(KINDS), files)

  return trial


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_damaged_checkpoints_are_refused_or_have_the_right_shapes():
  tally = mutations.tally(__file__, "checkpoints", 800)
  tally.check(800, seconds=10, memory=128 * MEBIBYTE)
  assert min(tally.outcomes["read"], tally.outcomes["refused"]) > 50


if __name__ == "__main__":
  mutations.serve(dict(checkpoints=checkpoints))
