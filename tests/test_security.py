"""What the code must not do with files and words of others: a walk over all of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("segvit", "segvit_kernels", "csrc", "bench", "examples")
# What makes objects, or runs, out of bytes and words that may be another's.
NEVER = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load"),
    *("shelve.open", "joblib.load", "dill.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "tempfile.mktemp", "torch.hub.load", "torch.jit.load"),
}
# Fine with this argument.
ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "tar.extractall": ("filter", "data"),
    "archive.extractall": ("filter", "data"),
}


def faults(source: str, allowed: set[str] = frozenset()) -> list[str]:
    """Calls that are forbidden, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in NEVER - allowed:
            found.append(f"{node.lineno}: {name}")
        if name in ONLY_WITH or name.endswith(".extractall"):
            argument, value = ONLY_WITH.get(name, ("filter", "data"))
            said = given.get(argument)
            well = isinstance(said, ast.Constant) and said.value == value
            if not well and "zip" not in name.lower():
                found.append(f"{node.lineno}: {name} without {argument}={value!r}")
        for argument in ("shell", "allow_pickle"):
            if argument in given and ast.unparse(given[argument]) != "False":
                found.append(f"{node.lineno}: {name} with {argument}")
    return found


EXCEPT = {
    # A TorchScript file is a program, and asked for as one.
    "segvit/exporting/torchscript.py": {"torch.jit.load"},
    # Python made here out of a kernel's PTX, and what a process of ours left for the next.
    "segvit_kernels/testing/ptx/translate.py": {"exec"},
    # And out of the operators that a function has called, by names of its own.
    "segvit_kernels/_replay.py": {"exec"},
    "bench/suites/simulate.py": {"pickle.loads"},
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_of_others_is_unpickled_or_run(folder):
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if wrong := faults(path.read_text(encoding="utf-8"), EXCEPT.get(name, set())):
            found[name] = wrong
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "subprocess.run(x, shell=True)",
        "tar.extractall(x)",
        "eval(x)",
    ],
)
def test_the_walk_sees(line):
    assert faults(line)
