"""What there is to choose from, by name."""

from __future__ import annotations

import importlib

from bigalign.run.configs import shipped


def configs() -> list[str]:
  """Returns the names of the configs that are installed with the package.

  >>> import bigalign
  >>> "siglip_b16" in bigalign.configs()
  True
  """
  return shipped()


def losses() -> list[str]:
  """Returns the names of the losses, as in config.loss.

  >>> import bigalign
  >>> bigalign.losses()[:3]
  ['albef_itc', 'alignclip', 'clip']
  """
  return _names("losses", "LOSSES")


def towers() -> list[str]:
  """Returns the names of the towers, as in config.model.image.name and config.model.text.name.

  >>> import bigalign
  >>> bigalign.towers()[:3]
  ['bert', 'features', 'mobilenet_v2']
  """
  return _names("towers", "TOWERS")


def projectors() -> list[str]:
  """Returns the names of the projectors, as in config.model.image_projector.name.

  >>> import bigalign
  >>> "linear" in bigalign.projectors()
  True
  """
  return _names("projectors", "PROJECTORS")


def _names(module: str, registry: str) -> list[str]:
  """The names in a registry, whose module imports JAX and is imported only now."""
  return sorted(getattr(importlib.import_module(f"bigalign.{module}"), registry))
