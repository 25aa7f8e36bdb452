"""Pure tensor operators of MoBA: packed tensors in, packed tensors out. Knows nothing of Transformers."""

from .engines import status as engine_status
from .operator import dense_attention, moba_attention, select_blocks

__all__ = ["dense_attention", "engine_status", "moba_attention", "select_blocks"]
