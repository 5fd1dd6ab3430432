"""Small crops are classified as the averaged model classifies large crops of the same image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.clip import clip
from bigalign.losses.heads import prototypes as classes
from bigalign.losses.heads.base import Head, Params, Read
from bigalign.losses.siglip import siglip
from bigalign.sphere import unit

PAIRS = ("local_only", "all_but_same")
CONTRASTS: dict[str, Callable[[], Loss]] = dict(clip=clip, siglip=siglip)


def silc(
  *,
  teacher: str = "global",
  student: str = "local",
  pairs: str = "local_only",
  prototypes: int = 65_536,
  hidden: int = 2_048,
  bottleneck: int = 256,
  student_temp: float = 0.1,
  teacher_temp: Sequence[float] = (0.04, 0.07),
  teacher_temp_updates: int = 37_500,
  center: str = "momentum",
  center_momentum: float = 0.9,
  contrast: str = "",
) -> Loss:
  """Local to global self-distillation: SILC, https://arxiv.org/abs/2310.13355.

  A head of three layers compares the pooled vector of a crop with K prototypes: DINO,
  https://arxiv.org/abs/2104.14294. The class probabilities of small crops come close to those that
  the averaged tower and head give large crops of the same image. The loss is the mean
  cross-entropy over pairs of crops and images. The teacher's logits are centred by their running
  mean over the batches, or their classes are balanced by Sinkhorn's algorithm over the whole batch.

  SILC has two large and eight small crops and contrasts each large crop with the text; SigLIP 2
  (https://arxiv.org/abs/2502.14786) has one large crop and leaves the contrast to the image that
  is not augmented. Both keep config.twin.decay fixed. SILC's decay and weight of the term, and the
  sizes of both heads, are not published; the sizes and temperatures here are DINO's and DINOv2's.

  >>> from bigalign import losses
  >>> losses.make_loss(dict(siglip={}, silc=dict(prototypes=512))).terms["silc"][1].head.averages
  True

  Args:
    teacher: the views of config.data.views that the averaged model sees, large crops.
    student: the views that the model sees, small crops.
    pairs: "local_only": small crops learn from large crops. "all_but_same": large crops do too,
      from the other large ones (DINO).
    prototypes: K, the number of classes.
    hidden: units of both hidden layers of the head.
    bottleneck: width of the vector that is compared with the prototypes.
    student_temp: temperature of the student's classes.
    teacher_temp: temperature of the teacher's classes, at first and at last.
    teacher_temp_updates: updates of this term after which the last one holds; 0: from the start.
      DINOv2 takes 30 epochs of 1,250.
    center: "momentum", or "sinkhorn" as of DINOv3: the logits of all crops then stay in memory.
    center_momentum: share of the old centre that a step keeps.
    contrast: "clip" or "siglip": each large crop is contrasted with the text too, the mean over
      crops is added, and no other contrastive loss is needed. "": not.

  Raises:
    ValueError: for an unknown name, or a number out of range.
  """
  where = "config.loss.silc"
  checks.known(f"{where}.pairs", pairs, PAIRS)
  checks.known(f"{where}.contrast", contrast, ("", *CONTRASTS))
  classes.check(
    where,
    center=center,
    student_temp=student_temp,
    teacher_temp=teacher_temp,
    center_momentum=center_momentum,
    prototypes=prototypes,
    hidden=hidden,
    bottleneck=bottleneck,
  )
  inner = CONTRASTS[contrast]() if contrast else None
  large, small = f"view/{teacher}", f"view/{student}"

  def of_views(read: Read, field: str, averaged: bool = False) -> tuple[jax.Array, Any]:
    """The pooled vectors of some views, [b, V, D], and the tower's output."""
    views = read.batch[field]
    output = read.image(rearrange(views, "b v ... -> (b v) ..."), averaged=averaged)
    return rearrange(output.pooled, "(b v) d -> b v d", v=views.shape[1]), output

  def init_head(key: jax.Array, read: Read) -> Params:
    pooled, _ = of_views(read, large)
    return classes.init(key, pooled.shape[-1], hidden, bottleneck, prototypes)

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    theirs, _ = of_views(read, large, averaged=True)
    logits = jax.lax.stop_gradient(classes.logits(averaged, classes.vectors(averaged, theirs)))
    own, _ = of_views(read, small)
    found: dict[str, jax.Array] = {}
    if pairs == "all_but_same" or contrast:
      of_large, output = of_views(read, large)
      if pairs == "all_but_same":
        own = jnp.concatenate([of_large, own], 1)
      if contrast:
        z = unit(read.project("image", output))
        found["z"] = rearrange(z, "(b v) e -> b v e", v=of_large.shape[1])
    students = classes.vectors(params, own)
    if center == "sinkhorn":
      return found | {"student": classes.logits(params, students), "teacher": logits}
    temperature = classes.teacher_temperature(teacher_temp, teacher_temp_updates, read.state)
    targets = classes.assigned(logits, read.state["center"], temperature)
    total = classes.compared(
      lambda x: classes.logits(params, x), students, targets, pairs, student_temp
    )
    number = classes.pairs_of(targets.shape[1], students.shape[1], pairs)
    sums = classes.of_teacher(logits, targets)
    ones = jnp.ones((len(students),), jnp.int32)
    return found | sums | {"sum": total, "count": number * ones, "seen": targets.shape[1] * ones}

  def init(sizes: Any) -> tuple[Scalars, State]:
    scalars, state = inner.init(sizes) if inner else ({}, {})
    return scalars, {**state, **classes.initial_state(prototypes)}

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    if center == "sinkhorn":
      temperature = classes.teacher_temperature(teacher_temp, teacher_temp_updates, state)
      logits, students = feats["teacher"], feats["student"]
      targets, sums, seen = classes.balanced(logits, temperature)
      total = classes.compared(lambda x: x, students, targets, pairs, student_temp).sum()
      value = total / (len(logits) * classes.pairs_of(logits.shape[1], students.shape[1], pairs))
    else:
      value, seen = feats["sum"].sum() / feats["count"].sum(), feats["seen"].sum()
      sums = {name: feats[name] for name in ("logits", "assigned", "entropy")}
    after = {**state, **classes.next_state(state, sums["logits"], seen, center_momentum)}
    logs = {"distillation": value, **classes.watched(sums, seen)}
    if inner:
      z = feats["z"]
      contrasts = []
      for i in range(z.shape[1]):
        own = {**feats, "zimg": z[:, i]}
        _, (_, found) = inner.apply(params, {}, own, batch, context)
        contrasts.append(found["loss"])
      value = value + sum(contrasts) / len(contrasts)
      logs |= {k: x for k, x in found.items() if k != "loss"}
      logs["contrastive_loss"] = sum(contrasts) / len(contrasts)
    return value, (after, {"loss": value, **logs})

  head = Head(
    init_head,
    apply_head,
    fields=frozenset({large, small}),
    late=frozenset({"sum", "entropy"}),
    sums=classes.SUMS if center == "momentum" else frozenset(),
    averages=True,
  )
  loss = Loss(frozenset(), init, apply, pair=bool(inner), head=head)
  return loss._replace(constrain=inner.constrain) if inner else loss
