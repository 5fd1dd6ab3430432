"""Prints the versions of this environment as constraints for pip, without the project itself."""

from __future__ import annotations

from importlib.metadata import distributions

# Tools of the environment, and what differs between platforms and interpreters.
LEFT_OUT = {"bigalign", "pip", "setuptools", "wheel"}

print("# The versions that the tests ran with; `make constraints` writes this file.")
versions = {(d.name.lower().replace("_", "-"), d.version) for d in distributions()}
for name, version in sorted(versions):
  if name not in LEFT_OUT:
    print(f"{name}=={version.partition('+')[0]}")  # any build of it
