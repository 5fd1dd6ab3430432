"""Zero-shot segmentation: each patch of an image is given the class whose prompts it resembles."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from bigalign import sharding
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import key, value
from bigalign.evals.embed import Context, EvalData, log_rejects, of_patches, open_data, to_host
from bigalign.evals.zeroshot import class_weights, read_lines, read_templates
from bigalign.sphere import unit

_NONE = -1  # of a place that does not count


def read_labels(stored: Any, size: int, first: int, ignore: int, classes: int) -> np.ndarray:
  """[size, size] int32: the class of each place of an image that is squashed to a square; or -1.

  Args:
    stored: bytes of an image file of one channel, or of indices into a palette.
    size: pixels per side of the square.
    first: value of the first class.
    ignore: value of places that do not count, as those below `first`.
    classes: K, their number.

  Raises:
    ValueError: for bytes that are not such an image, or a value without a class.
  """
  try:
    with Image.open(io.BytesIO(stored)) as image:
      if image.mode not in ("L", "P", "I", "I;16", "1"):
        raise ValueError(f"mode {image.mode}; expected one channel or a palette")
      whole = image if image.mode in ("L", "P") else image.convert("I")
      values = np.asarray(whole.resize((size, size), Image.Resampling.NEAREST), np.int32)
  except OSError as error:
    raise ValueError(f"not an image: {error}") from error
  counts = (values != ignore) & (values >= first)
  labels = np.where(counts, values - first, _NONE)
  if labels.max(initial=_NONE) >= classes:
    raise ValueError(
      f"the value {labels.max() + first} has no class: there are {classes}, from {first} on, and"
      f" {ignore} is ignored"
    )
  return labels


def classes_of(scores: jax.Array, size: int) -> jax.Array:
  """[B, S, S] int32: the class of each place.

  Args:
    scores: [B, h, w, K], of patches; they are interpolated.
    size: S, pixels per side.
  """
  batch, _, _, classes = scores.shape
  whole: jax.Array = jax.image.resize(scores, (batch, size, size, classes), "bilinear")
  return whole.argmax(-1)


def confusion(scores: jax.Array, labels: jax.Array) -> jax.Array:
  """[K, K] int32: how many places of each class (rows) were given each class (columns).

  Args:
    scores: [B, h, w, K], of patches; they are interpolated to the places of the labels.
    labels: [B, S, S] int32; -1 does not count.
  """
  classes = scores.shape[-1]
  found = classes_of(scores, labels.shape[-1])
  known = labels >= 0
  pairs = jnp.where(known, labels * classes + found, classes**2)
  counts = jnp.zeros(classes**2 + 1, jnp.int32).at[pairs.ravel()].add(1)
  return rearrange(counts[:-1], "(r c) -> r c", r=classes)


def measures(counts: np.ndarray) -> dict[str, float]:
  """The measures of a confusion matrix [K, K].

  >>> found = measures(np.array([[2, 0], [1, 1]]))
  >>> round(found["mean_iou"], 4), found["pixel_accuracy"]  # 2 / 3 and 1 / 2
  (0.5833, 0.75)

  Returns:
    "mean_iou": intersection over union of a class, averaged over the classes that occur in the
    labels or in the result. "pixel_accuracy": share of correct places. "mean_class_accuracy": the
    same for the places of a class, averaged over the classes that occur in the labels.
  """
  hits, rows, columns = np.diag(counts), counts.sum(1), counts.sum(0)
  union = rows + columns - hits
  occurs, there = union > 0, rows > 0
  return {
    "mean_iou": float((hits[occurs] / union[occurs]).mean()) if occurs.any() else 0.0,
    "pixel_accuracy": float(hits.sum() / max(counts.sum(), 1)),
    "mean_class_accuracy": float((hits[there] / rows[there]).mean()) if there.any() else 0.0,
  }


class Segmented(NamedTuple):
  """Some images, their labels and the classes that a model gives them.

  Attributes:
    names: of the K classes.
    images: [N, S, S, 3] uint8, as the model sees them.
    labels: [N, S, S] int32; -1 does not count.
    found: [N, S, S] int32.
  """

  names: Sequence[str]
  images: np.ndarray
  labels: np.ndarray
  found: np.ndarray


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """Zero-shot segmentation of one source by one model; see `segmentation`."""

  context: Context
  embed: Callable[[Any, jax.Array], jax.Array]
  data: EvalData
  weigh: Callable[[Any], jax.Array]
  names: Sequence[str]
  read: Callable[[bytes], np.ndarray]
  member: str

  def __call__(self, params: Any) -> dict[str, float]:
    """{metric: value}."""
    replicated = sharding.replicated_sharding(self.context.mesh)

    @functools.partial(jax.jit, out_shardings=replicated)
    def count(scores: jax.Array, labels: jax.Array, rejects: jax.Array) -> Any:
      return confusion(scores, labels), rejects.sum(0)

    total = np.zeros((len(self.names), len(self.names)), np.int64)
    rejects: Any = 0
    samples = 0
    for _, on_mesh, scores in self._scores(params):
      counted = count(scores, on_mesh["labels"], on_mesh["rejects"])
      counts, rejected = sharding.block_on_cpu(counted)
      total += np.asarray(counts)
      rejects = rejects + np.asarray(rejected)
      samples += int(on_mesh["valid"].sum())
    name = self.context.name
    rejected = log_rejects(name, rejects)
    metrics = {**measures(total), "num_samples": samples, "num_classes": len(self.names)}
    metrics |= {"rejected": rejected} if rejected else {}
    return {f"val/{name}-segmentation-{key}": x for key, x in metrics.items()}

  def examples(self, params: Any, most: int) -> Segmented:
    """The first images of the source, for a single process.

    Args:
      params: of the model.
      most: at most so many images, all of the first batch.

    Raises:
      ValueError: for a source without samples.
    """
    for batch, _, scores in self._scores(params):
      rows = np.flatnonzero(batch["valid"])[:most]
      found = to_host(classes_of(scores, self.context.data.image_size))
      images = np.stack([self.context.data.shown(batch, int(row)) for row in rows])
      return Segmented(self.names, images, batch["labels"][rows], found[rows])
    raise ValueError(f"config.evals.{self.context.name}.source has no samples")

  def _scores(
    self, params: Any
  ) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, jax.Array], jax.Array]]:
    """(rows of this host with their labels, global arrays, cosines [B, h, w, K]) of each batch."""
    mesh, size = self.context.mesh, self.data.batch_size
    rows = sharding.host_rows(mesh, size)
    weights = self.weigh(params)
    for batch in self.data.batches():
      given = {name: batch[name] for name in ("image", "rejects", "valid")}
      given["labels"] = self._labels(batch)
      on_mesh = sharding.global_batch(mesh, given, rows, size)
      yield given, on_mesh, _cosines(self.embed(params, on_mesh["image"]), weights)

  def _labels(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[B, S, S] int32, of a batch of this host."""
    size = self.context.data.image_size
    labels = np.full((len(batch["valid"]), size, size), _NONE, np.int32)
    for row, (i, valid) in enumerate(zip(batch["index"].tolist(), batch["valid"])):
      if valid:
        labels[row] = self._labels_of(i)
    return labels

  def _labels_of(self, i: int) -> np.ndarray:
    source = self.data.source
    try:
      stored = value(source, i, self.member)
      if not isinstance(stored, bytes):
        raise ValueError(f"it has no {self.member!r}, the image of its labels")
      return self.read(stored)
    except (ValueError, Rejected) as error:
      where = f"config.evals.{self.context.name}.source"
      raise ValueError(f"{where}: sample {key(source, i)}: {error}") from error


