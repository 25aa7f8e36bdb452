"""Launch settings of the backward kernels: a fixed table, or tiles that the user has measured (`tuned_tiles`).

What bounds a tile, on 8 warps with head_dim 128 (`docs/kernels.md` has the compiled figures): dK and dV of 128 keys
take 128 of a thread's 255 registers, scores and their gradient for 64 rows another 64. Shared memory holds K and V of
the tile, and Q and dO once per stage: 227 KB on sm_90 and sm_100, 163 KB on sm_80, 99 KB on sm_86 and sm_89.
"""

from dataclasses import dataclass

import torch

from .primitives import padded
from .tuned_tiles import ROLES, Tile, tuned_tiles

SHARED_KB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LARGEST_FUSED_BLOCK = 128  # beyond it, one tile of keys no longer is a block, and dQ has a kernel of its own
_ROWS_PER_PROGRAM = 4096  # an attention sink sends every row to one block: the bucket is split over programs


@dataclass(frozen=True)
class BackwardSettings:
    """Tiles of the four kernels.

    fused: past blocks are one tile of keys each, whose owner makes the partial dQ as well; `past_queries` is not run.
    rows_per_program: entries of one bucket that one program of `past_keys` takes.
    """

    own_keys: Tile
    own_queries: Tile
    past_keys: Tile
    past_queries: Tile
    fused: bool
    rows_per_program: int = _ROWS_PER_PROGRAM


def backward_settings(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, block_size: int
) -> BackwardSettings:
    """The table, but for the tiles of the user's own file."""
    tiles = table(capability, dtype, head_dim, block_size)
    return with_tiles(tiles | tuned_tiles("backward", capability, dtype, head_dim, block_size), block_size)


def table(capability, dtype, head_dim: int, block_size: int) -> dict[str, Tile]:
    """Tiles by what a GPU of this compute capability can hold on chip, the width of a row, and the block."""
    width = padded(head_dim)
    row_bytes = width * dtype.itemsize
    shared = SHARED_KB.get(capability, 99)
    if dtype == torch.float32:  # plain FMA in float32: the largest tiles that spill nothing on sm_90
        tile = Tile(32, 32, 8, 1) if width <= 64 else Tile(16, 16, 8, 1)
        return _tiles(tile, tile, tile if width != 128 else Tile(32, 32, 16, 1), tile)
    if shared < 227:
        return _ampere(row_bytes, shared)
    # the fastest of six and more settings each on an H100 (docs/kernels.md), smaller where tensor memory is the limit
    fused, blackwell = block_size <= _LARGEST_FUSED_BLOCK, capability[0] > 9
    if width <= 64:
        past_keys = Tile(128, 128, 8, 5) if fused and not blackwell else Tile(64, 128, 8, 5)
        if block_size <= 64:
            past_keys = Tile(64, 64, 4, 5)
        return _tiles(Tile(32, 64, 4, 3), Tile(64, 64, 4, 2), past_keys, Tile(64, 64, 4, 2))
    if width <= 128:
        past_keys = Tile(64, 64, 8, 2) if fused and blackwell else Tile(64, 128, 8, 5)
        return _tiles(Tile(32, 64, 4, 3), Tile(64, 64, 4, 2), past_keys, Tile(128, 32, 8, 3))
    stages = 1 if block_size <= 64 else 3  # there dQ takes the shared memory of the stages
    past_keys = Tile(32 if blackwell else 64, 64, 8, stages)
    return _tiles(Tile(32, 64, 8, 3), Tile(32, 32, 4, 2), past_keys, Tile(64, 16, 4, 3))


def _ampere(row_bytes: int, shared: int) -> dict[str, Tile]:
    """mma.sync holds its operands in registers as well: half the keys of a Hopper tile, at most one stage of loads."""
    if row_bytes <= 128:
        keys, queries = Tile(32, 64, 4, 1), Tile(32, 64, 4, 2)  # 64 rows: 32 registers and 900 spilled on sm_80
    elif row_bytes <= 256:
        keys, queries = Tile(32, 64, 8, 2 if shared > 99 else 1), Tile(64, 32, 4, 2)
    else:
        keys, queries = Tile(16, 32, 8, 1), Tile(32, 16, 4, 1)
    return _tiles(keys, queries, keys, queries)


def _tiles(*tiles: Tile) -> dict[str, Tile]:
    return dict(zip(ROLES["backward"], tiles, strict=True))


def with_tiles(tiles: dict[str, Tile], block_size: int) -> BackwardSettings:
    """Settings of these tiles, by the kernels' names.

    Small blocks take no more keys than they have, and are fused where a tile of keys holds one.
    """
    past_keys = tiles["past_keys"]
    whole = padded(block_size)
    fused = block_size <= _LARGEST_FUSED_BLOCK and whole <= past_keys.keys
    if fused:
        past_keys = Tile(past_keys.rows, whole, past_keys.warps, past_keys.stages)
    return BackwardSettings(**tiles | {"past_keys": past_keys}, fused=fused)
