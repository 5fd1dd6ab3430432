"""SPARC with its adapters: patches and words meet in a space of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.heads.base import Head, Params, Read
from bigalign.losses.heads.layers import dense, dense_init
from bigalign.losses.sparc import sparc
from bigalign.sphere import unit
from bigalign.towers.base import gelu, masked_mean

GLOBAL = ("mlp", "none")


def sparc_adapted(
  *,
  width: int = 512,
  global_head: str = "mlp",
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  w_global: float = 0.5,
  w_fine: float = 1.0,
  threshold: float | None = None,
) -> Loss:
  """SPARC as in the paper, https://arxiv.org/abs/2401.09865: `sparc` after two linear adapters.

  Patches and words go through a linear map of their side to the same width. The text's vector is
  the mean of its words, that of an image the mean of its patches after a layer with GELU, both
  through the same adapters; the towers' own pooling and projectors take no part. The towers may
  have different widths. The paper calls its layer for images "non-linear" and gives no more;
  padding takes no part here, and does in its pseudo-code.

  >>> from bigalign import losses
  >>> [*losses.make_loss(dict(sparc_adapted={})).terms]
  ['sparc_adapted']

  Args:
    width: of both adapters.
    global_head: "mlp": the layer of the image's mean. "none": without, as in the pseudo-code.
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of that scale, as in `clip`.
    w_global: weight of CLIP's loss, as published.
    w_fine: weight of the fine-grained term; the paper chose it from 0.5, 1, 5 and 10.
    threshold: as of `sparc`.
  """
  where = "config.loss.sparc_adapted"
  checks.known(f"{where}.global_head", global_head, GLOBAL)
  checks.between(where, 1, width=width)
  inner = sparc(t_init=t_init, t_max=t_max, w_global=w_global, w_fine=w_fine, threshold=threshold)

  def init_head(key: jax.Array, read: Read) -> Params:
    keys = jax.random.split(key, 3)
    img, txt = (read.features[f"tokens_{side}"].shape[-1] for side in ("img", "txt"))
    layer = {"global": dense_init(keys[2], img, img)} if global_head == "mlp" else {}
    return {"img": dense_init(keys[0], img, width), "txt": dense_init(keys[1], txt, width), **layer}

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    patches, words = (read.features[f"tokens_{side}"] for side in ("img", "txt"))
    mask = read.batch["text_mask"]
    image, text = patches.astype(jnp.float32).mean(1), masked_mean(words, mask)
    if global_head == "mlp":
      image = gelu(dense(params["global"], image))
    return {
      "zimg": unit(dense(params["img"], image)),
      "ztxt": unit(dense(params["txt"], text)),
      "tokens_img": dense(params["img"], patches),
      "tokens_txt": dense(params["txt"], words),
      "mask_txt": mask,
    }

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    return inner.apply(params, state, feats, batch, context)

  return Loss(frozenset(), inner.init, apply, inner.constrain, head=Head(init_head, apply_head))
