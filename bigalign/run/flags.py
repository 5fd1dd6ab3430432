"""The flags of `bigalign train`: a config file, what is changed in it, and the other processes."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, FieldReference

# Steps as a number, or text such as "3 epochs".
DURATIONS = ("total_steps", "checkpoint_every", "eval_every", "diagnose_every")
DURATIONS_OF_THE_OPTIMIZER = ("warmup", "cooldown")


def define_flags() -> None:
  """Tells absl the flags."""
  with warnings.catch_warnings():
    # One load_module() inside of config_flags, which nobody here can mend.
    warnings.filterwarnings("ignore", message=".*load_module.*", category=DeprecationWarning)
    from ml_collections import config_flags

  config_flags.DEFINE_config_file("config", None, "The experiment: a file in configs/.")
  file: Any = flags.FLAGS["config"].parser
  file.parse = functools.partial(_free_durations, file.parse)
  flags.DEFINE_string("workdir", None, "Folder of the run; runs/<name of the config> if not given.")
  flags.DEFINE_bool("allow_config_change", False, "Continue a run with a config that differs.")
  flags.DEFINE_string("profile", None, "FIRST:LAST, steps traced into WORKDIR/profile for xprof.")
  flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.")
  flags.DEFINE_integer("num_processes", None, "How many processes.")
  flags.DEFINE_integer("process_id", None, "Which one this is.")
  flags.mark_flag_as_required("config")


def profile_span(text: str) -> tuple[int, int]:
  """(10, 15) from "10:15"."""
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal()):
    raise app.UsageError(f"--profile={text}: two steps are wanted, as in --profile=10:15")
  return int(first), int(last)


def _free_durations(read: Callable[[str], Any], path: str) -> Any:
  """The config in a file, where a flag may put text in the place of a duration that is a number.

  The value in the file gives a flag its type: --config.total_steps="3 epochs" would be refused
  where the file says 40.
  """
  config = read(path)
  if isinstance(config, ConfigDict):
    parts = ((config, DURATIONS), (config.get("optimizer", {}), DURATIONS_OF_THE_OPTIMIZER))
    for part, names in parts:
      for name in names:
        if name in part:
          part[name] = FieldReference(part[name], field_type=object)
  return config


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with a way on for a key that the config does not hold."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    sys.exit(
      f"No such key in the config: {error.args[0]}\nA flag changes what the config file writes out;"
      " another option is written into the file first."
    )
