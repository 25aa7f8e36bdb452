"""How the flash engine's work is cut up: all blocks of a batch, ranges of tokens, tiles of blocks, and their sizes.

A *piece* is one KV head and one range of tokens. Its past stream is attended in *tiles*: runs of whole blocks, a single
one unless the backward's key gradients would fill the workspace. Tiles cut what is held for each key (the kernels'
gradients, their sums in float32) as ranges cut what is held for each query.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import flash_providers
from .flash_providers import Segments

_MOST_SEGMENTS = 65535  # the kernels put the segments on the second axis of a CUDA grid
_TILE = 128  # rows that FlashAttention-2 gives a thread block


# ---- what attends what ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """All blocks of the batch, complete or not, in the order of their keys. No host sync; shapes from shapes.

    cu_queries, cu_keys: int32 [blocks + 1]; block i holds the keys cu_keys[i]:cu_keys[i+1] and is the own block of the
        queries cu_queries[i]:cu_queries[i+1]. `blocks` is the most there can be; the surplus is empty.
    first_block: int32 [total_q], number of the first block of the query's sequence; `blocks` for rows of no sequence.
    key_end: int32 [total_q], the row after the query's own key; the end of all keys for rows of no sequence.
    outside: bool [total_q], rows of no sequence.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    first_block: torch.Tensor
    key_end: torch.Tensor
    outside: torch.Tensor
    longest: int

    @classmethod
    def build(cls, cu_seqlens_q, cu_seqlens_k, total_q: int, total_k: int, block_size: int) -> "Blocks":
        device, sequences = cu_seqlens_q.device, cu_seqlens_q.shape[0] - 1
        q_start, k_start, k_end = cu_seqlens_q[:-1], cu_seqlens_k[:-1], cu_seqlens_k[1:]
        offset = (k_end - k_start) - (cu_seqlens_q[1:] - q_start)
        last_block = ((k_end - k_start + block_size - 1) // block_size).cumsum(0, dtype=torch.int32)
        first_block = torch.cat([last_block.new_zeros(1), last_block[:-1]])

        blocks = total_k // block_size + sequences
        block = torch.arange(blocks, dtype=torch.int32, device=device)
        owner = torch.searchsorted(last_block, block, right=True)
        used = owner < sequences
        owner = owner.clamp(max=sequences - 1)
        begin = (block - first_block[owner]) * block_size
        queries = torch.where(used, q_start[owner] + (begin - offset[owner]).clamp(min=0), cu_seqlens_q[-1])
        keys = torch.where(used, k_start[owner] + begin, cu_seqlens_k[-1])

        row = torch.arange(total_q, dtype=torch.int32, device=device)
        sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True)
        outside = sequence == sequences
        sequence = sequence.clamp(max=sequences - 1)
        own_key_end = k_start[sequence] + row - q_start[sequence] + offset[sequence] + 1
        return cls(
            cu_queries=torch.cat([queries, cu_seqlens_q[-1:]]),
            cu_keys=torch.cat([keys, cu_seqlens_k[-1:]]),
            first_block=torch.where(outside, blocks, first_block[sequence]).int(),
            key_end=torch.where(outside, cu_seqlens_k[-1], own_key_end).int(),
            outside=outside,
            longest=max(2, min(block_size, total_k)),
        )

    @property
    def count(self) -> int:
        return self.cu_keys.shape[0] - 1

    def own(self) -> Segments:
        """Every query with its own block."""
        return Segments(self.cu_queries, self.cu_keys, self.longest, self.longest, causal=True)

    def own_of(self, tokens: slice, keys: slice, most: int) -> Segments:
        """The same for a range of tokens, over a range of keys that holds all of their own blocks, at most `most`.

        A block's queries are its last keys, and the mask is aligned to that; where the range ends inside a block, the
        block must therefore end with the key of the range's last query.
        """
        cu_queries, cu_keys = self.cu_queries, self.cu_keys
        if most < self.count:  # the kernels pad each segment, those without queries too
            first = torch.searchsorted(cu_keys, keys.start, right=True) - 1
            nearby = (first + torch.arange(most + 1, device=first.device)).clamp_(max=self.count)
            cu_queries, cu_keys = cu_queries[nearby], cu_keys[nearby]
        cu_queries = cu_queries.clamp(tokens.start, tokens.stop) - tokens.start
        cu_keys = torch.minimum(cu_keys, self.key_end[tokens.stop - 1]).clamp(min=keys.start) - keys.start
        return Segments(cu_queries, cu_keys, self.longest, self.longest, causal=True)


