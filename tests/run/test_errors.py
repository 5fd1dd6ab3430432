"""Mistakes end a program with their message, bugs with a traceback."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
import sys

import pytest

from bigalign import checks, tree
from bigalign.data.files import patterns
from bigalign.run import errors, preemption


def raised(function, *args):
  try:
    function(*args)
  except BaseException as error:
    return error
  raise AssertionError("nothing was raised")


def compiled(body, monkeypatch):
  """A function f(x) with this body in a file of the package, as far as tracebacks show."""
  file = f"{errors._ROOT}made_up.py"
  text = "def f(x):\n" + "".join(f"  {line}\n" for line in body.splitlines())
  lines = (len(text), None, text.splitlines(keepends=True), file)
  monkeypatch.setitem(errors.linecache.cache, file, lines)
  names: dict = {}
  exec(compile(text, file, "exec"), names)
  return names["f"]


@pytest.mark.parametrize(
  "body",
  [
    "raise ValueError('unknown loss')",
    "raise KeyError('data path: $DATA is not set')",
    "raise ImportError('pip install bigalign[wandb]')",
    "raise FloatingPointError('the loss is not finite')",
    "raise FileNotFoundError(f'{x} holds no config.json')",
    "try:\n  {}[x]\nexcept KeyError as error:\n  raise ValueError('no such key') from error",
    "try:\n  raise ValueError('a')\nfinally:\n  x = 2",
    "try:\n  raise ValueError('a')\nexcept ValueError:\n  raise",
    "with open('/dev/null'):\n  raise ValueError('a')",
    "raise ValueError(\n  f'long {x}'\n  ' text'\n)",
  ],
)
def test_what_is_raised_on_purpose_is_a_mistake(body, monkeypatch):
  error = raised(compiled(body, monkeypatch), "x")
  assert errors.is_mistake(error)
  try:  # raised again elsewhere, as for several processes
    raise error
  except Exception as again:
    assert errors.is_mistake(again)


@pytest.mark.parametrize(
  "body",
  [
    "{}[x]",
    "x.shape",
    "len(1)",
    "int('a')",
    "f(1, 2)",
    "import json; json.loads('{')",
    "raise NotImplementedError(x)",
    "raise AssertionError(x)",
    "raise IndexError(x)",
    "raise ValueError(f'{ {}[x] }')",
    "raise ValueError(\n  f'{ {}[x] }'\n)",
    "assert not x",
    "f(x)",
  ],
)
def test_what_other_lines_raise_is_a_bug(body, monkeypatch):
  assert not errors.is_mistake(raised(compiled(body, monkeypatch), "x"))


def test_errors_of_users_code_and_libraries_are_no_mistakes_of_the_command():
  def users_loss():
    raise ValueError("in the user's own file")

  assert not errors.is_mistake(raised(users_loss))
  assert not errors.is_mistake(raised(concurrent.futures.ThreadPoolExecutor, -1))


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path):
  error = raised(pathlib.Path(tmp_path / "none.json").read_text)
  assert errors.is_mistake(error)
  assert errors.message(error) == f"{tmp_path}/none.json: No such file or directory"
  assert not errors.is_mistake(OSError("no errno"))


@pytest.mark.slow
def test_workers_of_pools_say_where_an_error_comes_from():
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    mistake = raised(pool.submit(checks.choose, {}, "clip", "config.loss").result)
    bug = raised(pool.submit(tree.nearest, 1, ()).result)
  assert isinstance(mistake, ValueError) and errors.is_mistake(mistake)
  assert not errors.is_mistake(bug)


@pytest.fixture(autouse=True)
def without_tracebacks(monkeypatch):
  monkeypatch.setenv(errors.VARIABLE, "")


def ends(function, capsys):
  with pytest.raises(BaseException) as ended, errors.reported("bigalign x"):
    function()
  return ended.value, capsys.readouterr().err


def test_a_mistake_is_its_message_and_status_1(capsys):
  error, text = ends(lambda: checks.choose({"clip": 0}, "cilp", "config.loss"), capsys)
  assert isinstance(error, SystemExit) and error.code == 1
  expected = "bigalign x: config.loss: unknown 'cilp'. Did you mean 'clip'? Known: ['clip']\n"
  assert text == expected


def test_a_key_error_has_no_quotation_marks(capsys, monkeypatch):
  monkeypatch.delenv("NOT_SET", raising=False)
  _, text = ends(lambda: patterns.expand_variables("$NOT_SET/*.tar", what="data"), capsys)
  assert text.startswith("bigalign x: data") and "\\" not in text


def test_a_wrong_command_line_is_status_2(capsys, monkeypatch):
  def wrong():
    raise errors.UsageError("no")

  monkeypatch.setattr(errors, "is_mistake", lambda error: True)  # this file is not of the package
  error, text = ends(wrong, capsys)
  assert error.code == 2 and text == "bigalign x: no\n"


def test_the_traceback_is_kept_if_asked_for_and_for_bugs(capsys, monkeypatch):
  error, text = ends(lambda: {}["a"], capsys)
  assert isinstance(error, KeyError) and text == ""
  for value, shown in (("1", True), ("0", False)):
    monkeypatch.setenv(errors.VARIABLE, value)
    error, text = ends(lambda: checks.choose({}, "cilp", "config.loss"), capsys)
    assert isinstance(error, ValueError) == shown and (text == "") == shown


def test_ctrl_c_and_other_ends_keep_their_status(capsys):
  def interrupted():
    raise KeyboardInterrupt

  error, text = ends(interrupted, capsys)
  assert error.code == 130 and text == "bigalign x: interrupted\n"
  error, text = ends(lambda: sys.exit(143), capsys)
  assert error.code == 143 and text == ""


def test_any_program_takes_the_flag():
  assert errors.take_flag(["a"]) == ["a"] and not errors.shows_tracebacks()
  assert errors.take_flag(["a", "--traceback", "--b"]) == ["a", "--b"]
  assert errors.shows_tracebacks()


def test_several_processes_log_the_message_of_a_mistake_only(monkeypatch, caplog):
  monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
  monkeypatch.setattr(os, "_exit", sys.exit)
  for function, shown in ((lambda: checks.known("a", 1, "b"), False), (lambda: {}["a"], True)):
    caplog.clear()
    with pytest.raises(SystemExit) as ended:
      preemption.exit_on_error(raised(function))
    assert ended.value.code == 1 and ("Traceback" in caplog.text) == shown


def test_a_reader_that_is_gone_ends_a_program_silently(monkeypatch, capsys):
  """As in `bigalign options | head`; a broken pipe to anything else is not taken for it."""
  reading, writing = os.pipe()
  os.close(reading)
  with os.fdopen(writing, "w") as closed:
    monkeypatch.setattr(sys, "stdout", closed)
    with pytest.raises(SystemExit) as end, errors.reported("bigalign options"):
      print("a" * 100_000)
    assert end.value.code == errors.READER_GONE
    print("what is left is discarded", flush=True)
    with pytest.raises(BrokenPipeError), errors.reported("bigalign options"):
      raise BrokenPipeError
  assert not capsys.readouterr().err
