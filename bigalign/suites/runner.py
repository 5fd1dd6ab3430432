"""Evaluates models on the tasks of a suite, with images embedded once and results kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from bigalign.api import embedding
from bigalign.api.loading import whole_encoder
from bigalign.api.model import Model
from bigalign.data.files import fingerprints, storage
from bigalign.data.image.reading import ImageReading
from bigalign.data.loader.options import DataOptions, resolve_data
from bigalign.data.sources.base import Source, open_source
from bigalign.data.stores.reader import Store
from bigalign.evals import make_evaluators, named_files
from bigalign.options import fingerprint
from bigalign.program import make_embed
from bigalign.run import errors
from bigalign.run.parsers import EVALUATE_CACHE
from bigalign.suites.suite import SCORES, Task, scored

# Options of evaluators that name data: sources, and folders that no fingerprint identifies.
_SOURCES = ("source", "train", "test", "validation", "ood", "gallery")
_FOLDERS = ("folder", "images")


@dataclasses.dataclass(frozen=True)
class Result:
  """What one model reached on one task.

  Attributes:
    task: its name.
    kind: the type of its evaluator.
    model: as it was named.
    metrics: {metric: value}, without the name of the task.
    scored: the metrics whose mean is the score.
    due: whether the task has a score if it is evaluated.
    missing: why the task was not evaluated; "" if it was.
    get: the command that gets its data.
    kept: whether an earlier call had evaluated it.
    shift_of: see Task.
  """

  task: str
  kind: str
  model: str
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  scored: tuple[str, ...] = ()
  due: bool = True
  missing: str = ""
  get: str = ""
  kept: bool = False
  shift_of: str = ""

  @property
  def score(self) -> float | None:
    """The mean of the metrics `scored`; None without any."""
    values = [self.metrics[name] for name in self.scored]
    return sum(values) / len(values) if values else None


class Subject:
  """A model that is evaluated: its options of data, its functions, and digits that identify it."""

  def __init__(self, name: str, model: Model) -> None:
    self.name, self.model = name, model
    self.data = _data_of(model)
    self._embed = make_embed(whole_encoder(model)) | dict(logit_head=lambda params: model.head)
    self._params = {f"model/{key}": x for key, x in model.params.items() if "/" in key}

  @functools.cached_property
  def header(self) -> dict[str, Any]:
    """Of the stores of its image embeddings; {} without an image tower."""
    return embedding.header_of(self.model, "float32") if self.model.view else {}

  @functools.cached_property
  def digest(self) -> str:
    """Hex digits of the parameters, the preprocessing, and this code."""
    model, code = self.model, fingerprints.of_code()
    texts = embedding.weights_digest(model.params, "text")  # the header has that of images
    spec = model.tokenizer.spec if model.tokenizer else {}
    files = model.tokenizer.from_files if model.tokenizer else {}
    towers = re.sub(r" at 0x\w+", "", repr(model.encoder))
    return fingerprint([self.header, texts, spec, files, towers, [*model.head], code])

  def measure(self, task: Task, image_store: str = "") -> dict[str, float]:
    """{metric: value} of a task; with the store of its images if there is one."""
    evaluator, embed = task.evaluator, dict(self._embed)
    assert evaluator is not None
    if image_store:
      options = {**evaluator.options, "image_store": image_store}
      evaluator = dataclasses.replace(evaluator, options=options)
      embed["embed_image"] = lambda params, vectors: vectors.astype("float32")
    with jax.set_mesh(self.model.mesh):
      made = make_evaluators({task.name: evaluator}, mesh=self.model.mesh, data=self.data, **embed)
      metrics = made[task.name](self._params)
    own = re.compile(rf"val/(?:{re.escape(task.name)})?(?:-\w+-val-|-\w+-|/)?")
    return {own.sub("", name, count=1): value for name, value in metrics.items()}


def _data_of(model: Model) -> DataOptions:
  """How a model reads images and texts."""
  reading = model.view.reading if model.view else ImageReading(image_size=1)
  if isinstance(reading, DataOptions):  # of a run
    return reading
  values = {field.name: getattr(reading, field.name) for field in dataclasses.fields(ImageReading)}
  spec = model.tokenizer.spec if model.tokenizer else dict(name="byte", length=2)  # of no texts
  return resolve_data(values | dict(tokenizer=spec))


def evaluate(
  subjects: Sequence[Subject], tasks: Sequence[Task], cache: str | os.PathLike[str] = EVALUATE_CACHE
) -> Iterable[Result]:
  """Yields the result of each task and model, task by task.

  An image is decoded once for all models that read it alike, and embedded once by each: the vectors
  are kept in `cache`, and so are the results. A call that was killed goes on where it was. On
  several processes nothing is kept.

  Args:
    subjects: the models.
    tasks: of a suite.
    cache: folder of the kept vectors and results.
  """
  root = pathlib.Path(cache).expanduser()
  for number, task in enumerate(tasks, 1):
    logging.info("Task %d of %d: %s", number, len(tasks), task.name)
    keeps = jax.process_count() == 1
    try:
      if task.missing:
        raise FileNotFoundError(task.missing)
      sources = _opened(task)
      files = {x.name: _file(root, x, task, sources) if keeps else None for x in subjects}
      to_do = [x for x in subjects if not _is_kept(files[x.name])]
      vectors = _embedded(to_do, task, sources, root) if keeps else {}
    except Exception as error:
      for subject in subjects:
        yield _missing(subject, task, error)
      continue
    for subject in subjects:
      try:
        yield _result(subject, task, files[subject.name], vectors)
      except Exception as error:
        yield _missing(subject, task, error)


def _missing(subject: Subject, task: Task, error: Exception) -> Result:
  """The result of a task that cannot be evaluated; raises what is not a mistake of the user."""
  if not errors.is_mistake(error):
    raise error
  due = bool(SCORES.get(task.kind) if task.metrics is None else task.metrics)
  why = errors.message(error)
  logging.warning("Task %s of %s is left out: %s", task.name, subject.name, why)
  return Result(task.name, task.kind, subject.name, due=due, missing=why, get=task.get)


def _is_kept(file: pathlib.Path | None) -> bool:
  return file is not None and file.is_file()


def _result(
  subject: Subject, task: Task, file: pathlib.Path | None, vectors: Mapping[str, str]
) -> Result:
  """The result of one task and model, kept or new; `vectors` names the stores of the images."""
  kept = _is_kept(file)
  if file is not None and kept:
    metrics = json.loads(file.read_text())
  else:
    metrics = subject.measure(task, vectors.get(subject.name, ""))
    if file is not None:
      file.parent.mkdir(parents=True, exist_ok=True)
      with storage.atomic_write(file, suffix=storage.unique_suffix()) as opened:
        opened.write(json.dumps(metrics).encode())
  names = scored(task, metrics)
  return Result(
    task.name,
    task.kind,
    subject.name,
    metrics,
    names,
    due=bool(names),
    kept=kept,
    shift_of=task.shift_of,
  )


def _given(task: Task, names: Iterable[str]) -> dict[str, str]:
  """{option: value} of some options of an evaluator that are not empty."""
  assert task.evaluator is not None
  every = task.evaluator.options
  return {name: str(every[name]) for name in names if every.get(name)}


def _opened(task: Task) -> dict[str, Source]:
  """{option: source} of the data that a task names, without captions."""
  given = _given(task, _SOURCES)
  return {name: open_source(pattern, captions=()) for name, pattern in given.items()}


def _file(
  root: pathlib.Path, subject: Subject, task: Task, sources: Mapping[str, Source]
) -> pathlib.Path | None:
  """The file of a result; None if the data of the task cannot be identified."""
  evaluator = task.evaluator
  assert evaluator is not None
  folders = _given(task, (name for name in evaluator.options if name.endswith("_store")))
  if not (sources or folders) or _given(task, _FOLDERS):
    return None
  # Class names and the kind of a dataset lie beside its shards.
  prints: dict[str, Any] = {
    name: [x.fingerprint, [*getattr(x, "classnames", ())], getattr(x, "dataset_type", "")]
    for name, x in sources.items()
  }
  prints |= {name: Store(folder).fingerprint for name, folder in folders.items()}
  named = {
    option: hashlib.sha256(path.read_bytes()).hexdigest()
    for (_, option), path in named_files({task.name: evaluator}).items()
  }
  key = fingerprint([subject.digest, task.name, task.kind, evaluator, named, prints])
  return root / "results" / f"{key}.json"


def _embedded(
  subjects: Sequence[Subject], task: Task, sources: Mapping[str, Source], root: pathlib.Path
) -> dict[str, str]:
  """{model: store} of the images of a task, if its evaluator reads such stores."""
  assert task.evaluator is not None
  source = sources.get("source")
  # An evaluator that reads other images too, `ood`, needs the tower.
  readable = "image_store" in task.evaluator.options and not _given(task, ("image_store", "ood"))
  if source is None or not readable:
    return {}
  vectors = {}
  alike: dict[str, list[Subject]] = {}
  for subject in subjects:
    if subject.model.view is not None and subject.data.frames is None:
      seen = json.dumps(subject.model.view.reading.preprocessing(), sort_keys=True)
      alike.setdefault(seen, []).append(subject)
  images = root / "images" / fingerprints.of_code()[:16]
  for group in alike.values():
    # A run and its export have one folder.
    folders = [embedding.folder_of(x.header, source.fingerprint, images) for x in group]
    targets = {folder: embedding.Target(x.model, folder) for x, folder in zip(group, folders)}
    try:
      stores = embedding.embed_with([*targets.values()], source, dtype="float32")
    except ValueError as error:  # no image has a vector, or two have one key
      if not errors.is_mistake(error):
        raise
      logging.info("The images of task %s are not kept: %s", task.name, error)
      continue
    # Vectors that are not finite count as misses; a store has none of them.
    whole = {store.folder for store in stores if not store.left_out.get("not_finite")}
    for subject, folder in zip(group, folders):
      if folder in whole:
        vectors[subject.name] = str(folder)
  return vectors
