"""A progress bar that appears for long work only."""

from __future__ import annotations

import time

import jax
import rich.console
import rich.progress

_AFTER = 2.0  # seconds


class LateProgress:
  """Shows how many items are done, on a terminal or in a notebook, once it takes a while.

  with LateProgress(1000) as bar:
    bar.advance(64)

  Args:
    total: number of items; None if it is not known.
    enabled: False: nothing is shown.
  """

  def __init__(self, total: int | None, *, enabled: bool = True) -> None:
    self._total, self._done, self._began = total, 0, time.monotonic()
    self._enabled = enabled and jax.process_index() == 0
    self._bar: rich.progress.Progress | None = None
    self._task: rich.progress.TaskID | None = None

  def __enter__(self) -> LateProgress:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar is not None:
      self._bar.stop()

  def advance(self, count: int) -> None:
    """Counts finished items."""
    self._done += count
    late = time.monotonic() - self._began > _AFTER
    if self._bar is None and self._enabled and late and self._done != self._total:
      console = rich.console.Console(stderr=True)
      if not (console.is_terminal or console.is_jupyter):
        self._enabled = False
        return
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("embedded"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("[dim]left"),
        console=console,
        transient=True,
      )
      self._task = self._bar.add_task("", total=self._total)
      self._bar.start()
    if self._bar is not None and self._task is not None:
      self._bar.update(self._task, completed=self._done)
