"""Label maps of a folder of pictures on Ray: python ray_predict.py PICTURES CHECKPOINT OUT [WORKERS]

Needs pip install 'segvit-kernels[ray,train]' on every node. Each worker holds the model. Ray starts one that
dies anew and gives its batches to it; to go on after the whole job was killed, leave out what OUT has.
"""

import sys

import ray

from segvit.ray import Labeller


def main(pictures: str, checkpoint: str, out: str, workers: int = 1) -> int:
    gpus = min(1, ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    rows = (
        ray.data.read_binary_files(pictures, include_paths=True)
        .map_batches(
            Labeller,
            fn_constructor_args=(checkpoint,),
            batch_size=16,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        .materialize()
    )
    rows.write_parquet(out)
    return rows.count()


if __name__ == "__main__":
    ray.init()
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:5])), "pictures")
