"""Triton's interpreter without work that changes nothing: its tests take a third of the time.

At each call of a function in a kernel it looks through all of triton.language for what to replace, and it
makes type, shape and size of every tensor anew. Here the first is done once a launch, the others once.
"""

import dataclasses
import functools
import math
import types
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """For this process; a second call changes nothing."""
    if hasattr(interpreter._patch_lang, "plain"):
        return
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        # Overflows of integers are computed, then dropped where assertions are off.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _by_element(interpreter._get_np_dtype)
    tl.tensor.__init__ = _init_tensor
    tl.block_type.__init__ = _interned(tl.block_type.__init__)


def _patched_once(plain: Any) -> Any:
    """All that functions of kernels see is replaced where a launch begins; within it nothing is left."""
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    active = False

    def patch(fn: Any) -> Any:
        nonlocal active
        if active:
            return interpreter._LangPatchScope()
        scope = plain(everything)
        restore, active = scope.restore, True

        def leave() -> None:
            nonlocal active
            active = False
            restore()

        scope.restore = leave
        return scope

    patch.plain = plain
    return patch


def _by_element(plain: Any) -> Any:
    cached = functools.cache(plain)

    def dtype(of: Any) -> Any:
        if isinstance(of, tl.block_type):
            of = of.element_ty
        return plain(of) if isinstance(of, tl.pointer_type) else cached(of)

    return dtype


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Size and shape as a tensor holds them."""
    return tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(length) for length in sizes])


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shape(tuple(type.shape) if type.is_block() else ())


def _interned(plain: Any) -> Any:
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = type(element_ty), element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if type(element_ty) is not tl.dtype:
            plain(self, element_ty, shape)
        elif key in known:
            self.__dict__.update(known[key])
        else:
            plain(self, element_ty, shape)
            known[key] = dict(self.__dict__)

    return init
