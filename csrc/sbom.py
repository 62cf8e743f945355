"""The bill of materials in a wheel (``.dist-info/sboms/``, PEP 770): what of others is inside, CycloneDX."""

from __future__ import annotations

import argparse
import json
from typing import Any


def _component(name: str, version: str, licence: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "library",
        "name": name,
        "version": version,
        "licenses": [{"license": {"name": licence}}],
        **more,
    }


def bill(version: str, args: argparse.Namespace | None, build: Any) -> str:
    """As text; ``args`` are those of csrc/build.py, the module ``build``, or ``None`` without a library."""
    inside, tools = [], []
    if args is not None:
        import torch

        compiler = build._cxx(args)
        name = "Clang" if "clang" in build._run([*compiler, "--version"]) else "GCC"
        number = build._identity(compiler).strip('"')
        tools.append({"type": "application", "name": name, "version": number})
        headers = "headers of LibTorch's stable ABI, compiled in"
        inside.append(_component("torch", torch.__version__, "BSD-3-Clause", description=headers))
        templates = "templates of its headers, compiled in"
        runtime = "GPL-3.0-or-later WITH GCC-exception-3.1"
        inside.append(_component("libstdc++", number, runtime, description=templates))
        if (nvcc := build._nvcc(args)) is not None:
            number = build.nvcc_version(nvcc)
            tools.append({"type": "application", "name": "nvcc", "version": number})
            linked = "cudart_static, linked in"
            inside.append(_component("CUDA runtime", number, "NVIDIA CUDA Toolkit EULA", description=linked))
    own = _component("segvit-kernels", version, "Apache-2.0")
    own["purl"] = own["bom-ref"] = f"pkg:pypi/segvit-kernels@{version}"
    found = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own, "tools": {"components": tools}},
        "components": inside,
    }
    return json.dumps(found, indent=1) + "\n"
