"""Images and texts as sparse bags of the words of a vocabulary."""

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
from bigalign.losses.heads.layers import dense, dense_init
from bigalign.sphere import unit


def overuse(activations: jax.Array) -> jax.Array:
  """[]: the sum over words of the square of their mean activation over the batch [B, V].

  Words that every text uses cost most: https://arxiv.org/abs/2004.05665.
  """
  return (jax.nn.relu(activations).mean(0) ** 2).sum()


def lexical(
  *,
  penalty: float = 1e-3,
  penalty_updates: int = 10_000,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
) -> Loss:
  """A lexical space after LexVLA, https://arxiv.org/abs/2407.16837: contrast of bags of words.

  A patch, after a linear map, scores the words of a copy of the text tower's token table, which is
  trained; a token of a text scores those of the table itself, which gets no gradient here. A word's
  activation is log(1 + relu(score)), the largest over the tokens. CLIP's loss compares the vectors
  of all activations, and a penalty on words that are active everywhere makes them sparse. The paper
  has a language model with LoRA as text tower; activation, penalty and their weights are not
  published in full, and those here are choices of this implementation.

  The B x V vectors are features of the batch: with 32,000 words, 128 KB for each image and text.

  Args:
    penalty: weight of `overuse`, for each side.
    penalty_updates: the weight grows from 0 in proportion to the updates of this term, and holds
      after this many; 0: from the start.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of that scale, as in `clip`.

  Raises:
    ValueError: for a number out of range.
  """
  where = "config.loss.lexical"
  checks.between(where, 0, penalty=penalty, penalty_updates=penalty_updates)
  scales.check("lexical", t_init, t_max)

  def init_head(key: jax.Array, read: Read) -> Params:
    words, width = read.words(), read.features["tokens_img"].shape[-1]
    return {
      "words": {"embedding": words},
      "adapter": dense_init(key, width, words.shape[1]),
    }

  def activation(highest: jax.Array) -> jax.Array:
    return jnp.log1p(jax.nn.relu(highest))

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    patches = dense(params["adapter"], read.features["tokens_img"]).astype(jnp.float32)
    tokens = read.features["tokens_txt"].astype(jnp.float32)
    img = scores.largest(patches, params["words"]["embedding"])
    txt = scores.largest(tokens, read.words(), read.batch["text_mask"])
    return {"img": activation(img), "txt": activation(txt)}

  def init(sizes: Any) -> tuple[Scalars, State]:
    return scales.init(t_init), {"updates": jnp.zeros((), jnp.float32)}

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    img, txt, scale = feats["img"], feats["txt"], jnp.exp(params["t"])
    contrastive = contrast(unit(img), unit(txt), scale, engine=context.engine)
    used = overuse(img) + overuse(txt)
    share = jnp.minimum(state["updates"] / penalty_updates, 1) if penalty_updates else 1.0
    value = contrastive + share * penalty * used
    logs = {"contrastive_loss": contrastive, "overuse": used, "logit_scale": scale}
    logs |= {f"words_{name}": (x > 0).sum(1).mean() for name, x in (("img", img), ("txt", txt))}
    return value, ({"updates": state["updates"] + 1}, {"loss": value, **logs})

  return Loss(frozenset(), init, apply, scales.clamped(t_max), head=Head(init_head, apply_head))
