"""The package in the Kernel Hub's form, loaded by `kernels` in a process without this source tree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import hub
import pytest

from segvit_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
kernels = pytest.importorskip("kernels", reason="kernels is not installed")
pytest.importorskip("ziglang", reason="hub: pip install 'segvit-kernels[wheels]'")
pytest.importorskip("elftools", reason="hub: pip install 'segvit-kernels[wheels]'")

USE = """
import pathlib, sys, torch, kernels

folder = pathlib.Path("hub")
segvit = kernels.get_local_kernel(folder, backend="cpu")
assert segvit._native.library().isa == sys.argv[1]  # the code of this processor
assert not [name for name in sys.modules if name == "segvit_kernels" or name.startswith("segvit_kernels.")]
q = torch.randn(2, 5, 3, 16, requires_grad=True)
truth = segvit.atm_reference(*[q.double()] * 3)
for backend in ("cpu", "eager"):
    output, masks = segvit.fused_atm(q, q, q, backend=backend)
    torch.testing.assert_close(masks.double(), truth.mask_logits, rtol=1e-5, atol=1e-5)
    output.sum().backward()
with segvit.record_backends() as taken:
    segvit.semantic_argmax(torch.randn(1, 5, 8, 8), torch.rand(1, 5, 4), (16, 16))
assert taken == {"semantic_argmax": {"cpu"}}, taken

from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

repository = lambda layer: LocalLayerRepository(repo_path=folder, layer_name=layer)
mapping = segvit.layers.mapping(repository, devices=["cpu"])


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.attn_drop, self.proj_drop = 2, 0.0, torch.nn.Identity()
        self.q, self.k, self.v, self.proj = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, query, features, value=None, previous=None, need_masks=True, padding=None):
        heads = [x.unflatten(-1, (2, -1)) for x in (self.q(query), self.k(features), self.v(features))]
        output, masks = segvit.atm_reference(*heads)
        return self.proj(output.flatten(-2)), masks


replace_kernel_forward_from_hub(Attention, "FusedATM")
model, x = Attention(), torch.randn(1, 6, 8)
expected = model(x, x)
for mode in (Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE):
    with use_kernel_mapping(mapping), segvit.record_backends() as taken:
        found = kernelize(model, mode=mode, device="cpu")(x, x)
    assert taken == {"atm_fwd": {"cpu"}}, taken
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])

try:
    import transformers
except ModuleNotFoundError:
    print("no transformers")
    sys.exit()
from transformers.models.eomt import modeling_eomt as eomt
from transformers.models.mask2former import modeling_mask2former as mask2former

for name, module, config in (
    ("Mask2Former", mask2former, transformers.Mask2FormerConfig(num_labels=3)),
    ("Eomt", eomt, transformers.EomtConfig(num_labels=3)),
):
    loss = getattr(module, f"{name}Loss")
    for kind in (loss, getattr(module, f"{name}HungarianMatcher")):
        replace_kernel_forward_from_hub(kind, kind.__name__)
    weights = {"loss_cross_entropy": 1.0, "loss_mask": 1.0, "loss_dice": 1.0}
    criterion = loss(config=config, weight_dict=weights)
    masks, classes = torch.randn(1, 6, 8, 8, requires_grad=True), torch.randn(1, 6, 4)
    labels = [(torch.rand(2, 32, 32) > 0.5).float()], [torch.tensor([0, 2])]
    with use_kernel_mapping(mapping), segvit.record_backends() as taken:
        criterion = kernelize(criterion, mode=Mode.TRAINING, device="cpu")
        losses = criterion(masks, classes, *labels)
    assert set(taken) == {"mask_loss_fwd", "mask_matching_sums"}, taken
    # Over all pixels: what the original estimates from points.
    (query,), (target,) = zip(*criterion.matcher(masks, classes, *labels))
    full = torch.nn.functional.interpolate(masks, (32, 32), mode="bilinear")[0, query]
    bce = torch.nn.functional.binary_cross_entropy_with_logits(full, labels[0][0][target], reduction="none")
    torch.testing.assert_close(losses["loss_mask"], bce.mean((1, 2)).sum() / 2, rtol=1e-5, atol=1e-5)
    sum(losses.values()).backward()
    assert masks.grad.isfinite().all()
print("well")
"""

# `kernels benchmark`, for a CPU: of itself it takes the device that torch was built for. Small, once.
BENCHMARKS = """
import functools, pathlib, kernels
from kernels.backends import CPU
from kernels.cli import benchmark

folder = pathlib.Path("hub").resolve()
benchmark._backend = CPU
kernels.get_local_kernel = functools.partial(kernels.get_local_kernel, backend="cpu")
found = {}
(script,) = benchmark.discover_benchmark_scripts("hub", folder)
for kind in benchmark.discover_benchmark_classes(script, folder):
    kind.image, kind.queries, kind.grid, kind.side = 64, 21, 8, 8 if hasattr(kind, "heads") else 32
    results, commit = benchmark.run_benchmark_class(kind, 1, 0, str(folder), True, "local")
    found |= results
assert all(row.verified for row in found.values()), found
print(*sorted(found))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Sources are compiled by `make native` before; what names the operators is compiled here."""
    if _native.library().reason is not None:
        pytest.skip(f"backend cpu: {_native.library().reason}")
    folder = tmp_path_factory.mktemp("repository") / "hub"
    hub.build(folder, _native.library().cuda_archs)
    return folder


def test_what_kernels_asks_of_a_repository(repository):
    from kernels._rust import Build, Metadata

    assert Build.open(repository).general is not None
    variants = sorted(path.name for path in (repository / "build").iterdir())
    assert variants[-1] == "torch-universal" and variants[0].startswith("torch-stable-abi211-cpu-")
    for variant in (repository / "build").iterdir():
        about = Metadata.read_from_file(variant / "metadata.json")
        assert about.id == f"_{hub.namespace()}" and about.name.python_name == "segvit_kernels"
        assert (variant / "libsegvit_native.so").exists() == (variant.name != "torch-universal")
        assert not list(variant.rglob("testing")) and (variant / "triton" / "configs").is_dir()


def run(script, repository, *arguments):
    """The words that a process without the source tree prints, beside the repository."""
    unset = ("PYTHONPATH", "SEGVIT_KERNELS_LIBRARY", "SEGVIT_KERNELS_BACKEND", "TRITON_INTERPRET")
    variables = {k: v for k, v in os.environ.items() if k not in unset} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        cwd=repository.parent,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


def test_loads_and_runs_without_the_source_tree(repository):
    assert run(USE, repository, _native.library().isa)[-1] in ("well", "transformers")


def test_its_benchmarks_verify_and_run(repository):
    assert run(BENCHMARKS, repository) == [
        "best_classes",
        "fused_atm",
        "mask_binarize",
        "mask_loss",
        "semantic_argmax",
    ]


def test_an_import_that_stays_absolute_is_refused():
    assert hub.relative("from segvit_kernels.ops.atm import a\n", 1) == "from ..ops.atm import a\n"
    assert hub.relative("    from segvit_kernels import _native\n", 0) == "    from . import _native\n"
    with pytest.raises(RuntimeError, match=re.escape("cannot be made relative: import segvit_kernels")):
        hub.relative("x = 1\nimport segvit_kernels.ops\n", 0)
