"""Optional dependencies: import them where they are used, and name the extra that brings them."""

from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import and return `module`; if it is not installed, say in one line which extra brings it.

    Raises:
        ImportError: `module` is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed; it comes with: pip install 'segvit-kernels[{extra}]'"
        ) from None
