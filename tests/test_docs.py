"""The site of docs/: built strictly and without a network, and what its pages hold."""

import importlib.util
import logging
import re
import socket
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import segvit
import segvit_kernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, str]:
    """Its files by path; a warning of the build is an error."""
    out = tmp_path_factory.mktemp("site")

    def refuse(*_: object) -> None:
        raise AssertionError("the site was to be built without a network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setattr(socket.socket, "connect", refuse)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out)))
    kinds = (".html", ".css")
    return {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.suffix in kinds}


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_page_asks_another_host_for_anything(site):
    tag = r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="?(?:https?:)?//'
    style = r'url\(["\']?(?:https?:)?//'
    for name, text in site.items():
        assert not re.search(f"{tag}|{style}", text), name


def test_every_public_name_is_in_the_reference(site):
    for package in (segvit_kernels, segvit):
        page = site[f"api/{package.__name__}.html"]
        shown = {name.rpartition(".")[2] for name in re.findall(r'<h3 id="([\w.]+)"', page)}
        assert set(package.__all__) - {"__version__"} <= shown


def test_every_operator_has_its_formulas_there():
    """To which docstrings send their readers: 'at the top of this module'."""
    named = re.findall(r"^::: segvit_kernels\.ops\.(\w+)$", (ROOT / "docs/api/formulas.md").read_text(), re.M)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "segvit_kernels/ops").glob("[a-z]*.py"))


def test_docstrings_left_no_markup_of_another_kind(site):
    for name, text in site.items():
        if name.startswith("api/"):
            assert not re.search(r":(?:func|class|meth|mod|attr):|\.\. \w+::", text), name


def test_links_are_those_of_the_site(hooks, caplog):
    pages = {"index.md", "data.md", "contributing.md", "examples/camvid.md"}
    link = "[a](../CONTRIBUTING.md#testing), [b](data.md), [c](../segvit/cli.py) and [d](https://example.org)"
    assert hooks.linked(link, "index.md", pages) == (
        "[a](contributing.md#testing), [b](data.md), c and [d](https://example.org)"
    )
    assert hooks.linked("[a](../../docs/data.md)", "examples/camvid.md", pages) == "[a](../data.md)"
    code = "```text\n[b](nowhere.md)\n```"
    assert hooks.linked(code, "index.md", pages) == code
    with caplog.at_level(logging.WARNING):
        assert hooks.linked("[b](nowhere.md)", "index.md", pages) == "[b](nowhere.md)"
    assert "docs/index.md: the link to nowhere.md leads nowhere" in caplog.text