@dataclass(frozen=True)
class Tile:
    """A run of blocks, its keys, and the piece's entries that list one of them, in the order of PastRows.

    max_rows bounds the rows that select one block.
    """

    blocks: slice
    keys: slice
    entries: slice
    max_rows: int


@dataclass(frozen=True)
class Piece:
    """One KV head and one range of tokens; the tiles of its past stream that any row selects.

    own_keys holds the own blocks of the tokens, `own_blocks` at most. finished: the keys that no earlier range attends
    and every later one is done with.
    """

    kv_head: slice
    heads: slice
    tokens: slice
    own_keys: slice
    own_blocks: int
    finished: slice
    tiles: list[Tile]


@dataclass(frozen=True)
class PastRows:
    """A piece's entries (row, slot) ordered by the block selected; a row is a token and a head of the group.

    row: int64 [entries], the row of each entry in this order; those that name no block come last, in no segment.
    listed: bool [rows, slots], whether the entry names a block. place: int64 [rows, slots], where it went; 0 if not.
    cu_rows, cu_keys: int32 [blocks + 1], the entries and the keys of each block.
    """

    row: torch.Tensor
    place: torch.Tensor
    listed: torch.Tensor
    cu_rows: torch.Tensor
    cu_keys: torch.Tensor
    longest: int

    def segments(self, tile: Tile) -> Segments:
        bounds = slice(tile.blocks.start, tile.blocks.stop + 1)
        cu_rows = self.cu_rows[bounds] - tile.entries.start
        cu_keys = self.cu_keys[bounds].clamp(max=tile.keys.stop) - tile.keys.start
        return Segments(cu_rows, cu_keys, tile.max_rows, self.longest, causal=False)

    def take(self, entries: torch.Tensor, slot: int) -> torch.Tensor:
        """[entries, 1, head_dim] in block order → [rows, head_dim] of one slot; 0 where it names no block."""
        taken = entries[:, 0].index_select(0, self.place[:, slot])
        return taken.masked_fill_(~self.listed[:, slot, None], 0)


