"""Launch settings of routing and forward kernels: a fixed table, no tuning at run time (`docs/kernels.md`: figures)."""

from dataclasses import dataclass

import torch
import triton

from .backward_settings import SHARED_KB, Tile

_LARGEST_STATIONARY_BLOCK = 128  # K and V of one block stay on chip: 64 KB at head_dim 128 in bf16
_ROWS_PER_PROGRAM = 1024  # entries of one bucket that one program of the stationary kernel takes


@dataclass(frozen=True)
class ForwardSettings:
    """Tiles of the kernels.

    stationary: the past-block kernel is the one that keeps K and V on chip; rows_per_program: entries of one bucket a
    program of the past-block kernel takes.
    """

    gate: Tile
    past: Tile
    own: Tile
    stationary: bool
    rows_per_program: int


def forward_settings(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, block_size: int
) -> ForwardSettings:
    """The table: by compute capability, the width of a row, and the block."""
    width = max(16, triton.next_power_of_2(head_dim))
    whole = max(16, triton.next_power_of_2(block_size))
    if dtype == torch.float32:  # plain FMA: small tiles
        gate, past, own = Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)
    elif SHARED_KB.get(capability, 99) < 227:  # sm_80 to sm_89, and consumer Blackwell (sm_120)
        gate = Tile(64, 64, 4, 1) if width <= 128 else Tile(32, 32, 4, 1)
        past = own = Tile(64, 64, 4, 2) if width <= 128 else Tile(32, 32, 4, 1)
    elif width <= 128:  # the fastest of six settings each on an H100, head_dim 128: docs/kernels.md
        gate, own = Tile(64, 64, 4, 1), Tile(128, 32, 4, 2)
        past = Tile(64, 128, 4, 2) if whole <= _LARGEST_STATIONARY_BLOCK else Tile(128, 64, 4, 2)
    else:
        gate, past, own = Tile(64, 32, 4, 1), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)
    stationary = whole <= min(past.keys, _LARGEST_STATIONARY_BLOCK)
    if stationary:
        past = Tile(min(past.rows, 128), whole, past.warps, past.stages)
    return ForwardSettings(gate, past, own, stationary, _ROWS_PER_PROGRAM if stationary else past.rows)
