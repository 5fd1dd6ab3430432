"""What a loss is: three pure functions, as in optax, and the weighted sum of several losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigalign import tree
from bigalign.losses.engine import tiles
from bigalign.losses.engine.pairwise import DEFAULT, Engine
from bigalign.losses.heads.base import Head

Params = dict[str, Any]  # learned scalars, float32
State = dict[str, Any]  # arrays that a loss keeps between steps; never differentiated
Features = Mapping[str, jax.Array]


class Context(NamedTuple):
  """What a loss may read in addition to features and batch: progress, a key and the engine."""

  step: jax.Array  # [] int32, updates done
  progress: jax.Array  # [] float32 in [0, 1], share of all updates that are done
  samples_seen: jax.Array  # [] float32
  epochs: jax.Array  # [] float32, passes over the data done; whole numbers are exact
  key: jax.Array  # a JAX key of this step
  engine: Engine  # forms the B x B logits
  sizes: Mapping[str, Any] = {}  # those that Loss.init gets


def first_context(
  engine: Engine = DEFAULT, seed: int = 0, sizes: Mapping[str, Any] | None = None
) -> Context:
  """The context of a run's first step, to apply a loss outside of a run."""
  zero = jnp.zeros(())
  step, key = jnp.zeros((), jnp.int32), jax.random.key(seed)
  return Context(step, zero, zero, zero, key, engine, sizes or {})


class Loss(NamedTuple):
  """A loss over the global batch; it does not know about devices or processes.

  Args:
    needs: what it reads in addition to zimg and ztxt, names of `PROVIDES` in losses/__init__.py.
    init: (sizes) -> (params, state). sizes: the number of ids, {"image": n, "text": m}, the width E
      of the embeddings, "embed", and, of data with teachers, their widths, "teachers".
    apply: (params, state, feats, batch, context) -> (objective, (state, metrics)).
      feats: zimg, ztxt [B, E], unit norm; for "raw" also raw_img, raw_txt [B, E] before
      normalisation; for "tokens" tokens_img [B, N, D], tokens_txt [B, L, D] and mask_txt [B, L];
      for "second_text" ztxt_second [B, E], of another caption of the same image; for "texts" ztxts
      [B, M, E], of M texts of the image, of which ztxt is the first; for "text_pairs" zquery and
      zdocument [B, E], of pairs of texts without images; for "ema_teacher" teacher_img,
      teacher_txt [B, E], zimg and ztxt of the averaged parameters. All are float32.
      batch: the data's fields, [B, ...]; for "ids" image_id, text_id [B, 2] uint32, the two words
      of a 64-bit number; for "labels" label [B] int32; for "teacher" teacher_img, teacher_txt
      [B, D], the teachers side by side; for "teacher_texts" teacher_txts [B, M, D]; for "texts"
      texts_kind [B, M], 0 for an absent text, 1 for a positive, 2 for a hard negative; for "noise"
      noise_prob [B], the probability that a pair does not belong together.
      objective: [] float32, which is differentiated; it may be a surrogate of the loss.
      metrics: "loss", [] float32, the value to log, and others.
    constrain: (params, params before the update) -> params, after each update; clamps temperatures.
    terms: of a weighted sum, {name: (weight, loss)}.
    per_sample_state: whether the arrays of its state are per-sample tables (per_sample/tables.py):
      all of them are, or none.
    pair: whether it reads zimg and ztxt; without a loss that does, a batch may have texts alone.
    head: layers of its own, whose features `apply` reads; None: no layers.
  """

  needs: frozenset[str]
  init: Callable[[Mapping[str, Any]], tuple[Params, State]]
  apply: Callable[
    [Params, State, Features, Mapping[str, jax.Array], Context], tuple[jax.Array, Any]
  ]
  constrain: Callable[[Params, Params], Params] = lambda params, before: params
  terms: Mapping[str, tuple[float, Loss]] = {}
  per_sample_state: bool = False
  pair: bool = True
  head: Head | None = None


def apply_once(
  loss: Loss,
  feats: Features,
  batch: Mapping[str, jax.Array] | None = None,
  sizes: Mapping[str, Any] | None = None,
  engine: Engine = DEFAULT,
) -> dict[str, jax.Array]:
  """The metrics of a loss at its first step, to try it outside of a run.

  Args:
    loss: to initialise and apply.
    feats: features, as for Loss.apply.
    batch: other fields of the batch.
    sizes: as for Loss.init.
    engine: forms the logits.
  """
  params, state = loss.init(sizes or {})
  feats, batch = tiles.widened(feats), tiles.widened(batch or {})
  _, results = loss.apply(params, state, feats, batch, first_context(engine, sizes=sizes))
  metrics: dict[str, jax.Array] = results[1]
  return metrics


def others(batch_size: int) -> int:
  """B - 1, the number of an anchor's negatives; raises ValueError if there is none."""
  if batch_size < 2:
    raise ValueError(
      f"config.batch_size={batch_size}: this loss compares a sample with others; use at least 2"
    )
  return batch_size - 1


def has_tables(loss: Loss) -> bool:
  """Whether the loss keeps per-sample tables, which bound the ids of the data."""
  return loss.per_sample_state or any(has_tables(term) for _, term in loss.terms.values())


def table_mask(loss: Loss, state: State) -> Any:
  """A tree of bools with the structure of `state`: which arrays are per-sample tables."""
  if loss.terms:
    return {name: table_mask(term, state[name]) for name, (_, term) in loss.terms.items()}
  return jax.tree.map(lambda _: loss.per_sample_state, state)


def weighted_sum(terms: Mapping[str, tuple[float, Loss]]) -> Loss:
  """The sum of weight * loss; each term has parameters, state and metrics under its own name.

  Features and batch fields of fewer bits are converted to float32 for the losses. The total is
  logged as "loss". A single term logs its metrics under their own names, as open_clip
  does ("contrastive_loss", "logit_scale"); several terms log theirs as "<name>/<metric>".

  Args:
    terms: {name: (weight, loss)}.
  """

  def init(sizes: Mapping[str, Any]) -> tuple[Params, State]:
    both = {name: loss.init(sizes) for name, (_, loss) in terms.items()}
    return {k: p for k, (p, _) in both.items()}, {k: s for k, (_, s) in both.items()}

  def apply(params, state, feats, batch, context):
    feats, batch = tiles.widened(feats), tiles.widened(batch)
    objective = jnp.zeros((), jnp.float32)
    value = jnp.zeros((), jnp.float32)
    states: State = {}
    metrics: dict[str, jax.Array] = {}
    for name, (weight, loss) in terms.items():
      own = {**feats, **tree.subtree(feats, f"{name}/")}  # with the features of its head
      term, (states[name], logs) = loss.apply(
        params.get(name, {}), state.get(name, {}), own, batch, context
      )
      objective += weight * term
      value += weight * logs["loss"]
      prefix = "" if len(terms) == 1 else f"{name}/"
      metrics |= {prefix + key: x for key, x in logs.items() if key != "loss" or prefix}
    return objective, (states, {"loss": value, **metrics})

  def constrain(params: Params, before: Params) -> Params:
    return {
      name: loss.constrain(params.get(name, {}), before.get(name, {}))
      for name, (_, loss) in terms.items()
    }

  needs = frozenset().union(*(loss.needs for _, loss in terms.values()))
  pair = any(loss.pair for _, loss in terms.values())
  return Loss(needs, init, apply, constrain, terms, pair=pair)
