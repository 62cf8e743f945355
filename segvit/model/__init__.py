"""SegViT and what it is made of: backbone, decoders, losses, and weights from and to files.

`segvit.py` is the model, `heads.py` its kinds; `checkpoint.py`, `pretrained.py`, `foreign.py` read weights.
"""

from segvit.model.segvit import SegViT, SegViTOutput

__all__ = ["SegViT", "SegViTOutput"]
