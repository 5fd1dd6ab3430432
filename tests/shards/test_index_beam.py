"""The same index through Apache Beam, which needs an environment of its own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import venv

import pytest
from helpers.small_shards import samples, write_tar

from bigalign.data.tar import index
from bigalign.shards import index as program

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def beam(tmp_path_factory) -> str:
  """The interpreter of an environment with Beam; 20 s with a package index nearby."""
  folder = tmp_path_factory.mktemp("beam")
  venv.create(folder, with_pip=True)
  python = str(folder / "bin" / "python")
  found = subprocess.run(
    [
      python,
      "-m",
      "pip",
      "install",
      "--quiet",
      "--disable-pip-version-check",
      "apache-beam",
      "braceexpand",
      "numpy",
      "pillow",
      "simplejpeg",
    ],
    capture_output=True,
    text=True,
    timeout=500,
  )
  if found.returncode:
    pytest.skip(f"apache-beam cannot be installed: {found.stderr.strip().splitlines()[-1]}")
  return python


@pytest.mark.slow
def test_beam_and_processes_write_the_same_index(tmp_path, beam):
  for i in range(5):
    write_tar(tmp_path / "shards" / f"{i}.tar", samples(20 * i, 5 + i))
  pattern = f"{tmp_path}/shards/{{0..4}}.tar"
  assert program.main([pattern, "--stats", f"--out={tmp_path}/here", "--workers=2"]) == 0
  subprocess.run(
    [
      beam,
      "-m",
      "bigalign",
      "index",
      pattern,
      "--stats",
      f"--out={tmp_path}/beam",
      "--runner=DirectRunner",
      "--direct_num_workers=1",
    ],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    check=True,
    timeout=300,
  )
  homes = [
    pathlib.Path(index.home(f"{tmp_path}/shards", f"{tmp_path}/{name}"))
    for name in ("here", "beam")
  ]
  contents = [
    {path.relative_to(home): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    for home in homes
  ]
  assert len(contents[0]) == 6 and contents[0] == contents[1]


def test_without_beam_the_error_says_how_to_install_it(tmp_path):
  path = write_tar(tmp_path / "0.tar", samples(0, 2))
  with pytest.raises(ImportError, match=r"pip install 'bigalign\[beam\]'"):
    program.main([path, "--runner=DirectRunner"])
  with pytest.raises(SystemExit):
    program.main([path, "--direct_num_workers=1"])
