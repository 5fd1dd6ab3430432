"""Random access to ArrayRecord files of serialised tf.train.Example, without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigalign.data.files import fingerprints
from bigalign.data.files.cache import Recent
from bigalign.data.files.patterns import expand_local
from bigalign.data.samples import columns
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.webdataset import classnames_beside

KEY = "__key__"  # webdataset's word
_OPEN = 128  # files
_KINDS = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
_CAPTIONS = ("caption", "captions", "captions/text", "text", "txt", "title")


class ArrayRecord:
  """One tf.train.Example per record; each feature is a column.

  image     the feature of the encoded image; by default image, or jpg, png, …
  captions  features of one or more UTF-8 strings, in order of preference
  label     the feature of the integer class, used if it is there

  A feature __key__ names the sample; without it the file and the place in it do. classnames.txt is
  looked for as beside webdataset shards.

  This is what bigalign convert, TFDS and most converters write. The file names end in
  .array_record, or the source is named arrayrecord:PATTERN. Which features there are is seen in the
  first record; one that it lacks counts as absent.
  """

  def __init__(
    self,
    pattern: str,
    *,
    image: str | None = None,
    captions: Sequence[str] = _CAPTIONS,
    label: str = "label",
  ):
    self.pattern = pattern
    self.captions = tuple(captions)
    self._label = label
    self._paths = expand_local(pattern, kind="ArrayRecord")
    # Not through _files: that many may be more than a process can have open.
    counts = [open_file(path)[0].num_records() for path in self._paths]
    self._firsts = np.cumsum([0, *counts])
    self._files = Recent(open_file, room=_OPEN)
    if not len(self):
      raise ValueError(f"{pattern!r}: no records in {len(self._paths)} files")
    _, features = self._features(0)
    what = repr(pattern)
    self._image = columns.image_column(features, image, what=what)
    columns.check_captions(features, captions, label=label, what=what)
    self.classnames = classnames_beside(self._paths[0])
    self.fingerprint = fingerprints.of_files(self._paths)

  def __repr__(self) -> str:
    return f"ArrayRecord({self.pattern!r})"

  def __len__(self) -> int:
    return int(self._firsts[-1])

  def __getitem__(self, i: int) -> dict[str, Any]:
    key, features = self._features(i)
    image = features.get(self._image)
    if not image:
      raise Rejected("no_image", f"{key} has {sorted(features)}")
    return dict(
      image=image[0],
      key=key,
      **columns.texts(features, self.captions),
      label=columns.label(features.get(self._label), column=self._label, key=key),
    )

  def where(self, i: int) -> tuple[str, int, int]:
    """The file of record i, its place there, and how many it holds."""
    which = int(np.searchsorted(self._firsts, i, side="right")) - 1
    first, end = self._firsts[which : which + 2].tolist()
    return self._paths[which], i - first, end - first

  def fields(self, i: int) -> dict[str, list[Any]]:
    """The features of record i."""
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
      if "Corrupted" not in str(error):  # the disk's fault, not the record's
        raise
      raise Rejected("undecodable", f"{key}: {error}") from error
    features = parse_example(data, key=key)
    named = features.pop(KEY, None)
    return named[0].decode("utf-8", "surrogateescape") if named else key, features


def open_file(path: str) -> tuple[Any, int]:
  """A reader of an ArrayRecord file, and 1: it counts as one open file."""
  from array_record.python import array_record_module  # absl's flags come with it

  reader = array_record_module.ArrayRecordReader(
    path, options="readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32_768
  )
  if not reader.ok():  # it opens what it cannot read, and reads nothing from it
    raise ValueError(
      f"{path}: not a whole ArrayRecord file ({os.path.getsize(path)} bytes); its "
      "index stands at the end. Fetch it again."
    )
  return reader, 1


def parse_example(data: bytes, *, key: str) -> dict[str, list[Any]]:
  """A serialised tf.train.Example → its features, each a list of bytes, floats or ints."""
  # Half a second to import, and only this source needs it.
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_pb2

  try:
    features = tf_example_pb2.Example.FromString(data).features.feature
  except DecodeError as broken:
    raise Rejected("bad_metadata", f"{key}: no tf.train.Example ({broken})") from None
  return {
    name: list(getattr(feature, feature.WhichOneof("kind")).value)
    for name, feature in features.items()
    if feature.WhichOneof("kind")
  }


def make_example(features: Mapping[str, Sequence[bytes | int | float]]) -> bytes:
  """A serialised tf.train.Example; equal features give equal bytes."""
  from tensorflow_datasets.proto import tf_example_pb2

  message = tf_example_pb2.Example()
  for name, values in features.items():
    kind = next(
      (kind for type_, kind in _KINDS.items() if values and isinstance(values[0], type_)),
      "bytes_list",
    )
    column = getattr(message.features.feature[name], kind)
    column.SetInParent()  # an empty list is there too
    column.value.extend(values)
  data: bytes = message.SerializeToString(deterministic=True)
  return data
