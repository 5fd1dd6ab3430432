"""Distillation losses: the batch holds a teacher's embeddings of the same pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine

TEXTS = ("teacher_txt", "teacher_txt_second")  # fields of the batch


class Teacher(NamedTuple):
  """One of several teachers whose embeddings are concatenated; its columns are start to stop."""

  start: int
  stop: int
  scale: float
  bias: float = 0.0

  def logits(
    self, row: Mapping[str, jax.Array], col: Mapping[str, jax.Array], *, engine: Engine
  ) -> jax.Array:
    """[n, m]: the teacher's logits of a tile with "teacher" [n, D] and [m, D]."""
    x, y = (side["teacher"][:, self.start : self.stop] for side in (row, col))
    return jax.lax.stop_gradient(self.scale * engine.products(x, y) + self.bias)


def clip_distill(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  teacher_scale: float = 100.0,
  w_hard: float = 1.0,
  w_soft: float = 1.0,
) -> Loss:
  """CLIP's loss plus a cross-entropy to the softmax of a teacher's logits, in both directions.

  As in open_clip (https://github.com/mlfoundations/open_clip, --distill-model): a cross-entropy,
  not a KL divergence, whose gradient is the same, and a sum of the two losses. The batch holds the
  teacher's unit embeddings, teacher_img and teacher_txt [B, D].

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.
    teacher_scale: the teacher's own logit scale; 100 for models trained with that upper bound.
    w_hard: weight of CLIP's loss.
    w_soft: weight of the cross-entropy to the teacher.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> teacher = {"teacher_img": z, "teacher_txt": z}
    >>> loss = clip_distill(t_init=1.0, teacher_scale=1.0)
    >>> metrics = apply_once(loss, {"zimg": z, "ztxt": z}, teacher)
    >>> round(float(metrics["contrastive_loss"]), 3), round(float(metrics["distill_loss"]), 3)
    (0.744, 1.268)
  """
  temperature.check("clip_distill", t_init, t_max)
  checks.above_zero("config.loss.clip_distill", teacher_scale=teacher_scale)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale = jnp.exp(params["t"])
    teachers = _teachers("clip_distill", batch, TEXTS[:1], None, (teacher_scale,), (0.0,))
    hard, soft = _hard_and_soft(
      feats["zimg"],
      feats["ztxt"],
      scale,
      batch["teacher_img"],
      batch["teacher_txt"],
      teachers,
      engine=context.engine,
    )
    loss = w_hard * hard + w_soft * soft
    logs = {"contrastive_loss": hard, "distill_loss": soft, "logit_scale": scale}
    return loss, (state, {"loss": loss, **logs})

  return Loss(frozenset({"teacher"}), init, apply, temperature.clamped(t_max))


def mobileclip_dr(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  teacher_dims: Sequence[int] | None = None,
  teacher_scales: Sequence[float] = (100.0,),
  soft_share: float = 1.0,
  second_text: bool = False,
) -> Loss:
  """MobileCLIP's dataset reinforcement, with stored teachers: https://arxiv.org/abs/2311.17049.

  (1 - soft_share) times CLIP's loss, plus soft_share times the cross-entropy to the mean of the
  teachers' softmax probabilities, which each direction has of its own. With a second, synthetic
  caption it is the sum over both captions, each with its own teacher embeddings. The batch holds
  teacher_img and teacher_txt [B, D], and teacher_txt_second for the second caption: the
  concatenated unit vectors of the teachers.

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.
    teacher_dims: width of each teacher's embedding; None: one teacher, of any width.
    teacher_scales: logit scale of each teacher; 100 in the paper, (70, 60) for the two of DFN.
    soft_share: the paper's lambda; 1 for 12 million samples, 0.75 for a billion.
    second_text: whether the batch has synthetic captions too.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)  # two teachers with the embeddings of the student
    >>> both = jnp.concatenate([z, z], axis=1)
    >>> loss = mobileclip_dr(t_init=1.0, teacher_dims=(4, 4), teacher_scales=(1.0, 1.0))
    >>> teacher = {"teacher_img": both, "teacher_txt": both}
    >>> round(float(apply_once(loss, {"zimg": z, "ztxt": z}, teacher)["loss"]), 3)
    1.268
  """
  temperature.check("mobileclip_dr", t_init, t_max)
  checks.between("config.loss.mobileclip_dr", 0, 1, soft_share=soft_share)
  no_bias = (0.0,) * len(teacher_scales)
  _check_teachers("mobileclip_dr", teacher_dims, teacher_scales, no_bias)

  def init(sizes):
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale = jnp.exp(params["t"])
    names = TEXTS if second_text else TEXTS[:1]
    teachers = _teachers("mobileclip_dr", batch, names, teacher_dims, teacher_scales, no_bias)
    texts = [(feats["ztxt"], batch["teacher_txt"])]
    if second_text:
      texts.append((feats["ztxt_second"], batch["teacher_txt_second"]))
    parts = [
      _hard_and_soft(
        feats["zimg"],
        z,
        scale,
        batch["teacher_img"],
        teacher,
        teachers,
        engine=context.engine,
      )
      for z, teacher in texts
    ]
    hard, soft = (sum(x) for x in zip(*parts))
    hard, soft = (1 - soft_share) * hard, soft_share * soft
    logs = {"contrastive_loss": hard, "distill_loss": soft, "logit_scale": scale}
    return hard + soft, (state, {"loss": hard + soft, **logs})

  needs = {"teacher", *(("second_text", "teacher_second_text") if second_text else ())}
  return Loss(frozenset(needs), init, apply, temperature.clamped(t_max))


