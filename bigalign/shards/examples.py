"""Samples as tf.train.Examples, and files of them: what bigalign convert hands to a process."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from bigalign.data.image.decode import decode, orientation_of
from bigalign.data.samples.members import IMAGES
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources import arrayrecord, base
from bigalign.data.sources.base import Source, Spec, open_spec
from bigalign.data.tar import stats

AHEAD = 256  # samples that a far source may begin to fetch


class Plan(NamedTuple):
  """What all files of a copy share."""

  spec: Spec
  fields: tuple[str, ...]  # of captions: each record has them, if empty
  folder: str
  samples: int
  records: int  # of a file
  short_side: int  # pixels above which images are made smaller; 0: none
  quality: int  # of the JPEGs

  def path(self, n: int) -> str:
    """Of file n."""
    count = self.files
    width = max(5, len(str(count)))
    return os.path.join(self.folder, f"{n:0{width}d}-of-{count:0{width}d}.array_record")

  @property
  def files(self) -> int:
    return -(-self.samples // self.records)


def write_file(task: tuple[Plan, int]) -> dict[str, Any]:
  """Writes file n of a plan, whole or not at all; what it holds."""
  from array_record.python.array_record_module import ArrayRecordWriter

  plan, n = task
  source, path = open_spec(plan.spec), plan.path(n)
  half = f"{path}.tmp"
  span = range(n * plan.records, min((n + 1) * plan.records, plan.samples))
  refused: collections.Counter[str] = collections.Counter()
  smaller = 0
  try:
    writer = ArrayRecordWriter(half, "group_size:1,uncompressed")  # random reads of JPEGs
    for i in span:
      if (i - span.start) % (AHEAD // 2) == 0:
        base.prefetch(source, range(i, min(i + AHEAD, span.stop)))
      features, reason, shrunk = _features(source, i, plan)
      writer.write(arrayrecord.make_example(features))
      refused[reason] += bool(reason)
      smaller += shrunk
    writer.close()
    _finish(half, path, len(span))
  except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's for a write that failed
    if "write() failed" not in str(error):
      raise
    free = shutil.disk_usage(plan.folder).free
    raise OSError(
      f"{path}: {error}. {free / 1e6:,.0f} MB are free there; make room, and run the"
      " same command again: the finished files are kept"
    ) from error
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(half)
  return dict(
    file=os.path.basename(path),
    records=len(span),
    bytes=os.path.getsize(path),
    smaller=smaller,
    refused=dict(+refused),
  )


def _finish(half: str, path: str, count: int) -> None:
  """Puts a file in its place once it is on the disk and can be read."""
  reader, _ = arrayrecord.open_file(half)
  if reader.num_records() != count:
    raise OSError(f"{half}: holds {reader.num_records()} of {count} records; write() failed")
  with open(half, "rb") as file:
    os.fsync(file.fileno())
  os.replace(half, path)


def _features(source: Source, i: int, plan: Plan) -> tuple[dict[str, list[Any]], str, bool]:
  """The features of sample i, why the source refuses it ("" if not), whether it was shrunk."""
  stored: dict[str, Any] = {}
  with contextlib.suppress(Rejected):
    stored = base.fields(source, i)
  found: dict[str, list[Any]] = {name: [] for name in plan.fields}
  try:
    record = source[i]
  except Rejected as error:
    found |= {name: _values(value) for name, value in stored.items()}
    return found | _refused(error, found), error.reason, False
  image = _encoded(record["image"])
  small = _smaller(image, plan) if plan.short_side else image
  found |= {name: _values(value) for name, value in stored.items() if value not in (image, [image])}
  texts = base.texts_of(record, plan.spec)
  found |= {name: _values([*column]) for name, column in texts.items()}
  found |= {"image": [small], arrayrecord.KEY: [record["key"].encode("utf-8", "surrogateescape")]}
  if record["label"] >= 0:
    found["label"] = [record["label"]]
  return found, "", small is not image


def _refused(error: Rejected, found: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
  """Features that are refused for the same reason."""
  told = [str(error).encode("utf-8", "replace")]
  if error.reason == "no_image":
    return dict(image=[])
  if error.reason == "bad_metadata":
    image = next((found[name] for name in ("image", *IMAGES) if found.get(name)), told)
    return dict(image=image, label=told)  # a label that is no number
  return dict(image=told)  # that does not decode


def _values(value: Any) -> list[Any]:
  """A value as a feature: bytes, integers or numbers, several or none; JSON of anything else."""
  every = value if isinstance(value, list) else [] if value is None else [value]
  types = {type(each) for each in every}
  if types == {str}:
    return [each.encode("utf-8", "replace") for each in every]
  if types <= {bool, int} and all(-(1 << 63) <= each < 1 << 63 for each in every):
    return [int(each) for each in every]
  return every if types in ({bytes}, {float}) else [json.dumps(value, default=str).encode()]


def _encoded(image: Any) -> bytes:
  """The bytes of an image; pixels as PNG."""
  if isinstance(image, bytes):
    return image
  file = io.BytesIO()
  Image.fromarray(image).save(file, "png")
  return file.getvalue()


def _smaller(data: bytes, plan: Plan) -> bytes:
  """A JPEG with that shorter side; what is no larger, or cannot be decoded, as it is."""
  if min(stats.size_of(data)) <= plan.short_side:
    return data
  try:
    pixels = Image.fromarray(decode(data))
  except Rejected:
    return data
  size = [round(side * plan.short_side / min(pixels.size)) for side in pixels.size]
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation_of(data)  # config.data.apply_exif asks for it
  file = io.BytesIO()
  pixels.resize(size, Image.Resampling.LANCZOS).save(file, "jpeg", quality=plan.quality, exif=exif)
  return file.getvalue()
