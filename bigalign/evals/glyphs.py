"""Zero-shot naming of characters that the model has never seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigalign.data.image import naflex
from bigalign.data.sources.glyphs import CUTS, PROBES, Glyphs, parts
from bigalign.evals.embed import Context, mean_embedder
from bigalign.evals.zeroshot import class_weights


def candidates(label: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns the names that each character is compared with.

  Args:
    label: [N] int32, the names of the characters.
    names: K names.

  Returns:
    [N, K] bool for "all" names, the "heldout" names (those of these N characters), and the names of
    the same "letter", with any diacritics or none.
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
  """Returns the accuracy of naming characters.

  Of equal similarities the earlier name comes first. NaN is never a hit.

  >>> score(np.eye(3), np.eye(3), label=np.arange(3), allowed=np.ones((3, 3), bool))["top1"]
  1.0

  Args:
    zimg: [N, E], characters.
    weights: [K, E], names.
    label: [N] int32, the correct names, which are always allowed.
    allowed: [N, K] bool, the names to choose from.

  Returns:
    "top1" and "top5", fractions, and "chance", the chance level of top1.
  """
  sims = zimg @ weights.T
  own = np.take_along_axis(sims, label[:, None], axis=1)  # [N, 1]
  earlier = np.arange(len(weights))[None] < label[:, None]
  before = (((sims > own) | ((sims == own) & earlier)) & allowed).sum(1)
  finite = np.isfinite(own[:, 0])
  return {
    "top1": float((finite & (before < 1)).mean()),
    "top5": float((finite & (before < 5)).mean()),
    "chance": float((1 / allowed.sum(1)).mean()),
  }


def embedder(context: Context, source: Glyphs, *, batch_size: int) -> Callable[[Any], jax.Array]:
  """Returns embed(params) -> [N, E] on every device: unit means over the PROBES of a character."""
  # A few hundred small images, rendered once and kept on the host.
  data = context.data
  images = data.stacked([data.evaluation_view(source[i]["image"]) for i in range(len(source))])

  def embed(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return context.embed_image(params, naflex.of_fields(batch))

  arrays = naflex.to_fields(images)
  return mean_embedder(context, embed, arrays, group=len(PROBES), batch_size=batch_size)


def glyphs(
  context: Context, *, split: str = "heldout", batch_size: int = 256
) -> Callable[[Any], dict[str, float]]:
  """Naming of characters that the training split contains in no font, and of as many that it does.

  The embedding of a character is the unit mean of its images in the two PROBES, that of a name the
  unit mean of its captions in these two.

  >>> import jax.numpy as jnp
  >>> from bigalign import sharding
  >>> from bigalign.data.loader.options import resolve_data
  >>> def embed(params, batch, mask=None):  # a collapsed model: all embeddings are equal
  ...   return jnp.full((len(batch), 4), 0.5)
  >>> data = resolve_data(dict(image_size=32, tokenizer=dict(name="byte", length=48)))
  >>> context = Context("val", embed, embed, sharding.make_mesh(), data)
  >>> run = glyphs(context, split="heldout_dev")
  >>> metrics = run(params=None)
  >>> metrics["val/val-unseen-heldout-top1"] == metrics["val/val-unseen-heldout-chance"]
  True

  Args:
    context: model, mesh and data options.
    split: "heldout" for results, "heldout_dev" for tuning.
    batch_size: images or captions at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-unseen-all-top1": fraction, …}: for unseen and seen characters;
    among all names, held-out names (for unseen characters) and names of the same letter; top1,
    top5 and chance.

  Raises:
    ValueError: for another split.
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
