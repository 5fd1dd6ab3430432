"""Assignment of rows to columns with given shares: Sinkhorn's algorithm."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sinkhorn(
  scores: jax.Array,
  *,
  eps: jax.Array | float,
  iterations: int = 3,
  prior: jax.Array | None = None,
) -> jax.Array:
  """[n, K]: an assignment of n rows to K columns; without gradient.

  exp(scores / eps) is scaled in turns, so that each column gets its share of the rows, and each row
  adds up to 1: https://arxiv.org/abs/2006.09882. The last turn is that of the rows, so rows add up
  to 1 exactly, and columns nearly. All rows of the global batch take part.

  Args:
    scores: [n, K].
    eps: temperature.
    iterations: turns of both kinds.
    prior: [K], the shares of the columns, which add up to 1; None: equal shares.
  """
  scores = jax.lax.stop_gradient(scores)
  share = 1 / scores.shape[1] if prior is None else prior[None]
  q = jnp.exp((scores - scores.max()) / eps)
  q = q / q.sum()
  tiny = jnp.finfo(q.dtype).tiny
  for _ in range(iterations):
    q = q * (share / jnp.maximum(q.sum(0, keepdims=True), tiny))
    q = q / jnp.maximum(q.sum(1, keepdims=True), tiny)
  return jax.lax.stop_gradient(q)