@jax.jit
def _cosines(patches: jax.Array, weights: jax.Array) -> jax.Array:
  """[B, h, w, K] of patches [B, N, E] and the weights [K, E or more] of the classes."""
  side = round(patches.shape[1] ** 0.5)
  weights = unit(weights[:, -patches.shape[-1] :])
  cosines = jnp.einsum("bne,ke->bnk", patches, weights, precision=jax.lax.Precision.HIGHEST)
  return rearrange(cosines, "b (h w) k -> b h w k", h=side)


def segmentation(
  context: Context,
  *,
  source: str,
  classnames: str,
  labels: str = "seg.png",
  templates: str | Sequence[str] = "photos",
  first: int = 0,
  ignore: int = 255,
  batch_size: int = 64,
) -> Segmentation:
  """Zero-shot segmentation, by the cosines of patches with the prompts of classes.

  Each patch goes through the projector of the image, and is compared with the unit mean of the
  prompts of a class. The cosines are interpolated to the pixels of the model's input, where the
  labels are compared; images are squashed to the square, so that none of their places is lost.
  Published protocols differ in the size of the images, in sliding windows and in the treatment of
  the background.

  Args:
    context: model, mesh and data options.
    source: as in config.data.source, whose samples also have an image of labels.
    classnames: file of class names in the order of the labels.
    labels: name of that image among the stored values of a sample, such as the end of a member's
      name; a PNG of one channel, or with a palette.
    templates: as of `zeroshot`.
    first: value of the first class: 1 for ADE20K, whose 0 is anything else.
    ignore: value of pixels that do not count.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-segmentation-mean_iou": fraction, ...}, see `measures`.

  Raises:
    ValueError: when run, for a sample without labels, or a value without a class; for a projector
      that does not take single patches.
  """
  where = f"config.evals.{context.name}"
  context, embed = of_patches(context)
  names = read_lines(classnames, f"{where}.classnames", labels=True)
  weigh = class_weights(
    context,
    classnames=names,
    templates=read_templates(templates, f"{where}.templates"),
    batch_size=batch_size,
  )
  size, classes = context.data.image_size, len(names)
  return Segmentation(
    context,
    embed,
    open_data(context, source, batch_size=batch_size, captions=0),
    weigh,
    names,
    functools.partial(read_labels, size=size, first=first, ignore=ignore, classes=classes),
    labels,
  )
