"""Tables, figures and documents, made of result files."""

from bench.report.documents import regenerate, update
from bench.report.results import ReportError, document, environment, load, machine, sound, tables, verdict

__all__ = [
    "ReportError",
    "document",
    "environment",
    "load",
    "machine",
    "regenerate",
    "sound",
    "tables",
    "update",
    "verdict",
]
