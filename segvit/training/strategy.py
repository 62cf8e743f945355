"""Fabric's strategy for `--strategy fsdp`; needs Lightning Fabric as soon as it is imported."""

from __future__ import annotations

import functools
from typing import Any

from lightning_fabric.strategies import ModelParallelStrategy
from lightning_fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from segvit.training.sharding import shard

__all__ = ["Sharded"]


def _parallelize(model: Any, mesh: Any, low_precision: bool) -> Any:
    return shard(model, mesh["data_parallel"], low_precision)


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, which are spawned where neither torchrun nor srun has started them.

    Args:
        processes: of all machines.
        low_precision: see `segvit.training.sharding.shard`.
    """

    def __init__(self, processes: int, low_precision: bool) -> None:
        parallelize: Any = functools.partial(_parallelize, low_precision=low_precision)
        super().__init__(parallelize, data_parallel_size=processes, tensor_parallel_size=1)
        self.low_precision = low_precision

    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        if not environment.creates_processes_externally:
            self._launcher = _MultiProcessingLauncher(self)

    def shard(self, model: Any) -> Any:
        """Spread another model as the one that is trained."""
        return _parallelize(model, self.device_mesh, self.low_precision)
