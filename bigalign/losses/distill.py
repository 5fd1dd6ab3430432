"""Distillation losses: the batch holds teachers' embeddings of the same pairs.

The unit vectors of several teachers stand side by side, [B, D]. Their widths are those of the data
("teachers" of the sizes), or the option teacher_dims.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigalign import checks
from bigalign.data.text.kinds import ABSENT, POSITIVE
from bigalign.losses import temperature
from bigalign.losses.base import Loss
from bigalign.losses.clip import above_positives
from bigalign.losses.engine import pairwise
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.siglip import DIVISORS
from bigalign.losses.texts import flat, of_batch, owned

TEXTS = ("teacher_txt", "teacher_txt_second")  # fields of the batch
DFNDR = (70.0, 60.0)  # logit scales of its two teachers
USUAL_SCALE = 100.0  # of a teacher whose scale is not given: the upper bound of CLIP's
FORMS = ("one", "per_ordinal")  # of several texts per image


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


@dataclasses.dataclass(frozen=True)
class StoredTeachers:
  """The teachers of a loss, as its options teacher_dims, teacher_scales and teacher_biases say.

  Args:
    name: of the loss.
    dims: the width of each teacher; None: those of the data, or one teacher, of any width.
    scales: the logit scale of each. None: `usual` of as many teachers, else 100 of each.
    biases: the logit bias of each; None: 0.
    usual: see `scales`.

  Raises:
    ValueError: unless every teacher has one scale above 0, and one bias.
  """

  name: str
  dims: Sequence[int] | None
  scales: Sequence[float] | None
  biases: Sequence[float] | None = None
  usual: Sequence[float] = ()

  def __post_init__(self) -> None:
    if self.dims is not None or self.scales is not None:
      self._check(len(self.dims or self.scales or ()))

  def check(self, sizes: Mapping[str, Any]) -> None:
    """Raises ValueError if the options do not fit the teachers of the data, sizes["teachers"]."""
    self._check(len(self._widths(sizes) or (0,)))

  def of_batch(
    self,
    batch: Mapping[str, jax.Array],
    sizes: Mapping[str, Any],
    *,
    texts: Sequence[str] = TEXTS[:1],
  ) -> list[Teacher]:
    """The teachers whose embeddings [B, D] stand side by side in the fields of a batch.

    Args:
      batch: "teacher_img" and the fields of `texts`.
      sizes: as for Loss.init.
      texts: the fields of the teachers' texts that the loss reads.

    Raises:
      ValueError: if their widths do not add up to D.
    """
    dims = [*(self._widths(sizes) or (batch["teacher_img"].shape[1],))]
    for field in ("teacher_img", *texts):
      width = batch[field].shape[-1]
      if sum(dims) != width:
        raise ValueError(
          f"config.loss.{self.name}.teacher_dims={dims} add up to {sum(dims)}, but the data's"
          f" {field} is {width} wide"
        )
    stops = [sum(dims[: k + 1]) for k in range(len(dims))]
    scales, biases = self._scales(len(dims)), self.biases or (0.0,) * len(dims)
    return [
      Teacher(stop - dim, stop, *of)
      for stop, dim, *of in zip(stops, dims, scales, biases, strict=True)
    ]

  def _widths(self, sizes: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of the option, or of the data; None: neither knows."""
    data = tuple(sizes["teachers"]) if sizes.get("teachers") else None
    if self.dims is not None and data is not None and tuple(self.dims) != data:
      raise ValueError(
        f"config.loss.{self.name}.teacher_dims={tuple(self.dims)}, but config.data.teachers holds"
        f" embeddings of the widths {data}; leave teacher_dims out"
      )
    return data if self.dims is None else tuple(self.dims)

  def _scales(self, count: int) -> Sequence[float]:
    if self.scales is not None:
      return self.scales
    return self.usual if len(self.usual) == count else (USUAL_SCALE,) * count

  def _check(self, count: int) -> None:
    for option, values in (("teacher_scales", self.scales), ("teacher_biases", self.biases)):
      if values is not None and len(values) != count:
        raise ValueError(
          f"config.loss.{self.name}.{option}={tuple(values)} must have length {count}, one"
          " value per teacher"
        )
    for k, scale in enumerate(self.scales or ()):
      checks.above_zero(f"config.loss.{self.name}", **{f"teacher_scales[{k}]": scale})


