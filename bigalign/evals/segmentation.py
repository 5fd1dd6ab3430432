"""Zero-shot segmentation: each patch of an image is given the class whose prompts it resembles."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from bigalign import sharding
from bigalign.data.samples.rejects import Rejected
from bigalign.data.sources.base import key, value
from bigalign.evals.embed import Context, log_rejects, of_patches, open_data
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


def confusion(scores: jax.Array, labels: jax.Array) -> jax.Array:
  """[K, K] int32: how many places of each class (rows) were given each class (columns).

  Args:
    scores: [B, h, w, K], of patches; they are interpolated to the places of the labels.
    labels: [B, S, S] int32; -1 does not count.
  """
  batch, size, _ = labels.shape
  classes = scores.shape[-1]
  whole = jax.image.resize(scores, (batch, size, size, classes), "bilinear")
  found = whole.argmax(-1)
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
) -> Callable[[Any], dict[str, float]]:
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
  data = open_data(context, source, batch_size=batch_size, captions=0)
  weigh = class_weights(
    context,
    classnames=names,
    templates=read_templates(templates, f"{where}.templates"),
    batch_size=batch_size,
  )
  rows = sharding.host_rows(context.mesh, data.batch_size)
  replicated = sharding.replicated_sharding(context.mesh)

  @functools.partial(jax.jit, out_shardings=replicated)
  def count(patches: jax.Array, weights: jax.Array, labels: jax.Array, rejects: jax.Array) -> Any:
    side = round(patches.shape[1] ** 0.5)
    weights = unit(weights[:, -patches.shape[-1] :])
    cosines = jnp.einsum("bne,ke->bnk", patches, weights, precision=jax.lax.Precision.HIGHEST)
    grid = rearrange(cosines, "b (h w) k -> b h w k", h=side)
    return confusion(grid, labels), rejects.sum(0)

  def labels_of(batch: Any) -> np.ndarray:
    size = context.data.image_size
    found = np.full((len(batch["valid"]), size, size), _NONE, np.int32)
    for row, (i, valid) in enumerate(zip(batch["index"].tolist(), batch["valid"])):
      if valid:
        found[row] = _labels(data.source, i, labels, size, first, ignore, len(names), where)
    return found

  def run(params: Any) -> dict[str, float]:
    weights = weigh(params)
    total = np.zeros((len(names), len(names)), np.int64)
    rejects: Any = 0
    samples = 0
    for batch in data.batches():
      given = {name: batch[name] for name in ("image", "rejects", "valid")}
      given["labels"] = labels_of(batch)
      on_mesh = sharding.global_batch(context.mesh, given, rows, data.batch_size)
      patches = embed(params, on_mesh["image"])
      counted = count(patches, weights, on_mesh["labels"], on_mesh["rejects"])
      counts, rejected = sharding.block_on_cpu(counted)
      total += np.asarray(counts)
      rejects = rejects + np.asarray(rejected)
      samples += int(on_mesh["valid"].sum())
    rejected = log_rejects(context.name, rejects)
    metrics = {**measures(total), "num_samples": samples, "num_classes": len(names)}
    metrics |= {"rejected": rejected} if rejected else {}
    return {f"val/{context.name}-segmentation-{name}": x for name, x in metrics.items()}

  return run


def _labels(
  source: Any, i: int, name: str, size: int, first: int, ignore: int, classes: int, where: str
) -> np.ndarray:
  """The labels of one sample; ValueError naming it."""
  try:
    stored = value(source, i, name)
    if not isinstance(stored, bytes):
      raise ValueError(f"it has no {name!r}, the image of its labels")
    return read_labels(stored, size, first, ignore, classes)
  except (ValueError, Rejected) as error:
    raise ValueError(f"{where}.source: sample {key(source, i)}: {error}") from error
