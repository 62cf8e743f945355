"""Builds the native library: ``python csrc/build.py``; needs torch and a C++ compiler, and nvcc for CUDA.

Everything lands in build/native but the library itself, which goes into the package. A source is compiled
again when it, a header or its flags have changed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OPERATORS = (
    "atm",
    "linear",
    "mask_binarize",
    "mask_iou",
    "mask_loss",
    "panoptic_argmax",
    "query_attention",
    "semantic_argmax",
    "subsample_norm",
)
# One entry per instruction set, in csrc/cpu/isa.h too.
X86 = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
}
# For these sources alone, where the compiler knows them (GCC 10 and 12, Clang 14).
BF16 = [*X86["avx512"], "-mavx512bf16"]
FP16 = [*BF16, "-mavx512fp16"]
AMX = [*FP16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
AVX2, AVX512 = ({name: X86[name]} for name in ("avx2", "avx512"))
SPECIAL = {
    "linear_kernels": {"avx512_fp16": FP16},
    "linear_float_kernels": AVX2 | AVX512,
    "linear_int16_kernels": AVX2,
    "linear_amx_kernels": {"amx": AMX},
    "linear_bf16_kernels": {"avx512_bf16": BF16},
    "linear_vnni_kernels": AVX512,
    "attention_amx_kernels": {"amx": AMX},
    "attention_bf16_kernels": {"avx512_bf16": BF16},
    "attention_fp16_kernels": {"avx512_fp16": FP16},
}
# The oldest torch whose stable ABI the binary asks for: 2.11.
TORCH_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CUDA_ARCHS = "75;80;90a"
# The oldest compilers that the sources are built and tested with.
LEAST = {"GCC": 11, "Clang": 14}


def library_name(emulate: bool = False) -> str:
    return f"libsegvit_{'emulated' if emulate else 'native'}.so"


def sources_hash() -> str:
    """What the library is made of: names and contents of everything under csrc that a compiler reads."""
    files = (p for p in HERE.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))
    named = ((p.relative_to(HERE).as_posix().encode(), p.read_bytes()) for p in files)
    return hashlib.sha256(b"".join(name + content for name, content in sorted(named))).hexdigest()[:16]


def schemas() -> list[str]:
    """The operators' schemas, read from segvit_kernels/ops, sorted."""
    found = []
    for path in (ROOT / "segvit_kernels" / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "_library.define":
                found.append(ast.literal_eval(node.args[0]))
    return sorted(found)


def schemas_hash() -> str:
    """What tells versions of the schemas apart; as segvit_kernels._native computes it."""
    return hashlib.sha256("\n".join(schemas()).encode()).hexdigest()[:16]


def find_nvcc() -> str | None:
    """nvcc of CUDACXX, CUDA_HOME or the path; ``None`` if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    found = Path("/usr/local/cuda/bin/nvcc")
    return str(found) if found.exists() else None


def nvcc_version(nvcc: str) -> str:
    """As nvcc says it, such as 13.0.88.

    Raises:
        RuntimeError: it says none.
    """
    said = _run([nvcc, "--version"])
    if found := re.search(r"release [\d.]+, V([\d.]+)", said):
        return found[1]
    raise RuntimeError(f"{nvcc} does not say its version:\n{said}")


def _own_arch() -> str:
    """The architecture of this machine's GPU; from 9.0 on with the features of that chip alone ("90a")."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("--archs native: there is no GPU that PyTorch can use")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def _gencode(archs: str) -> list[str]:
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs.split(";")]
    # Intermediate code of the newest plain architecture, for GPUs to come.
    newest = max((a for a in archs.split(";") if a.isdigit()), default=None, key=lambda a: int(a))
    return flags + ([f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else [])


def _cxx(args: argparse.Namespace) -> list[str]:
    """The C++ compiler: CXX, this machine's, or the cross compiler under its usual name."""
    default = "c++" if args.machine == platform.machine() else f"{args.machine}-linux-gnu-g++"
    return shlex.split(os.environ.get("CXX", default))


def _nvcc(args: argparse.Namespace) -> str | None:
    """nvcc, where CUDA kernels are wanted and it is there."""
    foreign = args.machine != platform.machine()
    return None if args.cpu_only or args.emulate or not args.archs or foreign else find_nvcc()


def _knows(compiler: list[str], flags: list[str], language: str = "c++") -> bool:
    """Whether a compiler knows these flags."""
    command = [*compiler, *flags, "-x", language, "-E", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _identity(cxx: list[str]) -> str:
    """Version of the C++ compiler.

    Raises:
        RuntimeError: there is none, or it is too old.
    """
    text = _run([*cxx, "-x", "c++", "-dM", "-E", os.devnull])
    macros = dict(re.findall(r"#define (\w+) (.*)", text))
    name, major = ("Clang", "__clang_major__") if "__clang__" in macros else ("GCC", "__GNUC__")
    if (version := int(macros.get(major, 0))) < LEAST[name]:
        raise RuntimeError(
            f"{cxx[0]} is {name} {version}; the least is GCC {LEAST['GCC']} or Clang {LEAST['Clang']}"
        )
    return macros["__VERSION__"]


def _plan(
    args: argparse.Namespace, torch_folder: Path, nvcc: str | None
) -> list[tuple[Path, str, list[str]]]:
    """(source, name of the object, command without output) of everything to compile."""
    include = ["-isystem", str(torch_folder / "include")]
    compiler = _cxx(args)
    # The emulator takes longer to compile than its tests to run.
    cxx = [*compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-O1" if args.emulate else "-O3"]
    # GCC's own headers of intrinsics would warn of what they mean to leave uninitialised.
    cxx += [
        "-Wall",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-Wno-unknown-warning-option",
    ]
    first = ["-include", str(HERE / "older.h")]
    cxx += [TORCH_VERSION, *first, *["-g1"] * args.debug]
    if args.sanitize:
        cxx += [f"-fsanitize={args.sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    chosen = args.only.split(",") if args.only else list(OPERATORS)
    cxx += [f"-DSEGVIT_WITH_{name}" for name in chosen]

    def sources_in(folder: str, pattern: str) -> list[Path]:
        left_out = set(OPERATORS) - set(chosen)
        found = sorted((HERE / folder).rglob(pattern))
        return [
            p
            for p in found
            if re.sub("(_amx|_bf16|_float|_fp16|_int16|_vnni)?_kernels$", "", p.stem) not in left_out
        ]

    stamp = [f'-DSEGVIT_SCHEMAS="{schemas_hash()}"', f'-DSEGVIT_SOURCES="{sources_hash()}"']
    definitions = ", ".join(f'"{schema}"' for schema in schemas())
    # In C++ a symbolic size is an integer like any other.
    stamp.append("-DSEGVIT_DEFINITIONS=" + definitions.replace("SymInt", "int"))
    stamp.append(f"-DSEGVIT_NAMESPACE={args.namespace}_{'emulated' if args.emulate else 'native'}")
    library = HERE / "library.cpp"
    if args.emulate:
        flags = [*cxx, *include, "-Wno-unknown-pragmas", "-DSEGVIT_EMULATE", "-x", "c++"]
        sources = [library, HERE / "cpu" / "isa.cpp"]
        sources += sources_in("cuda", "*.cu") + sources_in("cuda", "*.cpp")
        return [
            (source, f"emulated_{source.stem}.o", [*flags, *stamp * (source == library), "-c", str(source)])
            for source in sources
        ]
    define = [f'-DSEGVIT_CUDA_ARCHS="{args.archs}"'] if nvcc else []
    x86 = args.machine.lower() in ("x86_64", "amd64")
    special = {isa: flags for sets in SPECIAL.values() for isa, flags in sets.items()}
    known = {isa for isa, flags in special.items() if x86 and _knows(compiler, flags)}
    cxx += [f"-DSEGVIT_{isa.upper()}" for isa in sorted(known)]
    tiles = ["-DSEGVIT_EMULATE_TILES"] * args.emulate_tiles
    plan = [(library, "library.o", [*cxx, *include, *define, *stamp, "-c", str(library)])]
    if args.glibc:
        older = HERE / "older.cpp"
        plan.append((older, "older.o", [*cxx, "-c", str(older)]))
    for source in sources_in("cpu", "*.cpp"):
        if source.stem.endswith("_kernels"):
            every = X86 if x86 else {"portable": []}
            if source.stem in SPECIAL:
                every = {isa: flags for isa, flags in SPECIAL[source.stem].items() if isa in known}
            for isa, flags in every.items():
                command = [*cxx, *tiles * (isa == "amx")]
                command += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", *flags]
                name = f"{source.stem}_{isa}.o"
                plan.append((source, name, [*command, f"-DSEGVIT_ISA={isa}", "-c", str(source)]))
        else:
            own = tiles * (source.stem == "isa")
            plan.append((source, f"cpu_{source.stem}.o", [*cxx, *own, *include, "-c", str(source)]))
    if nvcc:
        flags = [
            nvcc,
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
            "--threads=2",
            *["-lineinfo"] * args.debug,
        ]
        # A fifth of the size for a seventh of the time; CUDA 12.8 and later.
        small = ["--compress-mode=size"] if ";" in args.archs else []
        flags += [f for f in small if _knows([nvcc], [f], "cu")]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-diag-suppress=20012", TORCH_VERSION, "-DUSE_CUDA"]
        flags += first
        flags += [*include, *_gencode(args.archs)]
        for source in sources_in("cuda", "*.cu"):
            plan.append((source, f"cuda_{source.stem}.o", [*flags, "-c", str(source)]))
        for source in sources_in("cuda", "*.cpp"):
            plan.append((source, f"host_{source.stem}.o", [*cxx, *include, "-c", str(source)]))
    return plan


def objects(args: argparse.Namespace, prefix: str = "") -> dict[str, Path]:
    """Compile what has changed; the object files by name, those whose name starts with ``prefix``.

    Raises:
        RuntimeError: a compiler fails, is missing or too old, or this is not Linux.
    """
    if platform.system() != "Linux":
        raise RuntimeError(
            "the native library is for Linux; elsewhere its operators run on the eager backend"
        )
    torch_folder, version = Path("torch"), ""
    if not args.kernels:
        import torch

        torch_folder, version = Path(torch.__file__).parent, torch.__version__
    of_torch = str(torch_folder / "include")

    nvcc = _nvcc(args)
    compilers = _identity(_cxx(args)), nvcc and _run([nvcc, "--version"])
    plan = [item for item in _plan(args, torch_folder, nvcc) if item[1].startswith(prefix)]
    if args.kernels:
        plan = [item for item in plan if of_torch not in item[2]]
    headers = b"".join(p.read_bytes() for p in sorted(HERE.rglob("*.h")) + sorted(HERE.rglob("*.cuh")))
    folder = ROOT / "build" / "native"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(item: tuple[Path, str, list[str]]) -> Path:
        source, name, command = item
        said = [word.replace(str(HERE), "csrc") for word in command]  # the same in any checkout
        key = said, compilers, version if of_torch in command else ""
        content = headers + source.read_bytes() + repr(key).encode()
        target = folder / f"{hashlib.sha256(content).hexdigest()[:16]}_{name}"
        if not target.exists():
            temporary = target.with_suffix(f".{os.getpid()}.part")  # other builds may be at it too
            _run([*command, "-o", str(temporary)], args.verbose)
            temporary.replace(target)
        return target

    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip((name for _, name, _ in plan), pool.map(compile_one, plan), strict=True))


def build(args: argparse.Namespace) -> Path:
    """Compile what has changed, link, and return the path of the library.

    Raises:
        RuntimeError: a compiler fails, is missing or too old, or this is not Linux.
    """
    nvcc = _nvcc(args)
    if args.archs == "native":
        args.archs = _own_arch()
    compiled = objects(args)
    import torch

    library = Path(args.out) / library_name(args.emulate)
    library.parent.mkdir(parents=True, exist_ok=True)
    temporary = library.with_suffix(f".{os.getpid()}.part")
    with tempfile.TemporaryDirectory() as scratch:
        command, last, folder = _linker(args, nvcc), [], Path(torch.__file__).parent / "lib"
        if args.machine != platform.machine():
            folder = _stand_ins(args, list(compiled.values()), Path(scratch))
        command += ["-shared", "-o", str(temporary), *map(str, compiled.values()), f"-L{folder}"]
        # libtorch.so itself is empty; through it the CUDA part is found where torch has one.
        for option in ("--no-as-needed", "-ltorch", "-ltorch_cpu", "--as-needed"):
            command += ["-Xlinker", option] if option.startswith("--") else [option]
        if args.glibc:
            # The compiler's own support code: Zig's tells other features of processors.
            for library_of in ("libstdc++.so", "libgcc.a"):
                last.append(_run([*_cxx(args), f"-print-file-name={library_of}"]).strip())
        if args.sanitize:
            last.append(f"-fsanitize={args.sanitize}")
        _run(command + last, args.verbose)
    temporary.replace(library)
    return library


def _linker(args: argparse.Namespace, nvcc: str | None) -> list[str]:
    """What links: the compiler; nvcc, where it is, since it knows where its runtime lies; or, for machines
    with an older glibc than this one's, Zig's compiler, which has the symbols of every version.

    Raises:
        RuntimeError: an older glibc is wanted, and there is no Zig.
    """
    if not args.glibc:
        return [nvcc, "-cudart=static"] if nvcc else _cxx(args)
    if importlib.util.find_spec("ziglang") is None:
        raise RuntimeError(f"--glibc {args.glibc} needs Zig's linker: pip install ziglang")
    target = f"{args.machine}-linux-gnu.{args.glibc}"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-lpthread", "-ldl", "-lm", "-lrt"]
    if nvcc:
        said = _run([nvcc, "--dryrun", "-cudart=static", "-shared", "x.o", "-o", "x.so"], merged=True)
        folders = re.findall(r'"(-L[^"]+)"', "".join(re.findall(r"LIBRARIES=.*", said)))
        if not folders:
            raise RuntimeError(f"{nvcc} does not say where its runtime lies:\n{said}")
        command += [*folders, "-lcudart_static"]
    return command


def _stand_ins(args: argparse.Namespace, compiled: list[Path], folder: Path) -> Path:
    """Libraries with the names of torch's and the symbols of its stable ABI that are asked for, to link for a
    machine whose torch is not here."""
    asked = _run([_tool(args, "nm"), "--undefined-only", *map(str, compiled)])
    symbols = sorted(set(re.findall(r" U ((?:aoti_)?torch_\w+)", asked)))
    for name, found in (("libtorch.so", []), ("libtorch_cpu.so", symbols)):
        source = folder / f"{name}.c"
        source.write_text("".join(f"void {symbol}(void) {{}}\n" for symbol in found))
        command = [*_cxx(args), "-x", "c", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{name}"]
        _run([*command, "-o", str(folder / name), str(source)])
    return folder


def _tool(args: argparse.Namespace, name: str) -> str:
    """One of the programs that go with the compiler."""
    return _run([*_cxx(args), f"-print-prog-name={name}"]).strip()


def _run(command: list[str], verbose: bool = False, merged: bool = False) -> str:
    """What a command prints; its errors too if ``merged``."""
    if verbose:
        print(" ".join(command), flush=True)
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"no compiler {command[0]!r}: install one or set CXX") from None
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    if result.stderr.strip() and verbose:
        print(result.stderr, file=sys.stderr, flush=True)
    return result.stdout + result.stderr * merged


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="csrc/build.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(ROOT / "segvit_kernels"), help="folder of the library")
    parser.add_argument("--cpu-only", action="store_true", help="leave the CUDA kernels out")
    parser.add_argument(
        "--archs",
        default=os.environ.get("SEGVIT_KERNELS_CUDA_ARCHS", CUDA_ARCHS),
        help="'80;90a', 'native' for this GPU's, '' for no CUDA (default %(default)s)",
    )
    parser.add_argument("--emulate", action="store_true", help="the CUDA kernels for the CPU, for tests")
    parser.add_argument(
        "--emulate-tiles", action="store_true", help="AMX's tiles as ordinary code, for tests without AMX"
    )
    parser.add_argument("--only", default="", help="operators to build, with commas between")
    parser.add_argument("--sanitize", default="", help="e.g. address,undefined; implies --debug")
    parser.add_argument("--debug", action="store_true", help="with line numbers")
    parser.add_argument(
        "--kernels", action="store_true", help="nothing but the sources that compile without torch"
    )
    parser.add_argument(
        "--glibc",
        default=os.environ.get("SEGVIT_KERNELS_GLIBC", ""),
        help="for machines with this glibc ('2.28') or a later one; needs ziglang (default: this machine's)",
    )
    parser.add_argument(
        "--machine",
        default=os.environ.get("SEGVIT_KERNELS_MACHINE") or platform.machine(),
        help="x86_64 or aarch64, by a cross compiler; without CUDA (default: this machine)",
    )
    parser.add_argument(
        "--namespace", default="segvit", help="of torch's operators, _native is added (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(arguments)
    args.debug |= bool(args.sanitize)
    return args


def main() -> int:
    try:
        args = parse()
        print(f"{len(objects(args))} objects" if args.kernels else build(args))
    except RuntimeError as error:
        print(f"csrc/build.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
