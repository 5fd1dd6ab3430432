"""FLOPs of attention do not depend on its implementation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers.cudnn import on_a_gpu  # noqa: F401

from bigalign.model import make_model, without_remat
from bigalign.run import flops
from bigalign.towers.attention import Lengths, attend

B, H, K = 3, 2, 8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries,keys", [(6, 6), (6, 10)])
def test_xla_and_cudnn_have_the_flops_of_their_products(on_a_gpu, queries, keys, causal):  # noqa: F811
  """Forward q k and p v; backward the gradients of p, v, q and k. Causal halves do not count."""
  q, k = (jax.ShapeDtypeStruct((B, n, H, K), jnp.bfloat16) for n in (queries, keys))
  product = 2 * B * H * K * queries * keys
  for mask in (None, Lengths(jnp.full(B, keys, jnp.int32))):

    def forward(q, k, v, mask=mask):
      return attend(q, k, v, mask, causal=causal)

    def loss(*args):
      return forward(*args).astype(jnp.float32).sum()

    assert flops.count(forward, q, k, k) == 2 * product
    assert flops.count(jax.grad(loss, (0, 1, 2)), q, k, k) == 6 * product


def test_the_token_that_makes_a_count_even_is_not_counted(on_a_gpu):  # noqa: F811
  """The useful FLOPs of towers of 9 patches and 7 tokens, as of MFU."""
  tower = dict(width=16, heads=2, depth=1)
  model = make_model(
    image=dict(name="vit", patch=4, pool="cls", registers=0, positions="sincos2d", **tower),
    text=dict(name="text", vocab_size=9, length=7, **tower),
    embed_dim=8,
  )
  towers = dict(image_tower=(jnp.zeros((2, 8, 8, 3)),), text_tower=(jnp.zeros((2, 7), int),))
  for name, inputs in towers.items():
    counts = []
    plain = getattr(model, name)
    plain = plain.clone(options=dataclasses.replace(plain.options, attention="xla"))
    params = jax.eval_shape(plain.init, jax.random.key(0), *inputs)
    for made in (getattr(model, name), getattr(without_remat(model), name), plain):
      counts.append(flops.count(made.apply, params, *inputs))
    assert counts[0] > counts[1] == counts[2]
  xla = model.clone(
    **{
      name: tower.clone(options=dataclasses.replace(tower.options, attention="xla"))
      for name in towers
      for tower in [getattr(model, name)]
    }
  )
  assert without_remat(xla) == xla
