"""How a model turns cosines into logits and probabilities: scale, bias, sigmoid or softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bigalign import tree
from bigalign.options import Component

# Losses that classify each pair on its own; all others compare the texts of an image.
SIGMOID = ("siglip", "sail", "siglip_distill")
# Options that hold a temperature that is not learned, or the first one of each sample.
_TEMPERATURES = ("tau", "tau_init")


class Head(NamedTuple):
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

    >>> Head(10.0, -5.0, True).probabilities(np.float32([[0.5, 0.5]])).tolist()
    [[0.5, 0.5]]
    >>> Head(10.0, 0.0, False).probabilities(np.float32([[0.5, 0.5, 0.5, 0.5]])).tolist()
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


def of_losses(params: Mapping[str, Any], losses: Mapping[str, Component]) -> Head:
  """The head of a run: that of the first loss that learns a scale, else of the first loss.

  Args:
    params: {path: array} of the run.
    losses: config.loss.
  """
  learned = {name: tree.subtree(params, f"loss/{name}/") for name in losses}
  name = next((x for x in losses if {"t", "temperature"} & {*learned[x]}), next(iter(losses)))
  found, resolved = learned[name], losses[name].options
  if "t" in found:
    scale = float(np.exp(np.asarray(found["t"])))
  elif "temperature" in found:
    scale = 1 / float(np.asarray(found["temperature"]))
  else:
    scale = _fixed(resolved)
  base = str(resolved.get("base", name))  # of matryoshka
  bias = float(np.asarray(found["b"])) if "b" in found else 0.0
  return Head(scale, bias, base in SIGMOID)


def _fixed(resolved: Mapping[str, Any]) -> float:
  """The scale of a loss that does not learn it, from its resolved options; 1 if they have none."""
  if resolved.get("t_init") is not None:
    return float(resolved["t_init"])
  tau = next((resolved[x] for x in _TEMPERATURES if resolved.get(x) is not None), 1.0)
  return 1 / float(tau)
