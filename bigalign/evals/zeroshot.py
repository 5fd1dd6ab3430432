"""Zero-shot classification, by class names in prompt templates instead of a trained classifier."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import metrics as clu_metrics

from bigalign import sharding, tree
from bigalign.data.files.lines import read_names, read_text
from bigalign.data.files.patterns import expand_variables
from bigalign.data.samples.ids import class_key, sample_id
from bigalign.data.sources.base import name_classes
from bigalign.data.sources.webdataset import read_classnames
from bigalign.data.stores.reader import Store
from bigalign.evals.calibration import Calibration
from bigalign.evals.confusion import Confusion, confusion
from bigalign.evals.embed import (
  Context,
  EvalData,
  embed_vectors,
  embedded_images,
  first_class,
  log_rejects,
  logits,
  mean_embedder,
  open_data,
  places,
  texts_embedder,
  unit_mean,
)
from bigalign.evals.frequency import measure as measure_frequency
from bigalign.evals.frequency import read_counts
from bigalign.evals.groups import Groups, read_groups
from bigalign.evals.languages import LabelSet, label_set, languages
from bigalign.evals.ood import Outside
from bigalign.sphere import unit

PROMPTS = {path.stem: path for path in sorted(pathlib.Path(__file__).parent.glob("prompts/*.json"))}
OPEN_CLIP = "open_clip"  # CLIP's templates, which are not ours to ship
_SLOTS = ("{c}", "{}")  # placeholders of the class name in CLIP_benchmark and open_clip


def text_file(path: str, what: str) -> pathlib.Path:
  """The file at a path whose variables and ~ are expanded; FileNotFoundError if there is none."""
  file = pathlib.Path(expand_variables(path, what=what)).expanduser()
  if not file.is_file():
    raise FileNotFoundError(f"{what}={path!r}: {file} does not exist")
  return file


def read_lines(path: str, what: str, *, labels: bool = False) -> list[str]:
  """Returns the strings of a .json list, or the lines of another text file that are not blank.

  Args:
    path: of the file; variables and ~ are expanded.
    what: the option that names it, for errors.
    labels: whether line numbers are labels; then a blank line is an error.

  Raises:
    FileNotFoundError: if the file is missing.
    ValueError: for an empty file, one that is not UTF-8, or JSON that is not a list of strings.
  """
  file = text_file(path, what)
  if file.suffix != ".json":
    texts = [*read_classnames(file)] if labels else list(filter(None, read_names(file)))
  else:
    texts = _json(file, f"{what}={path!r}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
      keys = f" with the keys {tree.shown(sorted(texts))}" if isinstance(texts, dict) else ""
      raise ValueError(
        f"{what}={path!r} holds a {type(texts).__name__}{keys}; expected a list of strings"
      )
  if not texts:
    raise ValueError(f"{what}={path!r}: {file} is empty")
  return texts


def _json(file: pathlib.Path, what: str) -> Any:
  """The value of a JSON file; ValueError that begins with `what` for another file."""
  try:
    return json.loads(read_text(file))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{what}: {file} is not JSON: {error}") from error


def read_descriptions(path: str, classnames: Sequence[str], what: str) -> list[list[str]]:
  """Returns the sentences that describe each class, in the order of the names.

  Args:
    path: of a .json file {class name: [sentences]}; variables and ~ are expanded.
    classnames: K names.
    what: the option that names the file, for errors.

  Raises:
    FileNotFoundError: if the file is missing.
    ValueError: for a file of another form, a class without sentences, and a class that is not among
      the names; the classes are counted and named.
  """
  what = f"{what}={path!r}"
  named = _json(text_file(path, what.partition("=")[0]), what)
  if not isinstance(named, dict) or not named:
    raise ValueError(f"{what} must hold an object {{class name: [sentences]}} with some classes")
  wrong = [
    k
    for k, x in named.items()
    if not isinstance(x, list) or not all(isinstance(one, str) and one.strip() for one in x)
  ]
  if wrong:
    raise ValueError(
      f"{what}: {_classes(wrong, named)} have something else than a list of sentences"
    )
  known = {*classnames}
  unknown = [k for k in named if k not in known]
  missing = [k for k in classnames if not named.get(k)]
  if unknown or missing:
    parts = [
      f"{_classes(missing, classnames)} have no sentence" if missing else "",
      f"{_classes(unknown, named)} are no class of the source" if unknown else "",
    ]
    raise ValueError(
      f"{what}: {'; '.join(filter(None, parts))}. Its keys must be the class names, such as"
      f" {classnames[0]!r}"
    )
  return [named[k] for k in classnames]


def _classes(some: Sequence[str], every: Sequence[str] | Mapping[str, Any]) -> str:
  return f"{len(some)} of {len(every)} classes ({tree.shown(some)})"


def read_label_sets(
  classnames: str | Mapping[str, str] | None, what: str
) -> dict[str, LabelSet] | None:
  """{language: class names}; None if `classnames` names a file of one list, or nothing.

  Args:
    classnames: {language: file}, or a .json of an object {language: [[labels], [names]]}.
    what: the option, for errors.
  """
  if isinstance(classnames, Mapping):
    sets = {}
    for language, path in classnames.items():
      where = f"{what}.{language}"
      file = text_file(path, where)
      value = _json(file, where) if file.suffix == ".json" else [*read_classnames(file)]
      sets[language] = label_set(value, f"{where}={path!r}")
  elif classnames is not None and pathlib.Path(classnames).suffix == ".json":
    value = _json(text_file(classnames, what), f"{what}={classnames!r}")
    if not isinstance(value, dict):
      return None
    sets = {name: label_set(own, f"{what}={classnames!r}: {name!r}") for name, own in value.items()}
  else:
    return None
  if not sets:
    raise ValueError(f"{what}={classnames!r} names no language")
  return sets


def named_files(
  *,
  classnames: str | Mapping[str, str] | None,
  templates: str | Sequence[str] | Mapping[str, str | Sequence[str]],
  descriptions: str = "",
  frequency: str = "",
) -> dict[str, str]:
  """{option: path} of the options of `zeroshot` that name a file; "classnames.de" of a language."""
  given: dict[str, Any] = dict(
    classnames=classnames,
    templates=templates,
    descriptions=descriptions or None,
    frequency=frequency or None,
  )
  named: dict[str, str] = {}
  for option, value in given.items():
    several = value if isinstance(value, Mapping) else {"": value}
    for language, one in several.items():
      if one is not None and (option != "templates" or _is_file(one)):
        named[f"{option}.{language}" if language else option] = str(one)
  return named


def _is_file(templates: str | Sequence[str]) -> bool:
  """Whether templates are given by the path of a file."""
  if not isinstance(templates, str) or templates in PROMPTS:
    return False
  return pathlib.Path(templates).suffix in (".txt", ".json")


def read_templates(templates: str | Sequence[str], what: str = "templates") -> list[str]:
  """Returns prompt templates.

  Args:
    templates: name of a set in PROMPTS, "open_clip" for the 80 of CLIP that an installed open_clip
      holds, path of a .txt or .json file, or the templates.
    what: the option that gives them, for errors.

  Raises:
    ImportError: for "open_clip" without open_clip.
    ValueError: for an unknown set, or a template without a placeholder for the class name.
  """
  if not isinstance(templates, str):
    lines = list(templates)
  elif templates == OPEN_CLIP:
    lines = _of_open_clip(what)
  elif templates in PROMPTS:
    lines = read_lines(str(PROMPTS[templates]), what)
  elif _is_file(templates):
    lines = read_lines(templates, what)
  else:
    raise ValueError(
      f"{what}: unknown {templates!r}.{tree.nearest(templates, [*PROMPTS, OPEN_CLIP])}"
      f" Known: {[*PROMPTS, OPEN_CLIP]}, or a .txt or .json file"
    )
  for template in lines:
    if not any(slot in template for slot in _SLOTS):
      raise ValueError(f"{what}: {template!r} has no {{c}} or {{}} for the class name")
  return lines


def _of_open_clip(what: str) -> list[str]:
  """CLIP's templates from a file of an installed open_clip; open_clip itself is not imported."""
  found = importlib.util.find_spec("open_clip")
  if found is None or found.origin is None:
    raise ImportError(
      f"{what}={OPEN_CLIP!r} reads CLIP's templates from open_clip: pip install open_clip_torch"
    )
  file = pathlib.Path(found.origin).with_name("zero_shot_metadata.py")
  return [template("{c}") for template in runpy.run_path(str(file))["OPENAI_IMAGENET_TEMPLATES"]]


