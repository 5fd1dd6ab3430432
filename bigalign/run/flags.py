"""Command-line flags of `bigalign train`: the config file, overrides of it, and the processes."""

from __future__ import annotations

import pathlib
import sys
import warnings
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, FieldReference

from bigalign.private_apis import transform_config_file

# Options that are a number of steps or a text such as "3 epochs".
DURATIONS = ("total_steps", "checkpoint_every", "eval_every", "diagnose_every")
DURATIONS_OF_THE_OPTIMIZER = ("warmup", "cooldown")


def define_flags() -> None:
  """Defines the flags with absl."""
  with warnings.catch_warnings():
    # config_flags calls load_module(), which is deprecated; only ml_collections can change that.
    warnings.filterwarnings("ignore", message=".*load_module.*", category=DeprecationWarning)
    from ml_collections import config_flags

  config_flags.DEFINE_config_file("config", None, "The experiment: a file in configs/.")
  transform_config_file("config", _accept_durations)
  flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<name of the config>.")
  flags.DEFINE_bool("allow_config_change", False, "Resume a run although its config has changed.")
  flags.DEFINE_string("profile", None, "FIRST:LAST, the steps to trace into WORKDIR/profile.")
  flags.DEFINE_string("coordinator", None, "host:port of process 0, for several processes.")
  flags.DEFINE_integer("num_processes", None, "Number of processes.")
  flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
  flags.mark_flag_as_required("config")


def config_name() -> str:
  """Returns the name of the config file without folder and suffix, once flags are parsed."""
  from ml_collections import config_flags

  return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def profile_span(text: str) -> tuple[int, int]:
  """Returns the steps of --profile as numbers: "10:15" -> (10, 15).

  Raises:
    app.UsageError: if the text has another form.
  """
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal()):
    raise app.UsageError(f"--profile={text}: two steps are wanted, as in --profile=10:15")
  return int(first), int(last)


def _accept_durations(config: Any) -> Any:
  """Lets an override replace a duration that is a number by a text.

  An override must have the type of the value in the file: --config.total_steps="3 epochs" would be
  refused if the file says 40.
  """
  if isinstance(config, ConfigDict):
    parts = ((config, DURATIONS), (config.get("optimizer", {}), DURATIONS_OF_THE_OPTIMIZER))
    for part, names in parts:
      for name in names:
        if name in part:
          part[name] = FieldReference(part[name], field_type=object)
  return config


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags as absl does; an override of an unknown key ends the program with an advice.

  Args:
    argv: the command line, the program first.

  Returns:
    The words of the command line that are not flags, the program first.
  """
  try:
    remaining: list[str] = app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    sys.exit(
      f"No such key in the config: {error.args[0]}\nA flag can only change a key that the config"
      " file sets. To use another option, add it to the config file first."
    )
  return remaining
