"""Commands of ``python -m bench``: one file a command, which says what options it has and runs them.

Each has ``add_arguments(parser)`` and ``run(options)``, which gives the exit code. Only the chosen one is
imported: with it comes torch, which ``--help`` need not wait for.
"""

COMMANDS = {
    "kernels": "the operators against their peers: correctness, time, memory",
    "gpu": "all that one GPU can show, within a budget, into one folder",
    "precompile": "compile for sm_90, without a GPU, all kernels of 'gpu'",
    "instructions": "the operators by instruction set and number of threads of a CPU",
    "scaling": "time of the operators as classes, tokens, batch, images, views grow",
    "model": "whole models and decoders, image to label map, against their peers",
    "memory": "peak memory of inference and of a training step",
    "step": "a training step of transformers' Mask2Former, its own loss against ours",
    "flops": "multiply-accumulates, parameters, memory of published models",
    "backbones": "backbones of the presets against timm: features, parameters, multiply-accumulates",
    "bulk": "many small pictures: `segvit predict` against a plain loop, its parts, shards",
    "decoders": "decoders of this package by backbone and patch size, picture to label map",
    "learning": "what models learn of a data set in the same minutes, and what they cost",
    "static": "what compiled kernels need, without running them",
    "simulate": "the time of the Triton kernels on an H100 and H200, predicted from machine code",
    "host": "what calls cost before a GPU runs: launches on a stub of its driver",
    "inference": "label maps of real images by windows, scales and flips",
    "export": "files of `segvit export`: labels, their tail, mIoU in int8",
    "tune": "time launch parameters of the Triton kernels on this GPU, pin the best",
    "all": "the small form of everything on this machine, then the report",
    "report": "regenerate tables and figures of README.md and docs/, or print files",
}
"""What each is for, in the order of ``--help``."""


class OptionError(ValueError):
    """An option that cannot be honoured; the message is for the user."""
