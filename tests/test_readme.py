"""What the README and the pages of docs/ say works."""

import fnmatch
import re
import runpy
import shlex
from pathlib import Path

import pytest

from bench.__main__ import main as bench
from segvit.commands.parser import find_command, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/operators.md", "docs/deploy.md", "docs/determinism.md"])
def test_python_examples_run(page, tmp_path):
    examples = blocks(ROOT / page, "python")
    assert examples
    for i, code in enumerate(examples):
        path = tmp_path / f"example{i}.py"
        path.write_text(code)
        runpy.run_path(str(path))


def test_commands_are_understood():
    """Options of `segvit`, and targets of make; nothing is run."""
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    program, *words = shlex.split(command, comments=True) or [""]
                    if program == "segvit":
                        name = find_command(words)
                        assert parse(name, words[name.count(" ") + 1 :]) is not None, command
                        seen.add(name)
                    elif program == "make":
                        assert {word for word in words if "=" not in word} <= targets, command
    assert {"train", "evaluate", "predict", "convert", "bench", "data check"} <= seen


def test_tests_that_pages_name_exist():
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    defined = re.findall(r"^ *def (test_\w+)", text, re.MULTILINE)
    for page in PAGES:
        for name in re.findall(r"`(test_[\w*]+)`", page.read_text()):
            assert fnmatch.filter(defined, name), f"{page}: {name}"


def test_links_lead_somewhere():
    for document in PAGES:
        prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert target.startswith("https://") or (document.parent / target).exists(), target


def test_tables_and_figures_are_what_the_result_files_say(capsys):
    assert bench(["report", "--check"]) == 0, capsys.readouterr().out
