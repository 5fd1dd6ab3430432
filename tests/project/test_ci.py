"""Tests of CI: skips need reasons, pinned versions fit, make names a missing interpreter."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
  """{name: JUnit report} of a passed, a skipped and a failed test, and of a file with an error."""
  folder = tmp_path_factory.mktemp("suite")
  tests = {
    "passed": "def test_a(): pass",
    "skipped": "import pytest\n@pytest.mark.parametrize('x', [1])\n"
    "def test_b(x): pytest.skip('no data here')",
    "failed": "def test_c(): assert False",
    "broken": "import nothing_of_that_name",
  }
  for name, text in tests.items():
    (folder / f"test_{name}.py").write_text(text)
    subprocess.run(
      [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"test_{name}.py",
        f"--junitxml={name}.xml",
        "-o",
        "junit_family=xunit1",
      ],
      cwd=folder,
      capture_output=True,
    )
  return {name: folder / f"{name}.xml" for name in tests}


def _summary(tmp_path, skips, *reports):
  path = tmp_path / "skips.txt"
  path.write_text(skips)
  return subprocess.run(
    [sys.executable, ROOT / ".ci/summary.py", "--skips", path, *reports],
    capture_output=True,
    text=True,
  )


def test_the_last_line_holds_only_the_counts(reports, tmp_path):
  result = _summary(tmp_path, "", reports["passed"], reports["passed"])
  assert (result.returncode, result.stdout) == (0, "2 passed, 0 failed, 0 skipped\n")


@pytest.mark.parametrize(
  "skips, status",
  [
    ("", 1),
    ("# test_skipped.py::test_b[1] no data here", 1),
    ("test_skipped.py::test_b[1] another reason", 1),
    ("test_other.py::* no data here", 1),
    ("test_skipped.py::test_b[1] no data here", 0),
    ("# why\n\ntest_skipped.py::* no data*", 0),
  ],
)
def test_a_skip_needs_its_test_and_its_reason_in_the_list(reports, tmp_path, skips, status):
  result = _summary(tmp_path, skips, reports["passed"], reports["skipped"])
  assert result.returncode == status
  assert result.stdout.splitlines()[-1] == "1 passed, 0 failed, 1 skipped"
  assert ("test_skipped.py::test_b[1] no data here" in result.stdout) == bool(status)


def test_a_line_without_a_reason_is_an_error(reports, tmp_path):
  result = _summary(tmp_path, "test_skipped.py::test_b[1]", reports["skipped"])
  assert result.returncode and "has no reason" in result.stderr


@pytest.mark.parametrize("name", ["failed", "broken"])
def test_a_failed_test_or_import_fails(reports, tmp_path, name):
  result = _summary(tmp_path, "* *", reports["passed"], reports[name])
  assert result.returncode == 1
  assert result.stdout.splitlines()[-1] == "1 passed, 1 failed, 0 skipped"


def test_a_missing_report_fails(reports, tmp_path):
  result = _summary(tmp_path, "", reports["passed"], tmp_path / "absent.xml")
  assert result.returncode == 1 and "absent.xml" in result.stdout


def test_every_listed_skip_has_a_reason_and_a_test_file():
  for line in (ROOT / "tests/skips.txt").read_text().splitlines():
    test, _, reason = line.partition(" ")
    if line and not line.startswith("#"):
      assert reason
      assert test == "*" or any(ROOT.glob(test.partition("::")[0])), line


def test_the_pinned_versions_satisfy_every_dependency():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  pins = dict(
    line.split("==")
    for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()
    if not line.startswith("#")
  )
  requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
  for requirement in map(Requirement, requirements):
    version = pins[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement}, tested with {version}"


def test_make_names_the_missing_interpreter_and_leaves_no_environment(tmp_path):
  shutil.copy(ROOT / "Makefile", tmp_path)
  old = tmp_path / "python3.6"
  old.write_text("#!/bin/sh\nexit 1\n")
  old.chmod(0o755)
  result = subprocess.run(
    ["make", ".venv/bin/pip", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
  )
  assert result.returncode and f"No Python >= 3.11 among: {old}" in result.stderr
  assert not (tmp_path / ".venv").exists()
