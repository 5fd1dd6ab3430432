"""Classification into learned prototypes, with an averaged teacher's classes as targets: DINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from bigalign import checks
from bigalign.losses.heads.sinkhorn import sinkhorn
from bigalign.sphere import unit
from bigalign.towers.base import gelu
from bigalign.towers.linear import Dense

Params = dict[str, Any]
# Logits of one token group are formed at once up to this many prototypes x tokens of a row.
AT_ONCE = 65_536
CENTERS = ("momentum", "sinkhorn")


def init(key: jax.Array, width: int, hidden: int, bottleneck: int, prototypes: int) -> Params:
  """The parameters of a head: three layers, and one vector per prototype.

  https://arxiv.org/abs/2104.14294: kernels from a normal distribution that is cut at two standard
  deviations of 0.02, biases 0. The prototypes have unit norm when they are used, so only their
  directions matter.

  Args:
    key: of the random kernels.
    width: D, of the inputs.
    hidden: units of the two hidden layers.
    bottleneck: C, of the vector that is compared with the prototypes.
    prototypes: K.
  """
  keys = jax.random.split(key, 4)
  shapes = {
    "fc1": (width, hidden),
    "fc2": (hidden, hidden),
    "fc3": (hidden, bottleneck),
    "prototypes": (bottleneck, prototypes),
  }
  params: Params = {
    name: {"kernel": 0.02 * jax.random.truncated_normal(one, -2, 2, shape, jnp.float32)}
    for one, (name, shape) in zip(keys, shapes.items())
  }
  for name in ("fc1", "fc2", "fc3"):
    params[name]["bias"] = jnp.zeros(shapes[name][1:], jnp.float32)
  return params


def vectors(params: Params, x: jax.Array) -> jax.Array:
  """[..., D] -> [..., C], unit norm: the three layers, computed in the dtype of x; float32."""
  for name in ("fc1", "fc2", "fc3"):
    layer = params[name]
    y: Any = Dense(len(layer["bias"]), dtype=x.dtype).apply({"params": layer}, x)
    x = gelu(y) if name != "fc3" else y
  return unit(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def logits(params: Params, x: jax.Array) -> jax.Array:
  """[..., C] unit vectors -> [..., K], their cosines with the prototypes."""
  kernel = params["prototypes"]["kernel"].astype(x.dtype)
  return x @ unit(kernel.T).T


def assigned(logits: jax.Array, center: jax.Array, temperature: jax.Array | float) -> jax.Array:
  """[..., K]: the probabilities of a teacher's classes, from which `center` [K] is subtracted."""
  center = jnp.expand_dims(center, tuple(range(logits.ndim - 1)))
  return jax.lax.stop_gradient(jax.nn.softmax((logits - center) / temperature, -1))


def cross_entropy(logits: jax.Array, targets: jax.Array, temperature: float) -> jax.Array:
  """[..., K] and [..., K] -> [...]: -sum over classes of target x log softmax(logits / t)."""
  return -(targets * jax.nn.log_softmax(logits / temperature, -1)).sum(-1)


def compared(
  to_logits: Callable[[jax.Array], jax.Array],
  students: jax.Array,
  targets: jax.Array,
  pairs: str,
  temperature: float,
) -> jax.Array:
  """[b]: the sum of the cross-entropies of all pairs of a view of the teacher and of the student.

  Args:
    to_logits: [..., C] -> [..., K], of the student.
    students: [b, V, C], what `to_logits` takes.
    targets: [b, G, K], the probabilities of the teacher's views.
    pairs: "local_only": every view of the student with every view of the teacher. "all_but_same":
      likewise, but none with itself; the teacher's views are the first of the student's.
    temperature: of the student.
  """
  count, views = targets.shape[1], students.shape[1]
  total = targets.sum(1, keepdims=True)
  # Which of the teacher's views is the same one, [b, V, G].
  same = jnp.broadcast_to(
    jnp.eye(views, count, dtype=targets.dtype)[None], (len(students), views, count)
  )

  def group(students: jax.Array, same: jax.Array) -> dict[str, jax.Array]:
    wanted = total
    if pairs == "all_but_same":
      wanted = total - jnp.einsum("bvg,bgk->bvk", same, targets)
    return {"sum": cross_entropy(to_logits(students), wanted, temperature).sum(1)}

  return in_groups(group, (students, same), targets.shape[2])["sum"]


def pairs_of(teachers: int, students: int, pairs: str) -> int:
  """The number of pairs of a view of the teacher and one of the student, see `compared`."""
  return teachers * students - (teachers if pairs == "all_but_same" else 0)