def siglip_distill(
  *,
  t_init: float = 10.0,
  b_init: float = -10.0,
  t_max: float | None = None,
  teacher_dims: Sequence[int] | None = None,
  teacher_scales: Sequence[float] = (100.0,),
  teacher_biases: Sequence[float] = (-10.0,),
  soft_share: float = 1.0,
  form: str = "bce",
) -> Loss:
  """The sigmoid loss with the mean probabilities of sigmoid teachers as targets.

  (1 - soft_share) times SigLIP's loss, plus soft_share times the loss to the teachers, each summed
  over texts and averaged over images. The form "signed" is that of MobileCLIP2
  (https://arxiv.org/abs/2508.20691). The batch holds teacher_img and teacher_txt [B, D], the
  concatenated unit vectors of the teachers.

  Args:
    t_init: first value of the logit scale, as in `siglip`.
    b_init: first value of the logit bias, as in `siglip`.
    t_max: upper bound of the logit scale, as in `siglip`.
    teacher_dims: width of each teacher's embedding; None: one teacher, of any width.
    teacher_scales: logit scale of each teacher, as it was trained.
    teacher_biases: logit bias of each teacher, as it was trained.
    soft_share: share of the loss to the teachers.
    form: "bce": the binary cross-entropy to the teachers' probability q. "signed":
      softplus(-(2q - 1) logit), as in MobileCLIP2's release; its optimum is at an infinite logit
      unless q is 1/2, so it is not the default.

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> teacher = {"teacher_img": z, "teacher_txt": z}
    >>> metrics = apply_once(siglip_distill(b_init=-5.0), {"zimg": z, "ztxt": z}, teacher)
    >>> round(float(metrics["loss"]), 3)
    0.028
  """
  temperature.check("siglip_distill", t_init, t_max)
  checks.known("config.loss.siglip_distill.form", form, ("bce", "signed"))
  checks.between("config.loss.siglip_distill", 0, 1, soft_share=soft_share)
  _check_teachers("siglip_distill", teacher_dims, teacher_scales, teacher_biases)

  def init(sizes):
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    engine, scale = context.engine, jnp.exp(params["t"])
    teachers = _teachers(
      "siglip_distill", batch, TEXTS[:1], teacher_dims, teacher_scales, teacher_biases
    )

    def tile(row, col, shared):
      logits = shared["scale"] * engine.products(row["z"], col["z"]) + shared["bias"]
      hard = jax.nn.softplus(jnp.where(pairwise.same(row, col), -logits, logits))
      teacher_logits = [teacher.logits(row, col, engine=engine) for teacher in teachers]
      if form == "signed":
        sign = _mean([jnp.tanh(x / 2) for x in teacher_logits])  # 2q - 1
        soft = jax.nn.softplus(-sign * logits)
      else:
        yes, no = (_mean([jax.nn.sigmoid(v * x) for x in teacher_logits]) for v in (1, -1))
        soft = yes * jax.nn.softplus(-logits) + no * jax.nn.softplus(logits)
      return {"loss": (1 - soft_share) * hard + soft_share * soft}

    dtype = feats["zimg"].dtype
    rows = {"z": feats["zimg"], "teacher": batch["teacher_img"].astype(dtype)}
    columns = {"z": feats["ztxt"], "teacher": batch["teacher_txt"].astype(dtype)}
    shared = {"scale": scale, "bias": params["b"]}
    loss = engine.total(tile, rows, columns, shared, fixed={"teacher"}) / len(feats["zimg"])
    return loss, (state, {"loss": loss, "logit_scale": scale, "logit_bias": params["b"]})

  return Loss(frozenset({"teacher"}), init, apply, temperature.clamped(t_max))


