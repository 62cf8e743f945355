"""Thread pools of other libraries that compute in this process beside what is timed."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

PACKAGES = ("openvino",)
SIDE = 768
# Until both are in the midst of a product.
BEGIN_S = 0.1


def _openmp() -> Callable[[], object]:
    """A product by PyTorch: each thread that calls one has OpenMP threads of its own."""
    factor = torch.rand(SIDE, SIDE)
    return lambda: factor @ factor


def _tbb() -> Callable[[], object]:
    """The same by OpenVINO, whose threads are oneTBB's."""
    library, opset = importlib.import_module("openvino"), importlib.import_module("openvino.opset13")
    graph = opset.parameter([SIDE, SIDE], np.float32)
    model = library.Model([opset.matmul(graph, graph, False, False)], [graph])
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = library.Core().compile_model(model, "CPU", options).create_infer_request()
    values = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
    return lambda: request.infer([values], share_inputs=True)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A pool of OpenMP and one of oneTBB multiply all the time, each with as many threads as PyTorch.

    Raises:
        RuntimeError: one of them failed and did not compute to the end.
    """
    over, failed = threading.Event(), []

    def run(product: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                product()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(made(),)) for made in (_openmp, _tbb)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(BEGIN_S)
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if failed:
        raise RuntimeError(f"a pool beside failed: {failed[0]}") from failed[0]