@dataclass(frozen=True)
class Work:
    """How one forward or backward is cut up.

    ahead: a bound on how much later a query's own key comes in the packed key than the query in the packed query.
    tile_blocks: blocks in a tile. key_bounds: the first key of each tile, then the end of all.
    """

    provider: flash_providers.Provider
    blocks: Blocks
    selected_blocks: torch.Tensor
    total_k: int
    kv_heads: int
    sequences: int
    block_size: int
    scale: float
    ahead: int
    ranges: list[slice]
    tile_blocks: int
    key_bounds: list[int]
    rows: list[list[list[tuple[int, int]]]]  # [range][kv_head][tile]: see _rows

    @classmethod
    def plan(
        cls, query, key, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale, backward: bool
    ) -> "Work | None":
        """None where there is nothing to attend."""
        total_q, total_k, kv_heads = query.shape[0], *key.shape[:2]
        if total_q == 0 or total_k == 0:
            return None
        if scale <= 0:  # their running maximum is that of the unscaled scores
            raise ValueError(f"engine='flash' takes a scale above 0, as its kernels do, but was given {scale}")
        provider = flash_providers.choose(query.device.type, query.dtype, query.shape[2])
        blocks = Blocks.build(cu_seqlens_q, cu_seqlens_k, total_q, total_k, block_size)
        if blocks.count > _MOST_SEGMENTS:
            raise ValueError(
                f"engine='flash' takes at most {_MOST_SEGMENTS} blocks in a batch, but there can be {blocks.count} of "
                f"{block_size} tokens in {total_k}; use larger blocks or another engine"
            )
        sequences, slots = cu_seqlens_q.shape[0] - 1, selected_blocks.shape[2]
        ahead = _keys_ahead(cu_seqlens_q, cu_seqlens_k, total_k) if backward else total_k
        if backward:
            step, tile_blocks = _backward_sizes(query, key, slots, blocks.count, sequences, block_size, ahead)
        else:
            step, tile_blocks = _forward_tokens(query, key, slots), blocks.count
        ranges = [slice(start, min(start + step, total_q)) for start in range(0, total_q, step)]
        key_bounds = [0, total_k] if tile_blocks == blocks.count else _key_bounds(blocks, tile_blocks)
        rows = _rows(provider, blocks, selected_blocks, kv_heads, ranges, tile_blocks)
        return cls(
            provider, blocks, selected_blocks, total_k, kv_heads, sequences, block_size, scale, ahead, ranges,
            tile_blocks, key_bounds, rows,
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.selected_blocks.shape[1] // self.kv_heads

    @property
    def slots(self) -> int:
        return self.selected_blocks.shape[2]

    @property
    def tiled(self) -> bool:
        return self.tile_blocks < self.blocks.count

    @property
    def spare_heads(self) -> int:
        """How many heads' dQ rows (two are wanted at most) stay unused until the keys of their numbers are finished.

        Ranges come last to first, so that holds where the key of each query has its number: where `ahead` is 0.
        """
        return min(2, self.group) if self.ahead == 0 else 0

    def pieces(self) -> Iterator[Piece]:
        """All pieces, last tokens first in each KV head."""
        return itertools.chain.from_iterable(self.pieces_of(kv_head) for kv_head in range(self.kv_heads))

    def pieces_of(self, kv_head: int) -> Iterator[Piece]:
        one, heads = slice(kv_head, kv_head + 1), slice(kv_head * self.group, (kv_head + 1) * self.group)
        for tokens, rows in zip(reversed(self.ranges), reversed(self.rows)):
            key_end = min(self.total_k, tokens.stop + self.ahead)  # of every key that these tokens attend
            own_keys = slice(min(key_end, max(0, tokens.start - self.block_size + 1)), key_end)
            if own_keys.start == own_keys.stop:
                continue  # rows of no sequence, far past the last one
            own_blocks = _most_blocks(own_keys.stop - own_keys.start, self.block_size, self.sequences)
            finished = slice(min(key_end, tokens.start + self.ahead) if tokens.start else 0, key_end)
            yield Piece(one, heads, tokens, own_keys, own_blocks, finished, self._tiles(rows[kv_head], key_end))

    def _tiles(self, rows: list[tuple[int, int]], key_end: int) -> list[Tile]:
        tiles, entry = [], 0
        for i, (count, max_rows) in enumerate(rows):
            if count:
                blocks = slice(i * self.tile_blocks, min((i + 1) * self.tile_blocks, self.blocks.count))
                keys = slice(self.key_bounds[i], min(self.key_bounds[i + 1], key_end))
                tiles.append(Tile(blocks, keys, slice(entry, entry + count), max_rows))
                entry += count
        return tiles

    def own_segments(self, piece: Piece) -> Segments:
        return self.blocks.own_of(piece.tokens, piece.own_keys, piece.own_blocks)

    def order_by_block(self, piece: Piece) -> PastRows:
        """Step 2: a stable sort of the piece's entries by block."""
        entry = _entry_blocks(self.blocks, self.selected_blocks, piece.tokens, piece.heads)
        listed = (entry < self.blocks.count).view(-1, self.slots)
        in_order, order = entry.flatten().sort(stable=True)
        bounds = torch.arange(self.blocks.count + 1, dtype=torch.int32, device=entry.device)
        cu_rows = torch.searchsorted(in_order, bounds, out_int32=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        place = place.view_as(listed).masked_fill_(~listed, 0)
        return PastRows(order // self.slots, place, listed, cu_rows, self.blocks.cu_keys, self.blocks.longest)


def _entry_blocks(blocks: Blocks, selected_blocks, tokens: slice, heads: slice) -> torch.Tensor:
    """int32 [tokens, heads, slots]: the number of the block selected, `blocks.count` where there is none."""
    selected = selected_blocks[tokens, heads]
    entry = selected + blocks.first_block[tokens, None, None]
    return entry.masked_fill_(selected < 0, blocks.count).clamp_(max=blocks.count)


# ---- sizes ---------------------------------------------------------------------------------------------------------

_SORT = 64  # bytes of an entry: keys, order, rows, places and the sort's own buffers
_LAYOUT = 9  # bytes of a token: first_block, key_end, outside


def _budget() -> int:
    return int(os.environ.get("MOBA_HF_WORKSPACE_MB", "1024")) << 20


def _wide(dtype: torch.dtype) -> int:
    return torch.promote_types(dtype, torch.float32).itemsize


def _forward_tokens(query, key, slots: int) -> int:
    """How many tokens of one KV head's group fit in the workspace: see the bytes counted here."""
    group, width, item = query.shape[1] // key.shape[1], query.shape[2], query.element_size()
    entry = 2 * item * width + _SORT  # query, partial output
    row = (2 * item + 3 * _wide(query.dtype)) * width
    return max(_TILE, _budget() // (group * (slots * entry + row)))


def _backward_sizes(query, key, slots: int, blocks: int, sequences: int, block_size: int, ahead: int):
    """(tokens of a range, blocks of a tile) that fit in the workspace together: see the bytes counted here.

    The own stream and the past stream take turns. Float32 sums over all keys and key gradients of one call may take
    half of the workspace; where they do not fit, a tile takes a quarter: the traffic over the keys falls with longer
    ranges, and a tile need only outlast its launches.
    """
    group, width, item, wide = query.shape[1] // key.shape[1], query.shape[2], query.element_size(), _wide(query.dtype)
    total_q, total_k, budget = query.shape[0], key.shape[0], _budget()
    pad = wide * width * _TILE  # of each segment and head: dQ sums of FlashAttention-2
    own_row = (4 * item + 3 * wide) * width  # gradient, dQ, both with what the layout may copy; dQ in float32, its sums
    own_key = (2 * (group + 1) * item + wide) * width  # key gradients for each head of the group, then of all; one sum
    own_block = (group + 2) * pad  # FlashAttention-3 pads its sums of dK and dV as well
    own_rest = min(total_k, block_size + ahead) * own_key
    own_rest += min(blocks, _most_blocks(block_size + ahead, block_size, sequences)) * own_block
    entry = (4 * item + wide) * width + _SORT  # query, output and their gradients; FlashAttention-2's dQ sums
    past_row = (item + wide) * width  # dQ and what one slot adds to it
    past_key = (2 * item + wide) * width  # key gradients, one sum
    token = max(group * own_row + own_key + own_block // block_size, group * (slots * entry + past_row))

    sums = 2 * wide * width * total_k if item < wide else 0
    fixed, tile = sums + max(own_rest, total_k * past_key + blocks * pad), blocks
    if 2 * fixed > budget and not _capturing(query):
        tile = min(blocks, max(1, budget // 4 // (block_size * past_key + pad)))
        halves = 2 * item * width * total_k if ahead and item < wide else 0  # of the last KV head
        fixed = halves + max(own_rest, tile * (block_size * past_key + pad))
    return max(_TILE, max(budget - fixed - _LAYOUT * total_q, budget // 4) // token), tile


def _most_blocks(keys: int, block_size: int, sequences: int) -> int:
    """The most blocks that so many successive keys can touch."""
    return keys // block_size + sequences + 1


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _keys_ahead(cu_seqlens_q, cu_seqlens_k, total_k: int) -> int:
    return total_k if _capturing(cu_seqlens_q) else int(cu_seqlens_k[-1] - cu_seqlens_q[-1])


def _key_bounds(blocks: Blocks, tile_blocks: int) -> list[int]:
    """The first key of each tile, then the end of all keys."""
    return torch.cat([blocks.cu_keys[:-1:tile_blocks], blocks.cu_keys[-1:]]).tolist()


def _rows(provider, blocks: Blocks, selected_blocks, kv_heads: int, ranges: list[slice], tile_blocks: int):
    """[range][kv_head][tile]: (entries that list a block of the tile, a bound on those that list one block).

    Measured where there are tiles, or where that pays. A row selects a block at most once, so tokens · group bounds the
    second: an attention sink reaches that. Kernels that launch ceil(bound / 128) thread blocks for every block would
    then start far more empty ones than the work needs.
    """
    group, slots = selected_blocks.shape[1] // kv_heads, selected_blocks.shape[2]
    bounds = [(tokens.stop - tokens.start) * group for tokens in ranges]
    launched = (bounds[0] // _TILE + 1) * blocks.count
    needed = bounds[0] * slots // _TILE + blocks.count
    pays = provider.launches_by_max_seqlen and launched > 4 * needed and not _capturing(selected_blocks)
    if not slots or not (pays or tile_blocks < blocks.count):
        return [[[(slots * bound, max(2, bound))]] * kv_heads for bound in bounds]
    counts = [_listed(blocks, selected_blocks, kv_heads, tokens, tile_blocks) for tokens in ranges]
    return [[[(n, max(2, most)) for n, most in head] for head in heads] for heads in torch.stack(counts).tolist()]


def _listed(blocks: Blocks, selected_blocks, kv_heads: int, tokens: slice, tile_blocks: int) -> torch.Tensor:
    """int64 [kv_heads, tiles, 2]: the range's entries that list a block of each tile, and the most that list one."""
    bins = blocks.count + 1
    entry = _entry_blocks(blocks, selected_blocks, tokens, slice(None)).unflatten(1, (kv_heads, -1))
    entry += torch.arange(kv_heads, dtype=torch.int32, device=entry.device)[:, None, None] * bins
    one = torch.ones(1, dtype=torch.int32, device=entry.device)
    counts = one.new_zeros(kv_heads * bins).scatter_add_(0, entry.flatten().long(), one.expand(entry.numel()))
    counts = counts.view(kv_heads, bins)[:, :-1]
    counts = torch.nn.functional.pad(counts, (0, -blocks.count % tile_blocks)).unflatten(1, (-1, tile_blocks))
    return torch.stack([counts.sum(-1), counts.amax(-1)], -1)
