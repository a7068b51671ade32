"""Lets tools that still call setup.py install the package; everything it says is in pyproject.toml."""

from setuptools import setup

setup()
