"""Names that a package offers without importing them: the module behind a name is imported when the name is used.

Owns one function; knows nothing of cells. It keeps `import perturbgene` and every help page free of torch.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that finds names elsewhere.

    Args:
        places: Name -> `module:attribute`.

    Example:
        >>> lazily({"root": "math:sqrt"})("root")(9.0)
        3.0
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 - what Python calls it
        if name not in places:
            raise AttributeError(f"module 'perturbgene' has no attribute {name!r}")
        module, _, attribute = places[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    return __getattr__
