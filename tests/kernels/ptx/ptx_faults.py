"""Faults planted in the PTX of compiled kernels: each must turn the machine red by its own name.

``python ptx_faults.py [PART OF A NAME...]``, in a process without interpreter. Every kernel is right
before a fault is planted in it; one that the machine did not see is printed as missed.
"""

import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable

import torch

sys.path.extend(__file__.rsplit("/", up)[0] for up in (1, 2))
import ptx_kernels as kernels
import ptx_native
import ptx_text

from segvit_kernels.testing import ptx, relative_error
from segvit_kernels.testing.ptx import core

WRONG = "wrong result"


def add():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1000, generator=generator).bfloat16()
    out = torch.full_like(x, torch.nan)
    kernels.add[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)


def add_with_a_hint():
    """Compiled for an aligned vector, launched with one that is not, as if the JIT had chosen wrongly."""
    x, y = torch.randn(2, 1008, generator=torch.Generator().manual_seed(0))
    out = torch.full_like(x, torch.nan)
    compiled = kernels.add[(8,)](x, y, out, 1008, BLOCK=128)
    compiled[(8, 1, 1)](x[1:], y, out, 1007, 128)


def add_vectors():
    """Aligned and whole: loads of 16 bytes."""
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    out = torch.full_like(x, torch.nan)
    kernels.add[(4,)](x, y, out, 4096, BLOCK=1024)
    assert torch.equal(out, x + y)


def halves():
    """Sums of float32, rounded to bfloat16."""
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    out = torch.full((4096,), torch.nan, dtype=torch.bfloat16)
    kernels.add[(4,)](x, y, out, 4096, BLOCK=1024)
    assert torch.equal(out, (x + y).bfloat16())


def softmax():
    x = torch.randn(4, 257, generator=torch.Generator().manual_seed(0))
    out = torch.full_like(x, torch.nan)
    kernels.softmax[(4,)](x, out, 257, 257, BLOCK=512)
    assert relative_error(out, x.double().softmax(1)) < 1e-6


def gradients():
    x, dy = torch.randn(2, 6, 200, generator=torch.Generator().manual_seed(0))
    w, dx, mean, rstd = torch.ones(200), torch.empty_like(x), x.mean(1), 1 / x.std(1)
    dw, db = torch.zeros(2, 200)
    kernels.layer_norm_backward[(6,)](dy, x, w, mean, rstd, dx, dw, db, 200, BLOCK=256)
    assert relative_error(db, dy.double().sum(0)) < 1e-5


def matmul(stages=3):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(70, 128, generator=generator).bfloat16()
    b = torch.randn(128, 72, generator=generator).bfloat16()
    c = torch.full((70, 72), torch.nan, dtype=torch.bfloat16)
    options = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": "ieee", "num_stages": stages, "num_warps": 4}
    kernels.matmul[(4,)](a, b, c, 70, 72, 128, 128, 72, 72, **options)
    assert relative_error(c, a.double() @ b.double()) < 4e-3


def matmul_in_one_stage():
    matmul(1)


def nvcc_norm():
    x, w, b = torch.randn(2, 15, 520), torch.ones(520), torch.zeros(520)
    out, *_ = torch.ops.segvit.subsample_norm_fwd(x, w, b, 5, 3, 2, 0, 1e-6, x.dtype, backend="cuda")
    assert relative_error(out, torch.nn.functional.layer_norm(x.double(), (520,))) < 1e-5


def nvcc_attention():
    shape = (3, 1, 150, 1, 32)
    q, k, v = torch.randn(shape).bfloat16()
    out, _ = torch.ops.segvit.query_attention_fwd(q, k, v, None, 0.2, 0.0, backend="cuda")
    scores = q[:, :, 0].double() @ k[:, :, 0].double().mT * 0.2
    assert relative_error(out[:, :, 0], scores.softmax(-1) @ v[:, :, 0].double()) < 8e-3


@dataclasses.dataclass(frozen=True)
class Plant:
    """A fault.

    Args:
        run: launches the kernel and checks its result.
        arch: that it is compiled for.
        expected: a kind of fault, :data:`WRONG`, or part of the message of a ``PTXError``.
        pattern, new: a regular expression in the PTX and what it becomes; none where ``run`` is wrong itself.
        occurrence: which match of the pattern: 0 the first, -1 the last, ``None`` all.
        machine: for kernels of Triton, or of nvcc.
    """

    run: Callable[[], None]
    arch: str
    expected: str
    pattern: str = ""
    new: str = ""
    occurrence: int | None = 0
    machine: Callable = ptx.machine

    def edit(self, kernel: str, text: str) -> str:
        """The PTX with the fault; fails where there is nothing to plant it in."""
        if not self.pattern:
            return text
        begin = text.index(f".entry {kernel}(") + len(kernel)
        end = text.find(".entry ", begin)
        head, text, tail = text[:begin], text[begin:end], text[end:] if end >= 0 else ""
        matches = list(re.finditer(self.pattern, text))
        assert matches, f"{kernel}: no {self.pattern}"
        chosen = matches if self.occurrence is None else [matches[self.occurrence]]
        for match in reversed(chosen):
            text = text[: match.start()] + match.expand(self.new) + text[match.end() :]
        return head + text + tail


