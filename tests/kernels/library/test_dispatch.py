"""The dispatcher is left out only where it would do nothing: whoever looks at operators sees ours too."""

from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from segvit_kernels import _library
from segvit_kernels.ops.mask_loss import _mask_loss_fwd
from segvit_kernels.ops.subsample_norm import _subsample_norm_fwd

OPERATOR = torch.ops.segvit.subsample_norm_fwd.default
NAME = "segvit::subsample_norm_fwd"


def call(x, weight=None):
    return _subsample_norm_fwd(x, weight, None, 2, 3, 1, 0, 1e-6, torch.float32, "eager")[0]


def tokens():
    return torch.arange(48.0).view(1, 6, 8).sin()


class Watching:
    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Dispatch(Watching, TorchDispatchMode):
    __torch_dispatch__ = Watching.note


class Function(Watching, TorchFunctionMode):
    __torch_function__ = Watching.note


class Subclass(torch.Tensor):
    """No more than a name; so are Parameter's subclasses."""


class Wrapper(torch.Tensor):
    """Sees every operator on it."""

    seen: ClassVar[list] = []

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        unwrapped = pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return function(*unwrapped[0], **unwrapped[1])


def modes(*kinds):
    def seen():
        for kind in kinds:
            with kind() as mode:
                call(tokens())
            if OPERATOR not in mode.seen:
                return False
        return True

    return seen


def profilers():
    for profile in (torch.profiler.profile, torch.autograd.profiler.profile):
        with profile() as found:
            call(tokens())
        events = found.events() if callable(getattr(found, "events", None)) else found.function_events
        if NAME not in {event.name for event in events}:
            return False
    return True


def graphs():
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(Module(), backend=backend, fullgraph=True)(tokens())
    found.append(make_fx(Module())(tokens()))
    found.append(make_fx(Module(), tracing_mode="fake")(tokens()))
    found.append(torch.export.export(Module(), (tokens(),)).graph_module)
    traced = torch.jit.trace(Module(), (tokens(),)).graph
    return all(OPERATOR in {n.target for n in g.graph.nodes} for g in found) and NAME in str(traced)


class Module(torch.nn.Module):
    def forward(self, x):
        return call(x)


def fakes():
    """Kernels that read memory would find none."""
    with FakeTensorMode() as mode:
        inside = torch.empty(1, 6, 8)
        idle = [_library._dispatcher_is_idle((inside,))]
    idle += [
        _library._dispatcher_is_idle((t,)) for t in (inside, mode.from_tensor(tokens()), tokens().to("meta"))
    ]
    return idle == [False] * 4


def subclasses():
    Wrapper.seen.clear()
    call(Wrapper(tokens()))
    call(tokens(), Wrapper(torch.ones(8)))
    logits = [torch.zeros(1, 3, 2, 2), Wrapper(torch.zeros(1, 3, 2, 2))]
    _mask_loss_fwd(logits, torch.zeros(1, 4, 4, dtype=torch.uint8), None, 3, 0.25, 2.0, False, "eager")
    names = [function.name() for function in Wrapper.seen]
    return (
        names == [NAME, NAME, "segvit::mask_loss_fwd"]
        and type(call(tokens().as_subclass(Subclass))) is Subclass
    )


def transforms():
    seen: ClassVar[list] = []

    def watched(x):
        seen.append(_library._dispatcher_is_idle((x,)))
        return x.sum()

    for transform in (torch.func.vmap, torch.func.grad, torch.func.functionalize):
        transform(watched)(tokens())
    torch.func.jvp(watched, (tokens(),), (tokens(),))
    return seen == [False] * 4


def views():
    """Kernels that read memory would miss the sign, and find none."""
    negative, zero = torch._neg_view(tokens()), torch._efficientzerotensor((1, 6, 8))
    return not any(_library._dispatcher_is_idle(args) for args in ((negative,), (zero,), ([tokens(), zero],)))


LOOKING = {
    "dispatch mode": modes(Dispatch),
    "function mode": modes(Function),
    "profilers": profilers,
    "graphs": graphs,
    "fakes": fakes,
    "subclasses": subclasses,
    "transforms": transforms,
    "views": views,
}


@pytest.mark.parametrize("who", LOOKING)
def test_whoever_looks_sees_our_operators(who, monkeypatch):
    assert LOOKING[who]()
    # The planted bug.
    monkeypatch.setattr(_library, "_dispatcher_is_idle", lambda args: True)
    try:
        seen = LOOKING[who]()
    except Exception:
        seen = False
    assert not seen


@pytest.fixture
def dispatched(monkeypatch):
    """Calls that took the dispatcher so far."""
    calls, ours = [], type(OPERATOR).__call__

    def counted(self, /, *args, **kwargs):
        calls.append(self)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(type(OPERATOR), "__call__", counted)
    return calls


def test_nobody_looks(dispatched, poisoned):
    """Nor do autograd, autocast, no_grad or filled memory: nothing of the dispatcher is theirs here."""
    expected = torch.nn.functional.layer_norm(tokens(), (8,), eps=1e-6)
    leaf = torch.nn.Parameter(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        found = [call(leaf), call(tokens())]
    with torch.inference_mode():
        found += [call(tokens()), call(tokens(), torch.ones(8))]
    assert OPERATOR not in dispatched
    assert all(torch.allclose(f, expected, atol=1e-6) for f in found)
