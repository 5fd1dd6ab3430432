"""How strongly the tokens of a row name the rows of a table: the largest score over its tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

AT_ONCE = 1_024  # rows of the table whose scores of all tokens are in memory at once


def largest(
  tokens: jax.Array, table: jax.Array, mask: jax.Array | None = None, absent: float = -jnp.inf
) -> jax.Array:
  """[b, K]: for each row of a table, its largest product with a token.

  The scores of all tokens and all rows of the table never exist at once; they are computed again
  for the gradient.

  Args:
    tokens: [b, n, D].
    table: [K, D].
    mask: [b, n] bool, False for padding; None: no padding.
    absent: score of padding.
  """
  count = len(table)
  size = max(n for n in range(1, min(count, AT_ONCE) + 1) if count % n == 0)

  def part(rows: jax.Array) -> jax.Array:
    scores = jnp.einsum("bnd,kd->bkn", tokens, rows)
    if mask is not None:
      scores = jnp.where(mask[:, None, :], scores, absent)
    return scores.max(-1)

  if size == count:
    return part(table)
  parts = jax.lax.map(jax.checkpoint(part), rearrange(table, "(p k) d -> p k d", k=size))
  found: jax.Array = rearrange(parts, "p b k -> b (p k)")
  return found