BARRIER, A, B = r"bar\.sync\s+0;", "sm_80", "sm_90"
SPLIT = "\t.reg .pred %pz;\n\t.reg .b32 %rz;\n\tmov.u32 %rz, %laneid;\n\tsetp.lt.u32 %pz, %rz, 7;\n"
PLANTS = {
    "a barrier less between a write and a read": Plant(softmax, A, "race", BARRIER),
    "a barrier less between a read and a write": Plant(softmax, A, "race", BARRIER, occurrence=1),
    "a barrier less before matrices are loaded": Plant(matmul, A, "race", BARRIER, occurrence=2),
    "a barrier less before a product": Plant(
        matmul, B, "race", r"bar\.sync\s+0;\s*\n(?=(.*\n){0,9}.*wgmma\.fence)"
    ),
    "a wait for copies less": Plant(matmul, A, "in flight", r"cp\.async\.wait_group\s+\d;", occurrence=0),
    "a wait that leaves a copy in flight": Plant(
        matmul, A, "in flight", r"cp\.async\.wait_group\s+1;", "cp.async.wait_group 2;"
    ),
    "copies never committed": Plant(matmul, A, "in flight", r"cp\.async\.commit_group;", occurrence=None),
    "a wait for a product less": Plant(
        matmul, B, "in flight", r"wgmma\.wait_group\.sync\.aligned\s+\d;", occurrence=None
    ),
    "a product never committed": Plant(
        matmul, B, "in flight", r"wgmma\.commit_group\.sync\.aligned;", occurrence=None
    ),
    "a proxy fence less": Plant(
        matmul, B, "missing proxy fence", r"fence\.proxy\.async[^;]*;", occurrence=None
    ),
    "another swizzle in a descriptor": Plant(
        matmul_in_one_stage, B, WRONG, r"(or\.b64\s+%rd\d+, %rd\d+, )-9223371899415822336;",
        r"\g<1>4611686155302371328;", None,
    ),
    "another swizzle of an address": Plant(
        matmul, A, WRONG, r"(xor\.b32\s+%r\d+, %r\d+, )32;", r"\g<1>64;", -1
    ),
    "matrices loaded without their transposition": Plant(
        matmul, A, WRONG, r"(mma\.sync[^{]*\{[^}]*\}, \{)( %r\d+), (%r\d+)([^}]*\})", r"\1 \3,\2\4"
    ),
    "a product with another row of registers": Plant(
        matmul, A, WRONG, r"m16n8k16\.row\.col\.f32\.bf16\.bf16", "m16n8k16.row.col.f32.f16.f16", None
    ),
    "an uninitialised accumulator": Plant(
        matmul, A, "uninitialised register", r"mov\.b32\s+%r\d+, 0f00000000;", occurrence=0
    ),
    "a mask with one element more": Plant(
        add_vectors, A, "out of bounds", r"\[ %rd(\d+) \+ 0 \]", r"[ %rd\1 + 16 ]", occurrence=-1
    ),
    "a comparison off by one": Plant(softmax, A, "out of bounds", r"setp\.lt\.s32", "setp.le.s32", None),
    "a row behind the end": Plant(
        gradients, A, "out of bounds", r"mov\.u32(\s+%r\d+), %ctaid\.x;", r"mov.u32\1, %nctaid.x;"
    ),
    "a write before a tensor": Plant(
        add, A, "out of bounds", r"(st\.global\.b16) \[ %rd(\d+) \+ 0 \]", r"\1 [ %rd\2 + -64 ]"
    ),
    "a wrong divisibility": Plant(
        add_vectors, A, "misaligned", r"\[ %rd(\d+) \+ 0 \]", r"[ %rd\1 + 4 ]", occurrence=0
    ),
    "a division by zero": Plant(
        matmul, A, "division by zero", r"(rem\.s32\s+%r\d+, %r\d+, )%r\d+;", r"\g<1>0;"
    ),
    "a hint of divisibility that is not so": Plant(add_with_a_hint, A, "launch"),
    "a rounding towards zero": Plant(halves, A, WRONG, r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2", None),
    "a sum rounded towards zero": Plant(add_vectors, A, WRONG, r"add\.f32", "add.rz.f32", None),
    "a kernel compiled to nothing": Plant(
        softmax, A, "empty", r"\{\n(?=\t\.reg)[\s\S]*?\n\}", "{\n\tret;\n}"
    ),
    "a shuffle of part of a warp": Plant(
        softmax, A, "divergence", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, 16, 31, )-1;", r"\g<1>65535;"
    ),
    "a shuffle that some lanes do not reach": Plant(
        softmax, A, "divergence", r"(?=\tshfl\.sync\.bfly)",
        f"{SPLIT}\t@%pz bra $L_after;\n", 0,
    ),
    "a barrier that some warps miss": Plant(
        softmax, A, "deadlock", BARRIER, "bar.sync 1, 160;"
    ),
    "a barrier that part of a warp comes to": Plant(
        softmax, A, "divergence", r"(?=\tbar\.sync)",
        f"{SPLIT}\t@%pz bra $L_after;\n", 0,
    ),
    "a shared address outside": Plant(
        softmax, A, "out of bounds", r"(ld\.shared\.b32\s+%r\d+), \[[^]]*\]", r"\1, [global_smem+4096]"
    ),
    "shared memory that nothing wrote": Plant(
        softmax, A, "uninitialised shared memory", r"st\.shared\.b32[^;]*;"
    ),
    "local memory that nothing wrote": Plant(
        ptx_text.local, A, "uninitialised local memory", r"st\.local\.v2\.f32[^;]*;", machine=ptx_text.machine
    ),
    "a local address behind the end": Plant(
        ptx_text.local, A, "out of bounds", r"(mul\.wide\.s32 %rd10, %r6, )4;", r"\g<1>8;",
        machine=ptx_text.machine,
    ),
    "a local address between elements": Plant(
        ptx_text.local, A, "misaligned", r"add\.u64 %rd4, %SP, 16", "add.u64 %rd4, %SP, 14",
        machine=ptx_text.machine,
    ),
    "warps that write one address": Plant(
        softmax, A, "race", r"(st\.shared\.b32\s+)\[%r\d+\]", r"\1[global_smem]"
    ),
    "an atomic that is a store": Plant(
        gradients, A, WRONG, r"red\.global\.gpu\.relaxed\.add\.f32 (\[[^]]*\]), (%r\d+)",
        r"st.global.b32 \1, \2", None,
    ),
    "a loop without an end": Plant(add, A, "endless", r"\tret;", "$L_again:\n\tbra $L_again;\n\tret;"),
    "an instruction unknown": Plant(
        add, A, "does not know frob.f32", r"\tret;", "\tfrob.f32 %r1, %r2;\n\tret;"
    ),
}  # fmt: skip
if ptx_native.missing() is None:
    plant = functools.partial(Plant, arch=f"sm_{ptx_native.resources.plain()}", machine=ptx_native.machine)
    PLANTS |= {
        "nvcc: a barrier less": plant(nvcc_norm, expected="race", pattern=BARRIER),
        "nvcc: a barrier less after a wait": plant(nvcc_attention, expected="race", pattern=BARRIER),
        "nvcc: a wait for copies less": plant(
            nvcc_attention, expected="in flight", pattern=r"cp\.async\.wait_group 0;"
        ),
        "nvcc: shared memory that nothing wrote": plant(
            nvcc_norm, expected="uninitialised shared memory", pattern=r"st\.shared[^;]*;"
        ),
        "nvcc: a row behind the end": plant(
            nvcc_norm, expected="out of bounds", pattern=r"%ctaid\.x", new="%nctaid.x"
        ),
        "nvcc: keys behind the end": plant(
            nvcc_attention, expected="out of bounds", pattern=r"16, %r\d+;", new="16, 16;", occurrence=None
        ),
        "nvcc: a product of another type": plant(
            nvcc_attention, expected=WRONG, pattern="bf16.bf16", new="f16.f16", occurrence=None
        ),
    }


