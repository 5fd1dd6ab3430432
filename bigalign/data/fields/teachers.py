"""Vectors that teachers computed before the run, read with each sample: config.data.teachers.

  data.teachers = dict(a=dict(image="$STORES/a/image", text="$STORES/a/text"), b=...)

A batch then has teacher_img and teacher_txt [B, D], the vectors of all teachers side by side, D the
sum of their widths. The text is the caption that was drawn: a store of texts has a row for each
caption of a field, in their order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from bigalign.data.fields import replay as replays
from bigalign.data.fields.base import Draws, Sample, Spec
from bigalign.data.fields.replay import Replay
from bigalign.data.files import fingerprints
from bigalign.data.samples.ids import sample_id
from bigalign.data.samples.rejects import Rejected
from bigalign.data.stores.reader import Store

NAMES = ("teacher_img", "teacher_txt", "teacher_txts", "teacher_txt_second")
IMAGE, TEXT, TEXTS, SECOND = NAMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOptions:
  """The stores of one teacher, which `bigalign embed` made of the source.

  Args:
    image: folder of the vectors of images; "" for none.
    text: folder of the vectors of captions; "" for none. With several fields of captions,
      {field: folder}.
    second: folder of the vectors of second captions, likewise.
    width: D of its vectors; 0: as its stores say, which must exist then.
  """

  image: str = ""
  text: str | Mapping[str, str] = ""
  second: str | Mapping[str, str] = ""
  width: int = 0

  @property
  def folders(self) -> dict[str, Any]:
    """{"image", "text", "second": folder or {field: folder}} of the stores that there are."""
    named = dict(image=self.image, text=self.text, second=self.second)
    return {side: folder for side, folder in named.items() if folder}


def widths(teachers: Mapping[str, TeacherOptions]) -> tuple[int, ...]:
  """D of each teacher; reads the headers of stores for those without a width.

  Raises:
    FileNotFoundError: naming the teacher, if its width is not given and its store does not exist.
    ValueError: for a teacher without stores.
  """
  return tuple(_width(name, teacher) for name, teacher in teachers.items())


def _width(name: str, teacher: TeacherOptions) -> int:
  if not teacher.folders:
    raise ValueError(f"config.data.teachers.{name} names no store: give image, text, or both")
  if teacher.width:
    return teacher.width
  first = next(iter(teacher.folders.values()))
  folder = first if isinstance(first, str) else next(iter(first.values()))
  try:
    return int(Store(folder).width)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"config.data.teachers.{name}: {error}; to plan without it, give its width"
    ) from error


def spec(teachers: Mapping[str, TeacherOptions], *, texts: int) -> Spec:
  """The arrays of all teachers.

  Args:
    teachers: {name: options}.
    texts: the number of texts of an image, 0 if config.data.texts is not set.

  Raises:
    ValueError: if some teachers have a side and others do not.
  """
  if not teachers:
    return {}
  sides = {name: frozenset(teacher.folders) for name, teacher in teachers.items()}
  if len(set(sides.values())) > 1:
    listed = {name: sorted(x) for name, x in sides.items()}
    raise ValueError(f"config.data.teachers: all teachers need stores of the same sides: {listed}")
  width = sum(widths(teachers))
  names = dict(image=IMAGE, text=TEXTS if texts else TEXT, second=SECOND)
  return {
    names[side]: (
      (texts, width) if names[side] == TEXTS else (width,),
      np.dtype(ml_dtypes.bfloat16),
    )
    for side in ("image", "text", "second")
    if side in next(iter(sides.values()))
  }


class Teachers:
  """The vectors of all teachers, as a field.

  Args:
    teachers: {name: options}.
    texts: as of `spec`.
    fields: the fields of first captions, and of second ones.
    augment: config.data.augment in plain values.
    apply_exif: config.data.apply_exif.

  Attributes:
    replay: the views that all teachers saw, of `bigalign reinforce`; None for plain images.

  Raises:
    FileNotFoundError, ValueError: for a store that does not exist, is damaged, holds tokens, or has
      another width than the option; for a store of texts that could belong to several fields; for
      views that differ between the teachers, or from those of the run.
  """

  def __init__(
    self,
    teachers: Mapping[str, TeacherOptions],
    *,
    texts: int,
    fields: Mapping[str, Sequence[str]],
    augment: Mapping[str, Any],
    apply_exif: bool,
  ):
    self.spec = spec(teachers, texts=texts)
    self._texts = texts
    seen: dict[str, Replay | None] = {}
    # {side: [{field: store} of each teacher]}
    self._stores: dict[str, list[dict[str, Store]]] = {}
    for (name, teacher), width in zip(teachers.items(), widths(teachers)):
      for side, folders in teacher.folders.items():
        where = f"config.data.teachers.{name}.{side}"
        opened = {
          field: Store(folder) for field, folder in _by_field(folders, side, fields, where).items()
        }
        for store in opened.values():
          if store.shape != (width,):
            raise ValueError(
              f"{where}: {store.folder} has rows of shape {store.shape}, expected ({width},)"
            )
        self._stores.setdefault(side, []).append(opened)
        if side == "image":
          seen[where] = replays.of_header(opened[""].header, where)
    self.replay = next(iter(seen.values()), None)
    for where, one in seen.items():
      if one != self.replay:
        raise ValueError(
          f"{where}: its teacher saw other views than that of {next(iter(seen))}; make both stores"
          " by `bigalign reinforce` with the same seed, number of views and config.data.augment"
        )
    if self.replay:
      replays.check(self.replay, augment, apply_exif, next(iter(seen)))
    every = [store for sides in self._stores.values() for one in sides for store in one.values()]
    self.fingerprint = fingerprints.of_names(*(store.fingerprint for store in every))

  def read(self, sample: Sample, draws: Draws) -> dict[str, list[Any]]:
    """{side: [(store, rows)] of each teacher} of a sample; raises Rejected without a row."""
    id = np.array([sample_id(sample.key)], np.uint64)
    found: dict[str, list[Any]] = {}
    for side, teachers in self._stores.items():
      if side == "image":
        pixels = np.shape(sample.record["image"])[:2]
        found[side] = [
          ("", self._image_row(opened[""], id, sample.replay, pixels)) for opened in teachers
        ]
        continue
      places = (sample.second,) if side == "second" else sample.places
      # A text that is not a caption has no vector. It gets that of the first text, and
      # losses mask it by the kind of the text.
      drawn = [sample.caption(place if place >= 0 else places[0]) for place in places]
      found[side] = [
        [(field, _text_row(_of_field(opened, field), id, i, n)) for field, i, n in drawn]
        for opened in teachers
      ]
    return found

  def _image_row(self, store: Store, id: np.ndarray, number: int, pixels: Sequence[int]) -> int:
    """The row of an image, or of one of its views; pixels: its height and width here."""
    first, count = _rows(store, id)
    if count != (self.replay.views if self.replay else 1):
      raise ValueError(f"{store.folder} has {count} rows of an image; is it a store of images?")
    if not self.replay:
      return first
    height, width = store.sizes(np.array([first]))[0].tolist()
    if (height, width) != tuple(pixels):
      raise Rejected(
        "no_vector",
        f"the teacher saw an image of {width} x {height} pixels, here it has {pixels[1]} x"
        f" {pixels[0]}, so views would differ",
      )
    return first + number

  def stack(self, values: Sequence[dict[str, list[Any]]]) -> dict[str, np.ndarray]:
    """{name: [b, D] or [b, M, D]}."""
    arrays = {}
    for side, teachers in self._stores.items():
      name = dict(image=IMAGE, text=TEXTS if self._texts else TEXT, second=SECOND)[side]
      parts = []
      for t, opened in enumerate(teachers):
        rows = [value[side][t] for value in values]
        flat = rows if side == "image" else [row for several in rows for row in several]
        part = _gather(opened, flat)
        parts.append(part.reshape(len(values), *self.spec[name][0][:-1], part.shape[-1]))
      arrays[name] = _side_by_side(parts)
    return arrays


def _by_field(
  folders: str | Mapping[str, str], side: str, fields: Mapping[str, Sequence[str]], where: str
) -> dict[str, str]:
  """{field: folder}; of images, and of the only field of captions, {"": folder}."""
  if side == "image":
    return {"": str(folders)}
  known = [*fields["second" if side == "second" else "text"]]
  if isinstance(folders, str):
    if len(known) > 1:
      raise ValueError(
        f"{where}={folders!r}: captions come from {known}, so give a store for each:"
        f" dict({', '.join(f'{name!r}: ...' for name in known)})"
      )
    return {"": folders}
  missing = [name for name in known if name not in folders]
  if missing:
    raise ValueError(f"{where} has stores of {[*folders]}; those of {missing} are missing")
  return dict(folders)


def _of_field(opened: Mapping[str, Store], field: str) -> Store:
  return opened[""] if "" in opened else opened[field]


def _text_row(store: Store, id: np.ndarray, place: int, captions: int) -> int:
  first, count = _rows(store, id)
  if count != captions:
    raise Rejected(
      "no_vector", f"{count} rows in {store.folder}, but the sample has {captions} captions"
    )
  return first + place


def _rows(store: Store, id: np.ndarray) -> tuple[int, int]:
  (first,), (count,) = store.find(id)
  if not count:
    raise Rejected("no_vector", f"no row in {store.folder}")
  return int(first), int(count)


def _gather(opened: Mapping[str, Store], rows: Sequence[tuple[str, int]]) -> np.ndarray:
  """The vectors of (field, row) pairs, [N, D]."""
  if "" in opened:
    return opened[""].read(np.array([row for _, row in rows]))
  parts = {
    field: store.read(np.array([r for f, r in rows if f == field], np.int64))
    for field, store in opened.items()
  }
  out = np.empty((len(rows), next(iter(parts.values())).shape[-1]), np.float32)
  for field, part in parts.items():
    out[[f == field for f, _ in rows]] = part.astype(np.float32)
  return out


def _side_by_side(parts: Sequence[np.ndarray]) -> np.ndarray:
  """[..., D1], [..., D2] -> [..., D1 + D2], in their dtype, or float32 if they differ."""
  if len({part.dtype for part in parts}) > 1:
    parts = [part.astype(np.float32) for part in parts]
  return np.concatenate(parts, -1)
