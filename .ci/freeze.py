"""Prints the package versions of this environment as pip constraints, without the project."""

from __future__ import annotations

from importlib.metadata import distributions

# The project, and packaging tools, whose versions differ between platforms and interpreters.
LEFT_OUT = {"bigalign", "pip", "setuptools", "wheel"}

print("# The versions that the tests ran with; `make constraints` writes this file.")
versions = {(d.name.lower().replace("_", "-"), d.version) for d in distributions()}
for name, version in sorted(versions):
  if name not in LEFT_OUT:
    print(f"{name}=={version.partition('+')[0]}")  # matches any local build
