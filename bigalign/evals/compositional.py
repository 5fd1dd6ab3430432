"""Compositional tests: whether an image prefers its caption to one with the same or similar words.

Winoground (https://arxiv.org/abs/2204.03162) has two images and two captions per example,
SugarCrepe (https://arxiv.org/abs/2306.14610) and ARO (https://arxiv.org/abs/2210.01936) an image,
its caption and one or several wrong ones. They are read as they are published: JSON files beside a
folder of images.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from bigalign import sharding, tree
from bigalign.data.files import fingerprints
from bigalign.data.files.lines import read_names, read_text
from bigalign.data.files.patterns import expand_variables
from bigalign.data.image.decode import decode
from bigalign.data.samples import image_files
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import WithCaptions, open_source, read
from bigalign.evals.embed import Context, Embedded, embedder, read_data

# The sets of SugarCrepe by kind; a kind is reported as the mean of its sets.
KINDS = dict(add=("obj", "att"), replace=("obj", "att", "rel"), swap=("obj", "att"))
SUGAR_CREPE = tuple(f"{kind}_{part}" for kind, parts in KINDS.items() for part in parts)
LEAST = 25  # examples of a pair of attributes that ARO counts
# Names of the fields in the published files.
_IMAGE = ("filename", "image_path", "image")
_CAPTION = ("caption", "true_caption")
_NEGATIVES = ("negative_caption", "negative_captions", "false_caption", "false_captions")
_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
_ENDINGS = ("", ".png", ".jpg", ".jpeg", ".webp")  # Winoground names its images without one


def winoground(sims: np.ndarray) -> dict[str, np.ndarray]:
  """The three scores of Winoground; equal similarities and NaN are never correct.

  >>> scores = winoground(np.array([[[3, 2], [1, 4]], [[3, 2], [5, 6]]]))
  >>> {name: x.tolist() for name, x in scores.items()}
  {'text': [True, True], 'image': [True, False], 'group': [True, False]}

  Args:
    sims: [N, 2, 2], of image i with caption c.

  Returns:
    [N] bool each. text: both images prefer their caption. image: both captions prefer their image.
    group: both.
  """
  first, second = sims[:, 0, 0], sims[:, 1, 1]
  text = (first > sims[:, 0, 1]) & (second > sims[:, 1, 0])
  image = (first > sims[:, 1, 0]) & (second > sims[:, 0, 1])
  return {"text": text, "image": image, "group": text & image}


def prefers_first(sims: np.ndarray, there: np.ndarray) -> np.ndarray:
  """[N] bool: whether an image prefers its first caption to all others; not if one is equal or NaN.

  >>> sims = np.array([[2.0, 1.0, 9.0], [2.0, 2.0, 1.0], [2.0, 1.0, np.nan]])
  >>> prefers_first(sims, np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)).tolist()
  [True, False, False]

  Args:
    sims: [N, C].
    there: [N, C] bool, the captions that an image has.
  """
  return np.asarray(((sims[:, :1] > sims[:, 1:]) | ~there[:, 1:]).all(1) & there[:, 1:].any(1))


class Example(NamedTuple):
  """An image and its captions.

  Attributes:
    image: path of the image file, relative to the folder of images.
    box: (x, y, width, height) in pixels, the part that is seen; None for all.
    captions: the correct one, then the wrong ones. Of Winoground only the correct one, because the
      other image of the example has the wrong one.
    group: relation or attributes, of ARO; "" for none.
    problem: the reason for which it is rejected, and what is wrong; () if nothing is.
  """

  image: str
  box: tuple[float, ...] | None
  captions: tuple[str, ...]
  group: str = ""
  problem: tuple[str, ...] = ()


class Set(NamedTuple):
  """The examples of one file.

  Attributes:
    name: of the file without its ending; "" for those of a source.
    examples: of Winoground two in turn for each of its examples.
    two_images: whether it has the form of Winoground.
    file: path, for the log.
    least: examples of a group that counts; ARO leaves out rare pairs of attributes.
  """

  name: str
  examples: Sequence[Example]
  two_images: bool
  file: str
  least: int = 1

  @property
  def each(self) -> int:
    """Images of an example."""
    return 2 if self.two_images else 1


def read_set(file: pathlib.Path) -> Set:
  """The examples of a .json or .jsonl file in one of the published forms.

  A .json holds a list of records, or an object whose values are records; a .jsonl has a record per
  line. docs/evaluation.md lists the fields.

  Raises:
    ValueError: for another file; names it, and the fields of its first record.
  """
  try:
    if file.suffix == ".jsonl":
      records: Any = [json.loads(line) for line in read_names(file) if line.strip()]
    else:
      records = json.loads(read_text(file))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} is not {file.suffix[1:].upper()}: {error}") from error
  records = [*records.values()] if isinstance(records, dict) else records
  if not isinstance(records, list) or not records or not all(isinstance(x, dict) for x in records):
    raise ValueError(f"{file}: expected a list of records, or an object whose values are records")
  if any("caption_0" in x or "image_0" in x for x in records):
    pairs = [example for x in records for example in (_of_pair(x, 0), _of_pair(x, 1))]
    return Set(file.stem, pairs, True, str(file))
  if not any(_first(x, (*_NEGATIVES, "caption_options")) for x in records):
    raise ValueError(
      f"{file}: no record has {_IMAGE[0]!r}, {_CAPTION[0]!r} and {_NEGATIVES[0]!r}, or image_0,"
      " image_1, caption_0 and caption_1, or other published names of these; the first has"
      f" {tree.shown(sorted(records[0]))}"
    )
  least = LEAST if any(isinstance(x.get("attributes"), list) for x in records) else 1
  return Set(file.stem, [_of_record(x) for x in records], False, str(file), least)


def _of_pair(record: Mapping[str, Any], i: int) -> Example:
  image, caption = record.get(f"image_{i}"), record.get(f"caption_{i}")
  problem = () if _is_text(caption) else ("no_caption", f"caption_{i} is missing")
  return Example(_path(image), None, (str(caption),), problem=problem)


def _of_record(record: Mapping[str, Any]) -> Example:
  options = record.get("caption_options")
  if isinstance(options, list):
    captions = options
  else:
    negatives = _first(record, _NEGATIVES)
    captions = [
      _first(record, _CAPTION),
      *(negatives if isinstance(negatives, list) else [negatives]),
    ]
  problem: tuple[str, ...] = ()
  if len(captions) < 2 or not all(map(_is_text, captions)):
    problem = ("no_caption", "its caption or its wrong caption is missing")
  box: tuple[float, ...] | None = None
  if any(name in record for name in _BOX):
    values = [record.get(name) for name in _BOX]
    if all(isinstance(x, int | float) for x in values):
      box = tuple(float(x) for x in values if x is not None)
    else:
      problem = ("bad_metadata", f"its box {values} is not four numbers")
  attributes = record.get("attributes")
  group = "_".join(map(str, attributes)) if isinstance(attributes, list) else ""
  group = str(record.get("relation_name") or group)
  return Example(_path(_first(record, _IMAGE)), box, tuple(map(str, captions)), group, problem)


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
  return next((record[name] for name in names if record.get(name)), None)


def _is_text(x: Any) -> bool:
  return isinstance(x, str) and bool(x.strip())


def _path(x: Any) -> str:
  return x if isinstance(x, str) else ""


class Files:
  """The examples of sets as a source, in their order."""

  def __init__(self, sets: Sequence[Set], images: pathlib.Path, apply_exif: bool):
    self._examples = [example for one in sets for example in one.examples]
    self._places = [(one, n) for one in sets for n in range(len(one.examples))]
    self._images, self._apply_exif = images, apply_exif
    self.fingerprint = fingerprints.of_names(*(one.file for one in sets))

  def __repr__(self) -> str:
    return f"compositional tests in {self._images}"

  def __len__(self) -> int:
    return len(self._examples)

  def key(self, i: int) -> str:
    """Names an example by its set, its place and its image."""
    one, n = self._places[i]
    return f"{one.name}/{n // one.each}/{self._examples[i].image}"

  def where(self, i: int) -> tuple[str, int, int]:
    """The file of an example, its place there, and the examples in that file."""
    one, n = self._places[i]
    return one.file, n // one.each, len(one.examples) // one.each

  def __getitem__(self, i: int) -> dict[str, Any]:
    example, name = self._examples[i], self.key(i)
    if example.problem:
      raise Rejected(*example.problem)
    if not example.image:
      raise Rejected("no_image", "its record names no image")
    ending = next((x for x in _ENDINGS if (self._images / (example.image + x)).is_file()), "")
    data: Any = image_files.read(example.image + ending, folder=str(self._images), key=name)
    if example.box:
      data = _crop(decode(data, apply_exif=self._apply_exif), example.box)
    return dict(image=data, captions=example.captions, key=name, label=-1)


def _crop(pixels: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
  """The part of an image in a box (x, y, width, height), black beyond the border, as Pillow's."""
  height, width, _ = pixels.shape
  x, y, w, h = box
  beyond = x < -width or y < -height or x + w > 2 * width or y + h > 2 * height
  if not (w >= 1 and h >= 1) or beyond:
    raise Rejected("bad_metadata", f"its box {box} does not fit its {width} x {height} pixels")
  return np.asarray(Image.fromarray(pixels).crop((x, y, x + w, y + h)))  # type: ignore[arg-type]


