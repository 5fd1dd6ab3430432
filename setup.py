"""What pyproject.toml cannot say: the files in configs/ are installed as bigalign/configs."""

from setuptools import find_namespace_packages, setup

setup(
  packages=[*find_namespace_packages(include=["bigalign*"]), "bigalign.configs"],
  package_dir={"bigalign.configs": "configs"},
)
