"""The simulator of ``bench simulate`` on code whose time is known, and on launches whose way is."""

from __future__ import annotations

import numpy as np
import pytest

from bench.simulator import core, execute
from bench.simulator.launch import Launch, Loop, Shortened, makespan, nest
from bench.simulator.machine import H100, MULTIPROCESSORS
from segvit_kernels.testing.machine_code import Code, Instruction, instructions


def _line(address: int, text: str, stall: int, write: int, read: int, wait: int) -> str:
    high = (stall | write << 5 | read << 8 | wait << 11) << 41
    return f"        /*{address:04x}*/  {text} ;  /* 0x{0:016x} */\n{'':30}/* 0x{high:016x} */\n"


def _sass(*lines: str | tuple) -> str:
    """Machine code as cuobjdump prints it, of texts or (text, stall, write, read, wait)."""
    found = []
    for k, line in enumerate(lines):
        text, *control = (line,) if isinstance(line, str) else line
        control += (1, 7, 7, 0)[len(control) :]
        found.append(_line(16 * k, text, *control))
    return "".join(found)


def _cycles(*lines: str | tuple, warps: int = 1, repeat: int = 1, programs: int = 1) -> core.Run:
    code = instructions(_sass(*lines))
    timed = {k: core.timed(i) for k, i in enumerate(code)}
    sequence = list(range(len(code))) * repeat
    return core.run(timed, [(p, sequence) for p in range(programs) for _ in range(warps)], stagger=0)


def test_instructions_are_read_with_their_control_codes():
    found = instructions(_sass(("@!P0 IMAD.WIDE.U32 R2, R4.reuse, 0x2, R6", 5, 3, 2, 0b100001)))
    expected = Instruction(0, "IMAD", "!P0", ".WIDE.U32", ("R2", "R4", "0x2", "R6"), 5, 3, 2, 0b100001)
    assert found == [expected]


# ------------------------------------------------------------------------------------------------ one quarter


@pytest.mark.parametrize(
    ("line", "cycles"),
    [
        ("FFMA R0, R1, R2, R3", 1),
        ("IADD3 R0, R1, R2, R3", 2),
        ("MUFU.EX2 R0, R1", 8),
        ("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", 4),
        ("LDS.128 R0, [R4]", 16),
        ("HMMA.16816.F32.BF16 R0, R4, R8, R0", 8),
        ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24", 64),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", 128),
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24", 20),  # reading A from shared memory takes longer
    ],
)
def test_pipes_have_the_rates_of_hopper(line, cycles):
    long, short = (_cycles(line, warps=4, repeat=n).cycles for n in (100, 50))
    assert (long - short) / 200 == pytest.approx(cycles, rel=0.02)


def test_a_stall_count_holds_one_warp_and_not_another():
    one, four = (_cycles(("FFMA R0, R0, R1, R2", 4), warps=w, repeat=100).cycles for w in (1, 4))
    assert one == pytest.approx(400, abs=8)
    assert four == pytest.approx(400, abs=16)


def test_a_scoreboard_is_waited_for():
    load, use = ("LDS R0, [R4]", 1, 2), ("FADD R1, R0, R0", 1, 7, 7, 0b100)
    run = _cycles(load, use)
    assert 28 <= run.cycles <= 32
    assert set(run.waits) == {"scoreboard"}
    assert _cycles(load, ("FADD R1, R0, R0", 1)).cycles <= 3


def test_a_barrier_waits_for_the_last_warp_and_a_missing_one_forever():
    work = ["MUFU.EX2 R0, R1"] * 20
    code = instructions(_sass(*work, "BAR.SYNC.DEFER_BLOCKING 0x0", "FADD R0, R0, R0"))
    timed = {k: core.timed(i) for k, i in enumerate(code)}
    late, early = list(range(22)), [20, 21]
    run = core.run(timed, [(0, late), (0, early)], [{21}, {1}], stagger=0)
    assert run.times[1][1] >= 20 * 8 - 16 + 20 - 8
    timed = {k: core.timed(i) for k, i in enumerate(instructions(_sass("BAR.SYNC 0x1", "BAR.SYNC 0x2")))}
    with pytest.raises(RuntimeError, match="barrier"):
        core.run(timed, [(0, [0, 1]), (0, [1, 0])], stagger=0)


