"""Greedy and beam search for the most probable text of a head that predicts tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

# (ids [b k, L], position) -> logits [b k, V] of the token at this position.
NextLogits = Callable[[jax.Array, jax.Array], jax.Array]


class Beams(NamedTuple):
  """The best texts found so far, for each image.

  Args:
    ids: [b, k, L] int32.
    scores: [b, k] float32, log probabilities.
    lengths: [b, k] int32, tokens; of an unfinished text, all so far.
    done: [b, k] bool, whether the end token is there.
  """

  ids: jax.Array
  scores: jax.Array
  lengths: jax.Array
  done: jax.Array


def search(
  next_logits: NextLogits,
  *,
  batch: int,
  length: int,
  beams: int = 1,
  start: int | None = None,
  end: int | None = None,
  length_penalty: float = 1.0,
) -> jax.Array:
  """The most probable text of each image that is found with some beams; with one, the greedy text.

  Each step keeps the `beams` most probable beginnings; a finished text stays as it is. The result
  has the highest log probability / tokens ** length_penalty.

  Args:
    next_logits: (ids, position) -> logits; rows of an image are consecutive.
    batch: images, b.
    length: tokens of a text, L.
    beams: k.
    start: the id with which each text begins; None: it is predicted too.
    end: the id after which a text is finished; None: each text has `length` tokens.
    length_penalty: 0 prefers short texts, 1 compares the mean log probability of tokens.

  Returns:
    [b, L] int32; what follows the end is 0.
  """

  def step(position: jax.Array, found: Beams) -> Beams:
    logits = next_logits(rearrange(found.ids, "b k l -> (b k) l"), position)
    logs = rearrange(jax.nn.log_softmax(logits.astype(jnp.float32)), "(b k) v -> b k v", k=beams)
    words = logs.shape[-1]
    # A finished text has one continuation, which costs nothing: 0, in place of padding.
    first = jnp.arange(words)[None, None] == 0
    logs = jnp.where(found.done[..., None], jnp.where(first, 0.0, -jnp.inf), logs)
    if start is not None:
      forced = jnp.where(jnp.arange(words) == start, 0.0, -jnp.inf)
      logs = jnp.where(position == 0, jnp.broadcast_to(forced, logs.shape), logs)
    totals = rearrange(found.scores[..., None] + logs, "b k v -> b (k v)")
    scores, chosen = jax.lax.top_k(totals, beams)
    parent, word = chosen // words, (chosen % words).astype(jnp.int32)
    ids = jnp.take_along_axis(found.ids, parent[..., None], 1)
    done, lengths = (jnp.take_along_axis(x, parent, 1) for x in (found.done, found.lengths))
    ids = jax.lax.dynamic_update_index_in_dim(ids, word, position, 2)
    lengths = lengths + ~done
    return Beams(ids, scores, lengths, done if end is None else done | (word == end))

  one = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # the beams are equal at first
  first = Beams(
    jnp.zeros((batch, beams, length), jnp.int32),
    repeat(one, "k -> b k", b=batch),
    jnp.zeros((batch, beams), jnp.int32),
    jnp.zeros((batch, beams), bool),
  )
  last = jax.lax.fori_loop(0, length, step, first)
  ranks = last.scores / jnp.maximum(last.lengths, 1) ** length_penalty
  best = jnp.argmax(ranks, 1)
  return jnp.take_along_axis(last.ids, best[:, None, None], 1)[:, 0]
