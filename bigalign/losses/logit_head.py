"""How a model turns cosines into logits and probabilities: scale, bias, sigmoid or softmax."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bigalign import tree
from bigalign.losses import LOSSES
from bigalign.options import Component, resolve

# Losses that classify each pair on its own; all others compare the texts of an image.
SIGMOID = ("siglip", "sail", "siglip_distill")
# Options that hold a temperature that is not learned, or the first one of each sample.
_TEMPERATURES = ("tau", "tau_init")


class LogitHead(NamedTuple):
  """What follows the cosines of a model.

  Args:
    scale: factor of the cosines.
    bias: what is added to them.
    sigmoid: whether the model was trained with a sigmoid loss; else with a softmax.
  """

  scale: float
  bias: float
  sigmoid: bool

  def logits(self, cosines: np.ndarray) -> np.ndarray:
    """[N, M] -> [N, M] float32."""
    return np.asarray(self.scale * cosines + self.bias, np.float32)

  def probabilities(self, cosines: np.ndarray) -> np.ndarray:
    """Returns the probability of each text, for each image.

    >>> LogitHead(10.0, -5.0, True).probabilities(np.float32([[0.5, 0.5]])).tolist()
    [[0.5, 0.5]]
    >>> LogitHead(10.0, 0.0, False).probabilities(np.float32([[0.5, 0.5, 0.5, 0.5]])).tolist()
    [[0.25, 0.25, 0.25, 0.25]]

    Args:
      cosines: [N, C].

    Returns:
      [N, C] float32. After a sigmoid loss each one is the probability that image and text match;
      else those of an image add up to 1.
    """
    x = self.logits(cosines).astype(np.float64)
    if self.sigmoid:
      return np.asarray(0.5 * (1 + np.tanh(x / 2)), np.float32)  # does not overflow
    shares = np.exp(x - x.max(1, keepdims=True, initial=-np.inf))
    return np.asarray(shares / shares.sum(1, keepdims=True), np.float32)


class _Chosen(NamedTuple):
  """The loss that decides the logits.

  Args:
    name: of the loss; of matryoshka, that of its base.
    learned: {path: array} of its learned scalars.
    resolved: its options.
  """

  name: str
  learned: Mapping[str, Any]
  resolved: Mapping[str, Any]

  @property
  def scale(self) -> float:
    """The factor of the cosines."""
    if "t" in self.learned:
      return float(np.exp(np.asarray(self.learned["t"])))
    if "temperature" in self.learned:
      return 1 / float(np.asarray(self.learned["temperature"]))
    return _fixed(self.resolved)


def of_losses(params: Mapping[str, Any], losses: Mapping[str, Component]) -> LogitHead:
  """The logit head of a run: that of the first loss that learns a scale, else of the first loss.

  Args:
    params: {path: array} of the run.
    losses: config.loss.
  """
  chosen = _chosen(params, losses)
  bias = float(np.asarray(chosen.learned["b"])) if "b" in chosen.learned else 0.0
  return LogitHead(chosen.scale, bias, chosen.name in SIGMOID)


def scalars(params: Mapping[str, Any], losses: Mapping[str, Component]) -> dict[str, np.ndarray]:
  """The logit head of a run as parameters, float32: the arguments are those of `of_losses`.

  Returns:
    {"t": the log of the scale, which may be learned or fixed; "b": the bias, if the loss has one}.
  """
  chosen = _chosen(params, losses)
  t = chosen.learned["t"] if "t" in chosen.learned else np.log(chosen.scale)
  arrays = {"t": t, **({"b": chosen.learned["b"]} if "b" in chosen.learned else {})}
  return {name: np.asarray(x, np.float32) for name, x in arrays.items()}


def _chosen(params: Mapping[str, Any], losses: Mapping[str, Component]) -> _Chosen:
  """The arguments are those of `of_losses`."""
  learned = {name: _learned(params, name) for name in losses}
  name = next((x for x in losses if {"t", "temperature"} & {*learned[x]}), next(iter(losses)))
  resolved = losses[name].options
  if "base" not in resolved:
    return _Chosen(name, learned[name], resolved)
  base = str(resolved["base"])  # of matryoshka
  options = resolve(
    LOSSES[base], resolved["base_options"] or {}, f"{losses[name].where}.base_options"
  )
  return _Chosen(base, learned[name], options.options)


def _learned(params: Mapping[str, Any], name: str) -> dict[str, Any]:
  """{path: array} of the scalars of a loss; those of the whole width if each width has its own."""
  found = tree.subtree(params, f"loss/{name}/")
  widths = [int(match[1]) for path in found if (match := re.match(r"d(\d+)/", path))]
  return tree.subtree(found, f"d{max(widths)}/") if widths else found


def _fixed(resolved: Mapping[str, Any]) -> float:
  """The scale of a loss that does not learn it, from its resolved options; 1 if they have none."""
  if resolved.get("t_init") is not None:
    return float(resolved["t_init"])
  tau = next((resolved[x] for x in _TEMPERATURES if resolved.get(x) is not None), 1.0)
  return 1 / float(tau)
