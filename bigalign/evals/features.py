"""Features of images and their classes on the whole mesh, for classifiers that are trained on them.

Rows are split over all devices and stay there. What needs all rows (sums, neighbours) is computed
by each device for its own rows, and added up.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigalign import sharding, tree
from bigalign.data.sources.base import name_classes
from bigalign.data.stores.reader import Store
from bigalign.evals.embed import Context, EvalData, embedded_images, log_rejects, open_data, to_host
from bigalign.evals.zeroshot import average_precision, read_lines

ROWS = P(None, sharding.AXES)  # of arrays [N, B, …]: B is split over all devices


class Features(NamedTuple):
  """Features of N batches of B images, in the order of their source, split over B.

  Attributes:
    x: [N, B, D], 0 where `finite` is False.
    target: [N, B] int32, the class of each image; of a multilabel set [N, B, K] bool.
    finite: [N, B] bool, whether the image is used and none of its features is NaN or infinite.
  """

  x: jax.Array
  target: jax.Array
  finite: jax.Array


class Rows(NamedTuple):
  """What every host knows of the N B rows of some features, in their order.

  Attributes:
    target: [N B] int32, or [N B, K] bool.
    valid: [N B] bool, False for padding and rejected images.
    rejected: number of rejected images.
  """

  target: np.ndarray
  valid: np.ndarray
  rejected: int


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Labelled images of which an evaluator reads the features; see `open_set`.

  Attributes:
    option: the option that names them, for errors, such as "config.evals.NAME.train".
    context: of the evaluator; its `embed_image` gives features.
    data: the opened source.
    header: of the store of the features; {} without one.
  """

  option: str
  context: Context
  data: EvalData
  header: Mapping[str, Any]

  @property
  def names(self) -> list[str]:
    """The class names of the source; [] if it has none."""
    return list(getattr(self.data.source, "classnames", ()))

  @property
  def multilabel(self) -> bool:
    """Whether each image has a set of classes."""
    return getattr(self.data.source, "dataset_type", "") == "multilabel"

  def read(self, params: Any, classes: int = 0) -> tuple[Features, Rows]:
    """The features of all images.

    Args:
      params: of the model.
      classes: K, of a multilabel set.

    Raises:
      ValueError: if no image can be used, or one has no class.
    """
    features, labelled, valid, rejects = _collect(self.context, self.data, params, classes)
    target, there, finite, has_class = (
      flat(to_host(x)) for x in (features.target, valid, features.finite, labelled)
    )
    rejected = log_rejects(self.context.name, rejects)
    samples = int(there.sum())
    if not samples:
      raise ValueError(
        f"{self.option}: all {rejected} samples are rejected; the log gives the reasons"
      )
    if missing := int((there & ~has_class).sum()):
      kind = (
        f"no KEY.npy of {classes} numbers, 0 or 1, one per class name" if classes else "no label"
      )
      raise ValueError(f"{self.option}: {missing} of {samples} images have {kind}")
    if lost := int((there & ~finite).sum()):
      logging.warning(
        "%s: %d of %d images have features that are NaN or infinite; no classifier is fitted to"
        " them, and they are never a hit",
        *(self.option, lost, samples),
      )
    return features, Rows(target, there, rejected)


def open_set(
  context: Context, option: str, source: str, store: str, *, projected: bool, batch_size: int
) -> ImageSet:
  """Opens labelled images.

  Args:
    context: of the evaluator.
    option: "train", "validation" or "test"; its store is the option `<option>_store`.
    source: as in config.data.source; "" if the store has the labels.
    store: folder of the features of the images; "": the image tower computes them.
    projected: whether the features are embeddings, after the projector, for which the vectors of a
      store go through the projector.
    batch_size: global; rounded up to fit all devices.

  Raises:
    ValueError: if neither is given, or a store holds embeddings, which are not projected again.
  """
  where = f"config.evals.{context.name}.{option}"
  if not source and not store:
    raise ValueError(f"{where}: name a source with labels, or {option}_store, a store of images")
  header = dict(Store(store).header) if store else {}
  header.pop("dtype", None)
  if projected and header.get("projected"):
    raise ValueError(
      f"{where}_store={store!r} holds embeddings, after the projector; leave out projected=True,"
      " and they are used as they are"
    )
  embed = context.embed_image if projected else functools.partial(_before_projection, context)
  shared = context.shared
  own = context._replace(name=f"{context.name}.{option}", embed_image=embed, shared=None)
  size = -(-batch_size // context.mesh.size) * context.mesh.size
  opened = open_data(own, source, batch_size=size, captions=0, image_store=store)
  # Another pattern than that of evaluators that share embeddings.
  data = opened._replace(pattern=(source, f"{store} projected={projected}"))
  if shared:
    shared.add_reader((data.pattern, data.batch_size))
  return ImageSet(where, own._replace(shared=shared), data, header)


def _before_projection(context: Context, params: Any, image: Any) -> jax.Array:
  """[B, D]: stored vectors as they are, else the pooled output of the tower, else embeddings."""
  if any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(image)):
    vectors: jax.Array = image[:, 0] if image.ndim == 3 else image  # with tokens, the first row
    return vectors
  if context.image_output is None:
    return context.embed_image(params, image)
  return context.image_output(params, image).pooled


