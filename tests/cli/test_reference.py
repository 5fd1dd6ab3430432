"""The reference of the options, and the help of the programs: generated, complete, readable."""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags as absl_flags
from helpers.shipped import ROOT

from bigalign import __main__ as command
from bigalign.cli import configs, examples, help, reference
from bigalign.config import Config
from bigalign.export.formats import FORMATS
from bigalign.losses import TERMS
from bigalign.options import MISSING, definition
from bigalign.run.configs import load_config, shipped
from bigalign.run.flags import PROGRAMS, define_flags
from bigalign.run.overrides import names
from bigalign.run.parsers import EXPORT_FORMATS


def run(capsys, module, *words):
  """What a program prints."""
  module.main(words)
  return capsys.readouterr().out


def test_a_part_of_the_reference_has_names_types_defaults_and_meaning(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  text = run(capsys, reference, "data.augment")
  assert text.startswith("config.data.augment: random views of images in training")
  assert "\n  scale  tuple[float, float], default (0.9, 1.0)\n      smallest and largest" in text
  assert "\n  color_jitter  group\n" in text and "data.augment.rand_augment" in text
  assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
  ("part", "wanted"),
  [
    ("", ["  batch_size  int, required", "  ema  float, default 0.0", "  data  group"]),
    ("config.loss", ["config.loss.ENTRY.OPTION=VALUE", "  siglip: Classifies each pair", "t_init"]),
    ("loss.siglip", ["  t_init  float, default 10.0", "  weight  float, default 1.0"]),
    ("optimizer", ["config.optimizer.name=ENTRY", "adamw by default", "options: beta, rms, steps"]),
    ("optimizer.rms", ["config.optimizer.rms:", "  float, default"]),
    ("evals", ["config.evals.NAME.type=ENTRY chooses one of these:"]),
    ("evals.retrieval", ["  captions  int | None, default None", "largest number of captions"]),
    ("data.mixture", ["config.data.mixture[0]: several sources", "  upsampling  float | None"]),
    ("data.mixture.weight", ["config.data.mixture.weight:", "  float | None, default None"]),
    ("model", ["  init  str, default ''", "  open_clip  str"]),
    ("model.image", ["  init  str, default ''", "config.model.image.name=ENTRY", "  vit:"]),
  ],
)
def test_every_kind_of_part_can_be_asked_for(part, wanted, capsys):
  text = run(capsys, reference, part)
  assert all(line in text for line in wanted), text


def test_an_unknown_part_names_the_nearest():
  message = r"config\.data has no option 'augmnt'\. Did you mean 'augment'\? .* and \d+ more$"
  with pytest.raises(ValueError, match=message):
    reference.section(Config, "data.augmnt")


def test_the_reference_as_json(capsys):
  found = json.loads(run(capsys, reference, "loss", "--json"))
  assert {*found["entries"]} == {*TERMS}
  assert found["entries"]["siglip"]["options"]["t_init"] == {
    "type": "float",
    "required": False,
    "default": 10.0,
    "about": definition(TERMS["siglip"])["t_init"].doc,
  }


def test_the_reference_reaches_every_option_of_a_config():
  for name in names(Config, load_config("photos_frozen")):
    found = reference.section(Config, name)
    assert found.about, name
    assert [*reference.lines(found, 80)] and json.dumps(reference.as_json(found))


def test_help_reads_the_options_from_their_source_without_jax():
  """The same names, defaults and texts as the definitions, which importing would give."""
  wanted = definition(Config)
  found = {field.name: field for field in help.fields()}
  assert [*found] == [*wanted]
  for name, option in wanted.items():
    assert found[name].doc == option.doc
    assert bool(found[name].type) != reference.is_group(option), name
    if found[name].type:
      default = ast.literal_eval(found[name].default) if found[name].default else MISSING
      assert default == option.default


