"""What the log of a run says about its losses: defaults for large data, temperatures at a bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from bigalign import tree
from bigalign.losses.base import Loss
from bigalign.losses.heads.base import Head
from bigalign.losses.per_sample.global_contrastive import IDS
from bigalign.options import Component, definition

SMALL = 1_000_000  # pairs; the releases below were tuned on millions to hundreds of millions
# Options whose defaults are those of such a release: temperatures, and what keeps them low.
OF_LARGE_DATA: dict[str, tuple[str, ...]] = dict(
  sogclr=("tau",),
  isogclr=("tau_init", "rho"),
  fastclip_v2=("tau_init", "rho"),
  fastclip_v3=("rho",),
  drrho=("tau", "rho"),
  clip_gap=("t_init",),
  m2mix=("t_init",),
  m3mix=("t_init",),
)
SMALL_BATCH = 4_096  # with as many pairs, a bias of -10 costs a short run little
SHARE = 0.05  # of a run that a temperature is at its bound before the log says so
NEAR = 0.01  # of a bound, relative
EXTREME = 1e3


def defaults_of_large_data(terms: Mapping[str, Component], pairs: int) -> list[str]:
  """What to log of losses whose options are defaults for large data, on small data.

  Args:
    terms: the losses of a config by name.
    pairs: samples of an epoch; 0 if they are not known.
  """
  if not 0 < pairs < SMALL:
    return []
  said = []
  for name, term in terms.items():
    known = definition(term.function)
    same = [x for x in OF_LARGE_DATA.get(name, ()) if term.option(x) == known[x].default]
    if same:
      values = ", ".join(f"{x}={term.option(x):g}" for x in same)
      said.append(
        f"config.loss.{name}: {values}, the default, is a release's for millions of pairs or more;"
        f" this data has {pairs:,}. Compare with a temperature of 0.07 (t_init=14): docs/losses.md"
      )
  return said


def bias_of_large_batches(terms: Mapping[str, Component], batch_size: int) -> list[str]:
  """What to log of sigmoid losses whose first bias is the default, at a small batch.

  A pair has one positive and B - 1 negatives. With a bias of -log(B - 1) both have the same weight
  in the first step; the default, -10, is SigLIP's for batches of 32,768
  (https://arxiv.org/abs/2303.15343).

  Args:
    terms: the losses of a config by name.
    batch_size: B, the largest of the run.
  """
  said = []
  for name, term in terms.items():
    default = definition(term.function).get("b_init")
    biased = default is not None and default.default == -10
    if biased and term.option("b_init") == -10 and 1 < batch_size < SMALL_BATCH:
      said.append(
        f"config.loss.{name}: b_init=-10, the default, is for batches of about 32,768; with"
        f" {batch_size:,} pairs, b_init={-math.log(batch_size - 1):.1f} makes a short run learn"
        " faster: docs/losses.md"
      )
  return said


def unread_averages(heads: Iterable[Head], averages: Mapping[str, Any]) -> list[str]:
  """What to log of averaged parameters that no loss of a run reads.

  Args:
    heads: of the losses of all stages.
    averages: {path: array or shape} of config.twin.
  """
  if not averages or any(head.averages for head in heads):
    return []
  held = sum(math.prod(x.shape) for x in averages.values())
  return [
    f"config.twin averages {held:,} parameters that no loss reads, and no evaluation either; leave"
    " it out, or set config.ema for averages that are evaluated"
  ]


class BoundWatch:
  """Says once that a temperature has been at its bound for a share of the run.

  Args:
    terms: the losses of a config by name.
    total_steps: updates of the run.
  """

  def __init__(self, terms: Mapping[str, Component], total_steps: int):
    self._terms = terms
    self._steps = max(1, math.ceil(SHARE * total_steps))
    self._since: dict[str, int] = {}  # what is at a bound -> its first step there
    self._said: set[str] = set()

  def see(
    self, step: int, loss: Loss, scalars: Mapping[str, Any], metrics: Mapping[str, Any]
  ) -> list[str]:
    """What to log after a step.

    Args:
      step: its number.
      loss: the weighted sum.
      scalars: {"loss/…": [] float}, the scalars of the loss.
      metrics: the scalars of the log, with the means of temperatures per sample.
    """
    at_bound = {*_of_scalars(loss, scalars), *_of_samples(self._terms, metrics)}
    self._since = {text: self._since.get(text, step) for text in at_bound}
    said = [
      text
      for text, since in sorted(self._since.items())
      if step - since >= self._steps and text not in self._said
    ]
    self._said |= {*said}
    return [f"{text} since step {self._since[text]}" for text in said]


def _of_scalars(loss: Loss, scalars: Mapping[str, Any]) -> Iterator[str]:
  """The learned temperatures that are at a bound."""
  params = {path.removeprefix("loss/"): np.asarray(x) for path, x in scalars.items()}
  watched = [path for path in params if path.split("/")[-1] in ("t", "temperature")]
  if not watched:
    return
  for side, extreme in (("lower", -EXTREME), ("upper", EXTREME)):
    # What the loss does to an extreme value is its bound.
    moved = {path: np.full_like(x, extreme) for path, x in params.items() if path in watched}
    nested = tree.unflatten({**params, **moved})
    bounds = tree.flatten(loss.constrain(nested, nested))
    for path in watched:
      value, bound = float(params[path]), float(bounds[path])
      if abs(bound) >= EXTREME:
        continue
      what = "temperature"
      if path.endswith("/t"):  # the log of the scale
        what, value, bound = "logit scale", math.exp(value), math.exp(bound)
      if math.isclose(value, bound, rel_tol=NEAR):
        where = path.rpartition("/")[0].replace("/", ".")
        yield f"config.loss.{where}: the {what} has been at its {side} bound of {bound:.4g}"


def _of_samples(terms: Mapping[str, Component], metrics: Mapping[str, Any]) -> Iterator[str]:
  """The temperatures per sample whose mean over a batch is at a bound."""
  for name, term in terms.items():
    for option in {"tau_min", "tau_max"} & {*term.options}:
      for side in IDS:
        mean = metrics.get(f"tau_{side}", metrics.get(f"{name}/tau_{side}"))
        if mean is not None and math.isclose(mean, term.option(option), rel_tol=NEAR):
          yield (
            f"config.loss.{name}: the mean temperature of each {IDS[side]} of a batch has been at"
            f" {option}={term.option(option):g}"
          )
