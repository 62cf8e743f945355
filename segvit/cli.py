"""The command line: `segvit train|evaluate|predict|serve|...`, see `segvit --help`; also `python -m segvit`.

Options are read by `segvit.commands.parser`; torch is imported only after that. A mistake in options, files
or data is one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from segvit.commands import COMMANDS
from segvit.commands.parser import command_help, find_command, parse
from segvit.system.failures import one_line, out_of_memory

__all__ = ["COMMANDS", "main"]


def _prepare_streams() -> None:
    """What a stream's encoding cannot show is shown as \\u.... instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError, OSError):  # closed
                stream.reconfigure(errors="backslashreplace")
    for name in ("stdout", "stderr"):  # a program without a console has none
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


class _Output:
    """Standard output whose end does not end the program: what it did not take is kept.

    A closed pipe (`| head`) is no error, the reader has seen enough.
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.pending = stream, ""
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        self.pending += text
        if self.error is None:
            try:
                self.stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: closed
                self._failed(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.stream.flush()
                self.pending = ""
            except (OSError, ValueError) as error:
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.error = error
        with contextlib.suppress(Exception):  # or Python complains once more as it leaves
            if sys.__stdout__ is not None and self.stream is sys.__stdout__:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())

    @property
    def lost(self) -> bool:
        """Whether something was not taken that somebody waits for."""
        return self.error is not None and not isinstance(self.error, BrokenPipeError)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        print(text, file=sys.stderr, flush=True)


def _run(words: list[str]) -> int:
    """Run a command; mistakes are raised."""
    if words[:1] in (["-h"], ["--help"]):
        print(command_help())
        return 0
    if words[:1] == ["--version"]:
        from segvit_kernels import __version__

        print(f"segvit {__version__}")
        return 0
    command = find_command(words)
    options = parse(command, words[command.count(" ") + 1 :])
    if options is None:
        return 0
    module = importlib.import_module(f"segvit.commands.{command.replace(' ', '_')}")
    return module.run(options) or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 after a mistake, 130 after an interruption."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = "segvit"
    with contextlib.suppress(ValueError):
        name = f"segvit {find_command(words)}"
    _prepare_streams()
    output = sys.stdout = _Output(sys.stdout)
    try:
        code = _run(words)
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        FloatingPointError,
        MemoryError,
        RuntimeError,
    ) as error:
        expected = not isinstance(error, RuntimeError) or "BackendUnavailableError" in type(error).__name__
        if os.environ.get("SEGVIT_TRACEBACK") or not (expected or out_of_memory(error)):
            raise
        _complain(f"{name}: error: {one_line(error)}")
        code = 2
    except KeyboardInterrupt as error:
        _complain(f"{name}: interrupted{f'; {one_line(error)}' if str(error) else ''}")
        code = 130
    finally:
        output.flush()
        sys.stdout = output.stream
    if output.lost and output.error is not None:
        _complain(f"{name}: error: standard output took no more ({one_line(output.error)})")
        _complain(output.pending.rstrip("\n"))
        code = code or 2
    return code


if __name__ == "__main__":
    sys.exit(main())
