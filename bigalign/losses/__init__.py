"""The registry of losses. A config names losses and weights: dict(siglip=dict(weight=1.0))."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from bigalign.losses.albef import albef_itc, whole_batches
from bigalign.losses.base import (
  Context,
  Loss,
  apply_once,
  first_context,
  has_tables,
  table_mask,
  weighted_sum,
)
from bigalign.losses.clip import clip
from bigalign.losses.clip_gap import clip_gap
from bigalign.losses.distill import clip_distill, mobileclip_dr, siglip_distill
from bigalign.losses.engine.pairwise import RecordingEngine
from bigalign.losses.feature_distill import feature_distill, vl2v
from bigalign.losses.focal import focal_itc
from bigalign.losses.hard_negatives import dac_mil, hardneg_own, negclip
from bigalign.losses.heads.base import Head
from bigalign.losses.heads.caption import caption
from bigalign.losses.heads.caption_fused import caption_fused
from bigalign.losses.heads.coca import coca
from bigalign.losses.heads.fdt import fdt
from bigalign.losses.heads.grain import grain
from bigalign.losses.heads.gram import gram
from bigalign.losses.heads.ibot import ibot
from bigalign.losses.heads.lexical import lexical
from bigalign.losses.heads.mask_regularization import mask_regularization
from bigalign.losses.heads.region_phrase import region_phrase
from bigalign.losses.heads.silc import silc
from bigalign.losses.heads.sparc_adapted import sparc_adapted
from bigalign.losses.heads.superclass import superclass
from bigalign.losses.heads.token_distill import token_distill
from bigalign.losses.heads.vlap import vlap
from bigalign.losses.intra import alignclip, clip_intra_neg, cyclip
from bigalign.losses.m3co import m3co, softclip_m3co
from bigalign.losses.matryoshka import matryoshka
from bigalign.losses.mixup import m2mix, m3mix
from bigalign.losses.nitc import nitc
from bigalign.losses.per_sample import tables
from bigalign.losses.per_sample.drrho import drrho
from bigalign.losses.per_sample.fastclip import fastclip_v0, fastclip_v1, fastclip_v2, fastclip_v3
from bigalign.losses.per_sample.sogclr import isogclr, sogclr, sogclr_unimodal
from bigalign.losses.radzero import radzero
from bigalign.losses.sail import sail
from bigalign.losses.siglip import siglip
from bigalign.losses.sparc import sparc
from bigalign.losses.text_pairs import text_pairs
from bigalign.losses.unicl import unicl
from bigalign.options import Choose, Component, resolve_value

__all__ = [
  "BATCH_OPTIONS",
  "HEADS",
  "LOSSES",
  "PROVIDES",
  "TERMS",
  "Context",
  "Loss",
  "apply_once",
  "check_ids",
  "check_needs",
  "first_context",
  "has_tables",
  "make_loss",
  "reads",
  "summary",
  "table_mask",
  "weighted_sum",
]

LOSSES = dict(
  albef_itc=albef_itc,
  alignclip=alignclip,
  clip=clip,
  clip_distill=clip_distill,
  clip_gap=clip_gap,
  clip_intra_neg=clip_intra_neg,
  cyclip=cyclip,
  dac_mil=dac_mil,
  drrho=drrho,
  fastclip_v0=fastclip_v0,
  fastclip_v1=fastclip_v1,
  fastclip_v2=fastclip_v2,
  fastclip_v3=fastclip_v3,
  feature_distill=feature_distill,
  focal_itc=focal_itc,
  hardneg_own=hardneg_own,
  isogclr=isogclr,
  m2mix=m2mix,
  m3co=m3co,
  m3mix=m3mix,
  matryoshka=matryoshka,
  mobileclip_dr=mobileclip_dr,
  negclip=negclip,
  nitc=nitc,
  radzero=radzero,
  sail=sail,
  siglip=siglip,
  siglip_distill=siglip_distill,
  softclip_m3co=softclip_m3co,
  sogclr=sogclr,
  sogclr_unimodal=sogclr_unimodal,
  sparc=sparc,
  text_pairs=text_pairs,
  unicl=unicl,
  vl2v=vl2v,
)

# Losses with layers of their own, which config.loss names as the others.
HEADS: dict[str, Callable[..., Loss]] = dict(
  caption=caption,
  caption_fused=caption_fused,
  coca=coca,
  fdt=fdt,
  grain=grain,
  gram=gram,
  ibot=ibot,
  lexical=lexical,
  mask_regularization=mask_regularization,
  region_phrase=region_phrase,
  silc=silc,
  sparc_adapted=sparc_adapted,
  superclass=superclass,
  token_distill=token_distill,
  vlap=vlap,
)
TERMS = {**LOSSES, **HEADS}

# Options of losses whose default does not fit every batch size, for tools that apply them at any:
# (batch size) -> options.
BATCH_OPTIONS = dict(albef_itc=whole_batches)

# What a loss may need -> the features or fields of the batch that provide it.
PROVIDES = dict(
  ids=("image_id", "text_id"),
  labels=("label",),
  raw=("raw_img", "raw_txt"),
  tokens=("tokens_img", "tokens_txt"),
  second_text=("ztxt_second",),
  teacher=("teacher_img", "teacher_txt"),
  ema_teacher=("teacher_img", "teacher_txt"),
  noise=("noise_prob",),
  texts=("ztxts", "texts_kind"),
  hard_negatives=("texts_kind",),
  class_tokens=("zimgs",),
  raw_image=("raw_img",),
  raw_text=("raw_txt",),
  tokens_image=("tokens_img",),
  teacher_image=("teacher_img",),
  teacher_image_stored=("teacher_img_stored",),
  teacher_text=("teacher_txt",),
  teacher_text_stored=("teacher_txt_stored",),
  teacher_texts=("teacher_txts",),
  teacher_second_text=("teacher_txt_second",),
  text_pairs=("zquery", "zdocument"),
)

# What a loss may need -> the option of the config that provides it.
SET_BY = dict(
  **dict.fromkeys(("raw", "tokens", "raw_image", "tokens_image"), "config.data.images=True"),
  second_text="config.data.second_captions",
  texts="config.data.texts",
  hard_negatives="config.data.texts",
  class_tokens="config.model.image.class_tokens=2",
  noise="config.data.columns=dict(noise_prob=FIELD)",
  teacher="config.data.teachers",
  teacher_image="config.data.teachers",
  teacher_image_stored="config.data.teachers",
  teacher_text="config.data.teachers",
  teacher_text_stored="config.data.teachers",
  teacher_texts="config.data.teachers and config.data.texts",
  teacher_second_text="config.data.teachers",
  text_pairs="config.data.text_pairs",
)

# The beginning of a field's name that a head may read -> the option of the config that provides it.
SET_BY_PREFIX = {
  "view/": "config.data.views",
  "region_negatives": "config.data.regions.negatives, such as 10",
  "region_": "config.data.regions",
  "task": "config.data.locations",
  "image": "config.data.images=True, without a store of image vectors",
  "text_second": "config.data.second_captions",
  "text": "config.data.captions, without a store of text vectors",
  "": "config.data.columns",
}

# Why a loss has no option texts.
ONE_TEXT = (
  "; sogclr_unimodal compares two views of one modality, of which captions are none, so use"
  " config.loss.sogclr.texts='set' in its place"
)

# Options of config.data that only losses read -> one that does.
READ_BY = dict(
  second_captions="a loss of two texts, such as sail",
  stores="a loss of two texts, such as sail",
  teachers="a loss that learns from teachers, such as clip_distill",
  text_pairs="the loss text_pairs",
  regions="a loss of regions, such as region_phrase",
  **{"regions.negatives": "config.loss.region_phrase.own_negatives, 5.0 in FG-CLIP"},
  locations="config.loss.caption=dict(tasks=True)",
  columns="a loss that reads it, such as nitc for noise_prob",
  **{"columns.caption_frequency": "isogclr or fastclip_v2 with config.diagnose_every above 0"},
  views="a loss of views, such as silc, whose options name them",
)


def weighted(*, weight: float = 1.0) -> None:
  """The option that each term of config.loss has next to those of its loss.

  Args:
    weight: factor of the loss in the sum.
  """


LossTerms = Annotated[Mapping[str, Component], Choose(TERMS, key="", shared=weighted)]


def make_loss(terms: Mapping[str, Any]) -> Loss:
  """The weighted sum of several losses; one of weight 0 is not a part of it.

  Args:
    terms: {name: options}, such as dict(clip=dict(weight=1.0, label_smoothing=0.1)), in plain
      values or resolved.

  Raises:
    ValueError: for an unknown loss, or if none has a weight.
    TypeError: for an unknown option; both name what is known.
  """
  if not terms:
    raise ValueError(f"config.loss is empty; known losses: {sorted(TERMS)}")
  resolved = resolve_value(LossTerms, terms, "config.loss")
  chosen = {name: _term(x) for name, x in resolved.items() if x.option("weight")}
  if not chosen:
    raise ValueError(f"config.loss: each of {[*resolved]} has weight 0, so nothing is learned")
  return weighted_sum(chosen)


def _term(component: Component) -> tuple[float, Loss]:
  """(weight, loss) of one entry of the config."""
  options = dict(component.options)
  weight = options.pop("weight")
  return weight, component.function(**options)


def reads(loss: Loss) -> frozenset[str]:
  """The fields of the batch and the features that a weighted sum reads, besides a pair."""
  needed = (PROVIDES[need] for need in loss.needs - {"ema_teacher"})
  heads = (term.head.fields for _, term in loss.terms.values() if term.head is not None)
  return frozenset().union(*needed, *heads)


def check_needs(
  loss: Loss,
  fields: Any,
  ema: bool = False,
  averages: bool = False,
  *,
  negatives: bool = True,
  added: Mapping[str, Collection[str]] = {},
  elsewhere: Collection[str] = (),
) -> None:
  """Checks that batch and model provide all that the loss reads, and nothing that is not read.

  Args:
    loss: a weighted sum.
    fields: names of the batch's fields and of the model's features.
    ema: whether parameters are averaged (config.ema), which provides "ema_teacher".
    averages: whether parameters are averaged at all, by config.ema or config.twin.
    negatives: whether some of several texts are hard negatives.
    added: {option of config.data: names under which a loss reads the fields that it adds}.
    elsewhere: names that something else in the run reads, such as the loss of another stage.

  Raises:
    ValueError: naming the field that is missing; for several texts, and for other fields, that no
      loss reads.
  """
  for option, names in added.items():
    if not {*names} & {*reads(loss), *elsewhere}:
      name = option.removeprefix("config.data.")
      raise ValueError(
        f"{option} is read by no loss of config.loss={[*loss.terms]}; use"
        f" {READ_BY.get(name) or READ_BY[name.split('.')[0]]}, or leave it out"
      )
  if "texts_kind" in fields and "texts" not in loss.needs:
    raise ValueError(
      "config.data.texts gives each image several texts, but no loss reads them: the first would be"
      " used alone. Set the option texts of a loss, such as config.loss.clip.texts='uniform'"
      + ONE_TEXT
      * ("sogclr_unimodal" in loss.terms)
    )
  if "ema_teacher" in loss.needs and not ema:
    raise ValueError(
      "config.loss needs the features of averaged parameters, but config.ema is 0; set it, for"
      " example to 0.995"
    )
  for name, (_, term) in loss.terms.items():
    if term.pair and not {"image", "zimg"} & {*fields}:
      raise ValueError(
        f"config.loss.{name} compares images and texts, but config.data.images=False: the data has"
        " texts alone. Set config.loss.feature_distill=dict(w_img=0.0) or another loss of texts, or"
        " data with images"
      )
    head = term.head
    if head is not None and head.averages and not averages:
      raise ValueError(
        f"config.loss.{name} reads averaged parameters; set config.twin, for example to"
        " dict(decay=0.994)"
      )
    if head is not None:
      check_fields(name, head, fields)
    if "hard_negatives" in term.needs and "texts_kind" in fields and not negatives:
      raise ValueError(
        f"config.loss.{name} compares a text with hard negatives, but the texts of config.data have"
        " none, so it would be 0. Set config.data.texts.negatives=dict(count=1, rule='swap'), or"
        " field=FIELD in place of the rule"
      )
    for need in sorted(term.needs - {"ema_teacher"}):
      for field in PROVIDES[need]:
        if field not in fields:
          raise ValueError(
            f"config.loss.{name} needs {need!r}, but neither the data nor the model has a field"
            f" {field!r}; the fields are {sorted(fields)}"
            + (f". Set {SET_BY[need]}" if need in SET_BY else "")
          )


def check_fields(name: str, head: Head, fields: Any) -> None:
  """Raises ValueError, naming the option that is missing, if the batch lacks a field of a head.

  Args:
    name: of its loss.
    head: the layers of the loss.
    fields: names of the batch's fields, and of other features if they are known.
  """
  missing = sorted(head.fields - {*fields})
  if missing:
    option = next(x for prefix, x in SET_BY_PREFIX.items() if missing[0].startswith(prefix))
    raise ValueError(
      f"config.loss.{name} reads the field {missing[0]!r}, which the data does not have; the"
      f" fields are {sorted(fields)}. Set {option}"
    )


def summary(
  loss: Loss, sizes: Mapping[str, Any], feats: Mapping[str, Any], batch: Mapping[str, Any]
) -> str:
  """What a loss reads, keeps and communicates, in a few sentences for the log.

  Args:
    loss: a weighted sum.
    sizes: as for Loss.init.
    feats: shapes of the features that `loss.apply` gets.
    batch: shapes of the batch that it gets.

  Returns:
    Such as "Loss: siglip (weight 1). Extra inputs: none. Per-sample state: none. Logits: 1 BxB
    matrix, 513 floats communicated per pair."
  """
  params, state = jax.eval_shape(lambda: loss.init(sizes))
  engine = RecordingEngine()

  def value(params: Any, state: Any, feats: Any, batch: Any) -> Any:
    return loss.apply(params, state, feats, batch, first_context(engine, sizes=sizes))

  jax.eval_shape(value, params, state, feats, batch)
  terms = " + ".join(f"{name} (weight {weight:g})" for name, (weight, _) in loss.terms.items())
  needs = [f"{need} ({', '.join(PROVIDES[need])})" for need in sorted(loss.needs)]
  mask = jax.tree.leaves(table_mask(loss, state))
  arrays = jax.tree.leaves(state)
  of_samples = sum(x.size * x.dtype.itemsize for x, is_table in zip(arrays, mask) if is_table)
  others = sum(x.size * x.dtype.itemsize for x, is_table in zip(arrays, mask) if not is_table)
  parts = [
    f"Loss: {terms}",
    f"Extra inputs: {', '.join(needs) or 'none'}",
    f"Per-sample state: {_megabytes(of_samples)}",
    *([f"Other state: {_megabytes(others)}"] if others else []),
    f"Logits: {_matrices(engine.floats_per_column)}",
  ]
  return "".join(f"{part}. " for part in parts).strip()


def _megabytes(size: int) -> str:
  return f"{size / 1e6:,.1f} MB over all devices" if size else "none"


def _matrices(floats: Sequence[int]) -> str:
  """The logit matrices of a loss; floats: values communicated per column, for each matrix."""
  if not floats:
    return "no BxB matrix"
  noun = "matrix" if len(floats) == 1 else "matrices"
  unit = "float" if [*floats] == [1] else "floats"
  return f"{len(floats)} BxB {noun}, {' + '.join(map(str, floats))} {unit} communicated per pair"


def check_ids(batch: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> None:
  """Checks that a host batch only holds ids for which per-sample tables have a row.

  Args:
    batch: "image_id", "text_id" [b, 2] uint32.
    sizes: the number of ids, {"image": n, "text": m}.

  Raises:
    ValueError: naming the first id that is out of range.
  """
  for side in ("image", "text"):
    tables.check_ids(batch[f"{side}_id"], sizes[side], f"{side}_id")
