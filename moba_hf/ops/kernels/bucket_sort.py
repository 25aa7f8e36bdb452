"""Step 2 of the paper's Algorithm 1: order the (row, slot) entries by the block they chose.

A counting sort without a host sync.

A *row* is one (token, head of the group) of a KV head: row = (token − first token) · group + head within the group.
An *entry* is one (row, slot): entry = row · slots + slot.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TILE = 4096  # entries a program counts at a time
_COUNTERS_PER_ENTRY = 4  # at most, about: tiny blocks would otherwise need more memory for counters than for results

_STABLE_SORT_BYTES = 40  # keys int32 as made, in order and sorted, places int64 and int32, what PyTorch's sort takes


@dataclass(frozen=True)
class Buckets:
    """Entries sorted by global block, for some KV heads and queries.

    entries: int32 [kv heads of the pass, max_entries], meaningful up to offsets[:, −1].
    offsets: int32 [kv heads of the pass, n_blocks + 1], where each block's entries begin.
    """

    entries: torch.Tensor
    offsets: torch.Tensor


@triton.jit(do_not_specialize=["n_entries", "n_blocks", "n_chunks", "chunk_tiles", "first_token", "first_kv_head"])
def count_kernel(
    selected_ptr, first_block_ptr, counts_ptr, n_entries, n_blocks, n_chunks, chunk_tiles, first_token, first_kv_head,
    heads, GROUP: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How often each block was chosen by the entries of one chunk.

    Program (c, h) owns chunk c, that is chunk_tiles · TILE entries, of KV head first_kv_head + h; its counters are its
    own, so that none is contended by all. selected: int32 [total_q, heads, SLOTS]; first_block: int32 [total_q];
    counts: int32 [kv heads of the pass, n_blocks, n_chunks], zero before.
    """
    chunk, slice_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    for tile in range(0, chunk_tiles):
        entry = (chunk * chunk_tiles + tile) * TILE + tl.arange(0, TILE)
        block = _global_block(
            selected_ptr, first_block_ptr, entry, entry < n_entries, first_token, first_kv_head + tl.program_id(1),
            heads, GROUP, SLOTS,
        )  # fmt: skip
        counter = (slice_head * n_blocks + block) * n_chunks + chunk
        tl.atomic_add(counts_ptr + counter, 1, mask=block >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_entries", "n_blocks", "n_chunks", "chunk_tiles", "first_token", "first_kv_head"])
def scatter_kernel(
    selected_ptr, first_block_ptr, ends_ptr, entries_ptr, n_entries, n_blocks, n_chunks, chunk_tiles, first_token,
    first_kv_head, heads, GROUP: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Put each entry into its bucket. Chunks stay in order; the order within a chunk is not defined.

    Programs and pointers as in `count_kernel`; ends: int32, the inclusive running sum of counts, used up on the way;
    entries: int32 [kv heads of the pass, n_entries], written where a block was chosen.
    """
    chunk, slice_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    for tile in range(0, chunk_tiles):
        entry = (chunk * chunk_tiles + tile) * TILE + tl.arange(0, TILE)
        block = _global_block(
            selected_ptr, first_block_ptr, entry, entry < n_entries, first_token, first_kv_head + tl.program_id(1),
            heads, GROUP, SLOTS,
        )  # fmt: skip
        counter = (slice_head * n_blocks + block) * n_chunks + chunk
        place = tl.atomic_add(ends_ptr + counter, -1, mask=block >= 0, sem="relaxed") - 1
        tl.store(entries_ptr + slice_head * n_entries + place, entry, mask=block >= 0)


@triton.jit
def _global_block(
    selected_ptr, first_block_ptr, entry, inside, first_token, kv_head, heads, GROUP: tl.constexpr, SLOTS: tl.constexpr
):
    """The block of each entry, counted through all sequences; −1 where none."""
    row = entry // SLOTS
    token = (first_token + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    block = tl.load(selected_ptr + (token * heads + head) * SLOTS + entry % SLOTS, mask=inside, other=-1)
    first = tl.load(first_block_ptr + token, mask=inside, other=0)
    return tl.where(block >= 0, block + first, -1)


def _chunk_tiles(n_blocks: int) -> int:
    """Tiles of entries in a chunk, which has one counter for each block."""
    return max(1, triton.cdiv(n_blocks, _COUNTERS_PER_ENTRY * _TILE))


def sort_bytes(n_blocks: int, deterministic: bool) -> int:
    """Bytes that sorting takes for each entry: the result, and on the way counters and their sums, or sorted pairs."""
    if deterministic:
        return _STABLE_SORT_BYTES
    return 4 + 2 * 4 * triton.cdiv(n_blocks, _chunk_tiles(n_blocks) * _TILE)


def sort_by_block(
    selected_blocks: torch.Tensor, layout, tokens: range, kv_heads: range, num_kv_heads: int, n_blocks: int,
    deterministic: bool,
) -> Buckets:  # fmt: skip
    """Sort the entries of the queries `tokens` and the KV heads `kv_heads`. `deterministic`: by entry within a bucket.

    selected_blocks: int32 [total_q, heads, slots], contiguous; layout: `BlockLayout`.
    """
    heads, slots = selected_blocks.shape[1:]
    group = heads // num_kv_heads
    n_entries = len(tokens) * group * slots
    if deterministic:
        return _stable_sort(selected_blocks, layout, tokens, kv_heads, group, n_blocks)
    tiles = _chunk_tiles(n_blocks)
    n_chunks = triton.cdiv(n_entries, tiles * _TILE)
    device = selected_blocks.device
    counts = torch.zeros((len(kv_heads), n_blocks * n_chunks), dtype=torch.int32, device=device)
    grid = (n_chunks, len(kv_heads))
    shape = (n_entries, n_blocks, n_chunks, tiles, tokens.start, kv_heads.start, heads)
    sizes = dict(GROUP=group, SLOTS=slots, TILE=_TILE)
    count_kernel[grid](selected_blocks, layout.first_block, counts, *shape, **sizes)
    # one long running sum, not one per head: PyTorch's scan of few long rows is ten times slower
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    ends -= torch.nn.functional.pad(ends[:-1, -1:], (0, 0, 1, 0))
    offsets = torch.nn.functional.pad(ends[:, n_chunks - 1 :: n_chunks], (1, 0))  # before `ends` is used up
    entries = torch.empty((len(kv_heads), n_entries), dtype=torch.int32, device=device)
    scatter_kernel[grid](selected_blocks, layout.first_block, ends, entries, *shape, **sizes)
    return Buckets(entries, offsets)


def _stable_sort(selected_blocks, layout, tokens, kv_heads, group, n_blocks) -> Buckets:
    chosen = selected_blocks[tokens.start : tokens.stop, kv_heads.start * group : kv_heads.stop * group]
    first = layout.first_block[tokens.start : tokens.stop, None, None]
    block = torch.where(chosen >= 0, chosen + first, n_blocks)
    block = block.unflatten(1, (len(kv_heads), group)).transpose(0, 1).flatten(1)
    sorted_block, entries = block.sort(dim=1, stable=True)
    edges = torch.arange(n_blocks + 1, dtype=torch.int32, device=block.device).expand(len(kv_heads), -1)
    offsets = torch.searchsorted(sorted_block, edges.contiguous(), out_int32=True)
    return Buckets(entries.int(), offsets)


def bucket_tiles(buckets: Buckets, rows_per_tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the buckets into tiles of at most `rows_per_tile` entries of one block.

    Returns (bucket, begin, end), int32 [kv heads, max_tiles] each; bucket is −1 where a tile is not used. max_tiles
    follows from shapes: every bucket may end in a tile that is not full.
    """
    offsets = buckets.offsets
    tiles = (offsets.diff(dim=1) + rows_per_tile - 1) // rows_per_tile
    last = tiles.cumsum(1, dtype=torch.int32)
    n_blocks, max_entries = tiles.shape[1], buckets.entries.shape[1]
    max_tiles = min(-(-max_entries // rows_per_tile) + n_blocks, max_entries)
    tile = torch.arange(max_tiles, dtype=torch.int32, device=offsets.device).expand(len(offsets), -1).contiguous()
    bucket = torch.searchsorted(last, tile, right=True)
    used = bucket < n_blocks
    bucket = bucket.clamp(max=n_blocks - 1)
    begin = offsets.gather(1, bucket) + (tile - (last - tiles).gather(1, bucket)) * rows_per_tile
    end = torch.minimum(begin + rows_per_tile, offsets.gather(1, bucket + 1))
    return torch.where(used, bucket, -1).int(), begin.int(), end.int()