def fill(template: str, name: str) -> str:
  """Returns the prompt of one class; braces in the name are kept.

  >>> fill("a photo of a {c}.", "cat")
  'a photo of a cat.'
  """
  slot = next(slot for slot in _SLOTS if slot in template)
  return template.replace(slot, name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerClass(clu_metrics.Metric):
  """Mean recall of the classes that occur.

  Attributes:
    hits: [K], correct samples of each class.
    count: [K], samples of each class.
  """

  hits: jax.Array
  count: jax.Array

  @classmethod
  def from_model_output(  # type: ignore[override]
    cls, *, top1: jax.Array, label: jax.Array, mask: jax.Array, classes: int, **_: Any
  ) -> PerClass:
    # A label outside [0, K) counts for no class.
    member = (label[:, None] == jnp.arange(classes)[None]) & mask[:, None]  # [B, K]
    return cls(
      hits=jnp.sum(member & top1[:, None], axis=0, dtype=jnp.int32),
      count=jnp.sum(member, axis=0, dtype=jnp.int32),
    )

  def merge(self, other: PerClass) -> PerClass:
    merged: PerClass = jax.tree.map(jnp.add, self, other)
    return merged

  def compute(self) -> jax.Array:
    recall = self.hits / jnp.maximum(self.count, 1)
    return recall.sum() / jnp.maximum((self.count > 0).sum(), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MacroF1(clu_metrics.Metric):
  """Mean F1 score of the classes that occur, as WILDS reports it of iWildCam.

  Attributes:
    hits: [K], correct samples of each class.
    count: [K], samples of each class.
    found: [K], samples that are taken for each class.
  """

  hits: jax.Array
  count: jax.Array
  found: jax.Array

  @classmethod
  def from_model_output(  # type: ignore[override]
    cls, *, found: jax.Array, label: jax.Array, mask: jax.Array, classes: int, **_: Any
  ) -> MacroF1:
    every = jnp.arange(classes)[None]
    member = (label[:, None] == every) & mask[:, None]  # [B, K]
    taken = (found[:, None] == every) & mask[:, None]
    return cls(*(jnp.sum(x, axis=0, dtype=jnp.int32) for x in (member & taken, member, taken)))

  def merge(self, other: MacroF1) -> MacroF1:
    merged: MacroF1 = jax.tree.map(jnp.add, self, other)
    return merged

  def compute(self) -> jax.Array:
    f1 = 2 * self.hits / jnp.maximum(self.count + self.found, 1)
    occurs = self.count > 0
    return jnp.where(occurs, f1, 0).sum() / jnp.maximum(occurs.sum(), 1)


Hits = clu_metrics.Collection.create(
  top1=clu_metrics.Average.from_output("top1"),
  top5=clu_metrics.Average.from_output("top5"),
  mean_per_class_recall=PerClass,
  macro_f1=MacroF1,
  unlabelled=clu_metrics.Average.from_output("unlabelled"),
)


def measure(zimg: jax.Array, weights: jax.Array, label: jax.Array, valid: jax.Array) -> Any:
  """Returns the hits of a batch, as a `Hits` collection.

  Of equal logits the earlier class comes first, see `places`. NaN is never a hit.

  Args:
    zimg: [B, E], images.
    weights: [K, E], classes.
    label: [B] int32.
    valid: [B] bool; other samples do not count.
  """
  classes = len(weights)
  known = (label >= 0) & (label < classes)
  scores = logits(zimg, weights)
  before = places(scores, jnp.clip(label, 0, classes - 1))
  return Hits.single_from_model_output(
    top1=known & (before < 1),
    top5=known & (before < min(5, classes)),  # place K: the score is not finite
    found=first_class(scores),
    unlabelled=~known,
    label=label,
    mask=valid,
    classes=classes,
  )


def without_images(hits: Any, names: Sequence[str], name: str) -> dict[str, int]:
  """{"num_empty_classes": number} of the classes without an image, which the log names; or {}.

  Args:
    hits: of all samples, a `Hits` collection.
    names: K names.
    name: of the evaluator.
  """
  empty = [own for own, n in zip(names, np.asarray(hits.mean_per_class_recall.count)) if not n]
  if not empty:
    return {}
  logging.warning(
    "evaluation %r: classes without images: %d of %d; mean_per_class_recall and macro_f1 are means"
    " over the others: %s",
    *(name, len(empty), len(names), tree.shown(empty)),
  )
  return {"num_empty_classes": len(empty)}


def average_precision(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
  """Returns [K] float64, the average precision of each class, as CLIP_benchmark computes it.

  The precision at a positive sample is the share of positives among the samples with at least its
  score, so that the order of equal scores does not matter. The average precision is its mean over
  the positives of the class; 0 for a class without any, and at a score of NaN.

  >>> scores, positive = np.float32([[4], [3], [2], [1]]), np.array([[1], [0], [0], [1]], bool)
  >>> average_precision(scores, positive).tolist()  # the mean of 1 / 1 and 2 / 4
  [0.75]

  Args:
    scores: [N, K].
    positive: [N, K] bool, the classes of each sample.
  """
  values = np.zeros(scores.shape[1])
  for k in range(scores.shape[1]):
    real = ~np.isnan(scores[:, k])
    negated = np.where(real, -scores[:, k], np.inf)
    order = np.argsort(negated, kind="stable")
    ranked, hit = negated[order], positive[order, k]
    at_least = np.searchsorted(ranked, ranked, side="right")  # samples with at least this score
    precision = np.cumsum(hit)[at_least - 1] / at_least
    values[k] = precision[hit & real[order]].sum() / max(hit.sum(), 1)
  return values


def prefix_of(z: jax.Array, width: int) -> jax.Array:
  """[..., width], unit norm: the first components of embeddings; width 0: the embeddings.

  Raises:
    ValueError: for a width that is not below theirs.
  """
  if not width:
    return z
  if not 0 < width < z.shape[-1]:
    raise ValueError(f"widths: {width} must be between 1 and {z.shape[-1] - 1}, of {z.shape[-1]}")
  return unit(z[..., :width])


def _of_widths(
  combine: Callable[[jax.Array], jax.Array], widths: Sequence[int] | None
) -> Callable[[jax.Array], Any]:
  """`combine` of the embeddings; with widths {width: that of their prefixes}, 0 for the whole."""
  if widths is None:
    return combine
  return lambda z: {width: combine(prefix_of(z, width)) for width in (0, *widths)}


def class_names(source: Any, file: str | None, where: str, what: str) -> list[str]:
  """The names of the classes of a source; its labels that are names then mean those of a file.

  Args:
    source: the samples.
    file: of names in the order of the labels; None: the names that the source has.
    where: the evaluator, for errors.
    what: names the source, for errors.

  Raises:
    ValueError: if there are none.
  """
  if file is None:
    names = list(getattr(source, "classnames", ()))
  else:
    names = read_lines(file, f"{where}.classnames", labels=True)
    name_classes(source, names)
  if not names:
    raise ValueError(
      f"{where}: {what} has no class names (no classnames.txt next to its shards);"
      " set classnames to a file with one name per line, in the order of the labels"
    )
  return names


def class_weights(
  context: Context,
  *,
  classnames: Sequence[str],
  templates: Sequence[str],
  batch_size: int,
  widths: Sequence[int] | None = None,
) -> Callable[[Any], Any]:
  """Returns weigh(params) -> [K, E] on every device: unit means over the prompts of each class.

  Args:
    context: of the evaluator.
    classnames: K names.
    templates: with a placeholder for the name.
    batch_size: prompts at a time, over all devices.
    widths: of Matryoshka prefixes; then weigh(params) is {0: [K, E], width: [K, width], …}.
  """
  return texts_embedder(
    context,
    [fill(template, name) for name in classnames for template in templates],
    group=len(templates),
    batch_size=batch_size,
    combine=_of_widths(unit_mean, widths),
  )


def description_weights(
  context: Context,
  *,
  sentences: Sequence[Sequence[str]],
  pad: bool,
  renormalise: bool,
  batch_size: int,
  widths: Sequence[int] | None = None,
) -> Callable[[Any], Any]:
  """Returns weigh(params) -> [K, E] on every device: means over the sentences of each class.

  As in freeze-align (https://arxiv.org/abs/2409.19425) and VDT (https://arxiv.org/abs/2307.11661),
  the mean of unit vectors keeps its length. The score of an image is then the mean of its cosines
  with the sentences, as in Menon and Vondrick (https://arxiv.org/abs/2210.07183).

  Args:
    context: of the evaluator.
    sentences: those of K classes.
    pad: whether shorter lists are padded to the longest by repeating their first sentence, which
      counts more often then, as in freeze-align.
    renormalise: whether the means are scaled to unit norm, which can change the top class.
    batch_size: sentences at a time, over all devices.
    widths: as of class_weights.
  """
  counts = np.array([len(own) for own in sentences])
  ordinal = np.arange(counts.max())[None]
  first = (np.cumsum(counts) - counts)[:, None]
  own = ordinal < counts[:, None]
  shares = np.full(own.shape, 1 / counts.max()) if pad else own / counts[:, None]  # [K, G]

  def combine(z: jax.Array) -> jax.Array:
    mean = jnp.sum(shares[:, :, None].astype(z.dtype) * z, axis=1)
    return unit(mean) if renormalise else mean

  return texts_embedder(
    context,
    [x for own in sentences for x in own],
    group=first + np.where(own, ordinal, 0),
    batch_size=batch_size,
    combine=_of_widths(combine, widths),
  )


def stored_class_weights(
  context: Context,
  *,
  classnames: Sequence[str],
  folder: str,
  batch_size: int,
  widths: Sequence[int] | None = None,
) -> Callable[[Any], Any]:
  """As class_weights, from a store that holds the vectors of the prompts of each class.

  Raises:
    ValueError: for a store that lacks a class, or has different numbers of prompts.
  """
  store, where = Store(folder), f"config.evals.{context.name}"
  keys = [class_key(i, name) for i, name in enumerate(classnames)]
  first, count = store.find(np.array([sample_id(key) for key in keys], np.uint64))
  missing = [name for name, there in zip(classnames, count > 0) if not there]
  if missing:
    raise ValueError(
      f"{where}.class_store={folder!r} has no prompt of {len(missing)} of {len(keys)} classes"
      f" ({tree.shown(missing)}); embed the same class names in the same order"
    )
  if len({*count.tolist()}) > 1:
    raise ValueError(
      f"{where}.class_store={folder!r}: classes have {count.min()} to {count.max()}"
      " prompts, expected as many of each"
    )
  vectors = store.read((first[:, None] + np.arange(count[0])[None]).ravel())

  def embed(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    mask = jnp.ones((len(batch["text"]), 1), bool)
    return embed_vectors(context.embed_text, params, batch["text"], mask, where=where)

  return mean_embedder(
    context,
    embed,
    dict(text=vectors),
    group=int(count[0]),
    batch_size=batch_size,
    combine=_of_widths(unit_mean, widths),
  )


@dataclasses.dataclass(frozen=True)
class Zeroshot:
  """Zero-shot classification of images with one class each; see `zeroshot`.

  Attributes:
    run: (params) -> {metric: value}.
    samples: of the source.
    confusion: (params) -> which classes are taken for which.
  """

  run: Callable[[Any], dict[str, float]]
  samples: int
  confusion: Callable[[Any], Confusion]

  def __call__(self, params: Any) -> dict[str, float]:
    """{metric: value}."""
    return self.run(params)


def zeroshot(
  context: Context,
  *,
  source: str = "",
  templates: str | Sequence[str] | Mapping[str, str | Sequence[str]] = "photos",
  classnames: str | Mapping[str, str] | None = None,
  image_store: str = "",
  class_store: str = "",
  descriptions: str = "",
  pad_descriptions: bool = True,
  renormalise: bool = False,
  calibration: bool = False,
  widths: Sequence[int] = (),
  ood: str = "",
  groups: str = "",
  groups_without: Sequence[str] = (),
  frequency: str = "",
  batch_size: int = 256,
) -> Callable[[Any], dict[str, float]]:
  """Zero-shot classification of a labelled source.

  Images of CLIP_benchmark's multilabel datasets have several classes, or none. Their measure is
  the mean over classes of the average precision with which a class ranks the images; a class that
  no image has counts as 0. Each host then holds the similarities of all images and classes.

  With `calibration`, the confidence of an image is the softmax over the classes of scale * cosine,
  for its top class. The scale is that of the model's loss as trained, learned or fixed; after a
  sigmoid loss also, whose bias shifts all classes alike and so drops out. `ece` is the expected
  calibration error in 15 bins of equal width. A fifth of the samples, chosen by the hash of their
  keys, then fits a temperature; `ece_rest` and `ece_rest_calibrated` are measured on the others,
  before and after.

  With `ood`, the maximum class probability is compared with that of images which show none of the
  classes: `ood_auroc` is the probability that an image of the source has the larger one, and
  `ood_fpr95` the share of the others at or above the threshold that keeps 95 % of those of the
  source.

  >>> import jax.numpy as jnp
  >>> from bigalign import sharding
  >>> from bigalign.data.loader.options import resolve_data
  >>> def embed(params, batch, mask=None):  # a collapsed model: all embeddings are equal
  ...   return jnp.full((len(batch), 4), 0.5)
  >>> data = resolve_data(dict(image_size=32, tokenizer=dict(name="byte", length=48)))
  >>> context = Context("val", embed, embed, sharding.make_mesh(), data)
  >>> run = zeroshot(context, source="glyphs:heldout_dev", templates=["the letter {c}"])
  >>> metrics = run(params=None)
  >>> metrics["val/val-zeroshot-val-top1"], metrics["val/val-zeroshot-val-num_samples"]
  (0.0, 1148)

  Args:
    context: model, mesh and data options.
    source: as in config.data.source, with labels; "" if `image_store` has them.
    templates: "photos" (18), "varied" (80), "simple" (4) or "name", "open_clip" for CLIP's 80 from
      an installed open_clip, a file of templates (.txt with one per line, or a .json list), or the
      templates; {c} or {} is replaced by the class name. {language: templates} with class names in
      several languages.
    classnames: file of class names in the order of the labels; None: the names of the source. Or
      {language: file}, of which each may also be a .json [[labels], [names]] of some classes, or a
      .json {language: [[labels], [names]]} as of Babel-ImageNet. Each language is then measured on
      the images of its classes.
    image_store: folder of the vectors of the images.
    class_store: folder of the vectors of prompts, as `bigalign embed --with=... --classnames=...`
      writes it with the templates that it takes, for a model whose text tower is `features`;
      `templates` has no effect then.
    descriptions: .json file {class name: [sentences]}, in place of `templates`. A class is the mean
      of the unit embeddings of its sentences. The metrics are named
      "…-zeroshot-val-descriptions_unnormalised-top1" or "…-descriptions_renormalised-top1".
    pad_descriptions: whether shorter lists are padded to the longest by repeating their first
      sentence, as in freeze-align; else a class is the mean of its own sentences.
    renormalise: whether the means of `descriptions` are scaled to unit norm.
    calibration: whether to measure the calibration too; for images with one class.
    widths: prefixes of the embeddings to measure too, for models that are trained with
      loss.matryoshka; the metrics are named "…-zeroshot-val-d64-top1".
    ood: a second source, as in config.data.source, of images that show none of the classes.
    groups: field of the group of each image, such as "json.region", or "npy.0" for the first number
      of KEY.npy; for images with one class.
    groups_without: groups that neither the worst group nor the gap counts, such as "other".
    frequency: .json file {class name: how many captions of the training data name it}, as
      `bigalign balance --lemmas` writes it.
    batch_size: images at a time, over all devices; rounded up to fit the mesh.

  Returns:
    run(params) -> {"val/<name>-zeroshot-val-top1": fraction, ...}; top5 from five classes on.
    Of a multilabel dataset {"val/<name>-zeroshot-val-mean_average_precision": fraction, ...}.
    With calibration also ece, ece_rest, ece_rest_calibrated, logit_scale, calibrated_temperature
    and calibration_samples, the number of those that fit it; with ood also ood_auroc, ood_fpr95 and
    ood_num_samples. With groups also "group_<value>-top1" and so on, worst_group_top1, the lowest
    of them, and group_gap_top1, the difference of the highest and the lowest; so for top5. With
    frequency also what frequency.measure returns.

  Raises:
    ValueError: for a source without class names, descriptions that do not fit them, options that
      exclude each other; when run, for labels without a name.
  """
  where = f"config.evals.{context.name}"
  data = open_data(context, source, batch_size=batch_size, captions=0, image_store=image_store)
  sets = read_label_sets(classnames, f"{where}.classnames")
  if sets:
    alone: dict[str, Any] = dict(
      class_store=class_store,
      descriptions=descriptions,
      pad_descriptions=not pad_descriptions,
      renormalise=renormalise,
      calibration=calibration,
      widths=widths,
      ood=ood,
      groups=groups,
      frequency=frequency,
    )
    if wrong := [option for option, given in alone.items() if given]:
      raise ValueError(f"{where}.{wrong[0]} goes with class names in one language only")
    return _languages(context, data, sets, templates, batch_size)
  if isinstance(templates, Mapping):
    raise ValueError(f"{where}.templates has languages, but {where}.classnames has none")
  names = class_names(
    data.source, None if classnames is None else str(classnames), where, source or image_store
  )
  for unused, text in (
    (renormalise, "renormalise=True"),
    (not pad_descriptions, "pad_descriptions=False"),
  ):
    if unused and not descriptions:
      raise ValueError(f"{where}.{text} has an effect with `descriptions` only")
  if descriptions and class_store:
    raise ValueError(
      f"{where}: class_store={class_store!r} and descriptions={descriptions!r} both give the"
      " classes; leave out one of them"
    )
  shown = "zeroshot-val-"
  common: dict[str, Any] = dict(batch_size=batch_size, widths=widths)
  if class_store:
    weigh = stored_class_weights(context, classnames=names, folder=class_store, **common)
  elif descriptions:
    shown += f"descriptions_{'renormalised' if renormalise else 'unnormalised'}-"
    weigh = description_weights(
      context,
      sentences=read_descriptions(descriptions, names, f"{where}.descriptions"),
      pad=pad_descriptions,
      renormalise=renormalise,
      **common,
    )
  else:
    weigh = class_weights(
      context,
      classnames=names,
      templates=read_templates(templates, f"{where}.templates"),
      **common,
    )

  multilabel = getattr(data.source, "dataset_type", "") == "multilabel"
  more = dict(calibration=calibration, ood=ood, widths=widths, groups=groups, frequency=frequency)
  for option, given in more.items():
    if given and multilabel:
      raise ValueError(f"{where}.{option}: the images of a multilabel dataset have no single class")
    if given and option in ("calibration", "ood") and context.logit_head is None:
      raise ValueError(f"{where}.{option} needs the logit scale, which this model does not give")
  outside = None
  if ood:
    other = open_data(context, ood, batch_size=batch_size, captions=0)
    outside = Outside(context, other)
  if groups_without and not groups:
    raise ValueError(f"{where}.groups_without has an effect with `groups` only")
  grouped = read_groups(data.source, groups, groups_without, where) if groups else None
  named = None
  if frequency:
    what = f"{where}.frequency"
    named = read_counts(text_file(frequency, what), names, f"{what}={frequency!r}")
  measured = (
    _multilabel(context, data, names)
    if multilabel
    else _one_label(
      context, data, names, calibration=calibration, outside=outside, groups=grouped, named=named
    )
  )

  def run(params: Any) -> dict[str, float]:
    metrics, rejects, unlabelled = measured(params, weigh(params))
    rejected = log_rejects(context.name, rejects)
    samples = int(metrics["num_samples"])
    if not samples:
      raise ValueError(
        f"{where}.source={source!r}: all {rejected} samples are rejected; the log gives the reasons"
      )
    if unlabelled and multilabel:
      raise ValueError(
        f"{where}.source={source!r}: dataset_type.txt says multilabel, but {unlabelled} of"
        f" {samples} samples have no KEY.npy of {len(names)} numbers, 0 or 1, one per class name"
      )
    if unlabelled:
      raise ValueError(
        f"{where}.source={source!r}: {unlabelled} of {samples} samples have no label, or a label"
        f" outside the {len(names)} class names ({names[0]!r} ... {names[-1]!r})"
      )
    metrics["num_classes"] = len(names)
    if rejected:
      metrics["rejected"] = rejected
    return {f"val/{context.name}-{shown}{name}": value for name, value in metrics.items()}

  if multilabel:
    return run
  return Zeroshot(
    run, len(data.source), lambda params: confusion(context, data, names, params, weigh(params)[0])
  )


def _languages(
  context: Context,
  data: EvalData,
  sets: Mapping[str, LabelSet],
  templates: str | Sequence[str] | Mapping[str, str | Sequence[str]],
  batch_size: int,
) -> Callable[[Any], dict[str, float]]:
  """The evaluator of class names in several languages."""
  where = f"config.evals.{context.name}.templates"
  if isinstance(templates, Mapping):
    missing = [language for language in sets if language not in templates]
    if missing:
      raise ValueError(f"{where} has none for {len(missing)} languages, {tree.shown(missing)}")
    read = {name: read_templates(templates[name], f"{where}.{name}") for name in sets}
  else:
    read = dict.fromkeys(sets, read_templates(templates, where))
  weigh = {
    name: class_weights(context, classnames=own.names, templates=read[name], batch_size=batch_size)
    for name, own in sets.items()
  }
  return languages(context, data, sets, weigh, measure)


# (parameters, {0: weights [K, E], width: [K, width]}) -> metrics with num_samples, rejects [R],
# samples without label
_Measured = Callable[[Any, Mapping[int, jax.Array]], tuple[dict[str, float], np.ndarray, int]]


def _one_label(
  context: Context,
  data: EvalData,
  names: Sequence[str],
  *,
  calibration: bool,
  outside: Outside | None,
  groups: Groups | None,
  named: np.ndarray | None,
) -> _Measured:
  """The metrics of images with one class each."""
  replicated = sharding.replicated_sharding(context.mesh)

  @functools.partial(jax.jit, out_shardings=replicated)
  def count(
    zimg: jax.Array, weights: Mapping[int, jax.Array], batch: dict[str, jax.Array]
  ) -> tuple[dict[int, Any], Any]:
    label, valid = batch["label"], batch["valid"]
    hits = {
      width: measure(prefix_of(zimg, width), own, label, valid) for width, own in weights.items()
    }
    by_group = groups.hits(logits(zimg, weights[0]), label, batch["index"], valid) if groups else 0
    return hits, (batch["rejects"].sum(0), by_group)

  @functools.partial(jax.jit, out_shardings=replicated)
  def add(a: Any, b: Any) -> Any:
    hits = {width: hits.merge(b[0][width]) for width, hits in a[0].items()}
    return hits, jax.tree.map(jnp.add, a[1], b[1])

  def measured(
    params: Any, weights: Mapping[int, jax.Array]
  ) -> tuple[dict[str, float], np.ndarray, int]:
    total: Any = None
    needed = calibration or outside
    scale = context.logit_head(params).scale if needed and context.logit_head else math.nan
    calibrated = Calibration(context.mesh, weights[0], scale) if calibration else None
    inside = []
    for zimg, batch in embedded_images(context, data, params):
      if calibrated:
        calibrated.add(zimg, batch)
      if outside:
        inside.append(outside.score(zimg, weights[0], scale, batch)[0])
      kept = {name: batch[name] for name in ("label", "valid", "rejects", "index")}
      counted = sharding.block_on_cpu(count(zimg, weights, kept))
      total = counted if total is None else sharding.block_on_cpu(add(total, counted))
    hits, (rejects, by_group) = jax.tree.map(np.asarray, total)
    samples, unlabelled = int(hits[0].top1.count), int(hits[0].unlabelled.total)
    values: dict[str, float] = {}
    for width, own in hits.items() if samples else ():
      start = f"d{width}-" if width else ""
      values |= {f"{start}{name}": float(value) for name, value in own.compute().items()}
      values.pop(f"{start}unlabelled", None)
      if len(names) < 5:
        values.pop(f"{start}top5", None)
    if samples and not unlabelled:
      values |= without_images(hits[0], names, context.name)
      values |= groups.metrics(by_group, len(names)) if groups else {}
      if named is not None:
        own = hits[0].mean_per_class_recall
        recalls = np.where(own.count > 0, own.hits / np.maximum(own.count, 1), np.nan)
        values |= measure_frequency(named, recalls, context.name)
      values |= calibrated.metrics(context.name) if calibrated else {}
      if outside:
        values |= outside.metrics(params, weights[0], scale, np.concatenate(inside))
    return values | {"num_samples": samples}, rejects, unlabelled

  return measured


def _multilabel(context: Context, data: EvalData, names: Sequence[str]) -> _Measured:
  """The mean average precision of images with any number of classes."""
  replicated = sharding.replicated_sharding(context.mesh)

  @functools.partial(jax.jit, out_shardings=replicated)
  def score(zimg: jax.Array, weights: jax.Array, batch: dict[str, jax.Array]) -> Any:
    kept = ("label_set", "has_label_set", "valid")
    return logits(zimg, weights), *(batch[name] for name in kept), batch["rejects"].sum(0)

  def measured(
    params: Any, weights: Mapping[int, jax.Array]
  ) -> tuple[dict[str, float], np.ndarray, int]:
    parts = []
    for zimg, batch in embedded_images(context, data, params, classes=len(names)):
      kept = {name: batch[name] for name in ("label_set", "has_label_set", "valid", "rejects")}
      scored = sharding.block_on_cpu(score(zimg, weights[0], kept))
      parts.append([np.asarray(x) for x in scored])
    scores, label_sets, labelled, valid = (np.concatenate(x) for x in [*zip(*parts)][:-1])
    rejects = np.sum([part[-1] for part in parts], axis=0)
    samples, unlabelled = int(valid.sum()), int((valid & ~labelled).sum())
    if unlabelled or not samples:
      return {"num_samples": samples}, rejects, unlabelled
    positive = label_sets[valid]
    unseen = [name for name, some in zip(names, positive.any(0)) if not some]
    if unseen:
      logging.warning(
        "evaluation %r: classes without images: %d of %d; their average precision counts as 0,"
        " as in CLIP_benchmark: %s",
        *(context.name, len(unseen), len(names), tree.shown(unseen)),
      )
    mean = float(average_precision(scores[valid], positive).mean())
    return {"mean_average_precision": mean, "num_samples": samples}, rejects, 0

  return measured
