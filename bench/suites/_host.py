"""What ``bench host`` runs in a process of its own, on the ``segvit_kernels`` of any checkout.

``python -P _host.py STUB SECONDS``: STUB is the stub of libcuda, taken by path because older checkouts
have none. Prints one JSON object: the version of Triton, and for every subject the least time of a call.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Subject = tuple[str, str, str, Callable[[], object]]
"""Group, name, what is called, and the call."""


def install(path: str) -> None:
    """The stub, in this checkout too."""
    spec = importlib.util.spec_from_file_location("stub", path)
    stub = sys.modules["stub"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    gpu = stub.install()
    names = ("atm", "mask_loss", "query_attention", "semantic_argmax", "subsample_norm")
    for name in names:  # before launchers remembered, each asked for the architecture itself
        module = importlib.import_module(f"segvit_kernels.triton.{name}")
        if hasattr(module, "architecture"):
            module.architecture = lambda device: gpu.arch


def _tokens(count: int, batch: int = 1, heads: int = 2, dim: int = 32) -> Tensor:
    return torch.ones(batch, count, heads, dim, dtype=torch.bfloat16)


def _launchers() -> Iterator[Subject]:
    from segvit_kernels.triton import atm, mask_loss, query_attention, semantic_argmax, subsample_norm

    def subject(what: str, launcher: Callable, *arguments: object) -> Subject:
        return "launcher", launcher.__name__, what, lambda: launcher(*arguments)

    query, lse, none = _tokens(16), torch.ones(1, 2, 16), (None, 0.2, 0.0)
    for keys, what in ((64, "one launch"), (512, "keys split, two launches")):
        key, masks = _tokens(keys), torch.ones(1, 16, keys, dtype=torch.bfloat16)
        yield subject(what, atm.atm_fwd, query, key, key, masks, *none, True)
        if keys == 64:
            backward = (query, masks, query, key, key, query, lse, *none, False)
            yield subject("two launches", atm.atm_bwd, *backward)
            yield subject(what, query_attention.query_attention_fwd, query, key, key, *none)
            backward = (query, query, key, key, query, lse, *none, False)
            yield subject("three launches", query_attention.query_attention_bwd, *backward)
    logits = [torch.ones(1, 8, 4, 4, dtype=torch.bfloat16) for _ in range(3)]
    labels = torch.ones(1, 32, 32, dtype=torch.uint8)
    numbers, sums, areas = (8, 0.25, 2.0), torch.ones(3, 1, 8, 4), torch.ones(1, 8)
    yield subject(
        "three outputs, three launches", mask_loss.mask_loss_fwd, logits, labels, None, *numbers, False
    )
    backward = (sums, logits, labels, None, areas, *numbers, False)
    yield subject("three outputs, two launches", mask_loss.mask_loss_bwd, *backward)
    yield subject("two launches or four", mask_loss.mask_matching_sums, logits[0], labels, *numbers)
    probs = torch.ones(1, 8, 8, dtype=torch.bfloat16)
    sizes = (1, 32, 32, [1.0, 1.0], True, False, 0.0)
    yield subject("two launches", semantic_argmax.semantic_argmax, logits[:1], probs, [], *sizes)
    x, weight, rows = torch.ones(1, 16, 64), torch.ones(64), torch.ones(1, 16)
    place = (4, 4, 2, 0)
    yield subject(
        "one launch", subsample_norm.subsample_norm_fwd, x, weight, weight, *place, 1e-6, torch.float32
    )
    kept = torch.ones(1, 4, 64)
    backward = (x, kept, kept, x, weight, rows, rows, *place)
    yield subject("two launches", subsample_norm.subsample_norm_bwd, *backward)


def _calls() -> Iterator[Subject]:
    import torch.nn.functional as F

    from segvit_kernels import fused_atm, mask_loss, query_attention, semantic_argmax, subsample_layer_norm

    few, many = torch.ones(4), _tokens(64)
    query, masks = _tokens(16), torch.ones(1, 16, 64, dtype=torch.bfloat16)
    logits = [torch.ones(1, 8, 4, 4, dtype=torch.bfloat16) for _ in range(3)]
    labels, probs = torch.ones(1, 32, 32, dtype=torch.uint8), torch.ones(1, 8, 8, dtype=torch.bfloat16)
    x, weight = torch.ones(1, 16, 64), torch.ones(64)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return subsample_layer_norm(x, weight, bias, grid=(4, 4))

    def losses(*logits: Tensor) -> tuple[Tensor, ...]:
        found = mask_loss(list(logits), labels, num_classes=8)
        return *found.focal, *found.dice

    yield "torch", "a * a", "4 elements", lambda: few * few
    heads_first = [t.transpose(1, 2) for t in (query, many, many)]
    for name, call, inputs in (
        ("F.scaled_dot_product_attention", F.scaled_dot_product_attention, heads_first),
        ("fused_atm", lambda q, k, v: fused_atm(q, k, v, previous_masks=masks), (query, many, many)),
        ("query_attention", query_attention, (query, many, many)),
        ("mask_loss", losses, logits),
        (
            "subsample_layer_norm",
            norm,
            (x, weight, weight),
        ),
    ):
        group = "torch" if name.startswith("F.") else "function"
        plain = [t.detach().clone() for t in inputs]
        learned = [t.detach().clone().requires_grad_() for t in inputs]
        found = call(*plain)
        grads = [torch.ones_like(t) for t in (found if isinstance(found, tuple) else (found,))]

        def both(call=call, learned=learned, grads=grads) -> object:
            found = call(*learned)
            return torch.autograd.grad(found if isinstance(found, tuple) else (found,), learned, grads)

        yield group, name, "forward", lambda call=call, plain=plain: call(*plain)
        yield group, name, "forward under autograd", lambda call=call, learned=learned: call(*learned)
        yield group, name, "forward and backward", both
    yield "function", "semantic_argmax", "forward", lambda: semantic_argmax(logits[0], probs, (32, 32))


def least(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the shortest call; of several in a row a busy machine would interrupt one."""
    call(), call()
    best, end = float("inf"), time.perf_counter() + seconds
    gc.disable()
    try:
        begin = time.perf_counter()
        while begin < end:
            call()
            best = min(best, time.perf_counter() - begin)
            begin = time.perf_counter()
    finally:
        gc.enable()
    return best


def main(stub: str, seconds: str) -> None:
    torch.set_num_threads(1)
    install(stub)
    import triton

    rows = [
        {"group": group, "name": name, "what": what, "seconds": least(call, float(seconds))}
        for subjects in (_launchers, _calls)
        for group, name, what, call in subjects()
    ]
    print(json.dumps({"triton": triton.__version__, "rows": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
