"""Pooling and zero-shot segmentation: python experiments/segmentation.py OUT

Trains a small model on the icons in BIGALIGN_DATA for each seed and each way to pool the patches,
and evaluates the segmentation of mosaics: four held-out icons in one image, whose places have the
class of their icon's name, among the most frequent names of the training icons. White places do not
count. The table has retrieval on held-out icons too, and the reports of the runs have pictures.
"""

from __future__ import annotations

import collections
import io
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import arms
import numpy as np
from masked import RETRIEVAL, config
from PIL import Image

from bigalign.report.main import report

ICONS = pathlib.Path(os.environ["BIGALIGN_DATA"]) / "icons"
FIGURES = dict(
  retrieval=RETRIEVAL,
  mean_iou="val/mosaics-segmentation-mean_iou",
  pixel_accuracy="val/mosaics-segmentation-pixel_accuracy",
)
SIZE = 80  # pixels of an icon


def icons(pattern: str) -> Iterator[tuple[str, bytes]]:
  """(name, JPEG) of the icons of the shards that a pattern matches."""
  for path in sorted(ICONS.glob(pattern)):
    with tarfile.open(path) as file:
      for member in file:
        if member.name.endswith(".txt"):
          text, image = (file.extractfile(member.name[:-3] + x) for x in ("txt", "jpg"))
          assert text and image
          yield text.read().decode(), image.read()


def mosaics(folder: pathlib.Path, classes: int, count: int) -> int:
  """Writes mosaics.tar and classes.txt into a folder; returns how many icons were held out."""
  frequent = collections.Counter(name for name, _ in icons("train/*.tar"))
  held_out = collections.defaultdict(list)
  for name, image in icons("val/*.tar"):
    held_out[name].append(image)
  names = sorted(sorted(held_out, key=lambda name: (-frequent[name], name))[:classes])
  (folder / "classes.txt").write_text("\n".join(names) + "\n")
  rng = np.random.default_rng(0)
  with tarfile.open(folder / "mosaics.tar", "w") as file:
    for i in range(count):
      picture = np.full((2 * SIZE, 2 * SIZE, 3), 255, np.uint8)
      labels = np.full((2 * SIZE, 2 * SIZE), 255, np.uint8)
      for place, chosen in enumerate(rng.choice(classes, 4, replace=False).tolist()):
        images = held_out[names[chosen]]
        icon = Image.open(io.BytesIO(images[rng.integers(len(images))])).convert("RGB")
        pixels = np.asarray(icon.resize((SIZE, SIZE)))
        y, x = (SIZE * k for k in divmod(place, 2))
        picture[y : y + SIZE, x : x + SIZE] = pixels
        labels[y : y + SIZE, x : x + SIZE][(pixels < 235).any(-1)] = chosen
      for end, array in (("png", picture), ("seg.png", labels)):
        stored = io.BytesIO()
        Image.fromarray(array).save(stored, "png")
        info = tarfile.TarInfo(f"{i:05d}.{end}")
        info.size = stored.tell()
        stored.seek(0)
        file.addfile(info, stored)
  return sum(len(held_out[name]) for name in names)


def main() -> None:
  """Trains all arms with all seeds."""
  given = arms.arguments(__doc__ or "", steps=600, classes=64)
  held_out = mosaics(given.out, given.classes, 200)
  print(f"200 mosaics of {held_out} held-out icons of {given.classes} names")
  compared = {}
  for pool in ("mean", "max", "map"):
    c = compared[pool] = config(given.steps)
    c["data"]["image_size"] = 64  # an icon of a mosaic has 4 x 4 patches
    c["model"]["image"]["pool"] = pool
    c["evals"]["mosaics"] = dict(
      type="segmentation",
      source=str(given.out / "mosaics.tar"),
      classnames=str(given.out / "classes.txt"),
      templates=("{c}",),
    )

  def found(run: pathlib.Path, state: Any) -> dict[str, float]:
    report(run)
    return arms.last(run, FIGURES)

  rows = arms.compare(given.out, compared, given.seeds, found)
  arms.show(rows, [*FIGURES], given.out)
  arms.draw(rows, [*FIGURES], given.out / "segmentation.png")
  print(f"chance of pixel_accuracy: {1 / given.classes:.3f}")


if __name__ == "__main__":
  main()
