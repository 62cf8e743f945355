"""Label maps of a folder of pictures on Spark: spark-submit spark_predict.py PICTURES CHECKPOINT OUT

Every Python worker loads the model once for its part of the pictures; Spark gives the part of one that dies
to another. Needs segvit-kernels[train] there.
"""

import functools
import sys

import pandas
from pyspark.sql import SparkSession

from segvit.ray import Labeller

SCHEMA = "path string, width int, height int, labels binary, counts array<long>, error string"


def labelled(make):
    """Of frames of files, frames of label maps; `make` gives a worker its `Labeller`."""

    def part(frames):
        label = make()
        for frame in frames:
            found = label({"path": frame["path"], "bytes": frame["content"]})
            yield pandas.DataFrame({name: list(column) for name, column in found.items()})

    return part


def main(pictures, out, make):
    files = SparkSession.builder.getOrCreate().read.format("binaryFile").load(pictures)
    files.select("path", "content").mapInPandas(labelled(make), SCHEMA).write.parquet(out)


if __name__ == "__main__":
    pictures, checkpoint, out = sys.argv[1:]
    main(pictures, out, functools.partial(Labeller, checkpoint))
