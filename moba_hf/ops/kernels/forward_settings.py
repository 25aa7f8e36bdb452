"""Launch settings of routing and forward kernels: a fixed table (`docs/kernels.md`), or tiles the user measured."""

from dataclasses import dataclass

import torch

from .backward_settings import SHARED_KB
from .primitives import padded
from .tuned_tiles import Tile, tuned_tiles

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
    """The table, but for the tiles of the user's own file (`tuned_tiles`)."""
    tiles = table(capability, dtype, head_dim, block_size)
    return with_tiles(tiles | tuned_tiles("forward", capability, dtype, head_dim, block_size), block_size)


def table(capability, dtype, head_dim: int, block_size: int) -> dict[str, Tile]:
    """Tiles by compute capability, the width of a row, and the block."""
    width = padded(head_dim)
    if dtype == torch.float32:  # plain FMA: the largest tiles that spill nothing on sm_90
        gate, own = Tile(32, 32, 4, 1), Tile(32, 32, 8, 1) if width <= 64 else Tile(16, 16, 8, 1)
        past = {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 16, 1)}.get(max(width, 64), own)
    elif SHARED_KB.get(capability, 99) < 227:  # sm_80 to sm_89, and consumer Blackwell (sm_120)
        gate = Tile(64, 64, 4, 1) if width <= 128 else Tile(32, 32, 4, 1)
        past = own = Tile(64, 64, 4, 2) if width <= 128 else Tile(32, 32, 4, 1)
    elif width <= 128:  # the fastest of six and more settings each on an H100: docs/kernels.md
        gate, own = Tile(64, 64 if width > 64 else 32, 4, 1), Tile(64, 64, 4, 3)
        if block_size <= _LARGEST_STATIONARY_BLOCK:
            past = Tile(64, 128, 4, 3 if width > 64 else 5)
        else:
            past = Tile(64, 64, 4, 3)
            if width > 64:
                past = Tile(128, 64, 8, 3) if block_size >= 2048 else Tile(128, 32, 4, 4)
    else:
        gate, past, own = Tile(64, 32, 4, 1), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)
    return {"gate": gate, "past": past, "own": own}


def with_tiles(tiles: dict[str, Tile], block_size: int) -> ForwardSettings:
    """Settings of these tiles, by the kernels' names: K and V stay on chip where a tile of keys holds a block."""
    past, whole = tiles["past"], padded(block_size)
    stationary = whole <= min(past.keys, _LARGEST_STATIONARY_BLOCK)
    if stationary:
        past = Tile(min(past.rows, 128), whole, past.warps, past.stages)
    rows = _ROWS_PER_PROGRAM if stationary else past.rows
    return ForwardSettings(tiles["gate"], past, tiles["own"], stationary, rows)
