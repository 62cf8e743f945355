"""Who imports whom, and who may: `python tests/imports.py [PACKAGE...]` prints the graph, floor by floor.

Every import counts: inside functions, under `TYPE_CHECKING`, and `importlib.import_module("a.b")`. Names that
are only strings or made at run time do not.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Floor(NamedTuple):
    """What lies on a floor, and the floors that it may import from besides itself.

    Attributes:
        modules: names below the package; a package stands for all that is in it, "" for the package's own
            `__init__`.
        below: names of lower floors.
    """

    name: str
    modules: str
    below: str = ""


# Each package from the ground up: a floor names lower ones only.
FLOORS: dict[str, list[Floor]] = {
    "segvit": [
        Floor("ground", "config options"),
        Floor("system", "system"),
        Floor("data", "data", "ground system"),
        Floor("pictures", "pictures", "system"),
        Floor("inference", "inference", "ground system data pictures"),
        Floor("model", "model", "ground system data inference"),
        Floor("training", "training", "ground system data inference model"),
        Floor("speed", "speed", "ground system inference model"),
        Floor("demo", "demo", "ground system data pictures inference model"),
        Floor("exporting", "exporting", "ground system data inference model"),
        Floor("serve", "serve", "ground system data pictures inference"),
        Floor("clusters", "ray", "ground system data inference exporting"),
        Floor(
            "commands",
            "commands",
            "ground system data pictures inference model training speed demo exporting serve",
        ),
        Floor("entrances", "cli __main__", "system commands"),
        Floor("names", ""),  # lazily, by _EXPORTS
    ],
    "segvit_kernels": [
        Floor("ground", "_native _version _autocast _folding _rotary"),
        Floor("library", "_library _lowering _replay", "ground"),
        Floor("ops", "ops", "ground library"),
        Floor("triton", "triton"),
        Floor("layers", "modules integrations", "ground ops"),
        Floor("testing", "testing", "library ops triton"),
        Floor("names", "", "ground library ops layers"),
        Floor("entrances", "__main__", "ground library names"),
    ],
    "bench": [
        Floor("measure", "measure"),
        Floor("simulator", "simulator"),
        Floor("subjects", "subjects", "measure"),
        Floor("report", "report", "measure subjects"),
        Floor("suites", "suites", "measure simulator subjects"),
        Floor("commands", "commands", "measure subjects report suites"),
        Floor("entrances", "__main__ test_kernels test_model", "measure subjects suites commands"),
        Floor("names", ""),
    ],
}


class Import(NamedTuple):
    """One module imports another; "~" where not at the top of the file."""

    importer: str
    imported: str
    inner: bool


def modules_of(package: Path) -> dict[str, Path]:
    """Every module of a package by its whole name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, source: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Whole names that a module's source imports, and whether not at the top; `from a import b` gives a.b."""
    tree = ast.parse(source)
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        inner = id(node) not in top
        if isinstance(node, ast.Import):
            yield from ((alias.name, inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", inner) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "import_module" and isinstance(node.args[0].value, str):
                yield node.args[0].value, inner


def graph(sources: Mapping[str, tuple[str, bool]]) -> list[Import]:
    """The imports of modules by each other.

    Args:
        sources: by whole name, a module's text and whether it is a package's `__init__`.
    """
    found = set()
    for name, (text, is_package) in sources.items():
        for imported, inner in _all_imports(name, text, is_package):
            while imported and imported not in sources:  # a name in a module
                imported = imported.rpartition(".")[0]
            if imported and imported != name:
                found.add(Import(name, imported, inner))
    return sorted(found)


@functools.cache
def _all_imports(name: str, source: str, is_package: bool) -> tuple[tuple[str, bool], ...]:
    return tuple(imports_of(name, source, is_package))


def read(package: str) -> dict[str, tuple[str, bool]]:
    """The sources of a package of this repository, for `graph`."""
    return {
        name: (path.read_text(encoding="utf-8"), path.name == "__init__.py")
        for name, path in modules_of(ROOT / package).items()
    }


def floor_of(module: str, floors: list[Floor]) -> Floor | None:
    """The floor on which a module of a package lies, or None."""
    inside = module.partition(".")[2]
    for floor in floors:
        for name in floor.modules.split() or [""]:
            if inside == name or (name and inside.startswith(f"{name}.")):
                return floor
    return None


def upward(found: list[Import], floors: list[Floor]) -> list[str]:
    """The imports that no floor allows, in words."""
    wrong = []
    for importer, imported, _ in found:
        here, there = floor_of(importer, floors), floor_of(imported, floors)
        if here is None or there is None:
            wrong.append(f"{importer if here is None else imported} is on no floor")
        elif here != there and there.name not in here.below.split():
            wrong.append(f"{importer} ({here.name}) imports {imported} ({there.name})")
    return wrong


def circle(found: list[Import]) -> list[str]:
    """Modules that import each other in a circle, the first once more at the end; [] where none do."""
    below: dict[str, list[str]] = {}
    for importer, imported, _ in found:
        below.setdefault(importer, []).append(imported)
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in below.get(module, []):
            if ring := walk(imported, [*path, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in below if (ring := walk(module, []))), [])


def show(package: str) -> str:
    """The graph for a reader: floors from the top, under each its modules and what they import."""
    sources = read(package)
    found = graph(sources)
    lines = []
    for floor in reversed(FLOORS[package]):
        lines.append(f"{package}: {floor.name} -> {floor.below or 'nothing below'}")
        for module in sources:
            if floor_of(module, FLOORS[package]) == floor:
                names = [
                    ("~" if inner else "") + imported.removeprefix(f"{package}.")
                    for importer, imported, inner in found
                    if importer == module
                ]
                lines.append(f"    {module.removeprefix(f'{package}.')} -> {' '.join(names)}".rstrip(" ->"))
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(map(show, sys.argv[1:] or FLOORS)))
