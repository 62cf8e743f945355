"""What the README says works."""

import re
import runpy
from pathlib import Path

from bench.__main__ import main as bench

ROOT = Path(__file__).resolve().parents[1]


def test_python_examples_run(tmp_path, capsys):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert examples
    for i, code in enumerate(examples):
        path = tmp_path / f"example{i}.py"
        path.write_text(code)
        runpy.run_path(str(path))
    assert "torch.Size([2, 150, 32, 32])" in capsys.readouterr().out


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert target.startswith("https://") or (document.parent / target).exists(), target


def test_tables_and_figures_are_what_the_result_files_say(capsys):
    assert bench(["report", "--check"]) == 0, capsys.readouterr().out
