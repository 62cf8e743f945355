"""The rates of a machine that floors are computed from: copies, matrix products, exponentials."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch

from bench.measure import timing


def _rate(amount: float, work: Callable[[], object], device: torch.device) -> dict:
    sampler = timing.stream_sampler(lambda _: work(), [{}], device, least_s=10e-3)
    found = timing.summary([sampler() for _ in range(10)])
    return {"per_s": amount / found["median_s"], "median_s": found["median_s"], "amount": amount}


def _copy(device: torch.device, tiny: bool) -> dict:
    # On a CPU beyond any cache: 1 GiB in all.
    count = 2**16 if tiny else 2**27
    if device.type == "cuda" and not tiny:
        count = min(2**30, torch.cuda.get_device_properties(device).total_memory // 4 // 8)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return _rate(2 * source.nbytes, lambda: target.copy_(source), device)


def _matmul(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict:
    size = 64 if tiny else 1536 if device.type == "cpu" else 4096 if dtype == torch.float32 else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _rate(2 * size**3, lambda: a @ b, device)


def _exp2(device: torch.device, tiny: bool) -> dict:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        # torch's own vectorised exponential on data in the cache: a kernel with a shorter polynomial may win.
        x = torch.rand(2**12 if tiny else 2**17)
        target = torch.empty_like(x)
        return _rate(x.numel(), lambda: torch.exp2(x, out=target), device)
    programs, iterations = 1, 2
    if device.type == "cuda":
        programs, iterations = torch.cuda.get_device_properties(device).multi_processor_count * 32, 4096
    x = torch.rand(programs * 1024, device=device)
    return _rate(x.numel() * iterations, lambda: exponentials(x, programs, iterations), device)


def exponentials(x: torch.Tensor, programs: int, iterations: int) -> None:
    """``iterations`` dependent exponentials of each element of ``x`` by a kernel, 1024 elements a program."""
    from bench.measure._exp2 import launch

    launch(x, programs, iterations)


def rates(device: torch.device, tiny: bool = False) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Names and measurements of the rates that floors are computed from, as many threads as torch has."""
    yield "copy_bytes_per_s", lambda: _copy(device, tiny)
    yield "exp2_per_s", lambda: _exp2(device, tiny)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if device.type == "cuda" or dtype == torch.float32 or tiny:
            name = f"matmul_{str(dtype).removeprefix('torch.')}_flop_per_s"
            yield name, lambda dtype=dtype: _matmul(device, dtype, tiny)
