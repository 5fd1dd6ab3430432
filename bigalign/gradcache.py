"""Exact gradients of a loss over a batch whose activations do not fit in memory, by microbatches.

First all microbatches are embedded, keeping only the features. Then come the loss and its gradient
with respect to the features of the whole batch. Last, each microbatch is embedded once more, with
the same random keys, and its part of that gradient is propagated to the parameters.
GradCache: https://arxiv.org/abs/2101.06983, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P

from bigalign import sharding, tree

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
  communicated: Callable[[Tree], Tree] = lambda params: params,
  sums: Container[str] = (),
  late: Container[str] = (),
) -> tuple[tuple[jax.Array, Any], Tree]:
  """Returns value and gradient of objective(params, embed(params, batch, key)).

  Each copy of the model adds up the gradients of its part of all microbatches, and the copies
  exchange this sum once. If `embed` draws random numbers (dropout), which are those of the whole
  microbatch, the compiler exchanges the gradient of every microbatch.

  Args:
    embed: (params, rows of the batch, key) -> features {name: [b, …]}; rows are independent.
    objective: (params, features of the whole batch) -> (scalar, aux).
    params: differentiated.
    batch: {name: [B, …]}.
    key: microbatch i uses fold_in(key, i), so dropout depends on the number of microbatches.
    microbatches: their number; with 1, all activations are kept and each row is embedded once.
    communicated: params -> params in the dtypes in which devices add up their gradients.
    sums: names of features without the batch axis, which are added up over the batch; no gradient
      goes through them.
    late: names of features on whose values no gradient depends: `sums`, and those in which the
      objective is affine, such as sums over a row that are divided by a count. What they alone need
      is computed in the second pass only; the objective is then evaluated once more, with them.

  Returns:
    ((scalar, aux), gradient with respect to params).
  """
  if microbatches == 1:

    def of_params(params: Tree) -> tuple[jax.Array, Any]:
      return objective(params, embed(params, batch, jax.random.fold_in(key, 0)))

    return jax.value_and_grad(of_params, has_aux=True)(params)

  parts, keys = _parts(batch, key, microbatches)
  shapes = jax.eval_shape(
    lambda: embed_batch(embed, params, batch, key, microbatches=microbatches, sums=sums)
  )
  zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items() if name in late}
  with jax.named_scope("first_pass"):  # a part of `bigalign plan`
    features = {
      **embed_batch(embed, params, batch, key, microbatches=microbatches, sums=sums, but=late),
      **zeros,
    }
  floats = {
    name
    for name, x in features.items()
    if jnp.issubdtype(x.dtype, jnp.inexact) and name not in sums
  }
  rest = {name: x for name, x in features.items() if name not in floats}

  def of_features(params: Tree, learned: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    return objective(params, {**rest, **learned})

  value, (grads, feature_grads) = jax.value_and_grad(of_features, (0, 1), has_aux=True)(
    params, {name: features[name] for name in floats}
  )

  def propagated(
    params: Tree, grads: Tree, parts: Any, keys: jax.Array, cotangents: Any
  ) -> tuple[Tree, dict[str, jax.Array]]:
    """The gradients, plus those of all microbatches; the late features of each."""

    def add_gradient(grads: Tree, xs: Any) -> tuple[Tree, Any]:
      part, key, cotangents = xs

      def learned(params: Tree) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        found = embed(params, part, key)
        return {name: found[name] for name in cotangents}, {name: found[name] for name in zeros}

      _, pull_back, found = jax.vjp(learned, params, has_aux=True)
      (more,) = pull_back(cotangents)
      return jax.tree.map(jnp.add, grads, more), found

    return jax.lax.scan(add_gradient, grads, (parts, keys, cotangents))

  cotangents = {name: split(x, microbatches) for name, x in feature_grads.items()}
  if sharding.copies() == 1 or _draws(embed, params, parts, keys):
    grads, found = propagated(params, grads, parts, keys, cotangents)
    found = {name: x.sum(0) if name in sums else merge(x) for name, x in found.items()}
    return objective(params, {**features, **found}) if found else value, grads

  def of_one_copy(
    params: Tree, parts: Any, keys: jax.Array, cotangents: Any
  ) -> tuple[Tree, Tree, dict[str, jax.Array]]:
    first = jax.tree.map(jnp.zeros_like, params)
    grads, found = propagated(params, first, parts, keys, cotangents)
    added = {name: x.sum(0)[None] for name, x in found.items() if name in sums}
    late_rows = {name: x for name, x in found.items() if name not in sums}
    return jax.tree.map(lambda x: x[None], grads), added, late_rows

  def total(grad: jax.Array, of_copies: jax.Array, wire: jax.ShapeDtypeStruct) -> jax.Array:
    # jnp.sum would add up, and communicate, in float32. Not jax.lax.psum, with which XLA ends the
    # process for bfloat16 on CPUs.
    zero = jnp.zeros((), wire.dtype)
    summed = jax.lax.reduce(of_copies.astype(wire.dtype), zero, jax.lax.add, (0,))
    added: jax.Array = grad + summed.astype(grad.dtype)
    return added

  copies, rows = P(sharding.COPIES), P(None, sharding.COPIES)
  of_copies, added, late_rows = sharding.on_each_copy(
    of_one_copy, (P(), rows, P(), rows), (copies, copies, rows)
  )(params, parts, keys, cotangents)
  found = {name: merge(x) for name, x in late_rows.items()}
  found |= {name: x.sum(0) for name, x in added.items()}
  value = objective(params, {**features, **found}) if found else value
  return value, jax.tree.map(total, grads, of_copies, jax.eval_shape(communicated, params))


def _draws(embed: Embed, params: Tree, parts: Mapping[str, jax.Array], keys: jax.Array) -> bool:
  """Whether `embed` draws random numbers for its rows."""
  part, key = jax.tree.map(lambda x: x[0], (parts, keys))
  return "random_bits" in str(jax.make_jaxpr(embed)(params, part, key))


def embed_batch(
  embed: Embed,
  params: Tree,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
  *,
  microbatches: int,
  sums: Container[str] = (),
  but: Container[str] = (),
) -> dict[str, jax.Array]:
  """Returns the features of the whole batch, {name: [B, …]}, as `objective` gets them.

  The arguments are those of `value_and_grad`; `but` names features that are left out.
  """

  def of_part(_: None, xs: Any) -> tuple[None, dict[str, jax.Array]]:
    return None, {name: x for name, x in embed(params, *xs).items() if name not in but}

  _, features = jax.lax.scan(of_part, None, _parts(batch, key, microbatches))
  return {name: x.sum(0) if name in sums else merge(x) for name, x in features.items()}


def _parts(
  batch: Mapping[str, jax.Array], key: jax.Array, n: int
) -> tuple[dict[str, jax.Array], jax.Array]:
  """The microbatches and their keys, stacked on a new first axis."""
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
  return {name: split(x, n) for name, x in batch.items()}, keys


def check_microbatches(mesh: jax.sharding.Mesh, batch_size: int, microbatches: int) -> None:
  """Checks that the rows of each device divide into this many microbatches.

  Raises:
    ValueError: if they do not; lists the numbers that do.
  """
  rows = batch_size // math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  if microbatches < 1 or rows % microbatches:
    fits = [n for n in range(1, rows + 1) if rows % n == 0]
    raise ValueError(
      f"config.microbatches={microbatches} does not divide the {rows} rows of a device"
      f" (config.batch_size={batch_size}); these do: {tree.shown(fits)}"
    )


def split(x: jax.Array, n: int) -> jax.Array:
  """Splits a batch into n microbatches: [B, …] -> [n, B / n, …].

  Each microbatch takes equally many rows of every device, so that no row is communicated.
  """
  parts = rearrange(x, "(w n b) ... -> n (w b) ...", w=sharding.batch_parts(), n=n)
  if jax.sharding.get_abstract_mesh().empty:
    return parts
  spec = P(None, sharding.BATCH, *[None] * (parts.ndim - 2))
  constrained: jax.Array = jax.lax.with_sharding_constraint(parts, spec)
  return constrained


def merge(x: jax.Array) -> jax.Array:
  """Merges microbatches, the inverse of `split`: [n, b, …] -> [n * b, …]."""
  return sharding.constrain_batch(
    rearrange(x, "n (w b) ... -> (w n b) ...", w=sharding.batch_parts())
  )
