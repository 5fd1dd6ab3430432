"""Images and texts are assigned to the words of a table, and predict each other's words."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigalign import checks
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.heads.base import Head, Params, Read
from bigalign.losses.heads.layers import dense, dense_init
from bigalign.losses.heads.prototypes import cross_entropy
from bigalign.losses.heads.sinkhorn import sinkhorn
from bigalign.sphere import unit


def swapped(
  img: jax.Array,
  txt: jax.Array,
  *,
  eps: float,
  tau: float,
  iterations: int,
  prior: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """The cross-entropies of one side's assignments and the other side's words.

  Args:
    img: [B, K], cosines of images with the words.
    txt: [B, K], of texts.
    eps: temperature of the assignments.
    tau: temperature of the words.
    iterations: of Sinkhorn's algorithm.
    prior: [K], shares of the words; None: equal shares.

  Returns:
    "img" []: of images with the texts' assignments; "txt" []: the reverse; "Q_img", "Q_txt" [B, K].
  """
  q = {
    name: sinkhorn(x, eps=eps, iterations=iterations, prior=prior)
    for name, x in (("img", img), ("txt", txt))
  }

  values = {
    "img": cross_entropy(img, q["txt"], tau).mean(),
    "txt": cross_entropy(txt, q["img"], tau).mean(),
  }
  return values | {f"Q_{name}": x for name, x in q.items()}


def vlap(*, eps: float = 0.05, tau: float = 0.1, iterations: int = 3, prior: str = "") -> Loss:
  """Assignment prediction, https://arxiv.org/abs/2404.09632: both sides choose the same words.

  A linear map of each side's embedding is compared with the token table of the text tower, which
  gets no gradient here. Sinkhorn's algorithm assigns the images and the texts of the whole batch
  to the words, each word with its share; each side predicts the words of the other one. VLAP
  freezes a language model and also trains it to caption; add `caption` for that. The temperatures
  and the number of iterations are choices of this implementation.

  Args:
    eps: temperature of the assignments.
    tau: temperature of the predicted words.
    iterations: of Sinkhorn's algorithm.
    prior: .npy file with the share of each row of the token table, [K]: the frequencies of words in
      the texts, so that words that do not occur take no part. "": equal shares.

  Raises:
    ValueError: for a temperature or a number of iterations out of range, or another prior.
  """
  where = "config.loss.vlap"
  checks.above_zero(where, eps=eps, tau=tau)
  checks.between(where, 1, iterations=iterations)
  shares = _shares(f"{where}.prior", prior) if prior else None

  def init_head(key: jax.Array, read: Read) -> Params:
    width, embed = read.words().shape[1], read.features["raw_img"].shape[-1]
    keys = jax.random.split(key)
    return {
      side: dense_init(one, embed, width, bias=False) for one, side in zip(keys, ("img", "txt"))
    }

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    words = unit(read.words())
    return {
      f"cosines_{side}": unit(dense(params[side], read.features[f"raw_{side}"])) @ words.T
      for side in ("img", "txt")
    }

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    img, txt = feats["cosines_img"], feats["cosines_txt"]
    if shares is not None and len(shares) != img.shape[1]:
      raise ValueError(
        f"{where}.prior={prior!r} has {len(shares)} shares, but the token table of the text tower"
        f" has {img.shape[1]} rows"
      )
    given = None if shares is None else jnp.asarray(shares, img.dtype)
    found = swapped(img, txt, eps=eps, tau=tau, iterations=iterations, prior=given)
    value = (found["img"] + found["txt"]) / 2
    return value, (state, {"loss": value, "img": found["img"], "txt": found["txt"]})

  return Loss(
    frozenset(),
    lambda sizes: ({}, {}),
    apply,
    pair=True,
    head=Head(init_head, apply_head),
  )


def _shares(where: str, path: str) -> np.ndarray:
  """[K] float64, which add up to 1, from a file of counts or shares."""
  if not pathlib.Path(path).is_file():
    raise ValueError(
      f"{where}={path!r}: there is no such file; name a .npy file with a share for each row of the"
      " token table of the text tower"
    )
  counts = np.load(path, allow_pickle=False).astype(np.float64)
  if counts.ndim != 1 or not (counts >= 0).all() or not counts.sum() > 0:
    raise ValueError(f"{where}={path!r} must hold one number of at least 0 per row of the table")
  shares: np.ndarray = counts / counts.sum()
  return shares
