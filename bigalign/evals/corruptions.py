"""Zero-shot accuracy on corrupted images: the kinds of ImageNet-C that need no other library.

https://arxiv.org/abs/1903.12261. An image is decoded once, and corrupted as the model sees it: the
square of its size, which ImageNet-C takes as 224 pixels. The noise of an image depends on its key
alone, so that all models and meshes see the same.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from bigalign import checks, sharding
from bigalign.data.image import naflex
from bigalign.evals.embed import Context, log_rejects, open_data
from bigalign.evals.zeroshot import class_names, class_weights, measure, read_templates
from bigalign.run.progress import track

SEVERITIES = (1, 2, 3, 4, 5)
# The parameter of each severity. Noise: standard deviation; photons at full brightness; share of
# pixels. Blur: standard deviation in pixels. Then what is added to the value of HSV, the factor of
# the contrast, the share of the side that is left, and the quality of JPEG.
PARAMETERS: Mapping[str, tuple[float, ...]] = {
  "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
  "shot_noise": (60, 25, 12, 5, 3),
  "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
  "gaussian_blur": (1, 2, 3, 4, 6),
  "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
  "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
  "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
  "jpeg": (25, 18, 15, 10, 7),
}


def generator(sample_id: int, kind: str, severity: int) -> np.random.Generator:
  """The random numbers of the noise of an image: of its key, the kind and the severity."""
  digest = hashlib.sha256(f"{kind} {severity} {sample_id}".encode()).digest()
  return np.random.default_rng(int.from_bytes(digest[:16]))


def corrupt(image: np.ndarray, kind: str, severity: int, rng: np.random.Generator) -> np.ndarray:
  """A corrupted image, uint8 [H, W, 3].

  >>> grey = np.full((4, 4, 3), 100, np.uint8)
  >>> corrupt(grey, "brightness", 5, np.random.default_rng(0))[0, 0].tolist()
  [228, 228, 228]

  Args:
    image: uint8 [H, W, 3].
    kind: of PARAMETERS.
    severity: 1 to 5.
    rng: of the noise.
  """
  amount = PARAMETERS[kind][severity - 1]
  if kind == "pixelate":
    return _pixelate(image, amount)
  if kind == "jpeg":
    return _jpeg(image, int(amount))
  x = image / np.float64(255)
  if kind == "gaussian_noise":
    x = x + rng.normal(size=x.shape, scale=amount)
  elif kind == "shot_noise":
    x = rng.poisson(x * amount) / amount
  elif kind == "impulse_noise":  # half of the values that are hit become white
    hit = rng.random(x.shape) < amount
    x = np.where(hit, rng.random(x.shape) < 0.5, x)
  elif kind == "gaussian_blur":
    x = _blur(_blur(x, amount, 0), amount, 1)
  elif kind == "brightness":
    x = _brighter(x, amount)
  else:
    mean = x.mean((0, 1), keepdims=True)
    x = (x - mean) * amount + mean
  return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)


def _blur(x: np.ndarray, sigma: float, axis: int) -> np.ndarray:
  """A Gaussian filter along an axis, cut off at 4 sigma; the border is repeated."""
  radius = int(4 * sigma + 0.5)
  weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  weights /= weights.sum()
  pad = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
  windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, pad, "edge"), len(weights), axis)
  blurred: np.ndarray = windows @ weights
  return blurred


def _brighter(x: np.ndarray, amount: float) -> np.ndarray:
  """Adds to the value of HSV, the largest of red, green and blue; hue and saturation stay."""
  value = x.max(-1, keepdims=True)
  target = np.clip(value + amount, 0, 1)
  brighter: np.ndarray = np.where(value > 0, x * (target / np.maximum(value, 1e-12)), target)
  return brighter


def _pixelate(image: np.ndarray, share: float) -> np.ndarray:
  height, width = image.shape[:2]
  small = (max(1, int(width * share)), max(1, int(height * share)))
  shrunk = Image.fromarray(image).resize(small, Image.Resampling.BOX)
  return np.asarray(shrunk.resize((width, height), Image.Resampling.BOX))


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "jpeg", quality=quality)
  return np.asarray(Image.open(file))


def summary(clean: float, shares: Mapping[tuple[str, int], float]) -> dict[str, float]:
  """Means over severities and kinds, and the relative drop.

  Args:
    clean: accuracy on the images as they are.
    shares: {(kind, severity): accuracy}.

  Returns:
    {metric: value}: top1, "<kind>-<severity>-top1", "<kind>-mean_top1" over severities,
    "severity_<n>-mean_top1" over kinds, mean_top1 over all, and relative_drop, the share of the
    clean accuracy that is lost in the mean; without it if no clean image is found.
  """
  metrics = {"top1": clean}
  metrics |= {f"{kind}-{severity}-top1": share for (kind, severity), share in shares.items()}
  for place, name in ((0, "{}-mean_top1"), (1, "severity_{}-mean_top1")):
    for one in dict.fromkeys(key[place] for key in shares):
      own = [share for key, share in shares.items() if key[place] == one]
      metrics[name.format(one)] = float(np.mean(own))
  metrics["mean_top1"] = float(np.mean([*shares.values()]))
  if clean:
    metrics["relative_drop"] = 1 - metrics["mean_top1"] / clean
  return metrics


def corruptions(
  context: Context,
  *,
  source: str,
  templates: str | Sequence[str] = "photos",
  classnames: str | None = None,
  kinds: Sequence[str] = tuple(PARAMETERS),
  severities: Sequence[int] = SEVERITIES,
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Zero-shot accuracy on images as they are, and corrupted in kinds and severities.

  The mean corruption error of ImageNet-C is not computed, because it needs the errors of AlexNet.
  Ties and NaN are as of `zeroshot`.

  Args:
    context: model, mesh and data options.
    source: as in config.data.source, with labels.
    templates: of prompts, as of `zeroshot`.
    classnames: file of class names in the order of the labels; None: the names of the source.
    kinds: names of PARAMETERS.
    severities: from 1, weak, to 5, strong.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-corruptions-top1": fraction, …}, see `summary`, with num_samples and
    num_classes.

  Raises:
    ValueError: for an unknown kind or severity, a model that reads no squares, a source without
      class names; when run, for labels without a name.
  """
  where = f"config.evals.{context.name}"
  for kind in kinds:
    checks.known(f"{where}.kinds", kind, PARAMETERS)
  if unknown := [x for x in severities if x not in SEVERITIES]:
    raise ValueError(f"{where}.severities: {unknown} are not among {list(SEVERITIES)}")
  if not kinds or not severities:
    raise ValueError(f"{where}: kinds={list(kinds)}, severities={list(severities)}; name some")
  if context.data.naflex or context.data.frames:
    raise ValueError(
      f"{where}: corruptions are of squares, not of config.data.naflex or config.data.frames"
    )
  data = open_data(context._replace(shared=None), source, batch_size=batch_size, captions=0)
  names = class_names(data.source, classnames, where, source)
  prompts = read_templates(templates, f"{where}.templates")
  weigh = class_weights(context, classnames=names, templates=prompts, batch_size=batch_size)
  rows = sharding.host_rows(context.mesh, data.batch_size)
  replicated = sharding.replicated_sharding(context.mesh)
  ways = [(kind, severity) for kind in kinds for severity in severities]

  @functools.partial(jax.jit, out_shardings=replicated)
  def count(zimg: jax.Array, weights: jax.Array, batch: Mapping[str, jax.Array]) -> Any:
    return measure(zimg, weights, batch["label"], batch["valid"]), batch["rejects"].sum(0)

  def embedded(params: Any, batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, Any]:
    kept = {name: batch[name] for name in ("image", "label", "valid", "rejects")}
    on_mesh = sharding.global_batch(context.mesh, kept, rows, data.batch_size)
    return context.embed_image(params, naflex.of_fields(on_mesh)), on_mesh

  def run(params: Any) -> dict[str, float]:
    weights = weigh(params)
    totals: dict[Any, Any] = {}
    batches = -(-len(data.source) // data.batch_size)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for batch in track(data.batches(), context.name, batches, unit="batches"):
        for way in (None, *ways):
          seen = batch if way is None else {**batch, "image": _of_batch(batch, way, pool)}
          zimg, on_mesh = embedded(params, seen)
          own = {name: on_mesh[name] for name in ("label", "valid", "rejects")}
          hits, rejects = sharding.block_on_cpu(count(zimg, weights, own))
          before = totals.get(way)
          totals[way] = (
            (hits, rejects) if before is None else (before[0].merge(hits), before[1] + rejects)
          )
    found = {way: hits.compute() for way, (hits, _) in totals.items()}
    rejected = log_rejects(context.name, totals[None][1])
    samples = int(totals[None][0].top1.count)
    unlabelled = int(totals[None][0].unlabelled.total)
    if not samples or unlabelled:
      raise ValueError(
        f"{where}.source={source!r}: {unlabelled} of {samples} samples have no label of"
        f" {len(names)} class names, and {rejected} are rejected"
      )
    metrics = summary(float(found[None]["top1"]), {way: float(found[way]["top1"]) for way in ways})
    lowest = min(ways, key=lambda way: float(found[way]["top1"]))
    logging.info("evaluation %r: lowest top1 with %s, severity %d", context.name, *lowest)
    metrics |= dict(num_samples=samples, num_classes=len(names))
    metrics |= {"rejected": rejected} if rejected else {}
    return {f"val/{context.name}-corruptions-{name}": value for name, value in metrics.items()}

  return run


def _of_batch(
  batch: Mapping[str, np.ndarray], way: tuple[str, int], pool: concurrent.futures.Executor
) -> np.ndarray:
  """The corrupted images of a batch, uint8 [b, S, S, 3]."""

  def one(row: int) -> np.ndarray:
    high, low = (int(word) for word in batch["sample_id"][row])
    return corrupt(batch["image"][row], *way, generator(low | high << 32, *way))

  corrupted = np.array(batch["image"])
  used = np.flatnonzero(batch["valid"]).tolist()
  for row, image in zip(used, pool.map(one, used)):
    corrupted[row] = image
  return corrupted
