"""Wheel and source distribution: complete, versioned by git tags, and usable outside a checkout."""

from __future__ import annotations

import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
import yaml
from helpers.shipped import ROOT

from bigalign.run.configs import shipped

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TAG = "9.8.7"


def test_the_written_versions_agree():
  """A release changes three places; git tags carry the version of builds."""
  changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  fallback = PROJECT["tool"]["setuptools_scm"]["fallback_version"]
  assert changes[0] == citation["version"] == fallback.removesuffix(".dev0")
  assert ("not released yet" in (ROOT / "CHANGELOG.md").read_text()) == fallback.endswith(".dev0")
  assert PROJECT["project"]["dynamic"] == ["version"]


def test_the_citation_has_what_the_format_demands():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors"} <= {*citation}
  assert citation["license"] == PROJECT["project"]["license"]
  assert citation["repository-code"] == PROJECT["project"]["urls"]["Repository"]


def test_urls_are_those_of_one_repository():
  urls = PROJECT["project"]["urls"]
  assert {"Repository", "Documentation", "Changelog", "Issues"} <= {*urls}
  for url in urls.values():
    assert url.startswith(urls["Repository"])
    file = re.search(r"/(?:blob|tree)/main/(.*)", url)
    assert not file or (ROOT / file[1]).exists()


def test_classifiers_name_the_supported_pythons():
  classifiers = PROJECT["project"]["classifiers"]
  named = {x.rpartition(" ")[2] for x in classifiers if re.search(r":: 3\.\d+$", x)}
  least = PROJECT["project"]["requires-python"].removeprefix(">=")
  assert least in named and f"{sys.version_info[0]}.{sys.version_info[1]}" in named
  table = (ROOT / "docs/packaging.md").read_text()
  assert all(re.search(rf"^\|.*\b{re.escape(x)}\b.*\|", table, re.MULTILINE) for x in named)


def copy_of_the_project(target: pathlib.Path) -> None:
  """Copies the files that git knows, or would add, into a new repository with the tag v9.8.7."""
  listed = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    check=True,
  )
  for name in filter(None, listed.stdout.decode().split("\0")):
    if (ROOT / name).is_file() and not name.startswith("shared/"):
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, target / name)
  who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
  for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"], ["tag", f"v{TAG}"]):
    subprocess.run(["git", *who, *words], cwd=target, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """(source distribution, wheel), the wheel built from the unpacked source distribution."""
  if not (ROOT / ".git").exists() or not shutil.which("git"):
    pytest.skip("needs git and a checkout")
  folder = tmp_path_factory.mktemp("build")
  copy_of_the_project(folder / "checkout")
  build(folder / "checkout", "sdist", folder)
  (source,) = folder.glob("*.tar.gz")
  with tarfile.open(source) as archive:
    archive.extractall(folder, filter="data")
  build(folder / source.name.removesuffix(".tar.gz"), "wheel", folder)
  (wheel,) = folder.glob("*.whl")
  return source, wheel


def build(project: pathlib.Path, kind: str, out: pathlib.Path) -> None:
  """Builds without a network, in this environment."""
  code = f"from setuptools.build_meta import build_{kind} as build; build({str(out)!r})"
  done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_source_distribution_has_what_git_has(built):
  with tarfile.open(built[0]) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "setup.py", "Makefile"}
  wanted |= {"docs/command_line.md", "launch/Dockerfile", "tests/project/test_packaging.py"}
  wanted |= {f"configs/{name}.py" for name in shipped()}
  assert wanted <= names


@pytest.mark.slow
def test_the_wheel_has_the_package_its_data_and_the_configs(built):
  with zipfile.ZipFile(built[1]) as archive:
    names = {*archive.namelist()}
    meta = email.message_from_string(
      archive.read(f"bigalign-{TAG}.dist-info/METADATA").decode(errors="replace")
    )
  code = {f"{path.relative_to(ROOT)}" for path in (ROOT / "bigalign").rglob("*.py")}
  configs = {f"bigalign/configs/{name}.py" for name in shipped()}
  data = {"bigalign/py.typed", "bigalign/report/template.html", "bigalign/evals/prompts/name.json"}
  assert code | configs | data <= names
  assert {name.split("/")[0] for name in names} == {"bigalign", f"bigalign-{TAG}.dist-info"}
  assert meta["Version"] == TAG and meta["License-Expression"] == "Apache-2.0"
  assert len(meta.get_all("Project-URL")) >= 4 and meta["Requires-Python"] == ">=3.11"
  assert "Typing :: Typed" in meta.get_all("Classifier")


@pytest.fixture
def outside(built, tmp_path):
  """Runs Python in an empty folder, with the wheel in an otherwise empty folder of the path."""
  installed, folder = tmp_path / "installed", tmp_path / "outside"
  with zipfile.ZipFile(built[1]) as archive:
    archive.extractall(installed)
  folder.mkdir()
  env = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}

  def run(*words):
    done = subprocess.run(
      [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

  run.installed, run.folder = installed, folder
  return run


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(outside):
  code = """
import sys, bigalign
from bigalign.__main__ import main
for words in (["--version"], ["configs"], ["configs", "tiny", "--copy", "mine.py"]):
  sys.argv = ["bigalign", *words]
  main()
from bigalign.run.configs import find_file, load_config
assert load_config("mine.py") == load_config("tiny")
print(bigalign.__file__, find_file("tiny"))
"""
  lines = outside("-c", code).splitlines()
  assert lines[0] == f"bigalign {TAG}"
  assert [line.split()[0] for line in lines if line.startswith("siglip_b16")] == ["siglip_b16"]
  assert all(pathlib.Path(x).is_relative_to(outside.installed) for x in lines[-1].split())


@pytest.mark.long
def test_the_wheel_trains_and_reports_outside_the_checkout(outside):
  program = ["-c", "from bigalign.__main__ import main; main()"]
  short = ["--config.total_steps=4", "--config.optimizer.warmup=1"]
  outside(*program, "train", "--config=quickstart", *short)
  outside(*program, "report", "runs/quickstart")
  (page,) = outside.folder.rglob("*.html")
  assert "glyphs" in page.read_text()