def test_help_and_wrong_command_lines_need_no_jax():
  """Every program explains itself in a process that cannot import JAX, which takes seconds."""
  code = """
import sys
from bigalign import __main__ as command
heavy = ("jax", "flax", "tensorflow", "grain", "orbax", "matplotlib", "torch")
sys.modules.update(dict.fromkeys(heavy))  # None: an import raises ImportError
for words in [*((x, "--help") for x in command.PROGRAMS), ("evaluate",), ("costs", "--loses=x")]:
  sys.argv = ["bigalign", *words]
  try:
    command.main()
    ended = 0
  except SystemExit as end:
    ended = end.code or 0
  print("ended:", words[0], ended, flush=True)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
  assert done.returncode == 0, done.stderr[-1000:]
  ends = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ended: ")]
  wanted = [[program, "0"] for program in command.PROGRAMS]
  assert ends == [*wanted, ["evaluate", "2"], ["costs", "2"]], done.stderr[-1000:]


def test_the_formats_in_the_help_of_export_are_those_that_there_are():
  assert sorted(EXPORT_FORMATS) == sorted(FORMATS)


@pytest.fixture(scope="module")
def helps():
  """{program: its help}, of all programs, at 80 columns."""
  found = {}
  for program in command.PROGRAMS:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sys, "argv", ["bigalign", program, "--help"])
      patch.setattr(sys, "stdout", text := io.StringIO())
      patch.setenv("COLUMNS", "80")
      patch.setattr(help, "flags", patched := _Flags())
      patch.setattr("bigalign.run.flags.flags", patched)
      try:
        command.main()
      except SystemExit as end:
        assert not end.code
    found[program] = text.getvalue()
  return found


class _Flags:
  """absl.flags with flags of its own, because a process defines those of one program only."""

  def __init__(self):
    self.FLAGS = absl_flags.FlagValues()

  def __getattr__(self, name):
    found = getattr(absl_flags, name)
    if not name.startswith("DEFINE_"):
      return found

    def define(*args, **options):
      if name == "DEFINE_flag":
        options["module_name"] = define_flags.__module__
      return found(*args, flag_values=self.FLAGS, **options)

    return define


def test_every_program_has_usage_examples_and_its_flags(helps):
  for program, text in helps.items():
    assert text.startswith(f"usage: bigalign {program} "), program
    assert len(examples.EXAMPLES[program]) >= 2 and examples.text(program) in text
  for program in PROGRAMS:
    assert all(f"  {field.name}" in helps[program] for field in help.fields())
    assert "`bigalign options NAME`" in helps[program] and "siglip_b16" in helps[program]
    body = [x for x in helps[program].splitlines() if not x.startswith("  bigalign ")]
    assert max(map(len, body)) <= 80 and len(body) < 75


def test_examples_use_flags_and_options_that_exist(helps):
  tiny = {*names(Config, load_config("tiny"))}
  for program, commands in examples.EXAMPLES.items():
    for line in commands:
      words = shlex.split(line)
      assert words[:2] == ["bigalign", program]
      given = [word.split("=")[0] for word in words if word.startswith("--")]
      for flag in given:
        known = re.search(rf"{re.escape(flag)}\b", helps[program])
        assert known or flag.removeprefix("--") in tiny, f"{line}: {flag}"
      config = [word for word in words if word.startswith("--config=") and ".py" not in word]
      assert not config or config[0].removeprefix("--config=") in shipped()


def test_version(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["bigalign", "--version"])
  command.main()
  assert re.fullmatch(r"bigalign \d+\.\d+\S*\n", capsys.readouterr().out)


def test_an_unknown_program_names_the_nearest(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["bigalign", "trian"])
  with pytest.raises(SystemExit) as end:
    command.main()
  assert end.value.code == 2
  assert "unknown program 'trian'. Did you mean 'train'?" in capsys.readouterr().err


def test_every_program_is_there():
  for module, _ in command.PROGRAMS.values():
    assert importlib.import_module(f"bigalign.{module}").run


def test_configs_are_listed_with_what_they_are(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  text = run(capsys, configs)
  assert [line.split()[0] for line in text.splitlines()] == shipped()
  assert "https://arxiv.org/abs/2303.15343" in text
  assert [*json.loads(run(capsys, configs, "--json"))] == shipped()


def test_a_config_is_printed_and_copied(capsys, tmp_path):
  wanted = (ROOT / "configs/tiny.py").read_text()
  assert run(capsys, configs, "tiny") == wanted
  copied = tmp_path / "new/mine.py"
  assert f"bigalign train --config={copied}" in run(capsys, configs, "tiny", "--copy", str(copied))
  assert copied.read_text() == wanted
  run(capsys, configs, "tiny", "--copy", str(tmp_path))
  assert (tmp_path / "tiny.py").read_text() == wanted
  copied.write_text("mine")
  with pytest.raises(FileExistsError, match=r"mine\.py exists; give the path of a new file"):
    configs.main(["tiny", "--copy", str(copied)])
  assert copied.read_text() == "mine"
