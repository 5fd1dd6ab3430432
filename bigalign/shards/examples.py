"""Samples as tf.train.Examples in ArrayRecord files: the work of a process of bigalign convert."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from bigalign.data.image.decode import decode, orientation_of
from bigalign.data.samples.labels import Labels
from bigalign.data.samples.members import IMAGES
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import arrayrecord, base
from bigalign.data.sources.base import Source, Spec, open_spec
from bigalign.data.tar import stats

AHEAD = 256  # samples that a remote source may prefetch


class Plan(NamedTuple):
  """The settings that all files of a copy share.

  Attributes:
    spec: the source.
    fields: caption fields; every record has them, possibly empty.
    folder: of the files.
    samples: number of samples of the source.
    records: samples per file.
    short_side: pixels; larger images are resized to this shorter side. 0: no resizing.
    quality: of the JPEGs of resized images.
  """

  spec: Spec
  fields: tuple[str, ...]
  folder: str
  samples: int
  records: int
  short_side: int
  quality: int

  def path(self, n: int) -> str:
    """Returns the path of file n."""
    count = self.files
    width = max(5, len(str(count)))
    return os.path.join(self.folder, f"{n:0{width}d}-of-{count:0{width}d}.array_record")

  @property
  def files(self) -> int:
    """Number of files."""
    return -(-self.samples // self.records)


def write_file(task: tuple[Plan, int]) -> dict[str, Any]:
  """Writes a file of a copy atomically.

  Args:
    task: the plan, and the number of the file.

  Returns:
    Its entry in the log: "file", "records", "bytes", "smaller" (resized images), "refused" by
    reason.

  Raises:
    OSError: if the file cannot be written; tells the free space.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  plan, n = task
  source, path = open_spec(plan.spec), plan.path(n)
  partial = f"{path}.tmp"
  span = range(n * plan.records, min((n + 1) * plan.records, plan.samples))
  labels = Labels(getattr(source, "classnames", ()), what="label")
  refused: collections.Counter[str] = collections.Counter()
  smaller = 0
  try:
    writer = ArrayRecordWriter(partial, "group_size:1,uncompressed")  # random reads of JPEGs
    for i in span:
      if (i - span.start) % (AHEAD // 2) == 0:
        base.prefetch(source, range(i, min(i + AHEAD, span.stop)))
      features, reason, shrunk = _features(source, i, plan, labels)
      writer.write(arrayrecord.make_example(features))
      refused[reason] += bool(reason)
      smaller += shrunk
    writer.close()
    _finish(partial, path, len(span))
  except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError for a failed write
    if "write() failed" not in str(error):
      raise
    free = shutil.disk_usage(plan.folder).free
    raise OSError(
      f"{path}: {error}. {free / 1e6:,.0f} MB are free there; free some space and run the"
      " same command again: the finished files are kept"
    ) from error
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(partial)
  return dict(
    file=os.path.basename(path),
    records=len(span),
    bytes=os.path.getsize(path),
    smaller=smaller,
    refused=dict(+refused),
  )


def _finish(partial: str, path: str, count: int) -> None:
  """Renames a file to its final name once it is on the disk and can be read."""
  reader, _ = arrayrecord.open_file(partial)
  if reader.num_records() != count:
    raise OSError(f"{partial}: holds {reader.num_records()} of {count} records; write() failed")
  with open(partial, "rb") as file:
    os.fsync(file.fileno())
  os.replace(partial, path)


def _features(
  source: Source, i: int, plan: Plan, labels: Labels
) -> tuple[dict[str, list[Any]], str, bool]:
  """The features of sample i, why the source rejects it ("" if not), whether it was resized."""
  stored: dict[str, Any] = {}
  with contextlib.suppress(Rejected):
    stored = base.fields(source, i)
  # A source without captions has labels, which the reader looks for in the first record.
  features: dict[str, list[Any]] = {name: [] for name in plan.fields or ("label",)}
  try:
    record = base.read(source, i)
  except Rejected as error:
    features |= {name: _values(value) for name, value in stored.items()}
    return features | _rejected_features(error, features), error.reason, False
  image = _encoded(record["image"])
  small = _resized(image, plan) if plan.short_side else image
  features |= {
    name: values for name, value in stored.items() if (values := _values(value)) != [image]
  }
  texts = base.texts_of(record, plan.spec)
  features |= {name: _values([*column]) for name, column in texts.items()}
  features |= {
    "image": [small],
    arrayrecord.KEY: [record["key"].encode("utf-8", "surrogateescape")],
  }
  if record["label"] >= 0:
    features["label"] = [record["label"]]
  elif labels(features.get("label"), key=record["key"]) >= 0:
    features["label"] = []  # a column of this name that is not the label of the source
  return features, "", small is not image


def _rejected_features(error: Rejected, features: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
  """Features that a reader rejects for the same reason."""
  message = [part.encode("utf-8", "replace") for part in (error.reason, error.detail)]
  image: list[Any] = []
  if error.reason != "no_image":
    image = next((features[name] for name in ("image", *IMAGES) if features.get(name)), message[1:])
  return {"image": image, arrayrecord.REJECTED: message}


def _values(value: Any) -> list[Any]:
  """A value as a feature: a list of bytes, of integers or of floats; other values as JSON."""
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  every = value if isinstance(value, list) else [] if value is None else [value]
  types = {type(each) for each in every}
  if types == {str}:
    return [each.encode("utf-8", "replace") for each in every]
  if types <= {bool, int} and all(-(1 << 63) <= each < 1 << 63 for each in every):
    return [int(each) for each in every]
  return every if types in ({bytes}, {float}) else [json.dumps(value, default=str).encode()]


def _encoded(image: Any) -> bytes:
  """The encoded image; pixels are encoded as PNG."""
  if isinstance(image, bytes):
    return image
  file = io.BytesIO()
  Image.fromarray(image).save(file, "png")
  return file.getvalue()


def _resized(data: bytes, plan: Plan) -> bytes:
  """A JPEG with plan.short_side; an image that is not larger or cannot be decoded is unchanged."""
  if min(stats.size_of(data)) <= plan.short_side:
    return data
  try:
    pixels = Image.fromarray(decode(data))
  except Rejected:
    return data
  size = [round(side * plan.short_side / min(pixels.size)) for side in pixels.size]
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation_of(data)  # for config.data.apply_exif
  file = io.BytesIO()
  pixels.resize(size, Image.Resampling.LANCZOS).save(file, "jpeg", quality=plan.quality, exif=exif)
  return file.getvalue()
