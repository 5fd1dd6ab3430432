"""Contrastive image-text training in JAX.

  import bigalign

  model = bigalign.load("runs/quickstart")  # or a folder of Hugging Face, open_clip …
  model.embed_images(["a.jpg", "b.jpg"])  # [2, E] float32, unit norm
  model.classify("a.jpg", ["cat", "dog"])  # [1, 2] probabilities

`train`, `evaluate`, `embed`, `export` and `plan` are the programs as functions. docs/python.md
describes all of them. Importing this package imports nothing else; what a function needs, JAX among
it, is imported when the function is first used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from bigalign.api.loading import load
  from bigalign.api.model import Model
  from bigalign.api.names import configs, losses, projectors, towers
  from bigalign.api.programs import embed, evaluate, export, plan, train

  __version__: str

# {name: the module that defines it}
_PUBLIC = {
  "load": "loading",
  "Model": "model",
  **dict.fromkeys(("configs", "losses", "projectors", "towers"), "names"),
  **dict.fromkeys(("embed", "evaluate", "export", "plan", "train"), "programs"),
}
_MODULES = ("evaluate", "export", "losses", "plan", "projectors", "towers", "train")

__all__ = [
  "Model",
  "__version__",
  "configs",
  "embed",
  "evaluate",
  "export",
  "load",
  "losses",
  "plan",
  "projectors",
  "towers",
  "train",
]


def _public(name: str) -> Any:
  """The function or class of a name."""
  return getattr(importlib.import_module(f"bigalign.api.{_PUBLIC[name]}"), name)


# Some functions have the name of a submodule. Importing a submodule sets the attribute of its
# package, so `bigalign.train` would be the function or the module, depending on what was imported
# before. It is always the module, which can be called like the function.


class _CallableModule(types.ModuleType):
  """A submodule that can be called like the function of its name."""

  def __call__(self, *args: Any, **options: Any) -> Any:
    return _public(self.__name__.rpartition(".")[2])(*args, **options)

  @property
  def __signature__(self) -> Any:
    """For help, completion and inspect.signature."""
    import inspect

    return inspect.signature(_public(self.__name__.rpartition(".")[2]))


class _Package(types.ModuleType):
  """The type of this package: it makes submodules callable when the import system binds them."""

  def __setattr__(self, name: str, value: Any) -> None:
    if name in _PUBLIC and type(value) is types.ModuleType:
      value.__class__ = _CallableModule
    super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
  if name == "__version__":
    from importlib import metadata

    return metadata.version("bigalign")
  if name in _MODULES:
    return importlib.import_module(f"bigalign.{name}")
  if name in _PUBLIC:
    globals()[name] = _public(name)
    return globals()[name]
  raise AttributeError(f"module 'bigalign' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
