"""Counts the tests in JUnit reports. Exits with 1 on a failure or a skip that is not in the list.

.ci/summary.py --skips tests/skips.txt REPORT.xml ...

Lists the tests that take SLOW seconds or more. The reports must be written by pytest with
-o junit_family=xunit1, which records the file of each test.
"""

from __future__ import annotations

import argparse
import fnmatch
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

SLOW = 10.0


def read_excuses(path: pathlib.Path) -> list[tuple[str, str]]:
  """Returns (pattern of test ids, pattern of reasons) for each line that is not a comment."""
  excuses = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if line.strip() and not line.startswith("#"):
      test, _, reason = line.partition(" ")
      if not reason.strip():
        raise ValueError(f"{path}:{number}: {test!r} has no reason; write: TEST_ID REASON")
      excuses.append((test, reason.strip()))
  return excuses


def read_report(path: pathlib.Path) -> list[tuple[str, str, str, float]]:
  """Returns (test id, "passed" | "failed" | "skipped", reason, seconds) for each test."""
  tests = []
  for case in ElementTree.parse(path).iter("testcase"):
    name = f"{case.get('file', case.get('classname'))}::{case.get('name')}"
    skip, seconds = case.find("skipped"), float(case.get("time") or 0)
    if case.find("failure") is not None or case.find("error") is not None:
      tests.append((name, "failed", "", seconds))
    elif skip is not None:
      tests.append((name, "skipped", skip.get("message") or "", seconds))
    else:
      tests.append((name, "passed", "", seconds))
  return tests


def excused(test: str, reason: str, excuses: list[tuple[str, str]]) -> bool:
  """Returns whether a line matches this test and this reason; [ is not a wildcard here."""
  return any(
    fnmatch.fnmatchcase(test, pattern.replace("[", "[[]")) and fnmatch.fnmatchcase(reason, why)
    for pattern, why in excuses
  )


def main() -> int:
  """Prints the summary and returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--skips", type=pathlib.Path, required=True)
  parser.add_argument("reports", type=pathlib.Path, nargs="+")
  args = parser.parse_args()
  excuses = read_excuses(args.skips)

  counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
  wrong, times = [], []
  for path in args.reports:
    tests = read_report(path) if path.exists() else []
    if not tests:
      wrong.append(f"no tests in {path.name}: pytest stopped before it wrote a report")
    for name, outcome, reason, seconds in tests:
      counts[outcome] += 1
      times.append((seconds, name))
      if outcome == "failed":
        wrong.append(f"failed: {name}")
      elif outcome == "skipped" and not excused(name, reason, excuses):
        wrong.append(f"skipped without a line in {args.skips}: {name} {reason}")
  for seconds, name in sorted((x for x in times if x[0] >= SLOW), reverse=True):
    print(f"{seconds:6.1f} s  {name}")
  print("\n".join(wrong), end="\n" if wrong else "")
  print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(main())
