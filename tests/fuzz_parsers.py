"""Every parser on damaged and invented files: `make fuzz-parsers`, `python tests/fuzz_parsers.py`.

The subjects (tests/fuzz_subjects.py) are readers with right files to start from. An input is one of these,
changed: bytes by bytes, JSON by its values too. It is read, or refused in one line that names it; anything
else is a fault: another exception, Python's or a library's own words, more than a second of CPU time, more
than 256 MB, a crash. `--subject NAME --seed S --first N --inputs 1` gives an input again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import mmap
import os
import random
import re
import resource
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from segvit.system.failures import one_line

LONGEST = 1 << 16  # bytes of an input
ROUND = 200  # inputs of a parser, on average
SECONDS = 1.0  # of CPU time
MEGABYTES = 256  # by which a reader may raise what the process holds
# What Python, torch or a library would say, and no message of ours may.
FOREIGN = re.compile(
    r"object is not|has no attribute|<class|index out of|unhashable|NoneType' object|Traceback|must be str"
    r"|not iterable|invalid literal|could not convert|codec can't|\[Errno|KeyError|unexpected keyword"
    r"|positional argument|unsupported operand|not subscriptable|to unpack|Expected |broadcast"
    r"|expected str instance"
)


class Subject(NamedTuple):
    """A reader and right files for it.

    Attributes:
        read: takes the bytes of a file; checks what it gives by assertions.
        seeds: right files.
        words: what has a meaning in them.
        name: what a refusal must hold, the file's name.
        refusals: what a refusal is.
        share: how many inputs it gets of as many subjects.
    """

    read: Callable[[bytes], object]
    seeds: list[bytes]
    words: tuple[bytes, ...] = ()
    name: str = ""
    refusals: tuple[type[BaseException], ...] = (ValueError, OSError)
    share: float = 1.0


# Inputs

_ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    255,
    256,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    "",
    " ",
    "0",
    "é",
    "\u0000",
    "\ud800",
    "a\nb",
    "x" * 300,
    [],
    {},
    [[]],
    [None],
    [0, 0],
    [1, 2, 3, 4],
    {"": None},
    {"a": 1},
    [{}],
    [1e9, "b"],
)
_BYTES = (
    b"\0",
    b"\xff",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"-",
    b"#",
    b"&a",
    b"*a",
    b"!",
    b"%",
    b"\\",
    b"/",
    b"..",
    b"0",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"9" * 30,
    b"9" * 5000,
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xe2\x80\xa8",
    b"\xd9\xa3",
    b"\xc2\xb2",
    b"\xed\xa0\x80",
    *(struct.pack(f"<{kind}", value) for kind in "HIQ" for value in (0, 1, 0x7FFF, 0x8000, 0xFFFF)),
    *(
        struct.pack(f"{end}{kind}", (1 << bits) - less)
        for end in "<>"
        for kind, bits in (("I", 32), ("Q", 63))
        for less in (1, 64)
    ),
)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value within a value."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found.append((value, key))
            _places(inner, found)
    return found


def _other_values(rng: random.Random, data: bytes) -> bytes | None:
    """A JSON text with some of its values changed; None of another text."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(root, [])
        if not places:
            return json.dumps(rng.choice(_ODD)).encode()
        container, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.5:
            container[key] = copy.deepcopy(rng.choice(_ODD))
        elif kind < 0.7:
            source, other = rng.choice(places)
            container[key] = copy.deepcopy(source[other])
        elif kind < 0.8 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
            container[key] = container[key] + rng.choice((-1, 1, 7, 1000))
        elif isinstance(container, dict) and kind < 0.9:
            container[rng.choice(("", "0", "x", f"{key}.", str(key)[:-1], str(key).upper()))] = container.pop(
                key
            )
        else:
            del container[key]
    return json.dumps(root).encode()


def _other_bytes(rng: random.Random, data: bytearray, subject: Subject) -> None:
    """One change of some bytes."""
    place, end = rng.randint(0, len(data)), 0
    end = min(len(data), place + rng.choice((1, 1, 2, 4, 16, 200)))
    kind = rng.randrange(8)
    if kind == 0 and data:
        data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:end]
    elif kind == 2:
        data[place:place] = data[place:end]
    elif kind == 3:
        word = rng.choice(subject.words or _BYTES)
        data[place:place] = word * rng.choice((1, 1, 1, 2, 100, 4000))
    elif kind == 4:
        word = rng.choice(_BYTES)
        data[place : place + len(word)] = word
    elif kind == 5:
        word = rng.choice((*_BYTES, *subject.words))
        data[place:place] = word
    elif kind == 6:
        other = rng.choice(subject.seeds)
        start = rng.randint(0, len(other))
        data[place:end] = other[start : start + rng.choice((1, 8, 64, 4000))]
    elif kind == 7 and rng.random() < 0.3:
        del data[place:]
    elif numbers := list(re.finditer(rb"\d+", data[:4096])):
        number = rng.choice(numbers)
        data[number.start() : number.end()] = str(
            rng.choice((0, 1, 2, 255, 256, 65536, 2**31, 2**64, -1))
        ).encode()


