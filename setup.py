"""Packages, with conf/ at the repository's top as the package data ``esper.conf``; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["esper", "esper.*"]), "esper.conf"],
    package_dir={"esper.conf": "conf"},
    package_data={"esper.conf": ["*.yaml", "*/*.yaml"], "esper.tamiyo.policy": ["shipped.pt"]},
)
