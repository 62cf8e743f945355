"""The commands of `segvit`: the command `a b` is the module `a_b`, whose `run` takes its options."""

from segvit.options import (
    BenchConfig,
    ConvertConfig,
    DataConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    PackConfig,
    PredictConfig,
    ServeConfig,
    TrainConfig,
)

__all__ = ["COMMANDS", "OPERANDS"]

# Options, and what it does.
COMMANDS: dict[str, tuple[type, str]] = {
    "train": (TrainConfig, "train a model on a folder of images or on synthetic data"),
    "evaluate": (EvaluateConfig, "mIoU of a checkpoint on a data set"),
    "predict": (PredictConfig, "label maps and overlays of images"),
    "serve": (ServeConfig, "a page and an HTTP interface to a checkpoint, on this machine"),
    "convert": (ConvertConfig, "turn a published SegViT checkpoint into one of this package"),
    "export": (ExportConfig, "write a checkpoint as a file for other runtimes, from picture to label map"),
    "bench": (
        BenchConfig,
        "how fast a model runs on this machine, where the time goes, and what to switch on",
    ),
    "data check": (DataConfig, "what a folder of images and label maps holds, and how it is understood"),
    "data pack": (PackConfig, "write a data set as tars with an index, which train and evaluate read"),
    "demo": (DemoConfig, "train a small model on synthetic data and write an HTML report"),
}
# What stands behind the command, for its usage.
OPERANDS = {
    "predict": "IMAGE... ",
    "serve": "CHECKPOINT ",
    "convert": "IN.pth OUT ",
    "export": "CHECKPOINT OUT ",
    "bench": "MODEL ",
    "data check": "FOLDER ",
    "data pack": "FOLDER OUT ",
}
