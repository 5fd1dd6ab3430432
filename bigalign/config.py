"""The options of a training run, and how a config becomes them.

A config is a readable file of plain values (configs/*.py, a ConfigDict). `resolve_config` turns it
into a frozen `Config` once, with every default filled in and every value checked. After that only
the loading of pretrained weights reads plain values (which checkpoints a config names).
config.json of a run holds the resolved options.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from bigalign import checks, sharding
from bigalign.checkpoint import Checkpoints
from bigalign.data.loader.options import DataOptions
from bigalign.data.text import stated
from bigalign.evals import EvalOptions, named_files
from bigalign.losses import LossTerms
from bigalign.losses.engine.pairwise import Engine
from bigalign.losses.selection import Selection
from bigalign.model import ModelOptions, ModelWeights, TeacherOptions, TowerWeights
from bigalign.optim import OPTIMIZERS, make_optimizer
from bigalign.options import (
  DEFAULTS,
  Also,
  Call,
  Choose,
  Component,
  PartOfConfig,
  plain,
  resolve,
  without_defaults,
)
from bigalign.run import copies, runtime
from bigalign.run.flags import no_words
from bigalign.run.metrics import MetricWriter
from bigalign.run.provenance import digest
from bigalign.weights import init

# Passed by the program; not options.
OPTIMIZER_FIXED = ("params", "total_steps", "to_steps", "rate", "since", "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageEnd:
  """What a stage has besides the options that it overrides.

  Args:
    until: where it ends: a number of updates, "5000 steps", "1e9 samples", "3 epochs", or a share
      of the run, "90%".
  """

  until: int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A training run.

  Args:
    seed: of the initialisation, the order of the data, augmentation and dropout.
    total_steps: updates in all, or a duration: "1e9 samples", "3 epochs".
    batch_size: global: over all devices and hosts.
    log_every: steps between logs. Steps that neither log, save, diagnose nor evaluate do not wait
      for the device, except the first one.
    checkpoint_every: steps between checkpoints, or a duration; 0: only at the end, where one is
      always written.
    data: what the run reads.
    model: towers, projectors, and pretrained weights.
    loss: {name: options}; each has a `weight`, and the weighted losses are added.
    optimizer: name, learning rate, schedule and options of the optimizer.
    stages: earlier stages of the run, each with its `until` and the options of this config that it
      overrides (docs/stages.md lists them); this config is the last stage.
    eval_every: steps between evaluations, or a duration; 0: only at the start and the end.
    diagnose_every: steps between diagnostics of the loss, or a duration: hardest negatives,
      saturation, shares of the gradient, temperatures; each costs about half a step. 0: none.
    evals: {name: options}; each has a `type`.
    frozen: regular expression of the parameters that are not trained.
    ema: decay of the running average of the parameters, which is evaluated too; 0 for none.
    ema_warmup: whether the decay of the average is min(ema, (1 + n) / (10 + n)) after n updates.
      Without it, a short run averages its random first parameters: at 0.999, they are 86 % of the
      average after 150 updates.
    twin: averages of some parameters that losses with layers read as a teacher.
    teacher: a frozen image tower of another checkpoint that losses with layers read; None: none.
    selection: which part of each batch is trained on.
    microbatches: parts in which a batch is embedded; loss and gradient stay those of the batch.
    gradient_dtype: dtype in which devices communicate the gradients of kernels and token tables,
      "float32" or "bfloat16".
    logits: how the logit matrix of the loss is formed.
    mesh: sizes of the axes data, fsdp, tensor.
    topology: the TPU slice that `bigalign plan` compiles for; training uses the devices it finds.
    rules: (regular expression, axes) pairs: how parameters are sharded; the first match counts.
      None: the default rules.
    keep: which checkpoints are kept.
    writer: where metrics are written.
    profile: (begin, end): the updates begin < n <= end are traced into workdir/profile; (): none.
    patience: if no step completes for this many seconds, the run ends with 143 and logs what hangs;
      a single process that is computing goes on.
    runtime: settings of JAX and XLA, applied before the first device is used.
  """

  seed: int
  total_steps: int | str
  batch_size: int
  log_every: int
  checkpoint_every: int | str
  data: DataOptions
  model: Annotated[ModelOptions, Also(ModelWeights)]
  loss: LossTerms
  optimizer: Annotated[
    Component,
    Choose(OPTIMIZERS, fixed=OPTIMIZER_FIXED, shared=make_optimizer, default="adamw"),
  ]
  stages: Sequence[Annotated[Mapping[str, Any], PartOfConfig(StageEnd)]] = ()
  eval_every: int | str = 0
  diagnose_every: int | str = 0
  evals: EvalOptions = DEFAULTS
  frozen: str = ""
  ema: float = 0.0
  ema_warmup: bool = True
  twin: Twin = DEFAULTS
  teacher: Annotated[TeacherOptions | None, Also(TowerWeights)] = None
  selection: Selection = DEFAULTS
  microbatches: int = 1
  gradient_dtype: str = "float32"
  logits: Engine = DEFAULTS
  mesh: Annotated[Component, Call(sharding.make_mesh, fixed=("devices",))] = DEFAULTS
  topology: str = ""
  rules: Sequence[Any] | None = None
  keep: Annotated[Component, Call(Checkpoints, fixed=("workdir", "read_only"))] = DEFAULTS
  writer: Annotated[Component, Call(MetricWriter, fixed=("workdir", "resume_step", "repeats"))] = (
    DEFAULTS
  )
  profile: Sequence[int] = ()
  patience: float = 1800.0
  runtime: Annotated[Component, Call(runtime.setup)] = DEFAULTS

  def __post_init__(self) -> None:
    checks.known("config.gradient_dtype", self.gradient_dtype, ("float32", "bfloat16"))
    if self.log_every < 1:
      raise ValueError(f"config.log_every={self.log_every}: at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
  """A running average of some parameters, which losses with layers read as a teacher.

  It is updated after each update of the parameters, and no gradient goes through it.

  Args:
    paths: regular expression of the parameters; "": all that are trained.
    decay: of the average; 1: a frozen copy of the parameters that the run begins with. 0: no twin;
      losses then read the averages of config.ema, if it is set.
  """

  paths: str = ""
  decay: float = 0.0

  def __post_init__(self) -> None:
    if not 0 <= self.decay <= 1:
      raise ValueError(f"config.twin.decay={self.decay}: from 0 to 1")
    if self.paths and not self.decay:
      raise ValueError("config.twin.paths needs config.twin.decay, such as 0.994")

  def holds(self, path: str) -> bool:
    """Whether a parameter has an average."""
    return bool(self.decay and re.search(self.paths, path))


def resolve_config(
  values: Any, record: Mapping[str, Any] | None = None, *, files_needed: bool = True
) -> Config:
  """The options of a config, every default filled in; see `resolve_and_compare`."""
  return resolve_and_compare(values, record, files_needed=files_needed)[0]


def resolve_and_compare(
  values: Any, record: Mapping[str, Any] | None = None, *, files_needed: bool = True
) -> tuple[Config, tuple[str, ...]]:
  """The options of a config, every default filled in, and how they differ from its checkpoints.

  Args:
    values: a ConfigDict or a mapping of plain values, as a config file gives them.
    record: config.json of the run that continues, whose pretrained model options hold even if the
      checkpoint files have changed since.
    files_needed: False: if a pretrained checkpoint is missing, use the sizes next to its `init`.

  Returns:
    The options, and a text for each option of `data` that differs from what the pretrained
    checkpoints state; these are logged too.

  Raises:
    TypeError, ValueError: for unknown, missing or wrong options; they name the place.
    FileNotFoundError, KeyError: for a pretrained checkpoint that is missing.
  """
  values = plain(values)
  differences: tuple[str, ...] = ()
  if isinstance(values, Mapping) and isinstance(values.get("model"), Mapping):
    given = values.get("data")
    data = given if isinstance(given, Mapping) else {}
    model, data, differences = init.completed(
      values["model"], data, record, files_needed=files_needed
    )
    values = {**values, "model": model, **({"data": data} if isinstance(given, Mapping) else {})}
  if isinstance(values, Mapping) and isinstance(values.get("teacher"), Mapping):
    teacher = init.completed_teacher(values["teacher"], record, files_needed=files_needed)
    values = {**values, "teacher": teacher}
  config: Config = resolve(Config, values, "config")
  return config, differences


def written_model(values: Mapping[str, Any]) -> dict[str, Any]:
  """config.model as the user wrote it: without what a pretrained checkpoint adds to it."""
  model: dict[str, Any] = plain(values["model"])
  return model


def written_teacher(values: Mapping[str, Any]) -> dict[str, Any] | None:
  """config.teacher as the user wrote it, likewise; None without one."""
  teacher: dict[str, Any] | None = plain(values.get("teacher"))
  return teacher


def without_stores(values: Any) -> dict[str, Any]:
  """A config in plain values, without the stores and the augmentation of its data."""
  config: dict[str, Any] = plain(values)
  data = {k: v for k, v in config["data"].items() if k not in ("stores", "augment")}
  return {**config, "data": data}


def setup_runtime(values: Any) -> None:
  """Applies config.runtime, which must be set before the first device is used."""
  values = plain(values)
  given = values.get("runtime") if isinstance(values, Mapping) else None
  resolve(runtime.setup, given or {}, "config.runtime").make()


def start(argv: Sequence[str], given: Any) -> dict[str, Any]:
  """Sets up the runtime and connects the processes, as the command line of a program asks.

  Args:
    argv: the words that are not flags, the program first.
    given: the values of the flags.

  Returns:
    The config in plain values.

  Raises:
    UsageError: if there are words that are not flags.
  """
  no_words(argv)
  config: dict[str, Any] = plain(given.config)
  setup_runtime(config)
  runtime.connect(given.coordinator, given.num_processes, given.process_id)
  return config


def tokenizer_digest(config: Config) -> str:
  """Hex digits that identify the tokenizer of a run: its options and its files."""
  prefix = config.data.prefix_tokens
  options = without_defaults(config.data.tokenizer)
  return digest({**options, "prefix_tokens": plain(prefix)} if prefix else options)


def tokenizer_files(config: Config) -> dict[str, Any]:
  """What the files next to that of the tokenizer give, such as the id of padding and a prompt.

  `tokenizer_digest` does not cover these files, because most of their content does not change ids.
  """
  return config.data.make_tokenizer().from_files


def with_tokenizer_digest(record: Mapping[str, Any]) -> dict[str, Any]:
  """A record of a run whose tokenizer is identified by `tokenizer_digest`.

  Records from before options were resolved hold the digest of the options as they were written,
  which differs if a default was written out.
  """
  as_written = digest(record["config"]["data"]["tokenizer"])
  if record["tokenizer"] != as_written:
    return dict(record)
  return {**record, "tokenizer": tokenizer_digest(recorded_config(record))}


def recorded_config(record: Mapping[str, Any], workdir: pathlib.Path | None = None) -> Config:
  """The options of a run from its record: config.json, or what is saved with a checkpoint.

  Options that did not exist when the run was written get their defaults.

  Args:
    record: the record.
    workdir: the local folder of the run; the options then name the copies there (see run/copies)
      instead of files of the machine that trained. Older runs have no copies.

  Raises:
    checksums.Damaged: if a copy was damaged or edited.
  """
  values = record["config"]
  if workdir is not None:
    values = copies.used(values, record.get("copies", {}), workdir)
  config: Config = resolve(Config, values, "config")
  return config


def originals(config: Config) -> Iterator[copies.Original]:
  """The small files that the options of a run name: its tokenizer, class names, templates.

  Raises:
    FileNotFoundError, KeyError: for a missing file or environment variable.
  """
  source = config.data.make_tokenizer().vocabulary_file
  if source is not None:
    option, file = source
    near = tuple(x for x in stated.files(file.parent) if x.name != file.name)
    yield copies.Original("tokenizer", ("data", "tokenizer", option), file, near)
  for (name, option), file in named_files(config.evals).items():
    yield copies.Original(option, ("evals", name, *option.split(".")), file)
