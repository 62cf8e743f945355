"""Every Triton kernel of the operators on the PTX machine: ``python ptx_operators.py sm_90 bf16``.

The chosen part that CI runs: the kernels of ``ptx_battery``, then a few cases of every operator; all:
``make ptx``. In a process without interpreter. Says which kernels no case
launched, and fails where there is one.
"""

import dataclasses
import importlib
import os
import sys
import time

os.environ.setdefault("SEGVIT_KERNELS_BACKEND", "eager")
sys.path.extend(__file__.rsplit("/", up)[0] for up in (1, 2))

import ptx_battery
import ptx_coverage
import test_atm as atm
import test_mask_binarize as mask_binarize
import test_mask_iou as mask_iou
import test_mask_loss as mask_loss
import test_panoptic_argmax as panoptic_argmax
import test_query_attention as query_attention
import test_semantic_argmax as semantic_argmax
import test_semantic_topk as semantic_topk
import test_subsample_norm as subsample_norm
import torch
from backends import BY_ID, Launchers
from mask_loss_calls import Call, check_matching
from mask_loss_calls import check as check_mask_sums

from segvit_kernels.ops.semantic_argmax import View
from segvit_kernels.testing import ptx
from segvit_kernels.testing.launches import OPERATORS, module
from segvit_kernels.testing.semantic_argmax import SemanticCase
from segvit_kernels.triton import atm as atm_kernels
from segvit_kernels.triton import mask_loss as mask_loss_kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ONE_VIEW = SemanticCase("view", ((1, 5, 7),), 20, 7, (30, 41), (View.whole(0, (5, 7), (30, 41)),), 1)


def check_atm(dtype):
    case = dataclasses.replace(atm.SMALL, heads=1, broadcast=True)
    for plan in ({"splits": 2}, {"plan": "heads"}):
        atm.check(case, dtype, Launchers(atm_kernels, {"atm_fwd": plan}), deterministic=False)


def check_query_attention(dtype):
    query_attention.check(query_attention.BY_NAME["odd"], dtype, BY_ID["triton"], deterministic=False)


def check_mask_binarize(dtype):
    mask_binarize.check(mask_binarize.FEW[2], dtype, BY_ID["triton"])


def check_mask_loss(dtype):
    config, few = mask_loss_kernels._config, mask_loss.FEW
    mask_loss_kernels._config = lambda *arguments: {**config(*arguments), **few}
    for name in ("bool_masks", "one_pixel"):  # sizes of 1 are constants to Triton's JIT
        mask_loss.test_case(mask_loss.BY_NAME[name], BY_ID["triton"], dtype, None)
    call = Call.draw(2, 20, [(5, 7)], (21, 37), torch.uint8, 7, dtype=dtype)
    check_mask_sums(Call.draw(2, 7, [(5, 7)], (21, 37), dtype, dtype=dtype), BY_ID["triton"])  # soft masks
    several = {**few, "programs": 8}  # to a tile, whose sums are added
    check_matching(call, Launchers(mask_loss_kernels, {"mask_matching_sums": several}))
    mask_loss_kernels._config = config


def check_noise(arch):
    """Budgets of float32 hold where approximate instructions err as they may on hardware: of the smallest
    cases, in which errors do not average. All cases: ``SEGVIT_PTX_NOISE``, see docs/ptx.md."""
    for seed in range(1, 5):
        with ptx.machine(arch, noise=seed):
            mask_loss.test_case(mask_loss.BY_NAME["one_pixel"], BY_ID["triton"], torch.float32, None)
            for name in ("few_channels", "far_from_zero"):
                subsample_norm.check(subsample_norm.BY_NAME[name], torch.float32, BY_ID["triton"])


def check_mask_iou(dtype):
    for name, soft in (("targets", False), ("as_they_are", True)):
        mask_iou.check(mask_iou.BY_NAME[name], dtype, BY_ID["triton"], soft)


def check_panoptic_argmax(dtype):
    for name in ("odd", "mask2former"):
        panoptic_argmax.check(panoptic_argmax.BY_NAME[name], dtype, BY_ID["triton"], planted=True)


def check_semantic_argmax(dtype):
    for case, concentrated in ((semantic_argmax.BY_NAME["odd"], True), (ONE_VIEW, False)):
        inputs = case.inputs(dtype, concentrated=concentrated)
        semantic_argmax.check(case.name, inputs, BY_ID["triton"], scores=False)


def check_semantic_topk(dtype):
    for case, k in ((semantic_argmax.BY_NAME["odd"], 3), (ONE_VIEW, 1)):
        semantic_topk.check(case.name, case.inputs(dtype), BY_ID["triton"], k)


def check_subsample_norm(dtype):
    subsample_norm.check(subsample_norm.BY_NAME["odd_grid"], dtype, BY_ID["triton"])


def main(arch: str, *names: str) -> int:
    ptx_battery.main(arch, *names)
    kernels = set()
    for operator in OPERATORS:
        members = vars(importlib.import_module(f"segvit_kernels.triton.{operator}"))
        found = {
            name for name, value in members.items() if name.endswith("_kernel") and hasattr(value, "run")
        }
        demands = module(operator).KERNELS
        found |= set(demands)  # operators share some
        kernels |= {n for n in found if n not in demands or demands[n].everywhere or arch == "sm_90"}
    failed = 0
    with ptx.machine(arch) as session:
        for name in names or DTYPES:
            for operator in OPERATORS:
                begin = time.process_time()
                try:
                    globals()[f"check_{operator}"](DTYPES[name])
                    result = "ok"
                except (AssertionError, ptx.Fault, ptx.PTXError) as error:
                    result, failed = f"FAILED: {error}", failed + 1
                print(
                    f"{arch} {name} {operator}: {result} ({time.process_time() - begin:.1f} s of CPU)",
                    flush=True,
                )
        ptx_coverage.record(session)
    check_noise(arch)
    missing = sorted(kernels - set(session.launches))
    print(f"{len(session.launches)} kernels, {sum(session.launches.values())} launches; never: {missing}")
    return failed + len(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
