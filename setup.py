"""Metadata lives in pyproject.toml; this file is where an optional native extension will be added."""

from setuptools import setup

setup()
