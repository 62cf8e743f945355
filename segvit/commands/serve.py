"""`segvit serve`: a checkpoint behind HTTP and a page to try it on, of this machine unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from segvit.inference.engine import check_precision, in_precision
from segvit.inference.passes import check_options
from segvit.model.heads import load_model
from segvit.options import ServeConfig
from segvit.system.extras import require
from segvit.system.machine import pick_backend, pick_device


def run(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns 0.

    Raises:
        ValueError, OSError, ImportError: an option, the checkpoint or the port cannot be used.
    """
    for module in ("python_multipart", "starlette", "uvicorn"):
        require(module, extra="serve")
    from segvit.serve.app import Service
    from segvit.serve.http import local_names
    from segvit.serve.server import bind, serve

    if config.short_side is not None and config.short_side**2 > config.max_pixels:
        smallest = f"whose pictures have {config.short_side**2} pixels at least"
        raise ValueError(
            f"short_side: got {config.short_side}, {smallest}; --max-pixels {config.max_pixels} is less"
        )
    device = pick_device(config.accelerator)
    choice = pick_backend(config.backend, device)
    check_precision(device, config.dtype, config.backend)
    with bind(config.host, config.port) as listening:
        model = in_precision(load_model(config.checkpoint), device, config.dtype)
        check_options(config, model.config.backbone.patch_size, model.config.class_names)
        similarity = model.has_similarity_maps
        path = Path(config.checkpoint)
        name = os.path.basename(os.path.abspath(path)) if path.exists() else config.checkpoint
        service = Service(model, config, name, similarity=similarity, context=choice)
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if local_names(config.host) is None:
            reach = "whoever reaches this machine can use it: there is no password and no encryption"
        else:
            reach = "from this machine only; --host 0.0.0.0 lets others in"

        def ready() -> None:
            print(f"{address} ({reach})", flush=True)
            print("Ctrl-C ends it when what is at hand is answered", flush=True)

        serve(service, listening, config, ready)
    print("ended", flush=True)
    return 0
