"""How a program ends: a user's mistake is one paragraph, a bug is a traceback.

A mistake is an error that our code raises on purpose, or one of the operating system about a file.
What any other line raises is a bug, and keeps its traceback. `--traceback`, which every program
takes, or BIGALIGN_TRACEBACK=1 shows the traceback of mistakes too.

The exit status is 1 after a mistake or a bug, 2 after a wrong command line, 130 after Ctrl-C. What
leaves a program by SystemExit keeps its status, such as 143 of a run that was asked to stop. If
the reader of the output ends first, as in `bigalign options | head`, a program ends with 141.
"""

from __future__ import annotations

import contextlib
import dis
import linecache
import os
import pathlib
import re
import select
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NoReturn

from bigalign.private_apis import text_of_remote_traceback

FLAG = "--traceback"
VARIABLE = "BIGALIGN_TRACEBACK"
INTERRUPTED = 130  # 128 + SIGINT, as of a shell
READER_GONE = 141  # 128 + SIGPIPE, as of a shell
SHOW_CURSOR = b"\x1b[?25h"  # of a terminal
_ROOT = str(pathlib.Path(__file__).parents[1]) + os.sep
# What our code raises on purpose has one of these types; others, and subclasses such as
# NotImplementedError, say that code is wrong.
_TYPES = (ValueError, TypeError, KeyError, OSError, ImportError, FloatingPointError, RuntimeError)
_BUGS = (NotImplementedError, RecursionError)
_RAISE = dis.opmap["RAISE_VARARGS"]
_PROGRAMS: list[str] = []  # that `reported` runs now
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in .*$', re.MULTILINE)


class UsageError(ValueError):
  """A wrong command line; the exit status is 2."""


@contextlib.contextmanager
def reported(program: str) -> Iterator[None]:
  """A context that ends the process if a program fails: after its message, or with a traceback.

  Args:
    program: its name, such as "bigalign train".

  Raises:
    SystemExit: after a mistake or Ctrl-C.
    Exception: a bug, unchanged; the interpreter prints its traceback.
  """
  _PROGRAMS.append(program)
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    if not _reader_is_gone():
      raise
    sys.exit(READER_GONE)
  except KeyboardInterrupt:
    if shows_tracebacks():
      raise
    print(f"{program}: interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)
  except Exception as error:
    if shows_tracebacks() or not is_mistake(error):
      raise
    sys.stdout.flush()
    print(f"{program}: {message(error)}", file=sys.stderr)
    sys.exit(status(error))
  finally:
    _PROGRAMS.pop()


def _reader_is_gone() -> bool:
  """Whether standard output is a pipe that was closed; what is left of the output is discarded."""
  try:
    descriptor = sys.stdout.fileno()
  except (OSError, ValueError):  # not a file
    return False
  poll = select.poll()
  poll.register(descriptor, 0)
  if not any(event & select.POLLERR for _, event in poll.poll(0)):
    return False
  os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
  return True


def in_program() -> bool:
  """Whether this process is one of our programs, and not a notebook or another library's."""
  return bool(_PROGRAMS)


def take_flag(words: Sequence[str]) -> list[str]:
  """Returns a command line without --traceback, which sets BIGALIGN_TRACEBACK."""
  others = [word for word in words if word != FLAG]
  if len(others) < len(words):
    os.environ[VARIABLE] = "1"
  return others


def shows_tracebacks() -> bool:
  """Whether tracebacks of mistakes are shown too."""
  return os.environ.get(VARIABLE, "0") not in ("", "0")


def status(error: BaseException) -> int:
  """The exit status of a program that an error ends."""
  return 2 if isinstance(error, UsageError) else 1


def exit_now(status: int) -> NoReturn:
  """Ends this process at once: no thread and no `finally` runs on.

  A progress bar hides the cursor of the terminal, and would show it again only at its own end.
  """
  with contextlib.suppress(OSError, ValueError):  # of a terminal that is gone
    sys.stderr.flush()
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
      os.write(sys.__stderr__.fileno(), SHOW_CURSOR)  # which takes no lock
  os._exit(status)


def message(error: BaseException) -> str:
  """The text of an error, for a person who did not write the code."""
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    return f"{error.filename}: {error.strerror}"
  # str() of a KeyError is the repr of its text.
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  return text.strip() or type(error).__name__


def is_mistake(error: BaseException) -> bool:
  """Returns whether an error is about what the user gave, and not about the code.

  True for what a `raise` in our code raises with one of the usual types, here or in a worker
  process, and for an error of the operating system about a file. False for anything else: a missing
  key of a dict, a wrong argument of a library, an error of the library itself.
  """
  if isinstance(error, _BUGS) or not isinstance(error, _TYPES):
    return False
  if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
    return True
  remote = text_of_remote_traceback(error)
  if remote is not None:
    frames = _FRAME.findall(remote)
    return bool(frames) and _raises(frames[-1][0], int(frames[-1][1]))
  last = _innermost(error.__traceback__)
  return (
    last is not None
    and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE
    and _raises(last.tb_frame.f_code.co_filename, last.tb_lineno)
  )


def _innermost(trace: TracebackType | None) -> TracebackType | None:
  """The last entry of a traceback, where the error was raised."""
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  return trace


def _raises(file: str, line: int) -> bool:
  """Whether a line of a file is a `raise` of ours; also true if its text is not available."""
  text = linecache.getline(file, line)
  return os.path.abspath(file).startswith(_ROOT) and (not text or "raise " in text)
