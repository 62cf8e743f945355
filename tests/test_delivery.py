"""What the package says about itself in several places is the same everywhere."""

import re
import tomllib
from pathlib import Path

import yaml

from segvit_kernels import __version__
from segvit_kernels.testing import launches

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SUPPORT = (ROOT / "docs" / "support.md").read_text()


def test_the_changelog_begins_with_this_version():
    found = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found[1] == __version__


def test_the_recipe_is_the_projects():
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    assert recipe["context"]["version"] == __version__
    assert recipe["package"]["name"] == PROJECT["name"]
    asked = {f"python {PROJECT['requires-python']}"}
    for requirement in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)(>=[\d.]+)", requirement).groups()
        asked.add(f"{ {'torch': 'pytorch'}.get(name, name) } {bound}")
    assert set(recipe["requirements"]["run"]) == asked
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {name.replace(">=", " >=") for name in build} <= set(recipe["requirements"]["host"])
    points = [f"{name} = {place}" for name, place in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == points
    assert recipe["about"]["license"] == PROJECT["license"]


def test_the_support_table_names_what_is_pinned_and_asked_for():
    constraints = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    newest = [".".join(constraints[name].split(".")[:2]) for name in ("torch", "triton")]
    assert f"| {newest[0]} | {newest[1]} |" in SUPPORT
    oldest = next(name for name in PROJECT["dependencies"] if name.startswith("torch")).partition(">=")[2]
    assert f"| {oldest} |" in SUPPORT and f"below {oldest}" in SUPPORT
    assert set(re.findall(r"\b(?:sm_|gfx)\w+", SUPPORT)) == set(launches.TARGETS)
