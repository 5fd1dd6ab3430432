"""What a block keeps for its gradient under each value of `remat`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from bigalign.towers import base

ROWS, TOKENS, WIDTH = 2, 8, 32


@pytest.mark.parametrize("remat,widths", [("dots", 9), ("attention", 5), ("full", 1)])
def test_widths_of_tokens_that_a_block_keeps(remat, widths):
  """Its input; queries, keys, values and outputs of attention; 4 widths of hidden units."""
  block = nn.remat(base.Block, policy=base.REMAT[remat], prevent_cse=False, static_argnums=(3,))
  block = block(heads=4, hidden=4 * WIDTH, dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.bfloat16)

  def apply(params, x):
    return block.apply(params, x, None, True, None)[0]

  params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, None, True, None), x)
  kept = jax.eval_shape(lambda params, x: jax.vjp(apply, params, x)[1], params, x)
  tokens = [x.size for x in jax.tree.leaves(kept) if x.shape[:2] == (ROWS, TOKENS)]
  assert sum(tokens) == widths * ROWS * TOKENS * WIDTH
