"""Any loss, on several prefixes of the embedding (Matryoshka)."""

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
  """A loss on the first m dimensions of the embeddings, for several m.

  Matryoshka representation learning, https://arxiv.org/abs/2205.13147. The base loss is applied to
  the first m dimensions of the projections, normalised again, once for each m. Each m has its own
  state. Metrics: the value of each m as "d<m>", and the base's metrics for the last m.

  Args:
    base: name of a loss of the registry, but not "albef_itc": its queue holds embeddings of one
      width.
    base_options: its options; None: its defaults.
    dims: the m, ascending; None: 8, 16, 32, … as published, and E.
    weights: one for each m; None: all 1.
    reduction: of the weighted values: "sum", as published, or "mean", which divides by the sum of
      the weights, so that a learning rate of the base loss fits.
    shared: whether all m share the base's learned scalars; else each m has its own.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> feats = {"zimg": z, "ztxt": z, "raw_img": z, "raw_txt": z}
    >>> metrics = apply_once(matryoshka(base_options=dict(t_init=1.0), dims=(2, 4)), feats)
    >>> [round(float(metrics[name]), 3) for name in ("d2", "d4")]
    [1.065, 0.744]
  """
  # Imported here: the registry imports this module.
  from bigalign.losses import LOSSES

  where = "config.loss.matryoshka"
  loss = call(
    checks.choose(LOSSES, base, f"{where}.base"), base_options or {}, f"{where}.base_options"
  )
  if "ema_teacher" in loss.needs:
    raise ValueError(
      f"{where}.base={base!r} compares whole embeddings of averaged parameters, which have no"
      " prefixes; choose another base"
    )
  checks.known(f"{where}.reduction", reduction, REDUCTIONS)
  if dims is not None and (not dims or list(dims) != sorted({*dims}) or dims[0] < 1):
    raise ValueError(f"{where}.dims={tuple(dims)} must be ascending widths, such as (64, 128, 256)")
  if weights is not None and (dims is None or len(weights) != len(dims)):
    raise ValueError(
      f"{where}.weights={tuple(weights)} must have one weight for each of dims={dims}"
    )
  if weights is not None and not (min(weights) >= 0 and sum(weights) > 0):
    raise ValueError(f"{where}.weights={tuple(weights)} must be at least 0, and not all 0")

  def init(sizes):
    params, state = loss.init(sizes)
    if dims is None and (state or not shared):
      raise ValueError(
        f"{where}.dims must be set, such as (64, 128, 256): "
        + (f"{base!r} has state for each width" if state else "shared=False has scalars for each")
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
      if "finite_state" in last:
        logs["finite_state"] = logs.get("finite_state", True) & last["finite_state"]
      objective, value = objective + weight * term, value + weight * last["loss"]
    return objective, (states, {**last, **logs, "loss": value})

  def constrain(params, before):
    if shared:
      return loss.constrain(params, before)
    return {name: loss.constrain(own, before[name]) for name, own in params.items()}

  return Loss(loss.needs | {"raw"}, init, apply, constrain, per_sample_state=loss.per_sample_state)


def _widths(dims: Sequence[int] | None, width: int) -> list[int]:
  """The dims of an embedding of this width."""
  if dims is None:
    return [m for m in (1 << k for k in range(3, width.bit_length())) if m < width] + [width]
  if dims[-1] > width:
    raise ValueError(
      f"config.loss.matryoshka.dims={tuple(dims)}: the embeddings are {width} wide; use widths up"
      f" to {width}, or raise config.model.embed_dim"
    )
  return list(dims)


def _prefix(feats: Mapping[str, jax.Array], m: int) -> dict[str, jax.Array]:
  """The features as if the projections were m wide. Tokens are not projected and do not change."""
  raw = {k: feats[k][:, :m] for k in ("raw_img", "raw_txt")}
  cut = {**raw, "zimg": unit(raw["raw_img"]), "ztxt": unit(raw["raw_txt"])}
  if "ztxt_second" in feats:
    cut["ztxt_second"] = unit(feats["ztxt_second"][:, :m])
  if "ztxts" in feats:
    cut["ztxts"] = unit(feats["ztxts"][..., :m])
  return {**feats, **cut}