def _hard_and_soft(
  zimg: jax.Array,
  ztxt: jax.Array,
  scale: jax.Array,
  teacher_img: jax.Array,
  teacher_txt: jax.Array,
  teachers: Sequence[Teacher],
  *,
  engine: Engine,
) -> tuple[jax.Array, jax.Array]:
  """CLIP's loss [] and the cross-entropy [] to the mean probability of the teachers.

  A first pass computes the normalisers of the teachers' softmax: two floats per pair and teacher.
  """
  x, y = (jax.lax.stop_gradient(v.astype(zimg.dtype)) for v in (teacher_img, teacher_txt))
  kinds = {f"i2t{k}": "row_lse" for k in range(len(teachers))}
  kinds |= {f"t2i{k}": "col_lse" for k in range(len(teachers))}

  def teacher_logits(row, col, shared):
    logits = [teacher.logits(row, col, engine=engine) for teacher in teachers]
    return {name: logits[int(name[3:])] for name in kinds}

  norms = jax.lax.stop_gradient(
    engine.reduce(teacher_logits, {"teacher": x}, {"teacher": y}, outputs=kinds)
  )
  positive = engine.paired(zimg, ztxt)  # [B]

  def tile(row, col, shared):
    above = above_positives(engine.products(row["z"], col["z"]), row, col, shared["scale"])
    # A positive is 0 relative to itself, whatever the teachers' probability.
    i2t, t2i = (jnp.where(pairwise.same(row, col), 0, above[name]) for name in ("i2t", "t2i"))
    logits = [teacher.logits(row, col, engine=engine) for teacher in teachers]
    p = _mean([jnp.exp(v - row[f"i2t{k}"][:, None]) for k, v in enumerate(logits)])
    q = _mean([jnp.exp(v - col[f"t2i{k}"][None, :]) for k, v in enumerate(logits)])
    return {**above, "weighted": p * i2t + q * t2i}

  rows = {"z": zimg, "positive": positive, "teacher": x}
  columns = {"z": ztxt, "positive": positive, "teacher": y}
  reduced = engine.reduce(
    tile,
    rows | {name: x for name, x in norms.items() if name.startswith("i2t")},
    columns | {name: x for name, x in norms.items() if name.startswith("t2i")},
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse", "weighted": "row_sum"},
    fixed={"teacher", *kinds},
  )
  i2t, t2i = (jax.nn.softplus(reduced[name]).mean() for name in ("i2t", "t2i"))
  hard = (i2t + t2i) / 2
  return hard, hard - reduced["weighted"].mean() / 2


def _mean(tiles: Sequence[jax.Array]) -> jax.Array:
  """[n, m]: the mean of several tiles."""
  return sum(tiles[1:], tiles[0]) / len(tiles)


def _check_teachers(
  name: str, dims: Sequence[int] | None, scales: Sequence[float], biases: Sequence[float]
) -> None:
  """Raises ValueError unless every teacher has one scale above 0, and one bias."""
  teachers = 1 if dims is None else len(dims)
  for option, values in (("teacher_scales", scales), ("teacher_biases", biases)):
    if len(values) != teachers:
      raise ValueError(
        f"config.loss.{name}.{option}={tuple(values)} must have length {teachers}, one"
        f" value per teacher (teacher_dims={dims})"
      )
  for k, scale in enumerate(scales):
    checks.above_zero(f"config.loss.{name}", **{f"teacher_scales[{k}]": scale})


def _teachers(
  name: str,
  batch: Mapping[str, jax.Array],
  texts: Sequence[str],
  dims: Sequence[int] | None,
  scales: Sequence[float],
  biases: Sequence[float],
) -> list[Teacher]:
  """The teachers whose embeddings [B, D] are concatenated in teacher_img and in each of `texts`.

  Raises:
    ValueError: if their widths do not add up to D.
  """
  dims = [batch["teacher_img"].shape[1]] if dims is None else list(dims)
  for field in ("teacher_img", *texts):
    width = batch[field].shape[1]
    if sum(dims) != width:
      raise ValueError(
        f"config.loss.{name}.teacher_dims={dims} add up to {sum(dims)}, but the data's {field} is"
        f" {width} wide"
      )
  stops = [sum(dims[: k + 1]) for k in range(len(dims))]
  return [Teacher(stop - dim, stop, *of) for stop, dim, *of in zip(stops, dims, scales, biases)]
