"""A bar on a terminal, lines elsewhere, and an estimate that compilation does not spoil."""

from __future__ import annotations

import doctest
import io
import re
import sys
import time

import numpy as np
import pytest
import rich.table

from bigalign.evals.embed import Context, EvalData, embedded_images
from bigalign.run import metrics, progress, tables
from bigalign.run.metrics import TrainingProgress
from bigalign.run.progress import Clock, Progress, shown, track


class Terminal(io.StringIO):
  def isatty(self):
    return True

  def lines(self):
    """What was drawn, without the codes of colours and movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.fixture
def now(monkeypatch):
  """The time, which a test sets."""
  at = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: at[0])
  return at


@pytest.fixture
def terminal(monkeypatch):
  for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  return Terminal()


def test_the_start_and_pauses_do_not_count(now):
  clock = Clock(100, start=10)
  now[0] += 60  # compilation
  clock.reached(11)
  assert clock.left() is None and clock.elapsed() == 60
  now[0] += 2
  clock.reached(12)
  assert clock.left() == 2 * 88
  with clock.paused():
    now[0] += 500
  now[0] += 2
  clock.reached(13)
  assert clock.left() == 2 * 87 and clock.elapsed() == 564
  clock.reached(100)
  assert clock.left() is None


def test_the_estimate_follows_the_speed_of_the_last_minutes(now):
  clock = Clock(10_000)
  for done in range(1, 500):
    now[0] += 1 if done < 250 else 3
    clock.reached(done)
  assert clock.left() == pytest.approx(3 * (10_000 - 499))
  for done in range(500, 5000):  # many in a second
    now[0] += 0.001
    clock.reached(done)
  assert len(clock._marks) <= 121


def test_later_evaluations_of_a_run_count_and_the_first_does_not(now):
  left = TrainingProgress(100, evaluate_every=30, stream=io.StringIO())
  for seconds, steps in ((50, (1, 2)), (8, (3, 4))):  # the first one compiles
    with left.evaluating():
      now[0] += seconds
    for step in steps:
      now[0] += 1
      left.reach(step)
  assert left.seconds_left() == 96 + 4 * 8  # after 30, 60, 90 and 100
  left.reach(90)
  assert left._evaluations_left() == 1
  assert TrainingProgress(90, evaluate_every=30)._evaluations_left() == 3
  assert TrainingProgress(90)._evaluations_left() == 1


def test_the_bar_separates_what_has_passed_from_what_is_left(terminal, now):
  with Progress("embed", 120, unit="batches", stream=terminal) as bar:
    now[0] += 20
    bar.advance()
    now[0] += 40
    bar.advance(40)
    bar.note = "5 images/s"
    bar.say("above the bar")
    bar._bar.refresh()
  last = terminal.lines()[-1]
  assert re.search(r"^embed .* 41/120 batches 5 images/s 0:01:00 elapsed, 0:01:19 left$", last), (
    last
  )
  assert "above the bar" in terminal.lines()
  assert not any("left 0:" in line for line in terminal.lines())


def test_a_narrow_terminal_shows_what_is_left(terminal, now, monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  with Progress("embed", 120, unit="batches", stream=terminal) as bar:
    now[0] += 20
    bar.advance()
    now[0] += 40
    bar.advance(40)
    bar._bar.refresh()
  assert terminal.lines()[-1].endswith("41/120 batches  0:01:19 left")
  assert all(len(line) <= 60 for line in terminal.lines())


def test_training_names_what_it_does(terminal):
  with TrainingProgress(40, stream=terminal) as bar:
    bar._bar.refresh()
    bar.reach(1)
    bar.log(1, {"train/loss": 2.0, "train/samples_per_second": 300.0})
    bar._bar.refresh()
    with bar.evaluating():
      bar._bar.refresh()
  drawn = "\n".join(terminal.lines())
  assert re.search(r"^compile .* 0/40", drawn, re.MULTILINE)
  assert re.search(r"^train .* 1/40 loss 2.0000  images/s 300", drawn, re.MULTILINE)
  assert re.search(r"^evaluate .* 1/40", drawn, re.MULTILINE)


def test_lines_come_now_and_then_where_there_is_no_terminal(monkeypatch):
  monkeypatch.setattr(progress, "EVERY", 0.02)
  out = io.StringIO()
  with Progress("index", 3, unit="shards", stream=out) as bar:
    bar.advance()
    end = time.monotonic() + 10
    while out.getvalue().count("\n") < 2:
      assert time.monotonic() < end
      time.sleep(0.005)
  assert out.getvalue().startswith("index: 1/3 shards, 0:00:00 elapsed\n")


def test_one_process_shows_it(terminal, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  with TrainingProgress(10, stream=terminal) as bar:
    bar.reach(1)
    bar.say("x")
    bar.log(1, {"train/loss": 1.0})
  assert not terminal.getvalue()


def test_short_work_shows_no_bar(terminal, now):
  with Progress("embed", 4, lines=False, after=2, stream=terminal) as bar:
    bar.advance()
    now[0] += 1
    bar.advance()
    assert not terminal.getvalue()
    now[0] += 2
    bar.advance()
    assert bar.visible and re.search("^embed .* 3/4", terminal.lines()[-1])
  terminal.truncate(0)
  with Progress("embed", 1, lines=False, after=2, stream=terminal) as bar:
    now[0] += 3
    bar.advance()  # the last
  assert not terminal.getvalue()


def test_only_programs_show_the_progress_of_loops(terminal, monkeypatch):
  monkeypatch.setattr(sys, "stderr", terminal)
  assert [*track("ab", "index", 2)] == ["a", "b"]
  assert not terminal.getvalue()
  with shown():
    # One bar at a time.
    assert [[*track("cd", "inner", 2)] for _ in track("ab", "index", 2)] == [["c", "d"]] * 2
    assert progress.is_shown()
  assert not progress.is_shown()
  assert re.search(r"^index .* 2/2", terminal.lines()[-1])
  assert "inner" not in terminal.getvalue()


def test_evaluators_say_how_far_they_are(terminal, monkeypatch):
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setattr("bigalign.sharding.host_rows", lambda *_: None)
  monkeypatch.setattr("bigalign.sharding.global_batch", lambda mesh, batch, *_: batch)
  context = Context("val", lambda params, image: image, None, None, None)
  none = {"texts": np.zeros((1, 0, 8)), "texts_mask": np.zeros((1, 0, 8), bool)}
  none |= {"texts_valid": np.zeros((1, 0), bool), "rejects": np.zeros((1, 3), int)}
  data = EvalData([0] * 10, 4, lambda: [{"image": number, **none} for number in (1, 2, 3)])
  with shown():
    assert [image for image, _ in embedded_images(context, data, None)] == [1, 2, 3]
  assert re.search(r"^val .* 3/3 batches", terminal.lines()[-1])


def test_numbers_have_three_digits_and_a_unit_that_fits():
  assert doctest.testmod(tables).failed == 0
  assert tables.scaled(0.0000012, tables.SECONDS) == "1.2 µs"
  assert tables.scaled(12.0, tables.SECONDS) == "12 s"
  assert tables.scaled(0, tables.FLOP) == "0 MFLOP"


def test_tables_are_as_wide_as_the_terminal_and_never_cut_in_a_file(capsys, monkeypatch):
  name = "stores/" + "a_long_name_" * 20
  table = rich.table.Table()
  table.add_column("tower", overflow="fold")
  table.add_column("recall", no_wrap=True)
  table.add_row(name, "0.500")
  tables.show(table)
  assert name in capsys.readouterr().out
  terminal = Terminal()
  monkeypatch.setenv("COLUMNS", "70")
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr(sys, "stdout", terminal)
  tables.show(table)
  lines = terminal.lines()
  assert max(map(len, lines)) == 70 and any("0.500" in line for line in lines)
  assert "…" not in terminal.getvalue()
