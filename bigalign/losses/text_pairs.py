"""InfoNCE of pairs of texts, beside a loss of images and texts."""

from __future__ import annotations

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import clip


def text_pairs(
  *, t_init: float = 1 / 0.07, t_max: float | None = 100.0, label_smoothing: float = 0.0
) -> Loss:
  """`clip` of queries and documents, which the text tower embeds: config.data.text_pairs.

  The second contrast of jina-clip, https://arxiv.org/abs/2405.20204, which adds it to that of
  images and captions in each step. It has a logit scale of its own.

  Args:
    t_init: first value of the logit scale, as of `clip`.
    t_max: its upper bound, as of `clip`.
    label_smoothing: as of `clip`.

  Example:
    >>> import jax.numpy as jnp
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # each query has its document
    >>> metrics = apply_once(text_pairs(t_init=1.0), {"zquery": z, "zdocument": z})
    >>> round(float(metrics["loss"]), 3)
    0.744
  """
  temperature.check("text_pairs", t_init, t_max)
  checks.between("config.loss.text_pairs", 0, 1, label_smoothing=label_smoothing)
  of_pairs = clip(t_init=t_init, t_max=t_max, label_smoothing=label_smoothing)

  def apply(params, state, feats, batch, context):
    both = {"zimg": feats["zquery"], "ztxt": feats["zdocument"]}
    return of_pairs.apply(params, state, both, batch, context)

  needs = frozenset({"text_pairs"})
  return Loss(needs, of_pairs.init, apply, of_pairs.constrain, pair=False)
