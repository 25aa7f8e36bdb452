"""MoBA (Mixture of Block Attention, arXiv 2502.13189) for Hugging Face Transformers.

Importing this package registers the attention implementation "moba". What needs PyTorch is imported when it is asked
for, as Transformers does it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .config import MobaConfig, configure
from .integration.registration import register

if TYPE_CHECKING:
    from .integration.cache import MobaCache
    from .ops import engine_status as engines
    from .ops import moba_attention, select_blocks

__all__ = ["MobaCache", "MobaConfig", "configure", "engines", "moba_attention", "register", "select_blocks"]
__version__ = "0.1.0"

_LATER = {
    "MobaCache": (".integration.cache", "MobaCache"),
    "engines": (".ops", "engine_status"),
    "moba_attention": (".ops", "moba_attention"),
    "select_blocks": (".ops", "select_blocks"),
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name]
    return globals().setdefault(name, getattr(import_module(module, __name__), attribute))


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


register()
