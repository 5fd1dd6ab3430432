"""Classification by the nearest training images: no parameter is fitted to the features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec as P

from bigalign import checks, sharding
from bigalign.evals.embed import Context, places
from bigalign.evals.features import ROWS, Features, flat, measures
from bigalign.evals.probe import TrainAndTest, named
from bigalign.sphere import unit


@functools.partial(jax.jit, static_argnames=("neighbours", "classes"))
def vote(
  train: Features,
  test: Features,
  *,
  neighbours: int,
  classes: int,
  temperature: jax.Array | float = 0.07,
) -> jax.Array:
  """Lets the nearest training images of each image vote for its class, over the current mesh.

  The weight of a vote is exp(cosine / temperature), as in DINO (https://arxiv.org/abs/2104.14294).
  Of equal cosines the earlier training image is nearer; those that are not finite never vote.

  Args:
    train: N batches of B images, with as many valid ones as neighbours. They stay on their devices.
    test: M batches of C images.
    neighbours: that vote.
    classes: K.
    temperature: of the votes.

  Returns:
    What `features.measures` takes, on every device: [M, C], see `embed.places`; of a multilabel
    set [M, C, K], the share of the votes that each class has. An image that is not finite has NaN.
  """
  axes, _ = sharding.devices()
  size = train.x.shape[1]

  def local(train: Features, test: Features) -> jax.Array:
    gallery = unit(rearrange(train.x, "n b d -> (n b) d").astype(jnp.float32))
    target = rearrange(train.target, "n b ... -> (n b) ...")
    there = rearrange(train.finite, "n b -> (n b)")
    device = jax.lax.axis_index(axes) if axes else 0
    batch, place = jnp.divmod(jnp.arange(len(gallery)), train.x.shape[1])
    position = batch * size + device * train.x.shape[1] + place  # in the source

    def total(x: jax.Array) -> jax.Array:
      summed: jax.Array = jax.lax.psum(x, axes) if axes else x
      return summed

    def of_batch(queries: Features) -> jax.Array:
      if axes:
        queries = jax.tree.map(lambda a: jax.lax.all_gather(a, axes, tiled=True), queries)
      z = unit(queries.x.astype(jnp.float32))
      cosine = jnp.matmul(z, gallery.T, precision=jax.lax.Precision.HIGHEST)
      cosine = jnp.where(there[None], cosine, -jnp.inf)
      nearest, index = jax.lax.top_k(cosine, min(neighbours, len(gallery)))  # of this device
      every = (-nearest, position[index])
      if axes:
        every = tuple(jax.lax.all_gather(a, axes, axis=1, tiled=True) for a in every)
      ranked = jax.lax.sort(every, num_keys=2)
      distance, order = (a[:, neighbours - 1, None] for a in ranked)
      near = (-nearest < distance) | ((-nearest == distance) & (position[index] <= order))
      # The nearest has weight 1, so that a low temperature neither overflows nor loses all votes.
      most = -ranked[0][:, :1]
      weight = jnp.where(near, jnp.exp((nearest - most) / temperature), 0)
      own = target[index]
      has = (
        own if own.ndim == 3 else own[..., None] == jnp.arange(classes)[None, None]
      )  # [C, neighbours, K]
      votes = total(jnp.where(has, weight[..., None], 0).sum(1))
      if own.ndim == 3:
        votes = votes / total(weight.sum(1, keepdims=True))
      votes = jnp.where(queries.finite[:, None], votes, jnp.nan)
      return votes if own.ndim == 3 else places(votes, queries.target)

    found: jax.Array = jax.lax.map(of_batch, test)
    return found

  voted: jax.Array = sharding.on_each_device(local, (ROWS, ROWS), P())(train, test)
  return voted


def knn(
  context: Context,
  *,
  train: str = "",
  test: str = "",
  train_store: str = "",
  test_store: str = "",
  projected: bool = False,
  classnames: str | None = None,
  neighbours: int = 20,
  temperature: float = 0.07,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Classification by the nearest training images, see `vote`.

  Args:
    context: model, mesh and data options.
    train, test, train_store, test_store, projected, classnames: as of `linear_probe`.
    neighbours: training images that vote.
    temperature: of their votes exp(cosine / temperature).
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-knn-top1": fraction, ...}: mean_per_class_recall, from five classes
    on top5, or of a multilabel set mean_average_precision; and the numbers of images.

  Raises:
    ValueError: as `linear_probe`, and for fewer training images than neighbours.
  """
  where = f"config.evals.{context.name}"
  checks.between(where, 1, neighbours=neighbours)
  checks.above_zero(where, temperature=temperature)
  images = TrainAndTest(
    context,
    train=(train, train_store),
    test=(test, test_store),
    projected=projected,
    classnames=classnames,
    batch_size=batch_size,
  )

  def run(params: Any) -> dict[str, float]:
    read = images.read(params)
    (train_features, trained), (test_features, tested) = read.train, read.test
    if (count := int(trained.valid.sum())) < neighbours:
      raise ValueError(f"{where}.neighbours={neighbours}: there are {count} training images")
    with jax.set_mesh(context.mesh):
      found = vote(
        train_features,
        test_features,
        neighbours=neighbours,
        classes=read.classes,
        temperature=np.float32(temperature),
      )
    by_row = flat(np.asarray(sharding.block_on_cpu(found)))[tested.valid]
    metrics = measures(by_row, tested.target[tested.valid], read.classes)
    return named(context, "knn", metrics | read.sizes)

  return run
