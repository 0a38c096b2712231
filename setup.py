"""Packaging; the metadata is in pyproject.toml.

This is where the compiled extension `megarpt._C` is declared when csrc/ has sources. It has none yet, so nothing is compiled.
"""

from setuptools import setup

setup()
