"""The registry of losses; a config names them with their weights: dict(siglip=dict(weight=1.0))."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np

from bigalign.losses.albef import albef_itc
from bigalign.losses.base import Context, Loss, first_context, weighted_sum
from bigalign.losses.clip import clip
from bigalign.losses.clip_gap import clip_gap
from bigalign.losses.distill import clip_distill, mobileclip_dr, siglip_distill
from bigalign.losses.engine.pairwise import RecordingEngine
from bigalign.losses.focal import focal_itc
from bigalign.losses.intra import alignclip, clip_intra_neg, cyclip
from bigalign.losses.m3co import m3co, softclip_m3co
from bigalign.losses.matryoshka import matryoshka
from bigalign.losses.mixup import m2mix, m3mix
from bigalign.losses.nitc import nitc
from bigalign.losses.per_sample import tables
from bigalign.losses.per_sample.fastclip import fastclip_v0, fastclip_v1, fastclip_v2, fastclip_v3
from bigalign.losses.per_sample.sogclr import isogclr, sogclr, sogclr_unimodal
from bigalign.losses.sail import sail
from bigalign.losses.siglip import siglip
from bigalign.losses.sparc import sparc
from bigalign.losses.unicl import unicl
from bigalign.options import Choose, Component, resolve_value

__all__ = ["LOSSES", "PROVIDES", "Context", "Loss", "first_context", "make_loss", "weighted_sum"]

LOSSES = dict(
  albef_itc=albef_itc,
  alignclip=alignclip,
  clip=clip,
  clip_distill=clip_distill,
  clip_gap=clip_gap,
  clip_intra_neg=clip_intra_neg,
  cyclip=cyclip,
  fastclip_v0=fastclip_v0,
  fastclip_v1=fastclip_v1,
  fastclip_v2=fastclip_v2,
  fastclip_v3=fastclip_v3,
  focal_itc=focal_itc,
  isogclr=isogclr,
  m2mix=m2mix,
  m3co=m3co,
  m3mix=m3mix,
  matryoshka=matryoshka,
  mobileclip_dr=mobileclip_dr,
  nitc=nitc,
  sail=sail,
  siglip=siglip,
  siglip_distill=siglip_distill,
  softclip_m3co=softclip_m3co,
  sogclr=sogclr,
  sogclr_unimodal=sogclr_unimodal,
  sparc=sparc,
  unicl=unicl,
)

# What a loss may need -> the fields of the batch or the features that provide it.
PROVIDES = dict(
  ids=("image_id", "text_id"),
  labels=("label",),
  raw=("raw_img", "raw_txt"),
  tokens=("tokens_img", "tokens_txt"),
  second_text=("ztxt_second",),
  teacher=("teacher_img", "teacher_txt"),
  ema_teacher=("teacher_img", "teacher_txt"),
  noise=("noise_prob",),
  teacher_text=("teacher_txt",),
  teacher_second_text=("teacher_txt_second",),
)


def weighted(*, weight: float = 1.0) -> None:
  """The option that each term of config.loss has next to those of its loss.

  Args:
    weight: factor of the loss in the sum.
  """


LossTerms = Annotated[Mapping[str, Component], Choose(LOSSES, key="", shared=weighted)]


def make_loss(terms: Mapping[str, Any]) -> Loss:
  """The weighted sum of several losses.

  Args:
    terms: {name: options}, such as dict(clip=dict(weight=1.0, label_smoothing=0.1)), in plain
      values or resolved.

  Raises:
    ValueError: for an unknown loss, or for none.
    TypeError: for an unknown option; both name what is known.
  """
  if not terms:
    raise ValueError(f"config.loss is empty; known losses: {sorted(LOSSES)}")
  resolved = resolve_value(LossTerms, terms, "config.loss")
  return weighted_sum({name: _term(component) for name, component in resolved.items()})


def _term(component: Component) -> tuple[float, Loss]:
  """(weight, loss) of one entry of the config."""
  options = dict(component.options)
  weight = options.pop("weight")
  return weight, component.function(**options)


def check_needs(loss: Loss, fields: Any, ema: bool = False) -> None:
  """Raises ValueError if the loss reads a field that neither the batch nor the model has.

  ema: parameters are averaged, so there is a model that makes the fields of "ema_teacher".
  """
  if "ema_teacher" in loss.needs and not ema:
    raise ValueError(
      "config.loss needs the features of averaged parameters, but config.ema is 0; set it, to 0.995"
      " for example"
    )
  for name, (_, term) in loss.terms.items():
    for need in sorted(term.needs - {"ema_teacher"}):
      for field in PROVIDES[need]:
        if field not in fields:
          raise ValueError(
            f"config.loss.{name} needs {need!r}, but neither the data nor the model has a field"
            f" {field!r}; there are {sorted(fields)}"
            + (". Set config.data.second_captions" if need == "second_text" else "")
          )


def remembers(loss: Loss, sizes: Mapping[str, int]) -> bool:
  """Whether the loss keeps something for each sample, so that `check_ids` has a bound to hold."""
  _, state = jax.eval_shape(lambda: loss.init(sizes))
  return any(tables.is_table(x) for x in jax.tree.leaves(state))


def summary(
  loss: Loss, sizes: Mapping[str, int], feats: Mapping[str, Any], batch: Mapping[str, Any]
) -> str:
  """What a run with this loss needs, in a line: fields, what its logits bring by, and bytes that it
  remembers. feats, batch: shapes of what `loss.apply` gets."""
  params, state = jax.eval_shape(lambda: loss.init(sizes))
  engine = RecordingEngine()

  def value(params: Any, state: Any, feats: Any, batch: Any) -> Any:
    return loss.apply(params, state, feats, batch, first_context(engine))

  jax.eval_shape(value, params, state, feats, batch)
  columns = engine.floats_per_column
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  needs = [f"{need} ({', '.join(PROVIDES[need])})" for need in sorted(loss.needs)]
  terms = " + ".join(f"{weight:g} {name}" for name, (weight, _) in loss.terms.items())
  return (
    f"{terms}; beyond the two embeddings it reads {', '.join(needs) or 'nothing'} and remembers"
    f" {size / 1e6:,.1f} MB over all devices; it forms {len(columns)} matrices, for which"
    f" {', '.join(map(str, columns)) or 0} numbers of each pair travel"
  )


def check_ids(batch: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> None:
  """Raises ValueError if a host batch names a sample that a loss with a memory has no room for."""
  for side in ("image", "text"):
    tables.check_ids(batch[f"{side}_id"], sizes[side], f"{side}_id")