def drawn(subject: Subject, seed: str) -> bytes:
    """An input: the same for the same seed."""
    rng = random.Random(seed)
    data = rng.choice(subject.seeds)
    if rng.random() < 0.6 and data[:1] in (b"{", b"[") and (changed := _other_values(rng, data)) is not None:
        return changed[:LONGEST]
    changing = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        _other_bytes(rng, changing, subject)
    return bytes(changing[:LONGEST])


# Judgement


class _HangError(BaseException):
    pass


def _hang(*_: object) -> None:
    raise _HangError


@contextmanager
def watched() -> Iterator[None]:
    """A second of CPU time ends a reader; warnings are of no interest."""
    before = signal.signal(signal.SIGPROF, _hang)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(logging.NOTSET)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def held_kilobytes() -> int:
    """The most that this process has held: since `_forget_peak`, where the system lets a process forget."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fault(subject: Subject, data: bytes) -> str | None:
    """What is wrong with what the reader makes of an input; call it within `watched`."""
    _forget_peak()
    held = held_kilobytes()
    wrong = None
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            subject.read(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except subject.refusals as error:
        text = one_line(error) if isinstance(error, OSError) else str(error)  # as the command line says it
        ours = re.sub(r"\(.*\)", "", text)  # a decoder's reason in brackets
        if isinstance(error, UnicodeError) or FOREIGN.search(ours) or re.search("MemoryError|allocate", text):
            wrong = f"another's words: {type(error).__name__}: {text[:300]}"
        elif not text or "\n" in text or len(text) > 2000:
            wrong = f"no one line: {type(error).__name__}: {text[:300]!r}"
        elif subject.name not in text:
            wrong = f"does not name {subject.name}: {text[:300]}"
    except _HangError:
        wrong = f"more than {SECONDS} s"
    except Exception as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        wrong = f"escapes: {type(error).__name__}: {str(error)[:200]} ({place})"
    more = (held_kilobytes() - held) / 1024
    return wrong or (f"{more:.0f} MB more" if more > MEGABYTES else None)


def examine(
    name: str, subject: Subject, seed: int, numbers: range, mark: Callable[[int], None] = lambda _: None
):
    """(number, what is wrong) of inputs that are not read as they should be; `mark` is told each before."""
    with watched():
        for number in numbers:
            mark(number)
            if wrong := fault(subject, drawn(subject, f"{name}:{seed}:{number}")):
                yield number, wrong


# The long run


def apart(name: str, subject: Subject, seed: int, numbers: range) -> list[tuple[int, str]]:
    """`examine` in processes of their own, so that a crash is a fault as others are."""
    found: list[tuple[int, str]] = []
    place = mmap.mmap(-1, 8)
    start = numbers.start
    while start < numbers.stop:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            code = 1
            try:
                limit = resource.getrlimit(resource.RLIMIT_DATA)[1]
                resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, limit))
                with os.fdopen(writing, "w") as file:
                    mark = lambda number: struct.pack_into("<q", place, 0, number)  # noqa: E731
                    for number, wrong in examine(name, subject, seed, range(start, numbers.stop), mark):
                        print(json.dumps([number, wrong]), file=file, flush=True)
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading) as file:
            found += [tuple(json.loads(line)) for line in file]
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        (number,) = struct.unpack("<q", place[:8])
        found.append((number, f"the process died: {os.waitstatus_to_exitcode(status)}"))
        start = number + 1
    return found


def main() -> int:
    from fuzz_subjects import subjects

    parser = argparse.ArgumentParser(prog="tests/fuzz_parsers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of each subject's first input")
    parser.add_argument("--subject", action="append", help="only this one; may be repeated")
    args = parser.parse_args()
    with subjects() as known:
        if unknown := set(args.subject or ()) - set(known):
            parser.error(f"--subject: got {', '.join(sorted(unknown))}, expected of {', '.join(known)}")
        chosen = {name: known[name] for name in args.subject or known}
        start, total, wrong = time.monotonic(), 0, 0
        firsts, seen = dict.fromkeys(chosen, args.first), set()
        while total < args.inputs:  # in rounds over all, so that a run that is ended early has seen each
            wanted = min(ROUND * len(chosen), args.inputs - total)
            shares = sum(subject.share for subject in chosen.values())
            for name, subject in chosen.items():
                count = math.ceil(wanted * subject.share / shares)
                found = apart(name, subject, args.seed, range(firsts[name], firsts[name] + count))
                firsts[name] += count
                for number, text in found:
                    kind = name, re.sub(r"\d+", "0", text)[-60:]
                    if kind not in seen:
                        again = f"--subject {name} --seed {args.seed} --first {number} --inputs 1"
                        print(f"    {again}: {text}", flush=True)
                    seen.add(kind)
                total, wrong = total + count, wrong + len(found)
            cpu = sum(os.times()[2:4])
            said = f"{total:,} inputs of {len(chosen)} parsers: {wrong} faults"
            print(f"{said}, {cpu:.0f} CPU-seconds, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