def test_copies_and_products_are_waited_for_by_group():
    copy = ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDGDEPBAR")
    assert _cycles(*copy, "DEPBAR.LE SB0, 0x0", "FADD R0, R0, R0").cycles > core.L2_LATENCY
    assert _cycles(*copy, "DEPBAR.LE SB0, 0x1", "FADD R0, R0, R0").cycles < 100
    product = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",)
    assert _cycles(*product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R0, R0, R0").cycles >= 64 + 16
    assert _cycles(*product, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R0, R0, R0").cycles < 20


def test_an_instruction_without_a_rate_is_named_and_not_free():
    code = instructions(_sass("QUUX R0, R1", "QUUX R0, R1", "FADD R0, R0, R0"))
    assert core.unknown(code) == {"QUUX": 2}
    assert core.timed(code[0]).pipes


# ------------------------------------------------------------------------------------------ ways through code

COUNT = _sass(
    "S2R R0, SR_CTAID.X",
    "MOV R1, RZ",
    "ISETP.GE.AND P0, PT, R1, c[0x0][0x210], PT",  # 0x20
    "@P0 EXIT",
    "IADD3 R1, R1, 0x1, RZ",
    "IADD3 R2, R1, R0, RZ",
    "ISETP.LT.AND P1, PT, R1, c[0x0][0x210], PT",
    "@P1 BRA 0x40",
    "ISETP.NE.AND P2, PT, R0, 0x3, PT",
    "@P2 EXIT",
    "MUFU.EX2 R3, R3",
    "EXIT",
)


def _launch(sass: str, parameters: bytes = b"", **more) -> Launch:
    described = {"kernel": "k", "programs": 8, "warps": 4, "registers": 32, "shared": 0, "sass": sass}
    described |= {"parameters": parameters, "tensors": {}, "numbers": {}, "constants": {}} | more
    return Launch(described)


def test_loops_run_as_often_as_the_arguments_say_and_programs_part():
    launch = _launch(COUNT, (25).to_bytes(4, "little"))
    paths, sampled = launch._paths()
    assert not sampled
    found = {tuple(p.rows.tolist()): p.blocks for p in paths}
    assert set(found) == {(3,), (0, 1, 2, 4, 5, 6, 7)}
    assert all(blocks.count(4) == 25 for blocks in found.values())
    assert not any(p.unknown for p in paths)


def test_a_division_by_a_run_time_number_is_followed():
    # 1000003 // 150 as ptxas writes it for unsigned numbers.
    sass = _sass(
        "LDC R2, c[0x0][0x210]", "LDC R4, c[0x0][0x214]", "I2F.U32.RP R0, R4", "MUFU.RCP R0, R0",
        "IADD3 R6, R0, 0xffffffe, RZ", "F2I.FTZ.U32.TRUNC.NTZ R7, R6", "MOV R6, RZ", "IADD3 R5, RZ, -R7, RZ",
        "IMAD R5, R5, R4, RZ", "IMAD.HI.U32 R7, R7, R5, R6", "IMAD.HI.U32 R3, R7, R2, RZ",
        "IADD3 R5, -R3, RZ, RZ", "IMAD R5, R4, R5, R2", "ISETP.GE.U32.AND P0, PT, R5, R4, PT",
        "@P0 IADD3 R5, R5, -R4, RZ", "@P0 IADD3 R3, R3, 0x1, RZ", "ISETP.GE.U32.AND P1, PT, R5, R4, PT",
        "@P1 IADD3 R3, R3, 0x1, RZ", "EXIT",
    )  # fmt: skip
    code = instructions(sass)
    numbers = b"".join(n.to_bytes(4, "little") for n in (1000003, 150))
    state = execute._start(np.array([0]), execute.bank("sm_90", 128, 1, numbers), execute.Memory(), {})
    for i in code[:-1]:
        execute.step(i)(state)
    assert state.get("R3") == 1000003 // 150


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        ("LOP3.LUT R0, R1, R2, RZ, 0x3c, !PT", {"R1": 12, "R2": 10}, 12 ^ 10),
        ("LOP3.LUT R0, R1, 0xf, R9, 0xc0, !PT", {"R1": 0x1234}, 4),  # R9 is unknown, and not needed
        ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R1": 0x80000000}, 0xFFFFFFFF),
        ("SHF.R.U32.HI R0, RZ, 0x4, R1", {"R1": 0x123}, 0x12),
        ("LEA.HI R0, R1, R2, RZ, 0x5", {"R1": 0xF8000000, "R2": 1}, 32),
        ("LEA.HI.SX32 R0, R1, R2, 0x1f", {"R1": 0xFFFFFFFC, "R2": 7}, 5),
        ("IMAD.WIDE R2, R1, 0x4, R4", {"R1": 0xFFFFFFFF, "R4": 8, "R5": 0}, 4),
        ("VIMNMX R0, R1, R2, PT", {"R1": 0xFFFFFFFF, "R2": 5}, 0xFFFFFFFF),
        ("VIMNMX R0, R1, R2, !PT", {"R1": 0xFFFFFFFF, "R2": 5}, 5),
        ("SGXT.U32 R0, R1, 0x4", {"R1": 0x1F}, 15),
        ("PRMT R0, R1, 0x5410, R2", {"R1": 0x1111, "R2": 0x2222}, 0x22221111),
        ("SEL R0, R1, R2, P0", {"R1": 1, "R2": 2, "P0": False}, 2),
        ("LDG.E R0, desc[UR4][R2.64+0x4]", {"R2": 0x1000, "R3": 0}, 7),
        ("LDG.E R0, desc[UR4][R2.64]", {"R2": 0x9000, "R3": 0}, None),
        ("@P1 MOV R0, R1", {"R0": 3, "R1": 4, "P1": None}, None),
        ("MUFU.EX2 R0, R1", {"R0": 3, "R1": 4}, None),
    ],
)
def test_what_instructions_do(text, before, expected):
    (i,) = instructions(_sass(text))
    memory = execute.Memory(((0x1000, np.array([5, 7], dtype=np.int32).view(np.uint8)),))
    state = execute._start(np.array([0]), b"", memory, dict(before))
    execute.step(i)(state)
    assert state.get("R2" if "WIDE" in text else "R0") == expected


