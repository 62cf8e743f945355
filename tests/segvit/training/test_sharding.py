"""Checkpoints in pieces, and which processes Fabric finds (runs of several: test_kill.py)."""

import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from safetensors import safe_open
from safetensors.torch import save_file

from segvit import SegViT, SegViTConfig
from segvit.config import BackboneConfig
from segvit.options import TrainConfig
from segvit.training.launch import make_fabric
from segvit.training.sharding import load_tensors, save_tensors, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(seed, steps=1):
    torch.manual_seed(seed)
    sizes = {"taps": (0,), "decoder_dim": 8, "decoder_heads": 1, "decoder_depth": 1}
    model = SegViT(
        SegViTConfig(BackboneConfig(width=8, depth=1, heads=1), num_classes=2, image_size=16, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 0.01), fused=True)
    for _ in range(steps):
        output = model(torch.randn(1, 3, 16, 16))
        (output.mask_logits.square().mean() + output.class_logits.square().mean()).backward()
        optimizer.step()
    return model, None, optimizer


@pytest.fixture
def saved(tmp_path):
    run = trained(0)
    save_tensors(tmp_path / "shards", tensors_of(*run))
    return run, tmp_path / "shards"


def test_pieces_hold_weights_and_moments(saved):
    run, folder = saved
    other = trained(1, steps=0)
    load_tensors(folder, *other)
    expected, found = tensors_of(*run), tensors_of(*other)
    assert expected.keys() == found.keys() and "exp_avg_sq.decoder.class_head.bias" in found
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    moments, loaded = run[2].state_dict()["state"], other[2].state_dict()["state"]
    assert moments.keys() == loaded.keys()
    assert all(torch.equal(moments[i][name], loaded[i][name]) for i in moments for name in moments[i])


def halve(path):
    """As where a second process's file is missing."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    name = "weights.decoder.class_tokens"
    assert len(tensors[name]) > 1
    save_file({**tensors, name: tensors[name][:1].clone()}, path, about)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "as another model's"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
        (halve, "decoder.class_tokens is not whole: a file is missing"),
    ],
)
def test_damaged_pieces_are_refused_in_one_line(saved, damage, words):
    _, folder = saved
    damage(next(folder.glob("*.safetensors")))
    with pytest.raises(ValueError, match=words) as error:
        load_tensors(folder, *trained(1, steps=0))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_pieces_of_another_model_are_refused(saved):
    _, folder = saved
    model, _, optimizer = trained(1, steps=0)
    model.decoder.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"without weights\.decoder\.extra"):
        load_tensors(folder, model, None, optimizer)


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "segvit", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "n[1-2]",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("variables", "kind"), [(SLURM, SLURMEnvironment), (TORCHRUN, TorchElasticEnvironment)]
)
def test_processes_of_srun_and_torchrun_are_found(monkeypatch, variables, kind, strategy):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fabric = make_fabric(TrainConfig(data="x", out="y", strategy=strategy, accelerator="cpu"))
    environment = fabric.strategy.cluster_environment
    assert type(environment) is kind and environment.creates_processes_externally
    assert (fabric.strategy.num_processes, fabric.strategy._num_nodes) == (2, 2)
    assert (environment.global_rank(), environment.local_rank(), environment.node_rank()) == (3, 1, 1)


def test_half_precision_with_a_scaler_is_refused_for_pieces(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="precision: fp16 is not for strategy fsdp"):
        make_fabric(TrainConfig(data="x", out="y", strategy="fsdp", precision="fp16"))