def outcome(plant: Plant) -> str:
    """What the machine says of a fault."""

    def edit(kernel: str, text: str) -> str:
        found = plant.edit(kernel, text)
        return found.replace("\tret;", "$L_after:\n\tret;", 1) if "$L_after" in found else found

    try:
        with plant.machine(plant.arch, edit=edit):
            torch.manual_seed(0)
            plant.run()
    except RuntimeError as error:  # a fault that came through C++
        return str(error).split("Fault: ")[-1]
    except ptx.Fault as fault:
        assert fault.kernel and (fault.line or fault.kind in ("empty", "launch")), fault
        return str(fault)
    except ptx.PTXError as error:
        return str(error)
    except AssertionError as error:
        if "no " in str(error) and ": no " in str(error):
            raise
        return WRONG
    return "missed"


def main(*parts: str) -> int:
    core.STEPS = 100
    missed, begin = [], time.process_time()
    chosen = {n: p for n, p in PLANTS.items() if not parts or any(part in n for part in parts)}
    for run, arch, machine in {(p.run, p.arch, p.machine): None for p in chosen.values() if p.pattern}:
        with machine(arch):
            run()  # right as it was compiled
    for name, plant in chosen.items():
        found = outcome(plant)
        seen = found.startswith(plant.expected) or (plant.expected in found and "PTX line" in found)
        print(f"{'seen' if seen else 'MISSED'}: {name}: {found.splitlines()[0]}", flush=True)
        if not seen:
            missed.append(name)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} seen, {time.process_time() - begin:.0f} s")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