@pytest.mark.parametrize("before", [0x2000, np.array([[0x2000, 0x2008]])])
def test_bits_are_known_beside_others_that_are_not(before):
    """Predicates that a compiler packs into a register: one that was read from memory leaves the others."""
    code = instructions(
        _sass(
            "@P0 LOP3.LUT R0, R0, 0x8, RZ, 0xfc, !PT",  # of an unknown predicate
            "LOP3.LUT P1, RZ, R0.reuse, 0x2000, RZ, 0xc0, !PT",
            "LOP3.LUT P2, RZ, R0, 0x4000, RZ, 0xc0, !PT",
            "LOP3.LUT P3, RZ, R0, 0x8, RZ, 0xc0, !PT",
            "LOP3.LUT P4, R1, R0, 0x2008, RZ, 0xc0, !PT",
            "IADD3 R2, R0, 0x1, RZ",
            "LOP3.LUT R0, R0, 0xfffffff7, RZ, 0xc0, !PT",
        )
    )
    state = execute._start(np.array([0]), b"", execute.Memory(), {"R0": before, "P0": None})
    for i in code:
        execute.step(i)(state)
    assert np.all(state.get("P1")) and not np.any(state.get("P2")) and np.all(state.get("P4"))
    assert state.get("P2") is not None
    assert [state.get(name) for name in ("R1", "R2", "P3")] == [None, None, None]
    assert np.all(state.get("R0") == 0x2000)


