"""What the package says about itself in several places is the same everywhere."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from bench.commands import COMMANDS
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


def test_every_extra_is_on_the_first_page():
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", " ".join(rows))) == set(PROJECT["optional-dependencies"])


def test_every_benchmark_is_in_its_readme():
    text = (ROOT / "bench" / "README.md").read_text()
    assert set(re.findall(r"^.*python -m bench (\w+)", text, re.MULTILINE)) == set(COMMANDS)


def test_compose_takes_a_folder():
    """In one line `runs/a:/checkpoint` is a volume of that name, which there is not."""
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    assert [volume["type"] for volume in service["volumes"]] == ["bind"]


def test_the_support_table_names_what_is_pinned_and_asked_for():
    constraints = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    newest = [".".join(constraints[name].split(".")[:2]) for name in ("torch", "triton")]
    assert f"| {newest[0]} | {newest[1]} |" in SUPPORT
    oldest = next(name for name in PROJECT["dependencies"] if name.startswith("torch")).partition(">=")[2]
    assert f"| {oldest} |" in SUPPORT and f"below {oldest}" in SUPPORT
    assert set(re.findall(r"\b(?:sm_|gfx)\w+", SUPPORT)) == set(launches.TARGETS)


def test_the_files_of_ci_are_those_of_the_constraints_by_hash():
    """No address stands in it, so that any index that has the files serves."""
    _, *lines = (ROOT / ".ci" / "requirements.txt").read_text().splitlines()
    constraints = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if found := re.fullmatch(r"([\w.-]+)==(\S+)", line):
            constraints[re.sub(r"[-_.]+", "-", found[1]).lower()] = found[2]
    names = set()
    for line in lines:
        name, version = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups()
        name = re.sub(r"[-_.]+", "-", name).lower()
        names.add(name)
        assert constraints.get(name, version) == version, name
    assert {"torch", "numpy", "pytest", "setuptools"} <= names and len(names) == len(lines)


def test_a_file_without_a_hash_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    lock = importlib.import_module("lock")
    known = {
        "metadata": {"name": "B", "version": "2"},
        "download_info": {"archive_info": {"hashes": {"sha256": "0f"}}},
    }
    bare = {"metadata": {"name": "c", "version": "1"}, "download_info": {"archive_info": {}}}
    assert lock.lines({"install": [known]}) == ["B==2 --hash=sha256:0f"]
    with pytest.raises(ValueError, match="c: pip's report has no SHA-256"):
        lock.lines({"install": [known, bare]})
