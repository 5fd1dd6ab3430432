"""What a loss is: three pure functions, as optax does it, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigalign.losses.engine.pairwise import DEFAULT, Engine

Params = dict[str, Any]  # learned scalars, float32
State = dict[str, Any]  # what a loss remembers between steps, never differentiated
Features = Mapping[str, jax.Array]


class Context(NamedTuple):
  """What a loss may read beyond features and batch: the time in training, a key, the engine."""

  step: jax.Array  # [] int32, updates done
  progress: jax.Array  # [] float32 in [0, 1], share of all updates that are done
  samples_seen: jax.Array  # [] float32
  epochs: jax.Array  # [] float32, passes over the data done; whole numbers are exact
  key: jax.Array  # a JAX key of this step
  engine: Engine  # forms the B x B logits


def first_context(engine: Engine = DEFAULT, seed: int = 0) -> Context:
  """The context of a run's first step, to apply a loss outside of a run."""
  zero = jnp.zeros(())
  return Context(jnp.zeros((), jnp.int32), zero, zero, zero, jax.random.key(seed), engine)


class Loss(NamedTuple):
  """A loss over the global batch; it knows no devices and no ranks.

  needs: what it reads beyond zimg and ztxt, names of `PROVIDES` in losses/__init__.py.
  init: (sizes) -> (params, state); sizes holds the number of ids, {"image": n, "text": m}, and the
    width E of the embeddings, "embed".
  apply: (params, state, feats, batch, context) -> (objective, (state, metrics)).
    feats: zimg, ztxt [B, E], unit norm, float32; for "raw" also raw_img, raw_txt [B, E] before
    normalisation; for "tokens" tokens_img [B, N, D], tokens_txt [B, L, D] and mask_txt [B, L]; for
    "second_text" ztxt_second [B, E], of another caption of the same image; for "ema_teacher"
    teacher_img, teacher_txt [B, E], zimg and ztxt of the averaged parameters.
    batch: the data's fields, [B, ...]; for "ids" image_id, text_id [B, 2] uint32, the words of a 64
    bit number; for "labels" label [B] int32; for "teacher" teacher_img, teacher_txt [B, D]; for
    "noise" noise_prob [B], the probability that a pair does not belong together.
    objective: [] float32, what is differentiated (it may be a surrogate);
    metrics["loss"]: [] float32, the value to log.
  constrain: (params, params before the update) -> params, after each update: clamped temperatures.
  terms: of a weighted sum, {name: (weight, loss)}.
  """

  needs: frozenset[str]
  init: Callable[[Mapping[str, int]], tuple[Params, State]]
  apply: Callable[
    [Params, State, Features, Mapping[str, jax.Array], Context], tuple[jax.Array, Any]
  ]
  constrain: Callable[[Params, Params], Params] = lambda params, before: params
  terms: Mapping[str, tuple[float, Loss]] = {}


def weighted_sum(terms: Mapping[str, tuple[float, Loss]]) -> Loss:
  """sum of weight * loss, each term with parameters, state and metrics under its own name.

  The total is logged as "loss". One term alone logs its own metrics under their names, as
  open_clip does ("contrastive_loss", "logit_scale"); each of several, under "<name>/".
  """

  def init(sizes: Mapping[str, int]) -> tuple[Params, State]:
    both = {name: loss.init(sizes) for name, (_, loss) in terms.items()}
    return {k: p for k, (p, _) in both.items()}, {k: s for k, (_, s) in both.items()}

  def apply(params, state, feats, batch, context):
    objective = jnp.zeros((), jnp.float32)
    value = jnp.zeros((), jnp.float32)
    states: State = {}
    metrics: dict[str, jax.Array] = {}
    for name, (weight, loss) in terms.items():
      term, (states[name], logs) = loss.apply(
        params.get(name, {}), state.get(name, {}), feats, batch, context
      )
      objective += weight * term
      value += weight * logs["loss"]
      own = "" if len(terms) == 1 else f"{name}/"
      metrics |= {own + key: x for key, x in logs.items() if key != "loss" or own}
    return objective, (states, {"loss": value, **metrics})

  def constrain(params: Params, before: Params) -> Params:
    return {
      name: loss.constrain(params.get(name, {}), before.get(name, {}))
      for name, (_, loss) in terms.items()
    }

  needs = frozenset().union(*(loss.needs for _, loss in terms.values()))
  return Loss(needs, init, apply, constrain, terms)
