"""Hidden patches are classified as the averaged model, which sees them, classifies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.losses.base import Context, Features, Loss, State
from bigalign.losses.base import Params as Scalars
from bigalign.losses.heads import masks
from bigalign.losses.heads import prototypes as classes
from bigalign.losses.heads.base import Head, Params, Read

FORMS = ("masked", "all")


def ibot(
  *,
  view: str = "global",
  ratio: float = 0.5,
  form: str = "masked",
  prototypes: int = 65_536,
  hidden: int = 2_048,
  bottleneck: int = 256,
  student_temp: float = 0.1,
  teacher_temp: Sequence[float] = (0.04, 0.07),
  teacher_temp_updates: int = 37_500,
  center: str = "momentum",
  center_momentum: float = 0.9,
) -> Loss:
  """Masked prediction of an averaged teacher's classes: iBOT, https://arxiv.org/abs/2111.07832.

  The tower sees a learned vector in place of some patches. A head as of `silc`, with parameters of
  its own, classifies their tokens as the averaged tower and head, which see the whole image,
  classify the tokens at the same places. The loss is the mean cross-entropy over the hidden patches
  and images. SigLIP 2 (https://arxiv.org/abs/2502.14786) hides half of the patches of its large
  crop; TIPS (https://arxiv.org/abs/2410.16512) hides three quarters (not checked).

  With form="all", TIPSv2's iBOT++, the patches that the tower sees count too. TIPSv2 averages the
  head alone: config.twin.paths="heads/ibot" leaves the tower of the teacher as it is now. How it
  weights the patches is not published; here all count alike.

  Args:
    view: of config.data.views; "": the image of the batch.
    ratio: share of the patches that are hidden, more than 0 and less than 1.
    form: "masked": the hidden patches count. "all": all patches count.
    prototypes: K, the number of classes.
    hidden: units of both hidden layers of the head.
    bottleneck: width of the vector that is compared with the prototypes.
    student_temp: temperature of the student's classes.
    teacher_temp: temperature of the teacher's classes, at first and at last.
    teacher_temp_updates: updates of this term after which the last one holds; 0: from the start.
    center: "momentum": the running mean of the teacher's logits of the patches that count is
      subtracted from them. "sinkhorn": their classes are balanced over the whole batch; the logits
      of all these patches then stay in memory.
    center_momentum: share of the old centre that a step keeps.

  Raises:
    ValueError: for an unknown name, or a number out of range.
  """
  where = "config.loss.ibot"
  checks.known(f"{where}.form", form, FORMS)
  if not 0 < ratio < 1:
    raise ValueError(f"{where}.ratio={ratio}: more than 0 and less than 1")
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
  field = f"view/{view}" if view else "image"

  def images(read: Read) -> jax.Array:
    """[b V, S, S, 3]."""
    x = read.batch[field]
    return rearrange(x, "b v ... -> (b v) ...") if view else x

  def draw(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    shape = shapes[field]
    views = shape[1] if view else 1
    places = masks.uniform(key, shape[0] * views, masks.patches(shape, sizes), ratio)
    return {"hidden": rearrange(places, "(b v) n -> b v n", v=views)}

  def init_head(key: jax.Array, read: Read) -> Params:
    width = read.image(images(read)).tokens.shape[-1]
    vector = 0.02 * jax.random.normal(key, (width,), jnp.float32)
    return {"vector": vector, **classes.init(key, width, hidden, bottleneck, prototypes)}

  def apply_head(params: Params, averaged: Params, read: Read) -> dict[str, jax.Array]:
    views = read.batch["hidden"].shape[1]
    mask = rearrange(read.batch["hidden"], "b v n -> (b v) n")
    whole = read.image(images(read), averaged=True).tokens
    own = read.image(images(read), hidden=(mask, params["vector"])).tokens
    if form == "masked":  # the others are not classified
      count = round(ratio * mask.shape[1])
      at = jnp.argsort(~mask, axis=1, stable=True)[:, :count, None]
      whole, own = (jnp.take_along_axis(x, at, axis=1) for x in (whole, own))
      mask = jnp.ones((len(mask), count), bool)
    theirs = classes.vectors(averaged, whole)
    students = classes.vectors(params, own)

    def per_row(x: jax.Array) -> jax.Array:
      """[b V, …] -> [b, V, …]."""
      return rearrange(x, "(b v) ... -> b v ...", v=views)

    if center == "sinkhorn":
      logits = {
        "student": classes.logits(params, students),
        "teacher": classes.logits(averaged, theirs),
      }
      return {name: rearrange(per_row(x), "b v n k -> b (v n) k") for name, x in logits.items()}
    found = classes.patches(
      (lambda x: classes.logits(params, x), lambda x: classes.logits(averaged, x)),
      students,
      theirs,
      mask,
      read.state["center"],
      (
        student_temp,
        classes.teacher_temperature(teacher_temp, teacher_temp_updates, read.state),
      ),
    )
    rows = {name: per_row(found[name]).sum(1) for name in ("masked", "visible", "entropy")}
    hidden_count = per_row(mask).sum((1, 2))
    total = jnp.full_like(hidden_count, views * mask.shape[1])
    sums = {name: found[name] for name in classes.SUMS}
    return rows | sums | {"count": total, "hidden_count": hidden_count}

  def init(sizes: Any) -> tuple[Scalars, State]:
    return {}, classes.initial_state(prototypes)

  def apply(
    params: Scalars, state: State, feats: Features, batch: Any, context: Context
  ) -> tuple[jax.Array, Any]:
    logs: dict[str, jax.Array] = {}
    if center == "sinkhorn":
      temperature = classes.teacher_temperature(teacher_temp, teacher_temp_updates, state)
      targets, sums, seen = classes.balanced(feats["teacher"], temperature)
      value = classes.cross_entropy(feats["student"], targets, student_temp).mean()
    else:
      sums, seen = {k: feats[k] for k in ("logits", "assigned", "entropy")}, feats["count"].sum()
      masked, visible = feats["masked"].sum(), feats["visible"].sum()
      value = (masked + visible) / seen
      if form == "all":
        number = feats["hidden_count"].sum()
        logs |= {"masked": masked / number, "visible": visible / (seen - number)}
    after = classes.next_state(state, sums["logits"], seen, center_momentum)
    return value, (after, {"loss": value, **logs, **classes.watched(sums, seen)})

  head = Head(
    init_head,
    apply_head,
    fields=frozenset({field}),
    late=frozenset({"masked", "visible", "entropy"}),
    draw=draw,
    sums=classes.SUMS if center == "momentum" else frozenset(),
    averages=True,
  )
  return Loss(frozenset(), init, apply, pair=False, head=head)
