"""A module imports from its own floor and from those below, and no modules import each other in a circle."""

import ast
import importlib.util

import pytest
from imports import FLOORS, ROOT, circle, floor_of, graph, imports_of, read, upward

import segvit_kernels

PACKAGES = list(FLOORS)


def planted(package: str, module: str, line: str) -> list:
    """The graph with one more line in a module."""
    sources = read(package)
    text, is_package = sources[module]
    return graph({**sources, module: (f"{text}\n{line}\n", is_package)})


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down(package):
    found = graph(read(package))
    assert len(found) > 20
    assert upward(found, FLOORS[package]) == []
    assert circle(found) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_allowed_is_done(package):
    """A permission that nobody uses would let the next one in."""
    floors = FLOORS[package]
    used = {(floor_of(a, floors).name, floor_of(b, floors).name) for a, b, _ in graph(read(package))}
    allowed = {(floor.name, below) for floor in floors for below in floor.below.split()}
    assert allowed <= used, allowed - used


@pytest.mark.parametrize("package", PACKAGES)
def test_floors_lie_on_each_other(package):
    lower: set[str] = set()
    for floor in FLOORS[package]:
        assert set(floor.below.split()) <= lower, floor
        lower.add(floor.name)
    for module in read(package):
        assert floor_of(module, FLOORS[package]), f"{module} is on no floor"


@pytest.mark.parametrize(
    "line",
    [
        "from segvit.training.train import train",
        "import segvit.training.train as t",
        "from ..training import train",
        "def f():\n    from segvit.training import train",
        "if TYPE_CHECKING:\n    from segvit.training.train import train",
        'importlib.import_module("segvit.training.train")',
    ],
)
def test_an_upward_import_is_found(line):
    wrong = upward(planted("segvit", "segvit.inference.engine", line), FLOORS["segvit"])
    assert "segvit.inference.engine (inference) imports segvit.training.train (training)" in wrong


def test_a_module_on_no_floor_is_found():
    sources = {**read("segvit"), "segvit.attic": ("from segvit.config import PRESETS", False)}
    assert "segvit.attic is on no floor" in upward(graph(sources), FLOORS["segvit"])


@pytest.mark.parametrize(
    ("module", "line", "ring"),
    [
        ("segvit.model.losses", "import segvit.model.rotary", []),
        ("segvit.model.decoder", "from segvit.model.shrunk import ShrunkDecoder", ["decoder", "shrunk"]),
        ("segvit.model.backbone", "def f():\n    from segvit.model import SegViT", ["backbone", "segvit"]),
    ],
)
def test_a_circle_is_found(module, line, ring):
    found = circle(planted("segvit", module, line))
    assert found[:1] == found[-1:] and {f"segvit.model.{name}" for name in ring} <= set(found)
    assert bool(found) == bool(ring)


def others(package: str) -> list[tuple[str, str]]:
    """(module, what it imports) where that is of another package."""
    return [
        (name, imported)
        for name, (text, is_package) in read(package).items()
        for imported, _ in imports_of(name, text, is_package)
        if imported.partition(".")[0] != package
    ]


def test_the_kernels_know_neither_the_models_nor_in_ops_triton():
    for name, imported in others("segvit_kernels"):
        assert imported.partition(".")[0] not in ("segvit", "bench"), (name, imported)
        assert not (name.startswith("segvit_kernels.ops") and imported.startswith("triton")), (name, imported)


def test_segvit_uses_public_names_of_the_kernels():
    for name, imported in others("segvit"):
        assert imported.partition(".")[0] != "bench", name
        if imported.startswith("segvit_kernels."):
            assert imported.removeprefix("segvit_kernels.") in segvit_kernels.__all__, (name, imported)


def test_sources_in_c_import_nothing_of_the_benchmarks():
    paths = list((ROOT / "csrc").glob("*.py"))
    assert paths
    for path in paths:
        for imported, _ in imports_of(path.stem, path.read_text(encoding="utf-8"), False):
            assert imported.partition(".")[0] != "bench", path


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_taken_of_a_module_is_there(package):
    """Also in functions that only run where a GPU is."""
    missing = []
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    if _is_module(whole):
                        modules[name.asname or name.name] = whole
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        bound |= {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                whole = modules.get(node.value.id)
                if (
                    whole
                    and node.value.id not in bound
                    and not hasattr(importlib.import_module(whole), node.attr)
                ):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.id}.{node.attr}")
    assert missing == []


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