@pytest.mark.parametrize(("mode", "expected"), [("ANY", True), ("ALL", False)])
def test_warps_vote(mode, expected):
    (i,) = instructions(_sass(f"VOTEU.{mode} UP0, P0"))
    for votes, found in ((np.array([[True, False]]), expected), (False, False), (None, None)):
        state = execute._start(np.array([0]), b"", execute.Memory(), {"P0": votes})
        execute.step(i)(state)
        result = state.get("UP0")
        assert (result if found is None else bool(np.all(result))) is found


def test_a_carry_goes_into_the_upper_half():
    low, high = instructions(_sass("IADD3 R2, P0, R4, -R6, RZ", "IADD3.X R3, R5, ~R7, RZ, P0, !PT"))
    a, b = 5 << 32 | 1, 2 << 32 | 3
    values = {"R4": a & 0xFFFFFFFF, "R5": a >> 32, "R6": b & 0xFFFFFFFF, "R7": b >> 32}
    state = execute._start(np.array([0]), b"", execute.Memory(), values)
    for i in (low, high):
        execute.step(i)(state)
    assert state.get("R3") << 32 | state.get("R2") == a - b


def test_accesses_are_counted_by_banks_and_sectors():
    sass = _sass(
        "S2R R0, SR_TID.X",
        "IMAD.SHL.U32 R2, R0, 0x80, RZ",
        "LDS R4, [R2]",  # 32 lanes, one bank
        "IMAD.SHL.U32 R3, R0, 0x4, RZ",
        "LDS R5, [R3]",
        "IMAD.WIDE.U32 R6, R0, 0x2, RZ",
        "LDG.E.U16 R8, desc[UR4][R6.64]",
        "LDG.E.U16 R8, desc[UR4][R6.64]",  # again: in the first-level cache
        "EXIT",
    )
    code = instructions(sass)
    recorder = execute.Recorder(code, 1000)
    execute.accesses(code, execute.blocks(code), 0, 1, b"", execute.Memory(), recorder)
    found = recorder.found
    assert found[0x20].mean("wavefronts") == 32
    assert found[0x40].mean("wavefronts") == 1
    assert (found[0x60].mean("sectors"), found[0x60].mean("missed")) == (2, 2)
    assert (found[0x70].mean("sectors"), found[0x70].mean("missed")) == (2, 0)


@pytest.mark.parametrize(
    ("lines", "done", "skipped"),
    [
        (("@P0 BRA 0x40", "NOP", "EXIT"), [0, 3, 4], [0, 4]),
        (("@P0 BRA 0x40", "EXIT", "NOP", "BRA 0x30"), [0, 4, 3], [0, 3]),  # work that lies behind the kernel
    ],
    ids=["in line", "behind"],
)
def test_an_unknown_branch_leads_to_work_or_over_it(lines, done, skipped):
    code = instructions(_sass("LDG.E R0, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT", *lines))
    for skip, visited in ((False, done), (True, skipped)):
        (path,) = execute.paths(code, execute.blocks(code), [0], b"", execute.Memory(), skip=skip)
        assert path.blocks == visited
        assert path.unknown == {0x20}


# ------------------------------------------------------------------------------------------------- launches


def test_occupancy_is_that_of_registers_shared_memory_and_warps():
    there = MULTIPROCESSORS["sm_90"]
    assert there.fitting(4, 168, 49152) == 3
    assert there.fitting(4, 169, 49152) == 2  # a warp gets registers by 256
    assert there.fitting(8, 32, 100 * 1024) == 2
    assert there.fitting(4, 16, 0) == 16
    assert there.fitting(4, 128, 228 * 1024) == 0


