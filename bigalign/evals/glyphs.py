"""Zero-shot naming of glyphs: can the model name characters that it has never seen?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigalign.data.sources.glyphs import CUTS, PROBES, Glyphs, parts
from bigalign.evals.embed import Context, mean_embedder
from bigalign.evals.zeroshot import class_weights


def candidates(label: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Which of K names each of N characters may be taken for, [N, K] bool.

  `all` of them; `heldout`: those of these N; `letter`: the letter with any marks or none.
  """
  letters = np.asarray([(parts(name) or (name, ""))[0] for name in names])
  return {
    "all": np.ones((len(label), len(names)), bool),
    "heldout": np.tile(np.isin(np.arange(len(names)), label), (len(label), 1)),
    "letter": letters[None] == letters[label][:, None],
  }


def score(
  zimg: np.ndarray, weights: np.ndarray, *, label: np.ndarray, allowed: np.ndarray
) -> dict[str, float]:
  """Hits of N characters, [N, E], among those of K names, [K, E], that `allowed` [N, K] leaves.

  label: [N] int32, the right name; it is always allowed. Of equal similarities the earlier name
  comes first; NaN is never a hit.

  Returns:
    "top1" and "top5", fractions, and "chance": what a guess among the allowed makes of top1.
  """
  sims = zimg @ weights.T
  own = np.take_along_axis(sims, label[:, None], axis=1)  # [N, 1]
  earlier = np.arange(len(weights))[None] < label[:, None]
  before = (((sims > own) | ((sims == own) & earlier)) & allowed).sum(1)
  found = np.isfinite(own[:, 0])
  return {
    "top1": float((found & (before < 1)).mean()),
    "top5": float((found & (before < 5)).mean()),
    "chance": float((1 / allowed.sum(1)).mean()),
  }


def embedder(context: Context, source: Glyphs, *, batch_size: int) -> Callable[[Any], jax.Array]:
  """embed(params) -> [N, E] on every device: the unit mean over each character's PROBES."""
  # A few hundred small images: drawn once, kept on the host.
  images = np.stack([context.data.evaluation_view(source[i]["image"]) for i in range(len(source))])

  def embed(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return context.embed_image(params, batch["image"])

  return mean_embedder(context, embed, dict(image=images), group=len(PROBES), batch_size=batch_size)


def glyphs(
  context: Context, *, split: str = "heldout", batch_size: int = 256
) -> Callable[[Any], dict[str, float]]:
  """Naming of characters that are in train in no font, and of as many that are.

  A character's embedding is the unit mean of its pictures in the two PROBES, a name's that of its
  captions in these two.

  Args:
    split: "heldout" for the report, "heldout_dev" for tuning.
    batch_size: images or captions at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-unseen-all-top1": fraction, ...}: characters unseen and seen; among
    all names, the held-out ones (for unseen characters), those with the same letter; top1, top5
    and chance.
  """
  if split not in ("heldout", "heldout_dev"):
    raise ValueError(
      f"config.evals.{context.name}.split={split!r} is not held out; known: heldout, heldout_dev"
    )
  sources = {"unseen": Glyphs(split, cuts=PROBES), "seen": Glyphs("seen", cuts=PROBES)}
  names = sources["unseen"].classnames
  labels = {kind: source.items[:: len(PROBES), 0] for kind, source in sources.items()}
  allowed = {kind: candidates(label, names) for kind, label in labels.items()}
  del allowed["seen"]["heldout"]
  embed = {
    kind: embedder(context, source, batch_size=batch_size) for kind, source in sources.items()
  }
  weigh = class_weights(
    context,
    classnames=names,
    templates=[f"{{c}}, {CUTS[cut]}" for cut in PROBES],
    batch_size=batch_size,
  )

  def run(params: Any) -> dict[str, float]:
    weights = np.asarray(weigh(params))
    metrics = {}
    for kind, label in labels.items():
      zimg = np.asarray(embed[kind](params))
      for among, mask in allowed[kind].items():
        for metric, value in score(zimg, weights, label=label, allowed=mask).items():
          metrics[f"val/{context.name}-{kind}-{among}-{metric}"] = value
    return metrics

  return run
