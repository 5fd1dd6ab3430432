"""Command-line flags of the programs that take a config: train, embed, plan and benchmark.

  bigalign train --config=siglip_b16 --config.optimizer.lr=3e-4 --workdir=runs/mine

--config names a config (see run/configs.py); --config.OPTION=VALUE replaces one of its options (see
run/overrides.py). absl parses all other flags.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from bigalign.data.stores.reader import DTYPES
from bigalign.run import overrides
from bigalign.run.configs import config_name as name_of
from bigalign.run.configs import load_config, shipped
from bigalign.run.errors import UsageError


class _ConfigFlag(flags.Flag):  # type: ignore[type-arg]
  """--config: `parse_flags` replaces its text by the config.

  Args:
    options: as of `define_flags`.
  """

  def __init__(self, options: Callable[[], type] | None) -> None:
    super().__init__(
      flags.ArgumentParser(),
      flags.ArgumentSerializer(),
      "config",
      None,
      "NAME|FILE: A shipped config, or a Python file that has get_config().",
    )
    self.options = options
    self.text = ""


def define_flags(options: Callable[[], type] | None, program: str = "train") -> None:
  """Defines the flags of a program with absl.

  Args:
    options: returns the dataclass of the options of a config, bigalign.config.Config; called only
      if one is overridden. None where the flags are listed but not parsed.
    program: a key of PROGRAMS.
  """
  flags.DEFINE_flag(_ConfigFlag(options))
  PROGRAMS[program]()
  flags.DEFINE_string("coordinator", None, "HOST:PORT: Of process 0, for several processes.")
  flags.DEFINE_integer("num_processes", None, "N: Number of processes.")
  flags.DEFINE_integer("process_id", None, "N: Number of this process, from 0.")


def _train() -> None:
  flags.DEFINE_string(
    "workdir", None, "DIR: Folder of the run; default: runs/<name of the config>."
  )
  flags.DEFINE_bool("allow_config_change", False, "Resume a run although its config has changed.")
  flags.DEFINE_string("profile", None, "FIRST:LAST: Steps to trace into WORKDIR/profile.")


def _embed() -> None:
  flags.DEFINE_string(
    "out", None, "DIR: Folder of the stores, OUT/image and OUT/text.", required=True
  )
  flags.DEFINE_list("towers", ["image", "text"], "A,B: Which towers: image, text.")
  flags.DEFINE_bool("verify", False, "Only check the stores in OUT against their checksums.")
  flags.DEFINE_integer("batch_size", 256, "N: Images or texts per batch, over all devices.")
  flags.DEFINE_enum("dtype", "float16", list(DTYPES), "dtype of the vectors.")
  flags.DEFINE_bool("projected", False, "After the projectors, in the shared space.")
  flags.DEFINE_bool("tokens", False, "Also store every token, for projectors that read tokens.")
  flags.DEFINE_string(
    "with",
    "",
    "MODULE:FUNCTION: Embed by this function instead of the towers; it takes a list of texts or of"
    " PIL images and returns an array [n, D].",
  )
  flags.DEFINE_string(
    "classnames",
    "",
    "FILE: With --with: embed the prompts of these classes, one name per line, into OUT/classes.",
  )
  flags.DEFINE_string("templates", "photos", "NAME|FILE: Of these prompts, as for zeroshot.")
  flags.DEFINE_string("json", None, "FILE: Also write the summary of the stores to this file.")


def _reinforce() -> None:
  flags.DEFINE_string(
    "out", None, "DIR: Folder of the stores, OUT/image and OUT/text.", required=True
  )
  flags.DEFINE_list("towers", ["image", "text"], "A,B: Which towers: image, text.")
  flags.DEFINE_integer("views", 10, "N: Augmented views of each image.")
  flags.DEFINE_integer("seed", 0, "N: Seed of the views.")
  flags.DEFINE_integer("batch_size", 256, "N: Images or texts per batch, over all devices.")
  flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "dtype of the vectors.")
  flags.DEFINE_string("json", None, "FILE: Also write the summary of the stores to this file.")


def _plan() -> None:
  flags.DEFINE_string(
    "topology",
    None,
    "SLICE: A TPU slice such as v5e:16x16, or slices, v5e:16x16*2; default: config.topology.",
  )
  flags.DEFINE_integer("batch", None, "N: Global batch size, instead of config.batch_size.")
  flags.DEFINE_list("sweep", [], "A,B: Any of batch, remat, mesh: compile all combinations.")
  flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits, by compiling.")
  flags.DEFINE_integer(
    "samples", 0, "N: Size of the dataset, for epochs and losses with per-sample state."
  )
  flags.DEFINE_string(
    "prices",
    os.environ.get("BIGALIGN_PRICES"),
    'FILE: JSON with the price of a chip for an hour, by kind: {"v5e": 1.2}.',
  )
  flags.DEFINE_string(
    "calibrate",
    None,
    "FILE: Narrow the times by a measured step on such a chip: the JSON of `bigalign benchmark`, or"
    " a run's folder.",
  )
  flags.DEFINE_string("json", None, "FILE: Also write the figures to this file.")
  flags.DEFINE_string("cache", "~/.cache/bigalign/plans", "DIR: Folder of cached plans.")


def _benchmark() -> None:
  flags.DEFINE_integer(
    "batch",
    None,
    "N: Pairs of a step; default: per device as many as on config.topology.",
  )
  flags.DEFINE_string("source", None, "SHARDS: What the loader reads; default: made-up photos.")
  flags.DEFINE_float("seconds", 10.0, "S: Length of each measurement.")
  flags.DEFINE_string("json", None, "FILE: Also write the figures to this file.")


# {program: what defines its own flags}
PROGRAMS: dict[str, Callable[[], None]] = {
  "train": _train,
  "embed": _embed,
  "reinforce": _reinforce,
  "plan": _plan,
  "benchmark": _benchmark,
}


def config_name() -> str:
  """Returns the name of the config file without folder and suffix, once flags are parsed."""
  return name_of(_config_flag().text)


def profile_span(text: str) -> tuple[int, int]:
  """Returns the steps of --profile as numbers: "10:15" -> (10, 15).

  Raises:
    UsageError: if the text has another form.
  """
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal()):
    raise UsageError(f"--profile={text}: two steps are wanted, as in --profile=10:15")
  return int(first), int(last)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses a command line; FLAGS.config is then the config with its overrides.

  Args:
    argv: the command line, the program first.

  Returns:
    The words of the command line that are not flags, the program first.

  Raises:
    UsageError: for an unknown flag, a missing or wrong value, or a missing --config.
    FileNotFoundError: for a config that does not exist.
    TypeError, ValueError: for an override of an option that does not exist, or of a wrong type.
  """
  values = flags.FLAGS
  try:
    argv_with_files = values.read_flags_from_files(argv, force_gnu=False)
    words, others = overrides.take_words(argv_with_files)
    remaining: list[str] = values(others)
  except flags.Error as error:
    text = str(error).removesuffix("?").rstrip()  # "Did you mean: workdir ?"
    end = "?" if text != str(error) else "."
    raise UsageError(f"{text}{end} `{argv[0]} --help` lists the flags") from error
  flag = _config_flag()
  if flag.value is None:
    near = f" Did you mean --config={remaining[1]}?" if remaining[1:] else ""
    raise UsageError(
      f"--config=NAME or --config=FILE is missing.{near} Shipped configs: {', '.join(shipped())}"
    )
  flag.text = flag.value
  config = load_config(flag.text)
  if words and flag.options:
    config = load_config(config, overrides.read_words(words, flag.options(), config))
  flag.value = config
  return remaining


def no_words(argv: Sequence[str]) -> None:
  """Raises UsageError for words of a command line that are not flags, see parse_flags."""
  if len(argv) > 1:
    raise UsageError(f"unknown words {argv[1:]}; options are written --config.key=value")


def _config_flag() -> Any:
  return flags.FLAGS["config"]
