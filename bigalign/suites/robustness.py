"""Effective robustness: accuracy on a shifted set beyond what accuracy on the other one predicts.

https://arxiv.org/abs/2007.00644. The prediction is a line through models, on logit scales.
"""

from __future__ import annotations

import numpy as np

LEAST = 3  # models that a line is fitted to


def effective_robustness(reference: np.ndarray, shifted: np.ndarray) -> np.ndarray:
  """[M], the accuracy on the shifted set minus that which the line predicts.

  The line is fitted by least squares to all models, logit(shifted) over logit(reference). A model
  whose accuracy is 0, 1 or NaN has no logit: it is left out of the fit, and its value is NaN. All
  values are NaN if fewer than three different models are left.

  >>> x = np.array([0.2, 0.4, 0.6, 0.8])
  >>> abs(effective_robustness(x, x)).max() < 1e-9
  True

  Args:
    reference: [M], accuracy on the set that was not shifted.
    shifted: [M].
  """
  with np.errstate(divide="ignore", invalid="ignore"):
    x, y = (np.log(p / (1 - p)) for p in (reference, shifted))
  used = np.isfinite(x) & np.isfinite(y)
  if len({*x[used].tolist()}) < LEAST:
    return np.full(len(x), np.nan)
  centred = x[used] - x[used].mean()
  slope = (centred * y[used]).sum() / (centred**2).sum()
  line = y[used].mean() + slope * (np.where(used, x, np.nan) - x[used].mean())
  beyond: np.ndarray = np.where(used, shifted - 1 / (1 + np.exp(-line)), np.nan)
  return beyond
