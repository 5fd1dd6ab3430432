"""Exact gradients of a loss over a batch whose activations do not fit: in microbatches.

Embed all microbatches and keep only the features; take the loss and its gradient with respect to
the features of the whole batch; embed each microbatch once more, with the same random keys, and
pull its part of that gradient back. GradCache: https://arxiv.org/abs/2101.06983, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import sharding

Tree = Any
Embed = Callable[[Tree, Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]]
Objective = Callable[[Tree, Mapping[str, jax.Array]], tuple[jax.Array, Any]]


def value_and_grad(
  embed: Embed,
  objective: Objective,
  params: Tree,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
  *,
  microbatches: int = 1,
) -> tuple[tuple[jax.Array, Any], Tree]:
  """((objective, aux), gradient) of objective(params, embed(params, batch, key)).

  Args:
    embed: (params, rows of the batch, key) -> features {name: [b, ...]}, row by row.
    objective: (params, features of the whole batch) -> (scalar, aux).
    batch: {name: [B, ...]}.
    key: microbatch i draws from fold_in(key, i), so what is dropped depends on their number.
    microbatches: 1 keeps all activations and embeds once.
  """
  if microbatches == 1:

    def whole(params: Tree) -> tuple[jax.Array, Any]:
      return objective(params, embed(params, batch, jax.random.fold_in(key, 0)))

    return jax.value_and_grad(whole, has_aux=True)(params)

  parts, keys = _parts(batch, key, microbatches)
  features = embedded(embed, params, batch, key, microbatches=microbatches)
  real = {name for name, x in features.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
  rest = {name: x for name, x in features.items() if name not in real}

  def on_features(params: Tree, learned: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    return objective(params, {**rest, **learned})

  found, (grads, wanted) = jax.value_and_grad(on_features, (0, 1), has_aux=True)(
    params, {name: features[name] for name in real}
  )

  def pull(grads: Tree, xs: Any) -> tuple[Tree, None]:
    part, key, wanted = xs

    def learned(params: Tree) -> dict[str, jax.Array]:
      return {name: x for name, x in embed(params, part, key).items() if name in real}

    (more,) = jax.vjp(learned, params)[1](wanted)
    return jax.tree.map(jnp.add, grads, more), None

  wanted = {name: split(x, microbatches) for name, x in wanted.items()}
  grads, _ = jax.lax.scan(pull, grads, (parts, keys, wanted))
  return found, grads


def embedded(
  embed: Embed, params: Tree, batch: Mapping[str, jax.Array], key: jax.Array, *, microbatches: int
) -> dict[str, jax.Array]:
  """The features of the whole batch, {name: [B, ...]}, as `value_and_grad` hands them on."""
  _, found = jax.lax.scan(
    lambda _, xs: (None, embed(params, *xs)), None, _parts(batch, key, microbatches)
  )
  return {name: merge(x) for name, x in found.items()}


def _parts(
  batch: Mapping[str, jax.Array], key: jax.Array, n: int
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Microbatches and their keys, on a new first axis."""
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
  return {name: split(x, n) for name, x in batch.items()}, keys


def check(mesh: jax.sharding.Mesh, batch_size: int, microbatches: int) -> None:
  """Raises ValueError unless each device's rows divide into that many microbatches."""
  own = batch_size // math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  if microbatches < 1 or own % microbatches:
    fits = [n for n in range(1, own + 1) if own % n == 0]
    raise ValueError(
      f"config.microbatches={microbatches} does not divide the {own} rows of a device"
      f" (config.batch_size={batch_size}); these do: {fits[:12]}"
    )


def split(x: jax.Array, n: int) -> jax.Array:
  """[B, ...] -> [n, B / n, ...]; each takes as many rows of every device, so that none moves."""
  parts = rearrange(x, "(w n b) ... -> n (w b) ...", w=_shards(), n=n)
  return _pin(parts)


def merge(x: jax.Array) -> jax.Array:
  """The inverse of `split`."""
  return sharding.constrain_batch(rearrange(x, "n (w b) ... -> (w n b) ...", w=_shards()))


def _shards() -> int:
  """Parts into which the mesh splits a batch."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in sharding.BATCH)


def _pin(parts: jax.Array) -> jax.Array:
  if jax.sharding.get_abstract_mesh().empty:
    return parts
  spec = jax.sharding.PartitionSpec(None, sharding.BATCH, *[None] * (parts.ndim - 2))
  return jax.lax.with_sharding_constraint(parts, spec)
