"""Kernels of PTX by hand for the machine's tests, and a session that runs them."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from segvit_kernels.testing import ptx

CONFLICTS = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry conflicts(.param .u64 out) {
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    .shared .align 16 .b8 buffer[4096];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, buffer;
    mad.lo.s32 %r3, %r1, 16, %r2;
    st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};  // four passes of eight lanes, no conflict
    bar.warp.sync -1;
    mad.lo.s32 %r4, %r1, 128, %r2;
    st.shared.b32 [%r4], %r1;  // one bank
    ld.shared.b32 %r5, [%r4];
    ld.param.u64 %rd1, [out];
    mad.wide.u32 %rd2, %r1, 8, %rd1;
    st.global.b32 [%rd2], %r5;  // every other word: eight sectors
    ret;
}
"""

LOCAL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry local(.param .u64 x, .param .u64 at, .param .u64 out, .param .u32 n) {
    // out[i] = x[i, at[i]] by 8 floats in local memory, as nvcc makes of an index that it does not know
    .local .align 16 .b8 __local_depot0[48];
    .reg .pred %p<2>;
    .reg .f32 %f<10>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<16>;
    .reg .b64 %SP;
    .reg .b64 %SPL;
    mov.u64 %SPL, __local_depot0;
    cvta.local.u64 %SP, %SPL;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [at];
    ld.param.u64 %rd3, [out];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.s32 %p1, %r5, %r1;
    @%p1 bra $L_end;
    add.u64 %rd4, %SP, 16;
    add.u64 %rd5, %SPL, 16;
    mul.wide.s32 %rd6, %r5, 32;
    add.s64 %rd7, %rd1, %rd6;
    ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd7];
    st.local.v4.f32 [%rd5], {%f1, %f2, %f3, %f4};
    ld.global.v4.f32 {%f5, %f6, %f7, %f8}, [%rd7+16];
    st.local.v2.f32 [%rd5+16], {%f5, %f6};
    st.f32 [%rd4+24], %f7;
    st.local.f32 [%rd5+28], %f8;
    mul.wide.s32 %rd8, %r5, 4;
    add.s64 %rd9, %rd2, %rd8;
    ld.global.s32 %r6, [%rd9];
    mul.wide.s32 %rd10, %r6, 4;
    add.s64 %rd11, %rd4, %rd10;
    ld.f32 %f9, [%rd11];
    add.s64 %rd12, %rd3, %rd8;
    st.global.f32 [%rd12], %f9;
$L_end:
    ret;
}
"""

_sessions: list[ptx.Session] = []


@contextlib.contextmanager
def machine(arch: str, edit: Callable[[str, str], str] | None = None) -> Iterator[ptx.Session]:
    """As :func:`segvit_kernels.testing.ptx.machine`, for what this module launches."""
    _sessions.append(ptx.Session(arch, edit))
    try:
        yield _sessions[-1]
    finally:
        _sessions.pop()


def local(at: torch.Tensor | None = None) -> None:
    """150 threads in blocks of 64, each with its own index."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 8, generator=generator)
    if at is None:
        at = torch.randint(8, (150,), generator=generator, dtype=torch.int32)
    out = torch.full((150,), torch.nan)
    _sessions[-1].launch(LOCAL, "local", (3, 1, 1), 64, [x, at, out, 150], 0)
    assert torch.equal(out, x[torch.arange(150), at.long()])