def test_the_tail_of_a_launch_is_counted():
    alone = [[100.0]]
    assert makespan([0] * 4, alone, units=2, slots=1) == pytest.approx(200)
    assert makespan([0] * 5, alone, units=2, slots=1) == pytest.approx(300)
    shared = [[100.0, 160.0]]
    assert makespan([0] * 4, shared, units=2, slots=2) == pytest.approx(160)
    # A place that is free is taken at once, beside a long one.
    assert makespan([0, 1, 0], [[10.0] * 2, [100.0] * 2], units=1, slots=2) == pytest.approx(100)
    # The long one last: it begins when a short one is done, and ends alone.
    kinds = [[10.0], [100.0]]
    assert makespan([0, 0, 0, 0, 1], kinds, units=2, slots=1) == pytest.approx(120)
    assert makespan([1, 0, 0, 0, 0], kinds, units=2, slots=1) == pytest.approx(100)


def test_loops_in_loops_are_gathered_and_shortened_without_loss():
    blocks = [0, *[1, *[2] * 20] * 30, 3]
    tree = nest(blocks, [frozenset({1, 2}), frozenset({2})])
    assert isinstance(tree[1], Loop)
    assert len(tree[1].iterations) == 30
    assert len(tree[1].iterations[0][1].iterations) == 20
    parts = {b: execute.Block(10 * b, 10 * b + 10, []) for b in range(4)}
    short = Shortened(tree, parts)
    assert len(short.sequence) < 1000
    times = {position: float(position) for position in short.marks}  # a cycle an instruction
    assert len(short.sequence) + short.extra(times) == pytest.approx(10 * len(blocks))


def _prediction(sass: str, **more):
    return _launch(sass, (400).to_bytes(4, "little"), programs=132 * 16, **more).predict(H100)


def test_a_loop_of_exponentials_is_limited_by_mufu_and_a_slower_kernel_is_slower():
    body = ["MUFU.EX2 R3, R4"] * 8
    loop = ("IADD3 R1, R1, 0x1, RZ", "ISETP.LT.AND P1, PT, R1, c[0x0][0x210], PT", "@P1 BRA 0x10", "EXIT")
    fast = _prediction(_sass(("MOV R1, RZ", 4), *body, *loop))
    assert fast.limit == "MUFU"
    # 8 exponentials at 8 cycles, 400 times, 16 programs with a warp on each quarter.
    assert fast.cycles == pytest.approx(8 * 8 * 400 * 16, rel=0.05)
    slow = _prediction(_sass(("MOV R1, RZ", 4), *body, "MUFU.EX2 R3, R4", *loop))
    assert slow.seconds > 1.1 * fast.seconds
    few = _prediction(_sass(("MOV R1, RZ", 4), *body, *loop), registers=255, shared=200 * 1024)
    assert few.resident == 1
    assert few.limit.startswith("latency") or few.seconds >= fast.seconds


def test_a_launch_is_no_faster_than_its_bytes():
    sass = _sass(
        "S2R R0, SR_TID.X", "S2R R1, SR_CTAID.X", "IMAD R0, R1, 0x80, R0", "MOV R2, c[0x0][0x210]",
        "MOV R3, c[0x0][0x214]", "IMAD.WIDE R2, R0, 0x10, R2", "LDG.E.128 R4, desc[UR4][R2.64]", "EXIT",
    )  # fmt: skip
    programs = 132 * 200
    tensors = {"x": {"address": 1 << 40, "shape": (), "dtype": "", "bytes": programs * 2048}}
    launch = _launch(sass, (1 << 40).to_bytes(8, "little"), programs=programs, tensors=tensors)
    found = launch.predict(H100)
    assert found.limit == "memory"
    assert found.l2_bytes == programs * 2048
    assert found.seconds == pytest.approx(programs * 2048 / H100.memory + H100.launch_s)


def test_code_of_one_kernel_has_the_loops_that_its_ways_are_gathered_by():
    assert [sorted(loop) for loop in Code.sass(COUNT).loops] == [[4, 5, 6, 7]]
