"""Images classified into the words of their texts, as in SuperClass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigalign.losses.base import Context, Features, Loss, Params, State
from bigalign.losses.heads import base
from bigalign.losses.heads.base import Head, Read
from bigalign.losses.heads.caption import vocabulary
from bigalign.losses.heads.layers import dense_init
from bigalign.losses.heads.vocabulary import token_losses
from bigalign.towers.linear import lookup


def first_uses(ids: jax.Array, mask: jax.Array) -> jax.Array:
  """[b, L] bool: the tokens [b, L] that count, each word of a text once.

  Args:
    ids: [b, L] int32.
    mask: [b, L] bool, which tokens are text.
  """
  length = ids.shape[1]
  earlier = jnp.tril(jnp.ones((length, length), bool), -1)
  again = (ids[:, :, None] == ids[:, None]) & mask[:, None] & earlier[None]
  return mask & ~again.any(-1)


def superclass(*, idf: bool = True) -> Loss:
  """Cross-entropy of the words of a text, which a linear map predicts from the pooled image.

  SuperClass, https://arxiv.org/abs/2411.03313. The words of a text are a bag: each one once,
  weighted by log((N + 1) / (n + 1)), where n of the N texts of the run so far, with those of this
  batch, have it; the weights of a text then sum to 1. A word that all texts have, such as the end
  of text, weighs nothing. The loss is the mean over the texts that have a word left.

  The release counts in float64, and counts padding as a word that every text has, whose weight is
  0. Here frequencies are running means in float32, and padding does not count. The paper pools with
  the mean of the patches: config.model.image.pool="mean".

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(superclass={})).terms]
  ['superclass']

  Args:
    idf: whether rare words weigh more; without, all words of a text weigh the same.

  Raises:
    ValueError: for texts that are stored vectors, which have no words.
  """
  where = "config.loss.superclass"

  def init_head(key: jax.Array, read: Read) -> base.Params:
    width = read.features["pooled_img"].shape[-1]
    return {"words": dense_init(key, width, vocabulary(read, where))}

  def apply_head(params: base.Params, averaged: Any, read: Read) -> dict[str, jax.Array]:
    pooled, ids = read.features["pooled_img"], read.batch["text"]
    kernel, bias = params["words"]["kernel"], params["words"]["bias"]
    # The bias is one more row of the kernel, so that a block of words has those of its words.
    pooled = jnp.concatenate([pooled, jnp.ones_like(pooled[:, :1])], 1)
    kernel = jnp.concatenate([kernel, bias[None]])
    wide = jnp.promote_types(pooled.dtype, jnp.float32)
    rows = lookup(kernel.T, ids, pooled.dtype)  # rounded as token_losses rounds them
    own = jnp.einsum("bd,bld->bl", pooled, rows, preferred_element_type=wide)
    first = token_losses(pooled[:, None], kernel, ids[:, :1]).nll
    return {"nll": first + own[:, :1] - own}  # log-sum-exp - logit of each word

  def init(sizes: Any) -> tuple[Params, State]:
    words = sizes.get("vocabulary", 0)
    return {}, {"samples": jnp.zeros(()), "frequencies": jnp.zeros((words,))}

  def apply(
    params: Params, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    ids, used = batch["text"], first_uses(batch["text"], batch["text_mask"])
    samples = state["samples"] + len(ids)
    before = state["frequencies"]
    here = jnp.zeros(before.shape, before.dtype).at[ids].add(used.astype(before.dtype))
    frequencies = before + (here - len(ids) * before) / samples
    weights = jnp.log((1 + 1 / samples) / (frequencies + 1 / samples))
    weights = jnp.where(used, jnp.maximum(weights, 0)[ids] if idf else 1.0, 0.0)
    total = weights.sum(1)
    each = (weights * feats["nll"]).sum(1) / jnp.where(total > 0, total, 1)
    value = each.sum() / jnp.maximum((total > 0).sum(), 1)
    logs = {"loss": value, "words": used.sum(1).mean()}
    return value, ({"samples": samples, "frequencies": frequencies}, logs)

  return Loss(
    frozenset(),
    init,
    apply,
    pair=False,
    head=Head(init_head, apply_head, late=frozenset({"nll"})),
  )
