"""What several test files share."""

from __future__ import annotations

import importlib.util
import pathlib

from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[2]


def load(name: str) -> ConfigDict:
  """The config configs/<name>.py."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()