def _collect(
  context: Context, data: EvalData, params: Any, classes: int
) -> tuple[Features, jax.Array, jax.Array, jax.Array]:
  """The features of all batches; labelled [N, B], valid [N, B], and the rejects of each reason."""
  total = -(-len(data.source) // data.batch_size)
  split = NamedSharding(context.mesh, ROWS)
  layout: Any = ((split,) * 5, sharding.replicated_sharding(context.mesh))

  # Batches are written into their places, one by one, as in embed.embedder.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=layout)
  def put(placed: Any, k: jax.Array, x: jax.Array, batch: Mapping[str, jax.Array]) -> Any:
    finite = batch["valid"] & jnp.isfinite(x.astype(jnp.float32)).all(1)
    target = batch["label_set"] if classes else batch["label"]
    labelled = batch["has_label_set"] if classes else batch["label"] >= 0
    rows = (jnp.where(finite[:, None], x, 0), target, finite, labelled, batch["valid"])
    rejects = batch["rejects"].sum(0)
    if placed is None:
      placed = (jax.tree.map(lambda a: jnp.zeros((total, *a.shape), a.dtype), rows), 0 * rejects)
    arrays = jax.tree.map(
      lambda every, a: jax.lax.dynamic_update_index_in_dim(every, a, k, 0), placed[0], rows
    )
    return arrays, placed[1] + rejects

  placed: Any = None
  names = ("valid", "rejects", *(("label_set", "has_label_set") if classes else ("label",)))
  more = dict(classes=classes) if classes else {}
  pairs = zip(range(total), embedded_images(context, data, params, **more), strict=True)
  for k, (x, batch) in pairs:
    kept = {name: batch[name] for name in names}
    if classes and "label_set" not in batch:
      raise ValueError(
        f"config.evals.{context.name}: a store holds no sets of classes; name the source too"
      )
    placed = sharding.block_on_cpu(put(placed, np.int32(k), x, kept))
  assert placed is not None, "a source has samples"
  (x, target, finite, labelled, valid), rejects = placed
  return Features(x, target, finite), labelled, valid, rejects


def flat(x: np.ndarray) -> np.ndarray:
  """[N, B, …] -> [N B, …]."""
  return x.reshape(-1, *x.shape[2:])


def join(parts: Sequence[tuple[Features, Rows]]) -> tuple[Features, Rows]:
  """Some features one after the other; all must have the same B."""
  if len(parts) == 1:
    return parts[0]
  features = sharding.block_on_cpu(_concatenate([features for features, _ in parts]))
  target, valid = (np.concatenate([rows[i] for _, rows in parts]) for i in (0, 1))
  return features, Rows(target, valid, sum(rows.rejected for _, rows in parts))


@jax.jit
def _concatenate(parts: Sequence[Features]) -> Features:
  whole: Features = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  return whole


def spread(mesh: Mesh, rows: np.ndarray, like: jax.Array) -> jax.Array:
  """[N B], known to every host -> [N, B] on the mesh, split as the features `like` [N, B, …]."""
  whole = rows.reshape(like.shape[:2])
  return jax.make_array_from_callback(
    whole.shape, NamedSharding(mesh, ROWS), lambda index: whole[index]
  )


def pick(mesh: Mesh, features: Features, rows: Rows, chosen: np.ndarray) -> tuple[Features, Rows]:
  """Some rows, as one batch that is split over all devices.

  Args:
    mesh: of the features.
    features: N batches of B images.
    rows: of the same.
    chosen: [M], numbers in [0, N B).

  Returns:
    Features of one batch of M rows or more; those after M are padding.
  """
  padded = np.pad(chosen, (0, -len(chosen) % mesh.size))
  valid = rows.valid[padded] & (np.arange(len(padded)) < len(chosen))
  x, finite = sharding.block_on_cpu(_pick(features.x, features.finite, padded.astype(np.int32)))
  kept = Rows(rows.target[padded], valid, 0)
  return Features(x, spread(mesh, kept.target, x), finite), kept


@jax.jit
def _pick(x: jax.Array, finite: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
  axes, devices = sharding.devices()
  size = x.shape[1]  # of a batch

  def local(x: jax.Array, finite: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    device = jax.lax.axis_index(axes) if axes else 0
    batch, place = chosen // size, chosen % size - device * x.shape[1]
    own = (place >= 0) & (place < x.shape[1])
    place = jnp.clip(place, 0, x.shape[1] - 1)
    found = (jnp.where(own[:, None], x[batch, place], 0), own & finite[batch, place])
    part = len(chosen) // devices

    def mine(rows: jax.Array) -> jax.Array:
      whole = jax.lax.psum(rows, axes) if axes else rows  # each row is on one device
      own_part = jax.lax.dynamic_slice_in_dim(whole, device * part, part)
      return rearrange(own_part, "m ... -> 1 m ...")

    return mine(found[0]), mine(found[1].astype(jnp.int32)) > 0

  on_devices = sharding.on_each_device(local, (ROWS, ROWS, P()), (ROWS, ROWS))
  picked: tuple[jax.Array, jax.Array] = on_devices(x, finite, chosen)
  return picked


def class_names(where: str, sets: Sequence[ImageSet], classnames: str | None) -> list[str]:
  """The names of the classes, which all sets that have names share; [] if the first has none.

  Args:
    where: "config.evals.NAME".
    sets: of the evaluator; the first is the training images.
    classnames: file of names in the order of the labels; None: the names of the sources.

  Raises:
    ValueError: for a multilabel set without names, for sets of several kinds, and for sources whose
      names differ.
  """
  if len({one.multilabel for one in sets}) > 1:
    several = [one.option for one in sets if one.multilabel]
    raise ValueError(f"{where}: of its images, only those of {several} have several classes each")
  names = sets[0].names
  if classnames is not None:
    names = read_lines(classnames, f"{where}.classnames", labels=True)
    for one in sets:
      name_classes(one.data.source, names)
  else:
    _check_same_names(where, [one for one in sets if one.names])
  if sets[0].multilabel and not names:
    raise ValueError(
      f"{where}: images with several classes need class names, classnames.txt next to their shards"
      " or the option classnames"
    )
  return names


def _check_same_names(where: str, named: Sequence[ImageSet]) -> None:
  """Raises ValueError for sets whose names differ: a label would be another class in each."""
  for one in named[1:]:
    first = named[0]
    if one.names != first.names:
      pairs = itertools.zip_longest(first.names, one.names)
      label, (a, b) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
      raise ValueError(
        f"{first.option} and {one.option} have other class names, {len(first.names)} and"
        f" {len(one.names)}: label {label} is {a!r} and {b!r}. If their labels are those of"
        f" the same classes, give the names by {where}.classnames"
      )


def check_same_vectors(sets: Sequence[ImageSet]) -> None:
  """Raises ValueError for stores of one evaluator whose vectors were made in several ways."""
  stored = [one for one in sets if one.header]
  for one in stored[1:]:
    first = stored[0]
    keys = sorted({*first.header, *one.header})
    differing = [key for key in keys if first.header.get(key) != one.header.get(key)]
    if differing:
      raise ValueError(
        f"{first.option}_store and {one.option}_store hold vectors that were made in two ways:"
        f" {tree.shown(differing)} differ. Embed both with one config"
      )


def count_classes(names: Sequence[str], train: tuple[str, Rows], others: Mapping[str, Rows]) -> int:
  """The number of classes, of which each has a training image.

  Args:
    names: of the classes; [] if they are not known.
    train: the option that names the training images, for errors, and their rows.
    others: {option: rows}, to be classified.

  Raises:
    ValueError: for a class without a training image, and a label without a class.
  """
  option, rows = train
  target = rows.target[rows.valid]
  several = target.ndim == 2
  classes = len(names) or int(target.max()) + 1
  for where, one in {option: rows, **others}.items():
    labels = one.target[one.valid]
    if not several and (outside := int((labels >= classes).sum())):
      known = f"the {classes} class names" if names else f"those of {option}, 0 to {classes - 1}"
      raise ValueError(
        f"{where}: {outside} of {len(labels)} images have a label outside {known}; the largest is"
        f" {labels.max()}"
      )
  counts = target.sum(0) if several else np.bincount(target, minlength=classes)
  wrong_counts = {"have no image": 0} | ({"have every image": len(target)} if several else {})
  for text, wrong_count in wrong_counts.items():
    if (wrong := counts == wrong_count).any():
      shown = [names[k] if names else k for k in np.flatnonzero(wrong).tolist()]
      raise ValueError(
        f"{option}: {len(shown)} of {classes} classes {text}: {tree.shown(shown)}. A classifier"
        " cannot be fitted to them; give other images, or class names without them"
      )
  return classes


def measures(found: np.ndarray, target: np.ndarray, classes: int) -> dict[str, float]:
  """The measures of some images.

  >>> measures(np.array([0, 1, 0]), np.array([0, 0, 1]), 2)
  {'top1': 0.6666666666666666, 'mean_per_class_recall': 0.75}

  Args:
    found: [N], see `embed.places`; of a multilabel set the scores, [N, K].
    target: [N], the class of each image; or [N, K] bool.
    classes: K.

  Returns:
    "top1", "mean_per_class_recall" of the classes that occur, and from five classes on "top5"; of a
    multilabel set "mean_average_precision", in which a class that no image has counts as 0.
  """
  if target.ndim == 2:
    return {"mean_average_precision": float(average_precision(found, target).mean())}
  hit = found < 1
  count = np.bincount(target, minlength=classes)
  recall = np.bincount(target, weights=hit, minlength=classes)[count > 0] / count[count > 0]
  top5 = {"top5": float((found < 5).mean())} if classes >= 5 else {}
  return {"top1": float(hit.mean()), **top5, "mean_per_class_recall": float(recall.mean())}
