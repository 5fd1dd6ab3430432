"""Greedy and beam search for the most probable text of a head that predicts tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from bigalign import tree
from bigalign.losses.heads.base import Writing


class Found(NamedTuple):
  """The best text of each image: ids [b, L] int32, 0 after the end; its log probability [b]."""

  ids: jax.Array
  scores: jax.Array


class Beams(NamedTuple):
  """The best texts found so far, for each image.

  Args:
    ids: [b, k, L] int32.
    scores: [b, k] float32, log probabilities.
    lengths: [b, k] int32, tokens; of an unfinished text, all so far.
    done: [b, k] bool, whether the end token is there.
    cache: of Writing.step, with a row for each text.
  """

  ids: jax.Array
  scores: jax.Array
  lengths: jax.Array
  done: jax.Array
  cache: Any


def search(
  writing: Writing,
  *,
  batch: int,
  length: int,
  beams: int = 1,
  prompt: Sequence[int] = (),
  end: int | None = None,
  length_penalty: float = 1.0,
) -> Found:
  """The most probable text of each image that is found with some beams; with one, the greedy text.

  Each step keeps the `beams` most probable beginnings; a finished text stays as it is. The result
  has the highest log probability / tokens ** length_penalty.

  Args:
    writing: how the head writes b k texts, of which those of an image are consecutive.
    batch: images, b.
    length: tokens of a text, L.
    beams: k.
    prompt: the ids with which each text begins; the others are predicted.
    end: the id after which a text is finished; None: each text has `length` tokens.
    length_penalty: 0 prefers short texts, 1 compares the mean log probability of tokens.
  """

  def step(position: jax.Array, found: Beams) -> Beams:
    before = jnp.where(position > 0, found.ids[:, :, jnp.maximum(position - 1, 0)], 0)
    logits, cache = writing.step(rearrange(before, "b k -> (b k)"), position, found.cache)
    logs = rearrange(jax.nn.log_softmax(logits.astype(jnp.float32)), "(b k) v -> b k v", k=beams)
    words = logs.shape[-1]
    # A finished text has one continuation, which costs nothing: 0, in place of padding.
    first = jnp.arange(words)[None, None] == 0
    logs = jnp.where(found.done[..., None], jnp.where(first, 0.0, -jnp.inf), logs)
    forced = jnp.where(jnp.arange(words) == given[position], 0.0, -jnp.inf)
    logs = jnp.where(position < len(prompt), forced, logs)
    totals = rearrange(found.scores[..., None] + logs, "b k v -> b (k v)")
    scores, chosen = jax.lax.top_k(totals, beams)
    parent, word = chosen // words, (chosen % words).astype(jnp.int32)
    ids = jnp.take_along_axis(found.ids, parent[..., None], 1)
    done, lengths = (jnp.take_along_axis(x, parent, 1) for x in (found.done, found.lengths))
    ids = jax.lax.dynamic_update_index_in_dim(ids, word, position, 2)
    lengths = lengths + ~done
    if beams > 1:
      cache = _rows(cache, rearrange(parent + beams * jnp.arange(batch)[:, None], "b k -> (b k)"))
    return Beams(ids, scores, lengths, done if end is None else done | (word == end), cache)

  given = jnp.zeros(length, jnp.int32).at[: len(prompt)].set(jnp.array(prompt, jnp.int32)[:length])
  one = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # the beams are equal at first
  first = Beams(
    jnp.zeros((batch, beams, length), jnp.int32),
    repeat(one, "k -> b k", b=batch),
    jnp.zeros((batch, beams), jnp.int32),
    jnp.zeros((batch, beams), bool),
    writing.cache,
  )
  last = jax.lax.fori_loop(0, length, step, first)
  ranks = last.scores / jnp.maximum(last.lengths, 1) ** length_penalty
  best = jnp.argmax(ranks, 1)[:, None]
  ids = jnp.take_along_axis(last.ids, best[..., None], 1)[:, 0]
  return Found(ids, jnp.take_along_axis(last.scores, best, 1)[:, 0])


def _rows(cache: Any, rows: jax.Array) -> Any:
  """The cache of other texts: rows [b k] are the numbers of the present ones."""
  arrays = tree.flatten(cache).items()
  return tree.unflatten(
    {path: jnp.take(x, rows, axis=int(tree.is_stacked(path))) for path, x in arrays}
  )
