"""`segvit.data.transforms` under its first name."""

from segvit.data.transforms import Augment, ClassBalancedCrop, RandomScale, sample_seed

__all__ = ["Augment", "ClassBalancedCrop", "RandomScale", "sample_seed"]
