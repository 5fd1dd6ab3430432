"""Progress of long work: a bar on a terminal, a line now and then elsewhere.

  with Progress("embed", total=120, unit="batches") as progress:
    for batch in batches:
      ...
      progress.advance()

prints  embed ━━━━━━━━━━━━━━━━━━━━━━━━━━ 40/120 batches  0:01:01 elapsed, 0:02:02 left

Libraries and evaluators call `track`, which shows nothing unless a program asks for it by `shown`.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TextIO, TypeVar

import rich.console
import rich.progress
import rich.table
from absl import logging
from rich.text import Text

Item = TypeVar("Item")

EVERY = 20.0  # seconds between two lines if the output is not a terminal
_WINDOW = 120  # last measurements, at most one a second, that the estimate is from
_NARROW = 90  # columns below which a bar leaves out the elapsed time
_SHOWN = [False]


class Clock:
  """Estimates the time that work will take, from its speed in the last minutes.

  The time until the first call of `reached` does not count: it contains the start and compilations.
  Nor does what happens in `paused`.

  Args:
    total: units of work.
    start: units that are done already.
  """

  def __init__(self, total: int, start: int = 0) -> None:
    self.total, self.done = total, start
    self._began = time.monotonic()
    self._pauses = 0.0
    self._marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=_WINDOW)

  def reached(self, done: int) -> None:
    """Records that so many units are done."""
    self.done = done
    now = time.monotonic() - self._pauses
    if len(self._marks) < 2 or now - self._marks[-2][0] >= 1:
      self._marks.append((now, done))
    else:
      self._marks[-1] = (now, done)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """A context of other work, such as an evaluation, which does not count."""
    begin = time.monotonic()
    yield
    self._pauses += time.monotonic() - begin

  def elapsed(self) -> float:
    """Seconds since the start, all of them."""
    return time.monotonic() - self._began

  def speed(self) -> float:
    """Units per second; 0 while it is unknown."""
    if not self._marks:
      return 0.0
    (begin, first), (end, last) = self._marks[0], self._marks[-1]
    return (last - first) / (end - begin) if end > begin else 0.0

  def left(self) -> float | None:
    """Seconds until the end; None while there is nothing to estimate from."""
    speed = self.speed()
    return (self.total - self.done) / speed if speed and self.done < self.total else None


class Progress:
  """Shows how far some work is; a context.

  Args:
    what: the work, one word.
    total: units of work; 0: unknown, only the time is shown.
    unit: in the plural, such as "shards"; "": not shown.
    start: units done before.
    visible: False: show nothing; of several processes, one shows it.
    lines: print lines if the output is not a terminal.
    after: seconds before the bar appears; such a bar is removed at the end, and notebooks show it.
    stream: where to write; standard error by default.
  """

  def __init__(
    self,
    what: str,
    total: int,
    *,
    unit: str = "",
    start: int = 0,
    visible: bool = True,
    lines: bool = True,
    after: float = 0.0,
    stream: TextIO | None = None,
  ) -> None:
    self.what, self.unit, self.note = what, unit, ""
    self.clock = Clock(total, start)
    self.visible = visible
    self._lines, self._after = lines, after
    self._console = rich.console.Console(file=stream or sys.stderr)
    self._bar: rich.progress.Progress | None = None
    self._task: Any = None
    self._ended = threading.Event()
    self._handler = logging.get_absl_handler().python_handler
    self._handler_stream = self._handler.stream

  def __enter__(self) -> Self:
    if not self.visible:
      return self
    if self._has_bar():
      if not self._after:
        self._start_bar()
    elif self._lines:
      threading.Thread(target=self._print_lines, daemon=True).start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._ended.set()
    if self._bar is not None:
      self._bar.stop()
      self._handler.stream = self._handler_stream
      self._bar = None

  def advance(self, units: int = 1) -> None:
    """Shows that this much more work is done; cheap."""
    self.reach(self.clock.done + units)

  def reach(self, done: int) -> None:
    """Shows that so much work is done in all; cheap."""
    self.clock.reached(done)
    late = self._after and self.clock.elapsed() > self._after and done != self.clock.total
    if late and self._bar is None and self.visible and self._has_bar():
      self._start_bar()
    if self._bar is not None:
      self._bar.update(self._task, completed=done)

  def say(self, text: str) -> None:
    """Prints lines, above the bar if there is one."""
    if self.visible:
      self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def seconds_left(self) -> float | None:
    """Seconds until the end; None while there is nothing to estimate from."""
    return self.clock.left()

  def times(self) -> str:
    """ "0:01:01 elapsed, 0:00:02 left"; what is left only once there is an estimate."""
    left = self.seconds_left()
    elapsed = f"{clock_time(self.clock.elapsed())} elapsed"
    return elapsed if left is None else f"{elapsed}, {clock_time(left)} left"

  def line(self) -> str:
    """All that is known, in a line."""
    count = f"{self.clock.done:,}/{self.clock.total:,} {self.unit}".strip()
    known = [count if self.clock.total else "", self.note, self.times()]
    return f"{self.what}: {', '.join(part for part in known if part)}"

  def _has_bar(self) -> bool:
    """Whether the place of the output can show a bar."""
    terminal = self._console.is_terminal and not self._console.is_dumb_terminal
    return terminal or bool(self._after and self._console.is_jupyter)

  def _print_lines(self) -> None:
    while not self._ended.wait(EVERY):
      self.say(self.line())

  def _start_bar(self) -> None:
    narrow = self._console.width < _NARROW
    columns: list[rich.progress.ProgressColumn] = [
      _Column(lambda: self.what, style="bold"),
      rich.progress.BarColumn(bar_width=None),
    ]
    if self.clock.total:
      columns.append(
        _Column(lambda: f"{self.clock.done:,}/{self.clock.total:,} {self.unit}".strip())
      )
    columns.append(_Column(lambda: self.note))
    columns.append(_Column(lambda: self._short_times() if narrow else self.times()))
    self._bar = rich.progress.Progress(
      *columns,
      console=self._console,
      expand=True,
      transient=bool(self._after),
      refresh_per_second=5,
      redirect_stdout=sys.stdout.isatty(),  # rich would send what is piped to standard error
    )
    total = self.clock.total or None
    self._task = self._bar.add_task(self.what, total=total, completed=self.clock.done)
    self._bar.start()
    # rich keeps the bar below whatever goes through sys.stderr; absl still holds the old stream.
    self._handler.stream = sys.stderr

  def _short_times(self) -> str:
    left = self.seconds_left()
    return self.times() if left is None else f"{clock_time(left)} left"


class _Column(rich.progress.ProgressColumn):
  """A text that is made anew whenever the bar is drawn."""

  max_refresh = None

  def __init__(self, text: Any, style: str = "") -> None:
    super().__init__(rich.table.Column(no_wrap=True))
    self._text, self._style = text, style

  def render(self, task: rich.progress.Task) -> Text:
    return Text(self._text(), style=self._style)


def clock_time(seconds: float) -> str:
  """Seconds as hours, minutes and seconds: 3661.4 -> "1:01:01"."""
  whole = round(seconds)
  return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextlib.contextmanager
def shown(visible: bool = True) -> Iterator[None]:
  """A context in which `track` shows progress; programs use it, training does not.

  Args:
    visible: whether this process shows it.
  """
  before, _SHOWN[0] = _SHOWN[0], visible
  try:
    yield
  finally:
    _SHOWN[0] = before


def is_shown() -> bool:
  """Whether this is a context of `shown`."""
  return _SHOWN[0]


def track(items: Iterable[Item], what: str, total: int, *, unit: str = "") -> Iterator[Item]:
  """Yields items; shows in a context of `shown` how many are done.

  Args:
    items: to go through.
    what: the work, one word.
    total: number of items.
    unit: name of the items in the plural.
  """
  # One bar at a time: what the caller does with an item shows none.
  with Progress(what, total, unit=unit, visible=_SHOWN[0]) as progress, shown(False):
    for item in items:
      yield item
      progress.advance()
