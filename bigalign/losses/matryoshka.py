"""Any loss on several prefixes of the embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.options import call
from bigalign.sphere import unit

REDUCTIONS = ("sum", "mean")


def matryoshka(
  *,
  base: str = "clip",
  base_options: Mapping[str, Any] | None = None,
  dims: Sequence[int] | None = None,
  weights: Sequence[float] | None = None,
  reduction: str = "sum",
  shared: bool = True,
) -> Loss:
  """The first m numbers of an embedding are one too: https://arxiv.org/abs/2205.13147.

  The base loss sees the first m numbers of the projections, of unit norm again, once for each m.
  State is kept per m. Metrics: the values as "d<m>", and what the base logs for the last m.

  Args:
    base, base_options: a loss of the registry and its options.
    dims: the m, ascending; None: 8, 16, 32, … as published, and E.
    weights: one for each m; None: all 1.
    reduction: of the weighted values: "sum", as published; "mean" divides by the sum of weights, so
      that a learning rate of the base loss fits.
    shared: whether all m share the base's learned scalars, or each has its own.
  """
  # Here, since the registry holds this file too.
  from bigalign.losses import LOSSES

  where = "config.loss.matryoshka"
  loss = call(
    checks.choose(LOSSES, base, f"{where}.base"), base_options or {}, f"{where}.base_options"
  )
  checks.known(f"{where}.reduction", reduction, REDUCTIONS)
  if dims is not None and (not dims or list(dims) != sorted({*dims}) or dims[0] < 1):
    raise ValueError(f"{where}.dims={tuple(dims)} must be ascending widths, such as (64, 128, 256)")
  if weights is not None and (dims is None or len(weights) != len(dims)):
    raise ValueError(f"{where}.weights={tuple(weights)} must be one for each of dims={dims}")

  def init(sizes):
    params, state = loss.init(sizes)
    if dims is None and (state or not shared):
      raise ValueError(
        f"{where}.dims: name the widths, such as (64, 128, 256): "
        + (f"{base!r} keeps a state for each" if state else "shared=False keeps scalars for each")
      )
    each = [f"d{m}" for m in dims or ()]
    return (
      params if shared else {name: loss.init(sizes)[0] for name in each},
      {name: loss.init(sizes)[1] for name in each} if state else {},
    )

  def apply(params, state, feats, batch, context):
    chosen = _widths(dims, feats["zimg"].shape[-1])
    scales = jnp.asarray(weights or [1.0] * len(chosen), feats["zimg"].dtype)
    if reduction == "mean":
      scales /= scales.sum()
    states, logs = {}, {}
    objective = value = jnp.zeros((), feats["zimg"].dtype)
    for weight, m in zip(scales, chosen):
      own = params if shared else params[f"d{m}"]
      term, (new, last) = loss.apply(own, state.get(f"d{m}", {}), _prefix(feats, m), batch, context)
      if new:
        states[f"d{m}"] = new
      logs[f"d{m}"] = last["loss"]
      objective, value = objective + weight * term, value + weight * last["loss"]
    return objective, (states, {**last, **logs, "loss": value})

  def constrain(params, before):
    if shared:
      return loss.constrain(params, before)
    return {name: loss.constrain(own, before[name]) for name, own in params.items()}

  return Loss(loss.needs | {"raw"}, init, apply, constrain)


def _widths(dims: Sequence[int] | None, width: int) -> list[int]:
  """The prefixes of an embedding [width]."""
  if dims is None:
    return [m for m in (1 << k for k in range(3, width.bit_length())) if m < width] + [width]
  if dims[-1] > width:
    raise ValueError(
      f"config.loss.matryoshka.dims={tuple(dims)}: the embeddings have {width} numbers; take widths"
      f" up to {width}, or raise config.model.embed_dim"
    )
  return list(dims)


def _prefix(feats: Mapping[str, jax.Array], m: int) -> dict[str, jax.Array]:
  """The features as if the projections were m wide. Tokens are not projected, and stay."""
  raw = {k: feats[k][:, :m] for k in ("raw_img", "raw_txt")}
  cut = {**raw, "zimg": unit(raw["raw_img"]), "ztxt": unit(raw["raw_txt"])}
  if "ztxt_second" in feats:
    cut["ztxt_second"] = unit(feats["ztxt_second"][:, :m])
  return {**feats, **cut}
