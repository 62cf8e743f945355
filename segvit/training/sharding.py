"""Weights spread over the processes (`--strategy fsdp`), and checkpoints that any number of them reads.

Each block of the backbone, and the rest, is a group of FSDP2 (`torch.distributed.fsdp.fully_shard`): a
process keeps its piece of every weight, gradient and moment, and has a group whole only while it computes it.

A checkpoint's tensors are files of torch.distributed.checkpoint in its safetensors form, each process's own,
in which nothing is pickled: `weights.NAME`, `average.NAME`, and the moments of the optimizer, `exp_avg.NAME`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from segvit.model.segvit import SegViT
from segvit.system.failures import one_line

__all__ = ["gathered", "load_tensors", "local", "save_tensors", "shard", "spread", "tensors_of"]


def shard(model: SegViT, mesh: Any, low_precision: bool) -> SegViT:
    """Spread a model's weights over the processes of a one-dimensional mesh, in place; returns it.

    Args:
        low_precision: gather weights in bfloat16, to which autocast rounds most of them anyway; gradients are
            summed in float32.
    """
    # Losses write into no output of the model, of which this warns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    policy = MixedPrecisionPolicy()
    if low_precision:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in (*model.plain_blocks(), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, which is the whole where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whole in every process; all of them take part."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()
    }


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, spread as another one of its shape is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def tensors_of(model: nn.Module, average: nn.Module | None, optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors of a training by name, as they lie in the process."""
    named = {"weights": model, **({"average": average} if average else {})}
    found = {f"{kind}.{name}": t for kind, one in named.items() for name, t in one.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, moments in optimizer.state.items():
        found |= {f"{moment}.{names[id(parameter)]}": value for moment, value in moments.items()}
    return found


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of each process's pieces into a folder; all processes take part.

    Raises:
        OSError: one of them cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(tensors, storage_writer=writer)
    except checkpoint.CheckpointException as error:
        raise OSError(f"{folder}: cannot be written ({_reason(error)})") from None


def load_tensors(folder: Path, model: nn.Module, average: nn.Module | None, optimizer: Optimizer) -> None:
    """Fill a training's tensors from a folder of `save_tensors`, whatever processes wrote it.

    Raises:
        ValueError: files are missing or damaged, or of another model.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        stored = reader.read_metadata().state_dict_metadata
        _allocate_moments(stored, model, optimizer)
        tensors = tensors_of(model, average, optimizer)
        _compare(stored, tensors)
        alone = not torch.distributed.is_initialized()
        checkpoint.load(tensors, storage_reader=reader, no_dist=alone)
    except (
        Exception,
        checkpoint.CheckpointException,
    ) as error:  # safetensors' and torch's are of many classes
        raise ValueError(f"{folder}: cannot be read ({_reason(error)})") from None


def _allocate_moments(stored: Iterable[str], model: nn.Module, optimizer: Optimizer) -> None:
    kinds = {name.partition(".")[0] for name in stored} - {"weights", "average"}
    names = set(stored)
    fused = {id(p): group.get("fused") for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        for kind in kinds:
            if f"{kind}.{name}" not in names or id(parameter) not in fused:
                continue
            if kind == "step":
                device = parameter.device if fused[id(parameter)] else "cpu"
                value = torch.zeros((), dtype=torch.float32, device=device)
            else:
                value = torch.zeros_like(parameter, requires_grad=False)
            optimizer.state[parameter][kind] = value


def _compare(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A file that is missing leaves holes, which torch reads over."""
    if other := sorted(stored.keys() ^ tensors.keys()):
        missing = other[0] not in stored
        raise ValueError(f"{'without' if missing else 'with'} {other[0]}, as another model's or options'")
    for name, tensor in tensors.items():
        whole, there = stored[name].size, sum(piece.sizes.numel() for piece in stored[name].chunks)
        if whole != tensor.shape or there != tensor.numel():
            raise ValueError(f"{name} is not whole: a file is missing, or it is of another model")


def _reason(error: BaseException) -> str:
    """In one line; of a failure in several processes the first."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"process {rank}: {one_line(cause)}"
    return one_line(error)
