"""For mkdocstrings: what docstrings say in reStructuredText, as Markdown."""

import re
from typing import Any

import griffe

import segvit
import segvit_kernels

PUBLIC = {
    name: f"{package.__name__}.{name}" for package in (segvit, segvit_kernels) for name in package.__all__
}
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([\w.]+)`")
_SEVERAL = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def markdown(text: str) -> str:
    """``text`` with roles as code, linked where the name is public, and with several arguments of one entry
    apart."""

    def role(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][{PUBLIC[name]}]" if name in PUBLIC else f"`{match[1]}`"

    def entries(match: re.Match) -> str:
        return "\n".join(f"    {name}: {match[2]}" for name in match[1].split(", "))

    return _SEVERAL.sub(entries, _ROLE.sub(role, text))


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
