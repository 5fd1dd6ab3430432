"""Augmented views that a teacher saw, and that the student sees again, pixel by pixel.

`bigalign reinforce` runs a teacher over several views of each image. A view is a function of a
seed, the key of the sample and the number of the view, so the store holds no parameters of
augmentations: its header has the seed, the number of views and the options of config.data.augment.
Dataset reinforcement: MobileCLIP, https://arxiv.org/abs/2311.17049.

The box of a crop depends on the pixels of the image, so an image is decoded at its full size, and
the store has the height and width that the teacher saw.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigalign.data.order.permutation import REPLAY, hash_words
from bigalign.data.samples.ids import sample_id

VERSION = 1  # of the draws and of the augmentations; another one makes other pixels


@dataclasses.dataclass(frozen=True)
class Replay:
  """The views of each image in a store.

  Args:
    views: A, how many there are of each image.
    seed: of their draws.
    augment: config.data.augment in plain values.
    apply_exif: config.data.apply_exif.
  """

  views: int
  seed: int
  augment: Mapping[str, Any]
  apply_exif: bool

  def rng(self, key: str, number: int) -> np.random.Generator:
    """The generator of view `number` of the sample with this key."""
    words = [int(hash_words(REPLAY, self.seed, sample_id(key))[0]), number]
    return np.random.Generator(np.random.Philox(key=np.array(words, np.uint64)))

  @property
  def header(self) -> dict[str, Any]:
    """What the header of a store says of it."""
    return dict(
      version=VERSION,
      views=self.views,
      seed=self.seed,
      augment=json.loads(json.dumps(self.augment)),
    )


def of_header(header: Mapping[str, Any], where: str) -> Replay | None:
  """The views of a store; None of one without.

  Args:
    header: of the store.
    where: the option that names it, for the error.

  Raises:
    ValueError: if another version made the views.
  """
  given = header.get("reinforced")
  if given is None:
    return None
  if given["version"] != VERSION:
    raise ValueError(
      f"{where}: the views of this store are of version {given['version']}, and this bigalign makes"
      f" those of version {VERSION}, which are other pixels; run `bigalign reinforce` again"
    )
  return Replay(given["views"], given["seed"], given["augment"], bool(header["apply_exif"]))


def check(replay: Replay, augment: Mapping[str, Any], apply_exif: bool, where: str) -> None:
  """Raises ValueError, with the options that differ, if a run would make other views.

  Args:
    replay: of a store.
    augment: config.data.augment of the run in plain values.
    apply_exif: config.data.apply_exif of the run.
    where: the option that names the store, for the error.
  """
  theirs = {**replay.augment, "apply_exif": replay.apply_exif}
  ours = {**json.loads(json.dumps(augment)), "apply_exif": apply_exif}
  differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
  if differing:
    listed = ", ".join(f"{x}={theirs.get(x)!r} there, {ours.get(x)!r} here" for x in differing)
    raise ValueError(
      f"{where}: the teacher saw views of other options of config.data.augment ({listed}); train"
      " with the options of the store, or run `bigalign reinforce` with those of this config"
    )
