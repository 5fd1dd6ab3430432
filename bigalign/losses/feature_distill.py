"""Regression of embeddings to a teacher's: row by row, without logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses.base import Loss
from bigalign.sphere import unit

KINDS = ("cosine", "mse", "cosine+mse")
SIDES = {"img": "image", "txt": "text"}


def distance(x: jax.Array, teacher: jax.Array, kind: str) -> jax.Array:
  """[...]: how far vectors are from a teacher's.

  Args:
    x: [..., D], of any norm.
    teacher: [..., D], of any norm; it gets no gradient.
    kind: "cosine": 1 - cosine. "mse": the mean over components of the squared difference.
      "cosine+mse": their sum.
  """
  teacher = jax.lax.stop_gradient(teacher.astype(x.dtype))
  terms = []
  if "cosine" in kind:  # half the squared distance of the unit vectors, which keeps small digits
    terms.append(jnp.sum((unit(x) - unit(teacher)) ** 2, -1) / 2)
  if "mse" in kind:
    terms.append(jnp.mean((x - teacher) ** 2, -1))
  return sum(terms[1:], terms[0])


def feature_distill(
  *, kind: str = "cosine", w_img: float = 1.0, w_txt: float = 1.0, normalise: bool = False
) -> Loss:
  """Regression of image and text embeddings to those of a teacher, each to its own modality.

  The sum over sides of weight times the mean over the batch. As in AltCLIP's first stage
  (https://arxiv.org/abs/2211.06679: "mse", texts only), DC-CLIP (https://arxiv.org/abs/2404.11249:
  both sides; form and weights are our choice) and PH-Reg (https://arxiv.org/abs/2505.21501:
  "cosine+mse"). The student's vectors are those of its projectors before normalisation, raw_img and
  raw_txt [B, E]; the batch holds the teacher's as they are stored, teacher_img_stored and
  teacher_txt_stored [B, E], for "mse", and else its unit vectors teacher_img and teacher_txt. A
  linear projector fits the student to the teacher's width.

  Args:
    kind: "cosine": 1 - cosine. "mse": the mean over components of the squared difference.
      "cosine+mse": their sum.
    w_img: weight of the images; with 0, the loss does not read them.
    w_txt: weight of the texts; with 0, the loss does not read them.
    normalise: whether "mse" compares unit vectors; it is then 2 / E times "cosine".

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> batch = {"teacher_img": z, "teacher_txt": z[::-1]}
    >>> metrics = apply_once(feature_distill(), {"raw_img": 2 * z, "raw_txt": z}, batch)
    >>> float(metrics["img"]), float(metrics["txt"])
    (0.0, 1.0)
  """
  where = "config.loss.feature_distill"
  checks.known(f"{where}.kind", kind, KINDS)
  checks.between(where, 0, w_img=w_img, w_txt=w_txt)
  field = "_stored" if "mse" in kind and not normalise else ""
  weights = {side: w for side, w in (("img", w_img), ("txt", w_txt)) if w}
  if not weights:
    raise ValueError(f"{where}: w_img and w_txt are both 0; give one of them a weight")

  def apply(params, state, feats, batch, context):
    logs = {}
    for side in weights:
      own, teacher = feats[f"raw_{side}"], batch[f"teacher_{side}{field}"]
      _check_width("feature_distill", side, own, teacher)
      if normalise:
        own, teacher = unit(own), unit(teacher.astype(own.dtype))
      logs[side] = distance(own, teacher, kind).mean()
    loss = sum(weights[side] * x for side, x in logs.items())
    return loss, (state, {"loss": loss, **logs})

  needs = {x for side in weights for x in (f"raw_{SIDES[side]}", f"teacher_{SIDES[side]}{field}")}
  return Loss(frozenset(needs), lambda sizes: ({}, {}), apply, pair=False)


def vl2v(*, share: float = 0.1) -> Loss:
  """An image's embedding moves to a teacher's image and to its text: https://arxiv.org/abs/2310.08255.

  -share cos(v, teacher's image) - (1 - share) cos(v, teacher's text), averaged over the batch: the
  first term of VL2V-ADiP, which teaches a vision backbone to be classified by CLIP's text
  embeddings. The text is the prompt of the image's class ("a photo of a dog"). The batch holds
  teacher_img and teacher_txt [B, E]. No text tower is trained by it.

  Args:
    share: weight of the teacher's image; 0.1 in the release.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> batch = {"teacher_img": z, "teacher_txt": z[::-1]}
    >>> round(float(apply_once(vl2v(), {"raw_img": 2 * z}, batch)["loss"]), 3)
    -0.1
  """
  checks.between("config.loss.vl2v", 0, 1, share=share)

  def apply(params, state, feats, batch, context):
    z, cosines = unit(feats["raw_img"]), {}
    for side in SIDES:
      teacher = batch[f"teacher_{side}"]
      _check_width("vl2v", side, z, teacher, "img")
      teacher = jax.lax.stop_gradient(unit(teacher.astype(z.dtype)))
      cosines[f"cos_{side}"] = jnp.sum(z * teacher, -1).mean()
    loss = -share * cosines["cos_img"] - (1 - share) * cosines["cos_txt"]
    return loss, (state, {"loss": loss, **cosines})

  return Loss(frozenset({"raw_image", "teacher"}), lambda sizes: ({}, {}), apply, pair=False)


def _check_width(
  name: str, side: str, own: jax.Array, teacher: jax.Array, of: str | None = None
) -> None:
  """Raises ValueError if the vectors of the student's side `of` cannot be compared."""
  if own.shape[-1] != teacher.shape[-1]:
    raise ValueError(
      f"config.loss.{name}: the student's raw_{of or side} is {own.shape[-1]} wide, but the data's"
      f" teacher_{side} {teacher.shape[-1]}; set config.model.embed_dim={teacher.shape[-1]} with a"
      " linear projector, or name one teacher of that width in config.data.teachers"
    )
