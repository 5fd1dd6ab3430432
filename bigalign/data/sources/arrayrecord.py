"""Random access to ArrayRecord files of serialised tf.train.Example, without TensorFlow."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.data.files import fingerprints, regular
from bigalign.data.files.cache import LRUCache
from bigalign.data.files.draws import draw
from bigalign.data.files.patterns import expand_local
from bigalign.data.samples import columns
from bigalign.data.samples.labels import Labels
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.webdataset import classnames_near
from bigalign.private_apis import is_corrupt_array_record

logger = logging.getLogger(__name__)

KEY = "__key__"  # as webdataset names it
REJECTED = "__rejected__"  # reason and detail of a sample that the source of a copy rejects
_OLD_REJECTED = b"bad_metadata: "  # in the label, in copies without REJECTED
_OPEN_FILES = 128
_PROBES = 32  # records of a file that are looked at when it is opened
_KINDS = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
_CAPTIONS = ("caption", "captions", "captions/text", "text", "txt", "title")


class ArrayRecord:
  """Random access to records that are a tf.train.Example each; each feature is a column.

  `bigalign convert`, TFDS and most converters write such files. Their names end in .array_record,
  or the source is written as arrayrecord:PATTERN. The key of a sample is the feature __key__, or
  else the file and the place in it. The names of the classes are read from a classnames.txt, as for
  webdataset shards.

  Args:
    pattern: of local files.
    image: the feature of the encoded image; by default image, or jpg, png, ...
    captions: features of one or more UTF-8 strings, in order of preference.
    label: the feature of the class, if it exists: an integer or a name (samples/labels.py).
    images: whether images are read; if not, samples need none, and a record has image=b"".

  Raises:
    ValueError: if there are no records; if none of a file's records has an image feature of bytes,
      or none has a caption feature or a label: names the file. Up to 32 records of each file are
      looked at, drawn at random, until one has them.

  Example:
    >>> import tempfile
    >>> from array_record.python.array_record_module import ArrayRecordWriter
    >>> folder = tempfile.TemporaryDirectory()
    >>> writer = ArrayRecordWriter(f"{folder.name}/0.array_record", "group_size:1")
    >>> features = dict(image=[b"an encoded image"], caption=[b"a photo of a cat"])
    >>> _ = writer.write(make_example(features))
    >>> writer.close()
    >>> source = ArrayRecord(f"{folder.name}/*.array_record", captions=("caption",))
    >>> source[0]["key"], source[0]["captions"]
    ('0.array_record/0', ('a photo of a cat',))
    >>> folder.cleanup()
  """

  def __init__(
    self,
    pattern: str,
    *,
    image: str | None = None,
    captions: Sequence[str] = _CAPTIONS,
    label: str = "label",
    images: bool = True,
  ):
    self.pattern = pattern
    self._images = images
    self.captions = tuple(captions)
    self._label = label
    self._paths = expand_local(pattern, kind="ArrayRecord")
    # Not through self._files: there may be more files than a process can have open.
    counts = [open_file(path)[0].num_records() for path in self._paths]
    self._firsts = np.cumsum([0, *counts])
    self._files = LRUCache(open_file, capacity=_OPEN_FILES)
    if not len(self):
      raise ValueError(f"{pattern!r}: no records in {len(self._paths)} files")
    self._image = self._check(image)
    self.classnames = classnames_near(self._paths[0])
    self.labels = Labels(self.classnames, what=label)
    self.fingerprint = fingerprints.of_files(self._paths)

  def __repr__(self) -> str:
    return f"ArrayRecord({self.pattern!r})"

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    key, features = self._features(i)
    if features.get(REJECTED):
      raise Rejected(*(part.decode("utf-8", "replace") for part in features[REJECTED][:2]))
    label = features.get(self._label)
    if label and isinstance(label[0], bytes) and label[0].startswith(_OLD_REJECTED):
      raise Rejected("bad_metadata", label[0].decode("utf-8", "replace"))
    image = features.get(self._image) if self._images else [b""]
    if not image:
      raise Rejected("no_image", f"{key} has {tree.shown(sorted(features))}")
    if not isinstance(image[0], bytes):
      raise Rejected("undecodable", f"{key}: {self._image!r} holds {type(image[0]).__name__}")
    return dict(
      image=image[0],
      key=key,
      **columns.texts(features, self.captions),
      label=self.labels(label, key=key),
    )

  def where(self, i: int) -> tuple[str, int, int]:
    """Returns the file of record i, its place there, and the records of the file."""
    which = int(np.searchsorted(self._firsts, i, side="right")) - 1
    first, end = self._firsts[which : which + 2].tolist()
    return self._paths[which], i - first, end - first

  def fields(self, i: int) -> dict[str, list[Any]]:
    """Returns {feature: values} of record i."""
    return self._features(i)[1]

  def _features(self, i: int) -> tuple[str, dict[str, list[Any]]]:
    """The key of record i, and its features."""
    if not 0 <= i < len(self):
      raise IndexError(f"{self.pattern!r} has {len(self)} samples; asked for {i}")
    path, place, _ = self.where(i)
    key = f"{os.path.basename(path)}/{place}"
    try:
      data = self._files[path].read([place])[0]
    except RuntimeError as error:
      if not is_corrupt_array_record(error):  # an error of the disk
        raise OSError(f"{path}: record {place}: {error}") from error
      raise Rejected("undecodable", f"{key}: {error}") from error
    features = parse_example(data, key=key)
    named = features.pop(KEY, None)
    if named and isinstance(named[0], bytes):
      key = named[0].decode("utf-8", "surrogateescape")
    return key, features

  def _check(self, image: str | None) -> str:
    """The feature of the images, "" if none are read; raises ValueError for a file that lacks
    features."""
    name, problem = image if self._images else "", ""
    for first, end, path in zip(self._firsts, self._firsts[1:], self._paths):
      size = int(end - first)
      have: set[str] = set()
      for place in draw(size, _PROBES):
        try:
          _, features = self._features(int(first) + place)
        except Rejected as error:
          problem = problem or str(error)
          continue
        have |= features.keys()
        if REJECTED in features:  # of a copy: names all features, but may have no image
          continue
        name = columns.first_image(have) if name is None else name
        if name in features and features[name] and not isinstance(features[name][0], bytes):
          kind = type(features[name][0]).__name__
          raise ValueError(
            f"{path}: the image feature {name!r} holds {kind}, expected bytes."
            + columns.IMAGE_ADVICE
          )
        if name in {"", *have} and have & {*self.captions, self._label}:
          break
      if have:
        name = columns.image_column(have, name, what=path) if self._images else ""
        columns.check_captions(have, self.captions, label=self._label, what=path)
      elif size:
        logger.warning("%s: none of the records drawn from it can be read: %s", path, problem)
    if name is None:
      raise ValueError(f"{self.pattern!r}: no record can be read; the first error: {problem}")
    return name


def open_file(path: str) -> tuple[Any, int]:
  """Opens an ArrayRecord file.

  Returns:
    (reader, 1); 1 is the size for LRUCache.

  Raises:
    ValueError: if the file is incomplete.
  """
  from array_record.python import array_record_module  # defines absl flags

  regular.check(path)
  reader = array_record_module.ArrayRecordReader(
    path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32_768
  )
  if not reader.ok():  # a broken file opens without an error, and has no records
    raise ValueError(
      f"{path}: not a complete ArrayRecord file ({os.path.getsize(path)} bytes): the index at its"
      " end is missing. Fetch it again."
    )
  return reader, 1


def parse_example(data: bytes, *, key: str) -> dict[str, list[Any]]:
  """Parses a serialised tf.train.Example.

  Args:
    data: of a record.
    key: names the record in the error.

  Returns:
    {feature: list of bytes, floats or integers}.

  Raises:
    Rejected: if the data is something else.
  """
  # Takes half a second to import, and only this source needs it.
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_pb2

  try:
    features = tf_example_pb2.Example.FromString(data).features.feature
  except DecodeError as broken:
    raise Rejected("bad_metadata", f"{key}: not a tf.train.Example ({broken})") from None
  return {
    name: list(getattr(feature, feature.WhichOneof("kind")).value)
    for name, feature in features.items()
    if feature.WhichOneof("kind")
  }


def make_example(features: Mapping[str, Sequence[bytes | int | float]]) -> bytes:
  """Returns a serialised tf.train.Example; equal features give equal bytes.

  Args:
    features: {name: values}, all bytes, all integers or all floats.
  """
  from tensorflow_datasets.proto import tf_example_pb2

  message = tf_example_pb2.Example()
  for name, values in features.items():
    kind = next(
      (kind for type_, kind in _KINDS.items() if values and isinstance(values[0], type_)),
      "bytes_list",
    )
    column = getattr(message.features.feature[name], kind)
    column.SetInParent()  # so that an empty list is written too
    column.value.extend(values)
  data: bytes = message.SerializeToString(deterministic=True)
  return data
