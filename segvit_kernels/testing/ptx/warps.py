"""What the lanes of a warp do together: shuffles, votes, reductions; and barriers."""

from __future__ import annotations

import numpy as np

from segvit_kernels.testing.ptx.parser import Instruction, Vector
from segvit_kernels.testing.ptx.translate import NUMPY, Emitter, function, instruction, unknown


@instruction("shfl")
def _shfl(emit: Emitter, i: Instruction) -> None:
    if i.modifiers[0] != "sync":
        raise unknown(i)
    mode = i.modifiers[1]
    destination = i.operands[0]
    pair = destination.items if isinstance(destination, Vector) else (destination,)
    value, by, clamp, members = (emit.use(o, "u4") for o in i.operands[1:])
    emit.line(f"m.together({emit.site()}, {emit.mask()}, {members})")
    found = emit.temporary(f"shuffle('{mode}', {value}, {by}, {clamp}, m.threads)")
    emit.set(pair[0], "u4", f"{found}[0]")
    if len(pair) == 2:
        emit.set(pair[1], "b1", f"{found}[1]")


@function
def shuffle(
    mode: str, value: np.ndarray, by: np.ndarray, clamp: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """A value from another lane, and whether there was one."""
    lane = (np.arange(threads, dtype="i8") % 32)[None]
    by, clamp = by.astype("i8") & 31, clamp.astype("i8")
    segment = (clamp >> 8) & 31
    top, low = (lane & segment) | (clamp & 31 & ~segment), lane & segment
    if mode == "up":
        source = lane - by
        inside = source >= top
    elif mode == "down":
        source = lane + by
        inside = source <= top
    elif mode == "bfly":
        source = lane ^ by
        inside = source <= top
    else:
        source = low | (by & ~segment)
        inside = source <= top
    source = np.where(inside, source, lane) + np.arange(threads)[None] // 32 * 32
    if value.shape[1] == 1:
        return value, inside
    if source.shape[0] == 1:
        return value[:, source[0]], inside
    return np.take_along_axis(np.broadcast_to(value, source.shape), source, axis=1), inside


@instruction("vote")
def _vote(emit: Emitter, i: Instruction) -> None:
    mode = i.modifiers[1]
    members = emit.use(i.operands[2], "u4")
    site = emit.site()
    emit.line(f"m.together({site}, {emit.mask()}, {members})")
    found = f"vote('{mode}', {emit.use(i.operands[1], 'b1')}, {members}, m.threads)"
    emit.set(i.operands[0], "u4" if mode == "ballot" else "b1", found)


@function
def vote(mode: str, predicate: np.ndarray, members: np.ndarray, threads: int) -> np.ndarray:
    """Of the lanes in ``members``."""
    rows = max(predicate.shape[0], members.shape[0])
    lane = np.arange(threads) % 32
    inside = ((members >> lane.astype("u4")) & np.uint32(1)).astype(bool)
    predicate = np.broadcast_to(predicate, (rows, threads)).reshape(rows, -1, 32)
    inside = np.broadcast_to(inside, (rows, threads)).reshape(rows, -1, 32)
    if mode == "ballot":
        bits = np.uint32(1) << np.arange(32, dtype="u4")
        found = np.where(predicate & inside, bits, np.uint32(0)).sum(axis=-1, dtype="u4")
    else:
        every, some = (predicate | ~inside).all(axis=-1), (predicate & inside).any(axis=-1)
        found = {"all": every, "any": some, "uni": every | ~some}[mode]
    return np.repeat(found, 32, axis=-1)


@instruction("activemask")
def _activemask(emit: Emitter, i: Instruction) -> None:
    emit.set(i.operands[0], "u4", "m.activemask(k)")


@instruction("redux")
def _redux(emit: Emitter, i: Instruction) -> None:
    operation, kind = i.modifiers[1], i.modifiers[-1]
    if kind == "f32" or "NaN" in i.modifiers:
        raise unknown(i)
    dtype = NUMPY[kind]
    members = emit.use(i.operands[2], "u4")
    emit.line(f"m.together({emit.site()}, {emit.mask()}, {members})")
    names = {"add": "add", "min": "minimum", "max": "maximum"}
    names |= {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
    text = f"reduce_warp({names[operation]}, {emit.use(i.operands[1], dtype)}, {members}, m.threads)"
    emit.set(i.operands[0], dtype, text)


@function
def reduce_warp(ufunc: np.ufunc, value: np.ndarray, members: np.ndarray, threads: int) -> np.ndarray:
    """Of all lanes."""
    if (members != np.uint32(0xFFFFFFFF)).any():
        raise NotImplementedError("redux.sync of part of a warp")
    rows = np.broadcast_to(value, (value.shape[0], threads)).reshape(value.shape[0], -1, 32)
    return np.repeat(ufunc.reduce(rows, axis=-1), 32, axis=-1).astype(value.dtype)


@instruction("elect")
def _elect(emit: Emitter, i: Instruction) -> None:
    pair = i.operands[0].items
    emit.line(f"m.together({emit.site()}, {emit.mask()}, {emit.use(i.operands[1], 'u4')})")
    emit.set(pair[0], "u4", emit.constant(0, "u4"))
    emit.set(pair[1], "b1", "(m.special['%laneid'] == 0)")


@instruction("bar", "barrier")
def _bar(emit: Emitter, i: Instruction) -> None:
    if i.modifiers[0] == "warp":
        emit.line(f"m.warp_barrier({emit.site()}, {emit.mask()}, {emit.use(i.operands[0], 'u4')})")
        return
    words = [m for m in i.modifiers if m not in ("cta", "aligned")]
    if words not in (["sync"], ["arrive"]):
        raise unknown(i)
    number = emit.use(i.operands[0], "u4")
    count = emit.use(i.operands[1], "u4") if len(i.operands) > 1 else None
    emit.line(f"m.barrier({emit.site()}, {emit.mask()}, {number}, {count}, {words[0] == 'sync'})")


@instruction("membar", "fence")
def _fence(emit: Emitter, i: Instruction) -> None:
    if "proxy" in i.modifiers:
        emit.line(f"m.proxy_fence({emit.mask()})")
