"""Benchmarks: ``python -m bench --help``; the JSON they write is described in bench/README.md."""
