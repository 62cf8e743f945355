"""For MkDocs: pages whose sources lie outside docs/, links that hold in the repository and on the site."""

import json
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Page of the site: the file that it is made of.
ELSEWHERE = {
    "bench.md": "bench/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples/camvid.md": "examples/camvid/README.md",
    "examples/own_model.md": "examples/own_model.ipynb",
    "examples/train_and_look.md": "examples/train_and_look.ipynb",
}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCED = re.compile(r"^( *)(```+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
_log = logging.getLogger("mkdocs.plugins.segvit")  # whose warnings end a strict build


def notebook(text: str) -> str:
    """The cells of a notebook as Markdown; code is a block."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def source_of(page: str) -> PurePosixPath:
    """The file in the repository that the page ``page`` of the site is made of."""
    return PurePosixPath(ELSEWHERE.get(page, f"docs/{page}"))


def linked(text: str, page: str, pages: set[str]) -> str:
    """``text`` of the page ``page`` with its relative links as they are on the site.

    A link to a file that is no page becomes its text; one that leads nowhere is left, and a warning says so.
    """
    places = {str(source_of(name)): name for name in pages}

    def mend(match: re.Match) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        file = os.path.normpath(source_of(page).parent / target)
        if file in places:
            there = os.path.relpath(places[file], PurePosixPath(page).parent)
            return f"{match['image']}[{match['text']}]({there}{match['anchor'] or ''})"
        if not (ROOT / file).exists():
            _log.warning("%s: the link to %s leads nowhere", source_of(page), target)
            return match[0]
        return match["text"]

    fences = [match.span() for match in _FENCED.finditer(text)]
    return _LINK.sub(
        lambda match: match[0] if any(start <= match.start() < end for start, end in fences) else mend(match),
        text,
    )


def on_files(files: Files, config: Any, **_: Any) -> Files:
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(
            File.generated(config, page, content=notebook(text) if source.endswith("ipynb") else text)
        )
    named = set(re.findall(r"[\w/.-]+\.md", json.dumps(config.nav)))
    more = [f.src_uri for f in files.documentation_pages() if f.inclusion.is_included()]
    if unnamed := sorted(set(more) - named):
        config.nav.append({"More": unnamed})
    return files


def on_page_markdown(text: str, page: Any, files: Files, **_: Any) -> str:
    return linked(text, page.file.src_uri, {f.src_uri for f in files if f.inclusion.is_included()})
