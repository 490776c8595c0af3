"""prism_ray makes training sets out of models: dataset distillation and data-free distillation on Ray.

The Python API has five names, see `prism_ray.api`: `load_config`, `run`, `load_teacher`, `synthesize_batch` and
`load_images`. They are imported when first used, so that `import prism_ray` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_ray.api import load_config, load_images, load_teacher, run, synthesize_batch

__version__ = "0.1.0"
__all__ = ["load_config", "load_images", "load_teacher", "run", "synthesize_batch"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("prism_ray.api"), name)
    raise AttributeError(f"module 'prism_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
