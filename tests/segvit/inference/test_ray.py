"""Rows of pictures to rows of label maps; SEGVIT_RAY=1, SEGVIT_SPARK=1: on Ray, on Spark."""

import functools
import importlib.util
import io
import os
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from segvit.config import BackboneConfig, SegViTConfig
from segvit.model.segvit import SegViT
from segvit.options import InferenceOptions
from segvit.ray import Labeller

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    backbone = BackboneConfig(width=16, depth=1, heads=2, patch_size=8)
    values = {"taps": (0,), "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}
    folder = tmp_path_factory.mktemp("model")
    SegViT(SegViTConfig(backbone, num_classes=3, image_size=16, **values)).save_pretrained(folder)
    return folder


def picture(seed: int, size=(24, 16), kind="PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def labels_of(row) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(bytes(row))))


def test_rows_of_label_maps(checkpoint):
    files = [picture(0), picture(1, (9, 30)), b"no picture", picture(2)]
    if features.check("jpg_2000"):  # as `segvit predict` reads files, others too than servers take
        files[1] = picture(1, (9, 30), "JPEG2000")
    label = Labeller(str(checkpoint), "cpu", flip=True)
    found = label({"path": ["a", "b", "c", "d"], "bytes": files})
    nothing = label({"path": [], "bytes": []})
    assert nothing["counts"].shape == (0, 3) and {len(column) for column in nothing.values()} == {0}
    assert {name: column.dtype for name, column in nothing.items()} == {
        name: column.dtype for name, column in found.items()
    }
    assert list(found["width"]) == [24, 9, 0, 24] and list(found["height"]) == [16, 30, 0, 16]
    assert list(found["path"]) == ["a", "b", "c", "d"]
    assert found["error"][2].startswith("not a picture") and found["labels"][2] == b""
    assert not found["counts"][2].any() and found["counts"].sum(1).tolist() == [384, 270, 0, 384]
    model = SegViT.from_pretrained(checkpoint)
    for row in (0, 1, 3):
        image = Image.open(io.BytesIO(files[row])).convert("RGB")
        assert np.array_equal(
            labels_of(found["labels"][row]), model.predict(image, InferenceOptions(flip=True))
        )


def test_a_picture_that_cannot_be_labelled_fails_alone(checkpoint, monkeypatch):
    """Of too much memory, or of a size that an exported file does not take; a mistake of ours ends all."""
    label, predicted = Labeller(str(checkpoint), "cpu"), SegViT.predict
    files = [picture(0), picture(1, (9, 30)), picture(2), picture(3, (40, 40))]
    held: list[weakref.ref] = []

    def predict(self, images, options):
        assert not [tensor for tensor in held if tensor() is not None], "of a picture that failed"
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        if len(images) > 1:
            raise MemoryError
        if images.shape[-1] in wrong:
            raise wrong[images.shape[-1]]
        return predicted(self, images, options)

    monkeypatch.setattr(SegViT, "predict", predict)
    wrong = {9: ValueError("takes 24x16"), 40: RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")}
    found = label({"path": ["a", "b", "c", "d"], "bytes": files})
    assert list(found["width"]) == [24, 0, 24, 0] and found["counts"].sum(1).tolist() == [384, 0, 384, 0]
    assert found["error"][1] == "takes 24x16" and found["error"][3].startswith("not enough memory (2 GiB")
    assert [bool(text) for text in found["error"]] == [False, True, False, True]
    wrong[9] = KeyError("ours")
    with pytest.raises(KeyError, match="ours"):
        label({"path": ["b"], "bytes": files[1:2]})


class Dying(Labeller):
    """One of the workers is killed in the middle, once."""

    def __init__(self, checkpoint: str, flag: str) -> None:
        super().__init__(checkpoint, "cpu")
        self.flag, self.batches = flag, 0

    def __call__(self, batch):
        self.batches += 1
        if self.batches == 2:
            try:
                os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.fixture
def folder(tmp_path):
    """60 pictures, every seventeenth of them damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:03d}.png").write_bytes(picture(number) if number % 17 else b"no picture")
    return folder


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workers_path(monkeypatch):
    """Where workers find this file, the examples and the package."""
    found = [str(Path(__file__).parent), str(EXAMPLES), str(EXAMPLES.parent), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))
    return os.environ["PYTHONPATH"]


def assert_equal_tables(whole, disturbed):
    parquet = pytest.importorskip("pyarrow.parquet")
    tables = []
    for place in (whole, disturbed):
        found = parquet.read_table(place).to_pylist()
        rows = [{**row, "counts": np.array(row["counts"]).tolist()} for row in found]  # a tensor of Ray's
        tables.append(sorted(rows, key=lambda row: row["path"]))
    assert tables[0] == tables[1] and len(tables[0]) == 60
    assert all(sum(row["counts"]) == (0 if row["error"] else 24 * 16) for row in tables[0])
    damaged = [Path(row["path"]).stem for row in tables[0] if row["error"]]
    assert damaged == [f"{number:03d}" for number in range(0, 60, 17)]


@pytest.mark.skipif(not os.environ.get("SEGVIT_RAY"), reason="starts a cluster: SEGVIT_RAY=1, extra ray")
def test_two_workers_of_ray_and_one_is_killed(checkpoint, folder, tmp_path, workers_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": workers_path}})
    try:
        assert example("ray_predict").main(str(folder), str(checkpoint), str(tmp_path / "whole"), 2) == 60
        flag = tmp_path / "killed"
        rows = ray.data.read_binary_files(str(folder), include_paths=True, override_num_blocks=6).map_batches(
            Dying, fn_constructor_args=(str(checkpoint), str(flag)), batch_size=5,
            compute=ray.data.ActorPoolStrategy(size=2),
        )  # fmt: skip
        rows.write_parquet(str(tmp_path / "disturbed"))
    finally:
        ray.shutdown()
    assert flag.exists()
    assert_equal_tables(tmp_path / "whole", tmp_path / "disturbed")


@pytest.mark.skipif(not os.environ.get("SEGVIT_SPARK"), reason="starts Spark: SEGVIT_SPARK=1, pyspark, Java")
def test_two_workers_of_spark_and_one_is_killed(checkpoint, folder, tmp_path, workers_path):
    session = pytest.importorskip("pyspark.sql").SparkSession
    batches = "spark.sql.execution.arrow.maxRecordsPerBatch"
    spark = (
        session.builder.master("local[2,4]").config(batches, 5).getOrCreate()
    )  # a part is tried four times
    main, flag = example("spark_predict").main, tmp_path / "killed"
    try:
        main(str(folder), str(tmp_path / "whole"), functools.partial(Labeller, str(checkpoint), "cpu"))
        main(str(folder), str(tmp_path / "disturbed"), functools.partial(Dying, str(checkpoint), str(flag)))
    finally:
        spark.stop()
    assert flag.exists()
    assert_equal_tables(tmp_path / "whole", tmp_path / "disturbed")
