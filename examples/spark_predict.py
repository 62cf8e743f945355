"""Label maps of a folder of pictures on Spark: spark-submit spark_predict.py PICTURES CHECKPOINT OUT

Every Python worker loads the model once for its part of the pictures. Needs segvit-kernels[train] there.
"""

import sys

import pandas
from pyspark.sql import SparkSession

SCHEMA = "path string, width int, height int, labels binary, counts array<long>, error string"


def labelled(checkpoint):
    def part(frames):
        from segvit.ray import Labeller

        label = Labeller(checkpoint)
        for frame in frames:
            found = label({"path": frame["path"], "bytes": frame["content"]})
            yield pandas.DataFrame({name: list(column) for name, column in found.items()})

    return part


if __name__ == "__main__":
    pictures, checkpoint, out = sys.argv[1:]
    files = SparkSession.builder.getOrCreate().read.format("binaryFile").load(pictures)
    files.select("path", "content").mapInPandas(labelled(checkpoint), SCHEMA).write.parquet(out)
