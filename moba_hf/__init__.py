"""MoBA (Mixture of Block Attention, arXiv 2502.13189) for Hugging Face Transformers.

Importing this package registers the attention implementation "moba".
"""

from .config import MobaConfig, configure
from .integration.cache import MobaCache
from .integration.registration import register
from .ops import engine_status as engines
from .ops import moba_attention, select_blocks

__all__ = ["MobaCache", "MobaConfig", "configure", "engines", "moba_attention", "register", "select_blocks"]
__version__ = "0.1.0"

register()
