"""The examples in the docstrings of the data sources run, and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
  "arrayrecord",
  "base",
  "glyphs",
  "image_folder",
  "mixture",
  "parquet",
  "synthetic",
  "table_files",
]


@pytest.mark.parametrize("name", [*MODULES, "webdataset"])
def test_examples_of_sources(name, tmp_path, monkeypatch):
  monkeypatch.setenv("BIGALIGN_INDEX", str(tmp_path / "index"))
  module = importlib.import_module(f"bigalign.data.sources.{name}")
  results = doctest.testmod(module)
  assert results.attempted and not results.failed
