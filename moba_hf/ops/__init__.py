"""Pure tensor operators of MoBA: packed tensors in, packed tensors out. Knows nothing of Transformers."""

from .decode import cached_attention
from .engines import status as engine_status
from .operator import dense_attention, moba_attention, select_blocks
from .routing import block_means

__all__ = ["block_means", "cached_attention", "dense_attention", "engine_status", "moba_attention", "select_blocks"]