def clip_distill(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  teacher_dims: Sequence[int] | None = None,
  teacher_scales: Sequence[float] | None = None,
  w_hard: float = 1.0,
  w_soft: float = 1.0,
  texts: str = "one",
) -> Loss:
  """CLIP's loss plus a cross-entropy to the softmax of a teacher's logits, in both directions.

  As in open_clip (https://github.com/mlfoundations/open_clip, --distill-model): a cross-entropy,
  not a KL divergence, whose gradient is the same, and a sum of the two losses. The batch holds the
  teacher's unit embeddings, teacher_img and teacher_txt [B, D]. Of several teachers, the softmax
  probabilities are averaged.

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.
    teacher_dims: as in `mobileclip_dr`.
    teacher_scales: the logit scale of each teacher. None: 100, for models trained with that upper
      bound.
    w_hard: weight of CLIP's loss.
    w_soft: weight of the cross-entropy to the teacher.
    texts: "one": an image has one text, ztxt. "per_ordinal": it has several, ztxts [B, M, E], with
      the teacher's teacher_txts [B, M, D]; the mean of the loss over all positive texts, where the
      first texts form one matrix, the second another, ...

  Example:
    >>> from bigalign.losses import apply_once
    >>> z = jnp.eye(4)
    >>> teacher = {"teacher_img": z, "teacher_txt": z}
    >>> loss = clip_distill(t_init=1.0, teacher_scales=(1.0,))
    >>> metrics = apply_once(loss, {"zimg": z, "ztxt": z}, teacher)
    >>> round(float(metrics["contrastive_loss"]), 3), round(float(metrics["distill_loss"]), 3)
    (0.744, 1.268)
  """
  temperature.check("clip_distill", t_init, t_max)
  checks.known("config.loss.clip_distill.texts", texts, FORMS)
  stored = StoredTeachers("clip_distill", teacher_dims, teacher_scales)

  def init(sizes):
    stored.check(sizes)
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    scale = jnp.exp(params["t"])
    teachers = stored.of_batch(batch, context.sizes, texts=fields_of(texts))
    hard, soft = _of_texts(feats, batch, scale, teachers, texts, engine=context.engine)
    loss = w_hard * hard + w_soft * soft
    logs = {"contrastive_loss": hard, "distill_loss": soft, "logit_scale": scale}
    return loss, (state, {"loss": loss, **logs})

  return Loss(needs_of(texts), init, apply, temperature.clamped(t_max))


