"""Random access to a folder with a subfolder of image files for each class."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from bigalign import tree
from bigalign.data.files import fingerprints
from bigalign.data.files.patterns import expand_variables
from bigalign.data.samples import image_files
from bigalign.data.samples.members import IMAGES
from bigalign.data.sources.webdataset import classnames_near

logger = logging.getLogger(__name__)


class ImageFolder:
  """Random access to DIR/CLASS/….jpg; the label of an image is the place of its class, from 0.

  Classes are the subfolders, in the order of their names. Their names are those of the folders, or
  those of a classnames.txt in DIR or beside it, in the same order. Each process holds the path of
  each image; a training set of many millions belongs in shards.

  Args:
    pattern: the folder DIR.
    captions: must be empty, because these images have none.
    root: a folder that images may be in besides DIR, as of TableFiles: links that lead out of both
      are rejected.
    images: whether images are read; if not, a record has image=b"".

  Raises:
    FileNotFoundError: if there is no such folder.
    ValueError: if it holds no image, for captions, or if classnames.txt has more or fewer names
      than there are subfolders.

  Example:
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> for name in ("dog", "cat"):
    ...   path = pathlib.Path(folder.name) / name
    ...   path.mkdir()
    ...   _ = (path / "1.jpg").write_bytes(b"an encoded image")
    >>> source = ImageFolder(folder.name)
    >>> source.classnames, source[1]["key"], source[1]["label"]
    (('cat', 'dog'), 'dog/1.jpg', 1)
    >>> folder.cleanup()
  """

  def __init__(
    self,
    pattern: str,
    *,
    captions: Sequence[str] = (),
    root: str | None = None,
    images: bool = True,
  ):
    self.pattern, self._images = pattern, images
    self._root = root and os.path.expanduser(expand_variables(root, what="source_options.root"))
    folder = pathlib.Path(pattern).expanduser()
    if not folder.is_dir():
      raise FileNotFoundError(f"folder:{pattern}: there is no such folder")
    if captions:
      raise ValueError(f"folder:{pattern}: images of folders have no captions {[*captions]}")
    self._folder = str(folder)
    classes = sorted(x.name for x in folder.iterdir() if x.is_dir() and x.name[0] != ".")
    self.classnames = classnames_near(str(folder / "x")) or tuple(classes)
    if len(self.classnames) != len(classes):
      raise ValueError(
        f"folder:{pattern}: {len(classes)} subfolders, but {len(self.classnames)} names in"
        " classnames.txt; it must have one for each subfolder, in their order"
      )
    self._keys: list[str] = []
    self._labels: list[int] = []
    others, sizes = [], []
    for label, name in enumerate(classes):
      for file in sorted(x for x in (folder / name).rglob("*") if not x.is_dir()):
        key = file.relative_to(folder).as_posix()
        if file.suffix[1:].lower() in IMAGES:
          self._keys.append(key)
          self._labels.append(label)
          sizes.append(os.lstat(file).st_size)
        elif file.name[0] != ".":
          others.append(key)
    if not self._keys:
      raise ValueError(f"folder:{pattern}: no subfolder holds an image ({', '.join(IMAGES)})")
    if others:
      logger.warning(
        "folder:%s has files that are not images (%d): %s",
        *(pattern, len(others), tree.shown(others)),
      )
    about = (f"{key}\n{size}\n" for key, size in zip(self._keys, sizes))
    self.fingerprint = fingerprints.of_names("".join(about), *self.classnames, sep="\n")

  def __repr__(self) -> str:
    return f"ImageFolder({self.pattern!r})"

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, i: int) -> dict[str, Any]:
    key = self.key(i)
    image = (
      image_files.read(key, folder=self._folder, root=self._root, key=key) if self._images else b""
    )
    return dict(image=image, captions=(), key=key, label=self._labels[i])

  def key(self, i: int) -> str:
    """Returns the path of image i below the folder."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    return self._keys[i]