def _choices(record: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
  """The first caption of the first field, which is correct, and all others, which are wrong."""
  texts = record.get("texts") or {"": record["captions"]}
  own = [tuple(texts.get(field, ())) for field in (fields if "" not in texts else ("",))]
  captions = tuple(text for of_field in own for text in of_field)
  if not own or not own[0] or len(captions) < 2:
    raise Rejected("no_caption", f"{len(captions)} captions; expected one and a wrong one")
  return captions


def _files(folder: str, sets: Sequence[str] | None, what: str) -> list[pathlib.Path]:
  """The files of annotations in a folder, or the file itself."""
  path = pathlib.Path(expand_variables(folder, what=what)).expanduser()
  if not path.exists():
    raise FileNotFoundError(f"{what}={folder!r}: {path} does not exist")
  if path.is_file():
    return [path]
  found = {x.stem: x for x in sorted(path.iterdir()) if x.suffix in (".json", ".jsonl")}
  if not found:
    raise FileNotFoundError(f"{what}={folder!r}: {path} holds no .json or .jsonl file")
  wanted = [*found] if sets is None else [*sets]
  missing = [name for name in wanted if name not in found]
  if sets is None and {*SUGAR_CREPE} & {*found}:
    missing = [name for name in SUGAR_CREPE if name not in found]
  if missing:
    raise FileNotFoundError(
      f"{what}={folder!r} lacks {len(missing)} sets, {tree.shown(missing)}; it has"
      f" {tree.shown([*found])}. The option `sets` chooses those to evaluate"
    )
  return [found[name] for name in wanted]


def compositional(
  context: Context,
  *,
  folder: str = "",
  images: str = "",
  sets: Sequence[str] | None = None,
  without: Sequence[str] = (),
  source: str = "",
  fields: Sequence[str] | None = None,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Compositional tests: Winoground, SugarCrepe, ARO and others of their forms.

  An example is correct if the cosine of the image with its caption is larger than that with each
  wrong caption; one that is equal, or NaN, is not. Examples whose image or captions cannot be read
  are left out of the means, named in the log and counted as "rejected", of each set.

  Args:
    context: model, mesh and data options.
    folder: of .json and .jsonl files as they are published, each of which is a set; or one file.
    images: folder of their images; "": the subfolder `images` if there is one, else `folder`.
    sets: names of files without their ending; None: all of the folder, which must then hold all
      seven of SugarCrepe if it holds one of them.
    without: relations or attributes of ARO that are left out, such as symmetric relations.
    source: as in config.data.source, in place of `folder`.
    fields: caption fields of the source. The first caption of the first field is correct, all other
      captions are wrong; None: config.data.captions.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-compositional-<set>-accuracy": fraction, ...}, and num_samples and
    chance of each set. Of SugarCrepe also "add-mean_accuracy" and so on, the mean over the sets of
    a kind, if all of them are there; of ARO "<set>-mean_group_accuracy", the mean over relations,
    or over the pairs of attributes with at least 25 examples. Of Winoground "<set>-text", "-image"
    and "-group". The metrics of a source have no name of a set.

  Raises:
    FileNotFoundError: for a missing folder, or missing sets.
    ValueError: for a file of another form; when run, for a set of which no example can be used.
  """
  at = f"config.evals.{context.name}"
  if bool(folder) == bool(source):
    raise ValueError(f"{at}: give `folder` or `source`, one of them")
  if source:
    if images or sets is not None or without:
      raise ValueError(f"{at}: images, sets and without have an effect with `folder` only")
    names = fields or context.data.caption_fields or ()
    opened: Any = WithCaptions(
      open_source(source, captions=names or None), functools.partial(_choices, fields=names)
    )
    every = [_of_source(opened, f"{at}.source={source!r}")]
  else:
    if fields is not None:
      raise ValueError(f"{at}.fields has an effect with `source` only")
    files = _files(folder, sets, f"{at}.folder")
    every = _without([read_set(file) for file in files], without, f"{at}.without")
    every.sort(key=lambda one: not one.two_images)  # so that the two images are rows 2n and 2n + 1
    opened = Files(every, image_folder(images, files[0].parent, at), context.data.apply_exif)
  most = max(len(example.captions) for one in every for example in one.examples)
  data = read_data(context, opened, batch_size=batch_size, captions=most)
  embed = embedder(context._replace(shared=None), data)
  compare = jax.jit(_compare, out_shardings=sharding.replicated_sharding(context.mesh))

  def run(params: Any) -> dict[str, float]:
    found = [np.asarray(x) for x in sharding.block_on_cpu(compare(embed(params)))]
    metrics: dict[str, float] = {}
    first = 0
    for one in every:
      part = [x[first : first + len(one.examples)] for x in found]
      first += len(one.examples)
      start = f"{one.name}-" if one.name else ""
      metrics |= {f"{start}{name}": x for name, x in _measures(one, *part, at=at).items()}
    return {f"val/{context.name}-compositional-{k}": x for k, x in _with_kinds(metrics).items()}

  return run


def _of_source(source: WithCaptions, what: str) -> Set:
  """The samples of a source as a set; reads their captions."""
  examples = []
  for i in range(len(source)):
    try:
      examples.append(Example("", None, read(source, i)["captions"]))
    except Rejected:  # counted when the batches are made
      examples.append(Example("", None, ("",)))
  if not examples:
    raise ValueError(f"{what} has no samples")
  return Set("", examples, False, what)


def _without(every: Sequence[Set], without: Sequence[str], what: str) -> list[Set]:
  """The sets without the examples of some groups; ValueError for a group that no example has."""
  groups = {example.group for one in every for example in one.examples} - {""}
  unknown = [name for name in without if name not in groups]
  if unknown:
    raise ValueError(
      f"{what}: no example has {tree.shown(unknown)}; the groups are {tree.shown(sorted(groups))}"
    )
  left = [
    one._replace(examples=[x for x in one.examples if not x.group or x.group not in without])
    for one in every
  ]
  empty = [one.name for one in left if not one.examples]
  if empty:
    raise ValueError(f"{what} leaves no example of {tree.shown(empty)}")
  return left


def image_folder(images: str, beside: pathlib.Path, at: str) -> pathlib.Path:
  if not images:
    return beside / "images" if (beside / "images").is_dir() else beside
  path = pathlib.Path(expand_variables(images, what=f"{at}.images")).expanduser()
  if not path.is_dir():
    raise FileNotFoundError(f"{at}.images={images!r}: {path} is not a folder")
  return path


def _compare(embedded: Embedded) -> tuple[jax.Array, ...]:
  """Similarities of R images with their captions, and with the first caption of their partner.

  Rows 2n and 2n + 1 are partners.

  Returns:
    [R, C], [R], and which images [R] and captions [R, C] count.
  """
  zimg = rearrange(embedded.zimg, "n b e -> (n b) e")
  ztxt = rearrange(embedded.ztxt, "n b c e -> (n b) c e")
  highest = jax.lax.Precision.HIGHEST
  own = jnp.einsum("re,rce->rc", zimg, ztxt, precision=highest)
  odd = len(zimg) % 2
  pairs = rearrange(jnp.pad(ztxt[:, 0], ((0, odd), (0, 0))), "(n two) e -> n two e", two=2)
  partner = rearrange(pairs[:, ::-1], "n two e -> (n two) e")[: len(zimg)]
  cross = jnp.einsum("re,re->r", zimg, partner, precision=highest)
  valid = rearrange(embedded.valid, "n b -> (n b)")
  return own, cross, valid, rearrange(embedded.texts_valid, "n b c -> (n b) c")


def _measures(
  one: Set, own: np.ndarray, cross: np.ndarray, valid: np.ndarray, there: np.ndarray, *, at: str
) -> dict[str, float]:
  """The metrics of a set; the arrays are those of `_compare` for its rows."""
  usable = valid.reshape(-1, one.each).all(1)
  samples, rejected = int(usable.sum()), int((~usable).sum())
  if not samples:
    raise ValueError(
      f"{at}: all {rejected} examples of {one.file} are rejected; the log gives the reasons"
    )
  metrics: dict[str, float]
  if one.two_images:
    pairs = rearrange(np.stack([own[:, 0], cross], 1), "(n two) c -> n two c", two=2)
    pairs[:, 1] = pairs[:, 1, ::-1]  # image 1: its own caption is caption 1
    metrics = {name: float(x.mean()) for name, x in winoground(pairs[usable]).items()}
  else:
    correct = prefers_first(own, there)[usable]
    metrics = {
      "accuracy": float(correct.mean()),
      "chance": float((1 / there[usable].sum(1)).mean()),
      **_groups(np.array([x.group for x in one.examples])[usable], correct, one),
    }
  metrics["num_samples"] = samples
  return metrics | ({"rejected": rejected} if rejected else {})


def _groups(group: np.ndarray, correct: np.ndarray, one: Set) -> dict[str, float]:
  """The mean over the groups of a set; {} for a set without groups."""
  names, index, counts = np.unique(group, return_inverse=True, return_counts=True)
  used = (counts >= one.least) & (names != "")
  if not used.any():
    return {}
  shares = np.bincount(index, correct, minlength=len(names)) / counts
  return {"mean_group_accuracy": float(shares[used].mean()), "num_groups": int(used.sum())}


def _with_kinds(metrics: dict[str, float]) -> dict[str, float]:
  """Adds the mean of each kind of SugarCrepe of which all sets are there."""
  for kind, parts in KINDS.items():
    names = [f"{kind}_{part}-accuracy" for part in parts]
    if all(name in metrics for name in names):
      metrics[f"{kind}-mean_accuracy"] = float(np.mean([metrics[name] for name in names]))
  return metrics