def patches(
  to_logits: tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]],
  students: jax.Array,
  teachers: jax.Array,
  mask: jax.Array,
  center: jax.Array,
  temperatures: tuple[float, jax.Array | float],
) -> dict[str, jax.Array]:
  """Cross-entropies of patches with the teacher's classes of the same patches.

  Args:
    to_logits: of the student and of the teacher, [..., C] -> [..., K].
    students: [b, N, C].
    teachers: [b, N, C].
    mask: [b, N] bool, the patches that the student did not see.
    center: [K], subtracted from the teacher's logits.
    temperatures: of the student and of the teacher.

  Returns:
    "masked" and "visible" [b], sums over the patches of each kind; "logits" [K], the sum of the
    teacher's logits; "assigned" [K], that of its probabilities; "entropy" [b], that of their
    entropies.
  """

  def group(students: jax.Array, teachers: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    theirs = jax.lax.stop_gradient(to_logits[1](teachers))
    targets = assigned(theirs, center, temperatures[1])
    loss = cross_entropy(to_logits[0](students), targets, temperatures[0])
    return {
      "masked": jnp.where(mask, loss, 0).sum(1),
      "visible": jnp.where(mask, 0, loss).sum(1),
      **of_teacher(theirs, targets),
    }

  return in_groups(group, (students, teachers, mask), center.shape[0])


def of_teacher(logits: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
  """Sums of what a teacher says of [b, n, K]: "logits" [K], "assigned" [K], "entropy" [b]."""
  return {
    "logits": logits.sum((0, 1)),
    "assigned": targets.sum((0, 1)),
    "entropy": entropy(targets).sum(1),
  }


SUMS = frozenset({"logits", "assigned"})


def entropy(p: jax.Array) -> jax.Array:
  """[..., K] probabilities -> [...], in nats."""
  return -jax.scipy.special.xlogy(p, p).sum(-1)


def watched(feats: Mapping[str, jax.Array], count: int | jax.Array) -> dict[str, jax.Array]:
  """Metrics by which a collapse is seen, from `of_teacher` of `count` vectors.

  "entropy_of_mean", at most ln K: near 0, all images have one class. "entropy": at ln K, the
  classes say nothing.
  """
  return {
    "entropy": feats["entropy"].sum() / count,
    "entropy_of_mean": entropy(feats["assigned"] / count),
  }


def next_state(
  state: Mapping[str, jax.Array], total: jax.Array, count: int | jax.Array, momentum: float
) -> dict[str, jax.Array]:
  """The state after a step whose `count` teacher logits add up to `total` [K]."""
  center = momentum * state["center"] + (1 - momentum) * total / count
  return {"center": center, "updates": state["updates"] + 1}


def in_groups(
  function: Callable[..., Mapping[str, jax.Array]], xs: Any, prototypes: int
) -> dict[str, jax.Array]:
  """Results of a function of token groups, without logits of all tokens in memory at once.

  The tokens of each row are split into groups, and what the function computes is computed again
  for the gradient.

  Args:
    function: ([b, g, …] of each array of xs) -> {name: array}; results are added up over groups.
    xs: a tuple of arrays [b, n, …].
    prototypes: K.
  """
  count = xs[0].shape[1]
  fits = max(1, AT_ONCE // prototypes)
  size = max(n for n in range(1, count + 1) if count % n == 0 and n <= fits)
  groups = jax.tree.map(lambda x: rearrange(x, "b (n g) ... -> n b g ...", g=size), xs)
  first = jax.tree.map(lambda x: x[0], groups)
  if size == count:
    return dict(jax.checkpoint(function)(*first))
  shapes = jax.eval_shape(function, *first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(shapes))

  def add(total: dict[str, jax.Array], part: Any) -> tuple[dict[str, jax.Array], None]:
    return jax.tree.map(jnp.add, total, dict(jax.checkpoint(function)(*part))), None

  added: dict[str, jax.Array] = jax.lax.scan(add, zeros, groups)[0]
  return added


def initial_state(prototypes: int) -> dict[str, jax.Array]:
  """The state of a loss with a centre: "center" [K], and "updates" [], how many it has seen."""
  return {"center": jnp.zeros((prototypes,), jnp.float32), "updates": jnp.zeros((), jnp.float32)}


def teacher_temperature(
  ends: Sequence[float], over: int, state: Mapping[str, jax.Array]
) -> jax.Array:
  """[]: a line from the first temperature to the second in the first `over` updates of the loss."""
  first, last = ends
  share = jnp.minimum(state["updates"] / over, 1) if over else jnp.ones(())
  return first + (last - first) * share


def check(
  where: str,
  *,
  center: str,
  student_temp: float,
  teacher_temp: Sequence[float],
  center_momentum: float,
  prototypes: int,
  hidden: int,
  bottleneck: int,
) -> None:
  """Raises ValueError, naming the option, for values that a head cannot have."""
  checks.known(f"{where}.center", center, CENTERS)
  for name, values in dict(student_temp=[student_temp], teacher_temp=teacher_temp).items():
    if not all(x > 0 for x in values):
      raise ValueError(f"{where}.{name}={values}: more than 0")
  if not 0 <= center_momentum < 1:
    raise ValueError(f"{where}.center_momentum={center_momentum}: from 0 to less than 1")
  checks.between(where, 1, prototypes=prototypes, hidden=hidden, bottleneck=bottleneck)


def balanced(
  logits: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
  """Assignments of a teacher's [B, G, K] by Sinkhorn's algorithm over all rows of the batch.

  Three iterations and eps = the teacher's temperature, as in DINOv2 and DINOv3,
  https://arxiv.org/abs/2304.07193, 2508.10104.

  Returns:
    [B, G, K]; `of_teacher` of them; their number, B G.
  """
  rows = rearrange(logits, "b g k -> (b g) k")
  q = sinkhorn(rows, eps=temperature, iterations=3)
  targets = rearrange(q, "(b g) k -> b g k", g=logits.shape[1])
  return targets, of_teacher(logits, targets), jnp.asarray(len(rows))