def mobileclip_dr(
  *,
  t_init: float = 1 / 0.07,
  t_max: float | None = 100.0,
  teacher_dims: Sequence[int] | None = None,
  teacher_scales: Sequence[float] | None = None,
  soft_share: float = 1.0,
  second_text: bool = False,
  texts: str = "one",
) -> Loss:
  """MobileCLIP's dataset reinforcement, with stored teachers: https://arxiv.org/abs/2311.17049.

  (1 - soft_share) times CLIP's loss, plus soft_share times the cross-entropy to the mean of the
  teachers' softmax probabilities, which each direction has of its own. With a second, synthetic
  caption it is the sum over both captions, each with its own teacher embeddings. The batch holds
  teacher_img and teacher_txt [B, D], and teacher_txt_second for the second caption: the unit
  vectors of the teachers, side by side. The defaults are those of the release for DFNDR.

  Args:
    t_init: first value of the logit scale, as in `clip`.
    t_max: upper bound of the logit scale, as in `clip`.
    teacher_dims: width of each teacher's embedding; None: those of the data's teachers, or one
      teacher, of any width.
    teacher_scales: logit scale of each teacher. None: 70 and 60 of two teachers, as for those of
      DFNDR, else 100, as in the paper for those of DataCompDR.
    soft_share: the paper's lambda; 1 for 12 million samples, 0.75 for a billion.
    second_text: whether the batch has synthetic captions too.
    texts: as in `clip_distill`; a mean over the texts of an image, where second_text is a sum.

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
  checks.known("config.loss.mobileclip_dr.texts", texts, FORMS)
  if second_text and texts != "one":
    raise ValueError(
      "config.loss.mobileclip_dr.second_text=True adds a second caption to one text per image, but"
      f" texts={texts!r} reads several; set one of the two"
    )

  stored = StoredTeachers("mobileclip_dr", teacher_dims, teacher_scales, usual=DFNDR)

  def init(sizes):
    stored.check(sizes)
    return temperature.init(t_init), {}

  def apply(params, state, feats, batch, context):
    engine, scale = context.engine, jnp.exp(params["t"])
    fields = TEXTS if second_text else fields_of(texts)
    teachers = stored.of_batch(batch, context.sizes, texts=fields)
    hard, soft = _of_texts(feats, batch, scale, teachers, texts, engine=engine)
    if second_text:
      second = (feats["zimg"], feats["ztxt_second"], scale, batch["teacher_img"])
      more = _hard_and_soft(*second, batch["teacher_txt_second"], teachers, engine=engine)
      hard, soft = hard + more[0], soft + more[1]
    hard, soft = (1 - soft_share) * hard, soft_share * soft
    logs = {"contrastive_loss": hard, "distill_loss": soft, "logit_scale": scale}
    return hard + soft, (state, {"loss": hard + soft, **logs})

  second = {"second_text", "teacher_second_text"} if second_text else set()
  return Loss(needs_of(texts) | second, init, apply, temperature.clamped(t_max))


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
  texts: str = "one",
) -> Loss:
  """The sigmoid loss with the mean probabilities of sigmoid teachers as targets.

  (1 - soft_share) times SigLIP's loss, plus soft_share times the loss to the teachers, each summed
  over texts and averaged over images. The form "signed" is that of MobileCLIP2
  (https://arxiv.org/abs/2508.20691). The batch holds teacher_img and teacher_txt [B, D], the
  unit vectors of the teachers, side by side.

  Args:
    t_init: first value of the logit scale, as in `siglip`.
    b_init: first value of the logit bias, as in `siglip`.
    t_max: upper bound of the logit scale, as in `siglip`.
    teacher_dims: as in `mobileclip_dr`.
    teacher_scales: logit scale of each teacher, as it was trained.
    teacher_biases: logit bias of each teacher, as it was trained.
    soft_share: share of the loss to the teachers.
    form: "bce": the binary cross-entropy to the teachers' probability q. "signed":
      softplus(-(2q - 1) logit), as in MobileCLIP2's release; its optimum is at an infinite logit
      unless q is 1/2, so it is not the default.
    texts: the divisor of the sum over several texts per image, as in `siglip`; the teachers' are
      then teacher_txts [B, M, D].

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
  checks.known("config.loss.siglip_distill.texts", texts, DIVISORS)
  stored = StoredTeachers("siglip_distill", teacher_dims, teacher_scales, teacher_biases)

  def init(sizes):
    stored.check(sizes)
    return temperature.init(t_init, b_init=b_init), {}

  def apply(params, state, feats, batch, context):
    engine, scale = context.engine, jnp.exp(params["t"])
    teachers = stored.of_batch(batch, context.sizes, texts=fields_of(texts))
    several = None if texts == "one" else of_batch(feats, batch)
    count = 1 if several is None else several.per_image

    def tile(row, col, shared):
      logits = shared["scale"] * engine.products(row["z"], col["z"]) + shared["bias"]
      positive = pairwise.same(row, col) if count == 1 else owned(row, col, count)
      if "kind" in col:
        positive &= (col["kind"] == POSITIVE)[None, :]
      hard = jax.nn.softplus(jnp.where(positive, -logits, logits))
      teacher_logits = [teacher.logits(row, col, engine=engine) for teacher in teachers]
      if form == "signed":
        sign = _mean([jnp.tanh(x / 2) for x in teacher_logits])  # 2q - 1
        soft = jax.nn.softplus(-sign * logits)
      else:
        yes, no = (_mean([jax.nn.sigmoid(v * x) for x in teacher_logits]) for v in (1, -1))
        soft = yes * jax.nn.softplus(-logits) + no * jax.nn.softplus(logits)
      loss = (1 - soft_share) * hard + soft_share * soft
      if "kind" in col:
        loss = jnp.where(col["kind"][None, :] == ABSENT, 0, loss)
      return {"loss": loss}

    zimg = feats["zimg"]
    rows = {"z": zimg, "teacher": constant(batch["teacher_img"], zimg)}
    if several is None:
      theirs, columns, number = batch["teacher_txt"], {"z": feats["ztxt"]}, len(zimg)
    else:
      # An absent text is some vector, even one that is not finite.
      theirs = flat(jnp.where(several.present[..., None], batch["teacher_txts"], 0))
      present = several.number(several.present)
      numbers = {"images": len(zimg), "texts": present, "pairs": len(zimg) * present}
      columns, number = several.columns(), numbers[texts]
    columns["teacher"] = constant(theirs, zimg)
    shared = {"scale": scale, "bias": params["b"]}
    loss = engine.total(tile, rows, columns, shared, fixed={"teacher"}) / number
    return loss, (state, {"loss": loss, "logit_scale": scale, "logit_bias": params["b"]})

  return Loss(needs_of(texts), init, apply, temperature.clamped(t_max))


def needs_of(texts: str) -> frozenset[str]:
  """What a loss on pairs reads, with one text or several."""
  return frozenset({"teacher"} if texts == "one" else {"texts", "teacher_image", "teacher_texts"})


def fields_of(texts: str) -> tuple[str, ...]:
  """The field of the teachers' texts, of one text or of several."""
  return TEXTS[:1] if texts == "one" else ("teacher_txts",)


def _of_texts(
  feats: Mapping[str, jax.Array],
  batch: Mapping[str, jax.Array],
  scale: jax.Array,
  teachers: Sequence[Teacher],
  form: str,
  *,
  engine: Engine,
) -> tuple[jax.Array, jax.Array]:
  """`_hard_and_soft` of one text per image, or its mean over the positive texts of a form."""
  zimg, teacher_img = feats["zimg"], batch["teacher_img"]
  if form == "one":
    pair = (zimg, feats["ztxt"], scale, teacher_img, batch["teacher_txt"])
    return _hard_and_soft(*pair, teachers, engine=engine)
  texts, theirs = of_batch(feats, batch), batch["teacher_txts"]
  if texts.per_image == 1:
    pair = (zimg, texts.z, scale, teacher_img, theirs[:, 0])
    return _hard_and_soft(*pair, teachers, engine=engine)
  z, positive = texts.of_image(texts.z), texts.positive
  number = texts.number(positive)
  # The compiler may gather the columns of several ordinals at once.
  engine = dataclasses.replace(engine, budget_mb=engine.budget_mb / texts.per_image)

  def teacher_of(m: int) -> jax.Array:
    return jnp.where(positive[:, m, None], theirs[:, m], 0)  # an absent one may be not finite

  parts = []
  for m in range(texts.per_image):  # one matrix at a time
    pair = (zimg, z[:, m], scale, teacher_img, teacher_of(m))
    parts.append(_hard_and_soft(*pair, teachers, only=(positive[:, m], number), engine=engine))
    # The matrices' gradients of the images are then added one by one, not all kept for one sum.
    zimg = jax.lax.optimization_barrier(zimg)
  hard, soft = (functools.reduce(jnp.add, x) for x in zip(*parts))
  return hard, soft


def _hard_and_soft(
  zimg: jax.Array,
  ztxt: jax.Array,
  scale: jax.Array,
  teacher_img: jax.Array,
  teacher_txt: jax.Array,
  teachers: Sequence[Teacher],
  *,
  only: tuple[jax.Array, Any] | None = None,
  engine: Engine,
) -> tuple[jax.Array, jax.Array]:
  """CLIP's loss [] and the cross-entropy [] to the mean probability of the teachers.

  A first pass computes the normalisers of the teachers' softmax: two floats per pair and teacher.

  Args:
    zimg: [B, E], unit norm.
    ztxt: [B, E], unit norm.
    scale: [], of the logits.
    teacher_img: [B, D].
    teacher_txt: [B, D].
    teachers: their parts of D.
    only: which texts [B] bool are compared, and the number by which sums over them are divided;
      None: means over all.
    engine: forms the logits.
  """
  x, y = (constant(v, zimg) for v in (teacher_img, teacher_txt))
  kinds = {f"i2t{k}": "row_lse" for k in range(len(teachers))}
  kinds |= {f"t2i{k}": "col_lse" for k in range(len(teachers))}
  present = {} if only is None else {"present": only[0]}

  def teacher_logits(row, col, shared):
    logits = [teacher.logits(row, col, engine=engine) for teacher in teachers]
    if only is None:
      return {name: logits[int(name[3:])] for name in kinds}
    chosen = [jnp.where(col["present"][None, :], x, -jnp.inf) for x in logits]
    return {name: (chosen if name[0] == "i" else logits)[int(name[3:])] for name in kinds}

  norms = jax.lax.stop_gradient(
    engine.reduce(teacher_logits, {"teacher": x}, {"teacher": y, **present}, outputs=kinds)
  )
  positive = engine.paired(zimg, ztxt)  # [B]

  def tile(row, col, shared):
    above = above_positives(engine.products(row["z"], col["z"]), row, col, shared["scale"])
    # A positive is 0 relative to itself, whatever the teachers' probability.
    others = {name: ~pairwise.same(row, col) for name in above}
    if only is not None:
      others["t2i"] &= col["present"][None, :]
      others["i2t"] &= row["present"][:, None] & col["present"][None, :]
    i2t, t2i = (jnp.where(others[name], above[name], 0) for name in ("i2t", "t2i"))
    logits = [teacher.logits(row, col, engine=engine) for teacher in teachers]
    p = _mean([jnp.exp(v - row[f"i2t{k}"][:, None]) for k, v in enumerate(logits)])
    q = _mean([jnp.exp(v - col[f"t2i{k}"][None, :]) for k, v in enumerate(logits)])
    return {**above, "weighted": p * i2t + q * t2i}

  rows = {"z": zimg, "positive": positive, "teacher": x, **present}
  columns = {"z": ztxt, "positive": positive, "teacher": y, **present}
  reduced = engine.reduce(
    tile,
    rows | {name: x for name, x in norms.items() if name.startswith("i2t")},
    columns | {name: x for name, x in norms.items() if name.startswith("t2i")},
    {"scale": scale},
    outputs={"i2t": "row_lse", "t2i": "col_lse", "weighted": "row_sum"},
    fixed={"teacher", *kinds},
  )
  if only is None:
    i2t, t2i = (jax.nn.softplus(reduced[name]).mean() for name in ("i2t", "t2i"))
    hard = (i2t + t2i) / 2
    return hard, hard - reduced["weighted"].mean() / 2
  chosen, number = only
  i2t, t2i = (
    jnp.where(chosen, jax.nn.softplus(reduced[name]), 0).sum() / number for name in ("i2t", "t2i")
  )
  hard = (i2t + t2i) / 2
  return hard, hard - reduced["weighted"].sum() / number / 2


def soft_targets(
  feats: Mapping[str, jax.Array],
  batch: Mapping[str, jax.Array],
  scale: jax.Array,
  teachers: Sequence[Teacher],
  form: str,
  *,
  engine: Engine,
) -> jax.Array:
  """[]: the cross-entropy to the mean probability of teachers; arguments as of _of_texts."""
  return _of_texts(feats, batch, scale, teachers, form, engine=engine)[1]


def constant(x: jax.Array, like: jax.Array) -> jax.Array:
  """x in the dtype of `like`, without a gradient."""
  return jax.lax.stop_gradient(x.astype(like.dtype))


def _mean(tiles: Sequence[jax.Array]) -> jax.Array:
  """[n, m]: the mean of several tiles."""
  return sum(tiles[1:], tiles[0]) / len(tiles)
