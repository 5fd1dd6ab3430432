"""Images and texts as sparse mixtures of one shared codebook."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature as scales
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.clip import contrast
from bigalign.losses.heads import scores
from bigalign.losses.heads.base import Head, Params, Read
from bigalign.losses.heads.layers import dense, dense_init, norm, norm_init
from bigalign.sphere import unit
from bigalign.towers.base import gelu

PADDING = {"zero": 0.0, "inf": -jnp.inf}


def sparsemax(z: jax.Array) -> jax.Array:
  """[..., N]: the point of the simplex that is nearest to z, which has exact zeros.

  https://arxiv.org/abs/1602.02068. The gradient is that of the entries above zero.
  """
  ordered = -jnp.sort(-jax.lax.stop_gradient(z), axis=-1)
  ranks = jnp.expand_dims(jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype), tuple(range(z.ndim - 1)))
  sums = jnp.cumsum(ordered, -1)
  count = (1 + ranks * ordered > sums).sum(-1, keepdims=True)
  # The threshold from the entries themselves, so that it has a gradient.
  least = jnp.take_along_axis(ordered, count - 1, axis=-1)
  kept = jax.lax.stop_gradient(z) >= least
  threshold = (jnp.where(kept, z, 0).sum(-1, keepdims=True) - 1) / kept.sum(-1, keepdims=True)
  return jnp.maximum(z - threshold, 0)


def mixture(
  queries: jax.Array,
  codebook: jax.Array,
  temperature: float,
  mask: jax.Array | None = None,
  padding: str = "inf",
) -> tuple[jax.Array, jax.Array]:
  """[b, N] and [b, C]: the weights of a codebook and the mixture that they make.

  Args:
    queries: [b, n, C], of the tokens.
    codebook: [N, C].
    temperature: of the weights.
    mask: [b, n] bool, False for padding; None: no padding.
    padding: "zero": padding scores 0. "inf": it scores nothing.
  """
  scaled = queries / jnp.sqrt(jnp.asarray(codebook.shape[1], queries.dtype))
  highest = scores.largest(scaled, codebook, mask, PADDING[padding])
  weights = sparsemax(highest / temperature)
  return weights, weights @ codebook


def fdt(
  *,
  codes: int = 16_384,
  width: int = 512,
  temperature: float = 1_000.0,
  padding: str = "zero",
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """Finite discrete tokens, https://arxiv.org/abs/2303.14865: contrast through a codebook.

  Each token of an image or a text becomes a query, by two norms and two linear maps of its side.
  The largest product of a code with a query, over all tokens, is the score of the code. Sparsemax
  turns the scores into weights, and the weighted sum of the codes is the vector of the image or
  text. CLIP's loss compares these vectors. The codebook is the same for both sides.

  At the published temperature of 1,000 the weights are nearly equal at first.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(fdt=dict(codes=64, width=16))).terms]
  ['fdt']

  Args:
    codes: N, the number of codes.
    width: C, of a code.
    temperature: of the weights, constant.
    padding: "zero": padding of a text scores 0, as in the release, where a code of a padded text
      then has no negative score. "inf": padding takes no part.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of that scale, as in `clip`.

  Raises:
    ValueError: for an unknown name, or a number out of range.
  """
  where = "config.loss.fdt"
  checks.known(f"{where}.padding", padding, PADDING)
  checks.above_zero(where, temperature=temperature)
  checks.between(where, 1, codes=codes, width=width)
  scales.check("fdt", t_init, t_max)

  def init_head(key: jax.Array, read: Read) -> Params:
    keys = iter(jax.random.split(key, 5))
    params: Params = {
      "codebook": {"embedding": jax.random.normal(next(keys), (codes, width), jnp.float32)}
    }
    for side in ("img", "txt"):
      own = read.features[f"tokens_{side}"].shape[-1]
      params[side] = {
        "ln1": norm_init(own),
        "fc1": dense_init(next(keys), own, width),
        "ln2": norm_init(width),
        "fc2": dense_init(next(keys), width, width),
      }
    return params

  def queries(params: Params, x: jax.Array) -> jax.Array:
    x = gelu(dense(params["fc1"], norm(params["ln1"], x)))
    return dense(params["fc2"], norm(params["ln2"], x)).astype(jnp.float32)

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    codebook = params["codebook"]["embedding"]
    found: dict[str, jax.Array] = {}
    for side, mask in (("img", None), ("txt", read.batch["text_mask"])):
      own = queries(params[side], read.features[f"tokens_{side}"])
      weights, mixed = mixture(own, codebook, temperature, mask, padding)
      found |= {f"z_{side}": unit(mixed), f"used_{side}": (weights > 0).mean(-1)}
    return found

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    scale = jnp.exp(params["t"])
    value = contrast(feats["z_img"], feats["z_txt"], scale, engine=context.engine)
    used = {f"used_{side}": feats[f"used_{side}"].mean() for side in ("img", "txt")}
    return value, (state, {"loss": value, "logit_scale": scale, **used})

  return Loss(
    frozenset(),
    lambda sizes: (scales.init(t_init), {}),
    apply,
    scales.clamped(t_max),
    head=Head(init_head, apply_head),
  )
