"""Segmentation data: pictures, label maps, where they lie, and what their values mean.

`pictures` reads files and `names` class names, `folder` is the data set, `transforms` the augmentation.
"""

from segvit.data.folder import SegmentationFolder, check_data, folder_options, open_dataset
from segvit.data.names import read_names
from segvit.data.pictures import read_image
from segvit.data.stored import read_label

__all__ = [
    "SegmentationFolder",
    "check_data",
    "folder_options",
    "open_dataset",
    "read_image",
    "read_label",
    "read_names",
]
