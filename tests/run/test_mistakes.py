"""Likely mistakes of users: what they see, held by expected/mistakes.txt.

BIGALIGN_UPDATE_EXPECTED=1 rewrites the file from what the programs say now; read the difference.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap

import absl.app
import pytest
from absl import flags
from helpers.shipped import ROOT
from helpers.small_shards import picture, write_tar

from bigalign import __main__
from bigalign.run import errors

EXPECTED = ROOT / "tests/expected/mistakes.txt"
LINES = 5  # of a terminal of WIDTH columns
WIDTH = 120
TRAIN = "bigalign train --config=tiny --workdir=run"

MISTAKES = (
  "bigalign trian --config=tiny",
  "bigalign train --config=nope",
  "bigalign train --config=siglip_b61.py",
  "bigalign train",
  "bigalign train siglip_b16",
  f"{TRAIN} --workdri=run",
  f"{TRAIN} --profile=10",
  f"{TRAIN} --config.batchsize=64",
  f"{TRAIN} --config.optimizer.learning_rate=0.001",
  f"{TRAIN} --config.optimizer.lr=fast",
  f"{TRAIN} --config.optimizer.name=adamx",
  f"{TRAIN} --config.model.image.dtype=float16x",
  f"{TRAIN} --config.batch_size=66",
  f"{TRAIN} --config.data.source='shards/{{00010..00015}}.tar'",
  f"{TRAIN} --config.data.source='shrads/*.tar'",
  f"{TRAIN} --config.data.source='shards/*.tar' --config.data.captions=caption.txt",
  f"{TRAIN} --config.data.source='$NOT_SET/*.tar'",
  f"{TRAIN} --config.data.tokenizer.name=hf --config.data.tokenizer.path=missing/tokenizer.json",
  "bigalign evaluate runs/nope",
  "bigalign view 'shards/*.tar' --where 'width >= 200' --out good",
  "bigalign index 'shrads/*.tar'",
  "bigalign compare --image shards --text shards",
)
# The usage that argparse prints before the message differs between versions of Python.
WITH_USAGE = {
  "bigalign view 'shards/*.tar'": "the following arguments are required: --out",
  "bigalign evaluate": "the following arguments are required: model",
  "bigalign index 'shards/*.tar' --captoins txt": "unknown arguments: --captoins txt",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Where the programs run: it has a folder of shards."""
  made = tmp_path_factory.mktemp("mistakes")
  (made / "shards").mkdir()
  for shard in range(3):
    members = [("a.jpg", picture(shard)), ("a.txt", b"a caption"), ("a.json", b'{"title": "b"}')]
    write_tar(made / f"shards/{shard:05}.tar", members)
  return made


@pytest.fixture
def bigalign(folder, monkeypatch, capsys):
  """Runs a command in this process; returns what it prints to standard error, and its status."""
  known = {name: flags.FLAGS[name].value for name in flags.FLAGS}
  parsed = flags.FLAGS.is_parsed()
  monkeypatch.chdir(folder)
  monkeypatch.setattr(absl.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
  monkeypatch.delenv("NOT_SET", raising=False)
  monkeypatch.setenv(errors.VARIABLE, "")
  monkeypatch.setenv("COLUMNS", str(WIDTH))

  def run(command):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
      __main__.main()
    text = capsys.readouterr().err
    for path, name in ((folder, "FOLDER"), (os.environ["BIGALIGN_INDEX"], "INDEX")):
      text = text.replace(str(path), name)
    return re.sub(r"[0-9a-f]{16}", "HEX", text), ended.value.code

  yield run
  for name in {*flags.FLAGS} - {*known}:
    delattr(flags.FLAGS, name)
  for name, value in known.items():
    flags.FLAGS[name].value = value
  if not parsed:
    flags.FLAGS.unparse_flags()


def sections():
  """{command: what it prints and its status}, as in the file."""
  text = EXPECTED.read_text() if EXPECTED.exists() else ""
  parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
  return dict(zip(parts[::2], (part.rstrip("\n") for part in parts[1::2])))


def in_a_few_lines(text):
  lines = [line for part in text.splitlines() for line in textwrap.wrap(part, WIDTH)]
  return len(lines) <= LINES and "Traceback" not in text


@pytest.mark.parametrize("command", MISTAKES, ids=lambda x: re.sub(r"\W+", "-", x)[9:])
def test_a_mistake_is_said_in_a_few_lines(command, bigalign):
  text, status = bigalign(command)
  found = f"{text.rstrip()}\n(status {status})"
  if os.environ.get("BIGALIGN_UPDATE_EXPECTED"):
    every = {**sections(), command: found}
    EXPECTED.write_text("\n\n".join(f"$ {x}\n{every[x]}" for x in MISTAKES if x in every) + "\n")
  assert found == sections()[command]
  assert status in (1, 2) and in_a_few_lines(text)


@pytest.mark.parametrize("command", WITH_USAGE)
def test_a_wrong_command_line_is_said_with_the_usage(command, bigalign):
  text, status = bigalign(command)
  program = " ".join(command.split()[:2])
  assert text.endswith(f"{program}: error: {WITH_USAGE[command]}\n") and status == 2
  assert in_a_few_lines(text)


def test_the_file_holds_no_other_commands():
  assert [*sections()] == [*MISTAKES]


@pytest.mark.slow
def test_a_program_prints_nothing_else(folder):
  words = shlex.split(f"{TRAIN} --config.data.source='shrads/*.tar'")[1:]
  ended = subprocess.run(
    [sys.executable, "-m", "bigalign", *words],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  text = ended.stdout + ended.stderr
  assert ended.returncode == 1 and text.endswith("the folder shrads does not exist\n")
  assert in_a_few_lines(text), text
