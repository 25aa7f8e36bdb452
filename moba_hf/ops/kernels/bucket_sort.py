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
_TILES = 256  # tiles a program cuts
_ENTRIES_PER_COUNTER = 2  # at least, about: so few counters stay in the L2 cache, where atomics are fastest

_STABLE_SORT_BYTES = 40  # keys int32 as made, in order and sorted, places int64 and int32, what PyTorch's sort takes


@dataclass(frozen=True)
class Buckets:
    """Entries sorted by global block, for some KV heads and queries.

    entries: int32 [kv heads of the pass, places]; a head's are those of places offsets[h, 0] … offsets[h, −1] − 1. The
        rows may be one row that all heads share, each with places of its own.
    offsets: int32 [kv heads of the pass, n_blocks + 1], any strides: the place where each block's entries begin.
    most: entries of one head, at most.
    """

    entries: torch.Tensor
    offsets: torch.Tensor
    most: int


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

    Programs and pointers as in `count_kernel`; ends: int32, the inclusive running sum of counts over all heads, counted
    down on the way to the exclusive one; entries: int32 [places], of which the entries that chose a block are written.
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
        tl.store(entries_ptr + place, entry, mask=block >= 0)


@triton.jit(do_not_specialize=["offsets_head", "offsets_block", "n_blocks", "max_tiles", "rows_per_tile"])
def tile_kernel(
    offsets_ptr, bucket_ptr, begin_ptr, end_ptr, offsets_head, offsets_block, n_blocks, max_tiles, rows_per_tile,
    BY_PLACE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Cut the buckets of one KV head into tiles of at most rows_per_tile entries; see `bucket_tiles`.

    Program (i, h) owns tiles i · TILES … of head h of the pass; each finds its bucket by bisection. offsets: int32
    [kv heads of the pass, n_blocks + 1] with strides offsets_head and offsets_block; bucket, begin, end: int32
    [kv heads of the pass, max_tiles], every element written once, bucket −1 where the tile is not used.
    """
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    slice_head = tl.program_id(1).to(tl.int64)
    offsets_ptr += slice_head * offsets_head
    origin = tl.load(offsets_ptr)
    low = tl.zeros([TILES], tl.int32)  # block 0 has tile 0: the last block whose first tile is not after this one
    high = tl.zeros([TILES], tl.int32) + n_blocks
    steps = n_blocks
    while steps > 0:
        middle = (low + high) // 2
        open_ = middle > low
        first = tl.load(offsets_ptr + middle.to(tl.int64) * offsets_block, mask=open_, other=0) - origin
        if not BY_PLACE:
            first = first // rows_per_tile + middle
        low = tl.where(open_ & (first <= tile), middle, low)
        high = tl.where(open_ & (first > tile), middle, high)
        steps = steps // 2
    bucket = low.to(tl.int64)
    start = tl.load(offsets_ptr + bucket * offsets_block)
    stop = tl.load(offsets_ptr + (bucket + 1) * offsets_block)
    if BY_PLACE:
        begin = origin + tile
        used = (begin < stop) & ((begin - start) % rows_per_tile == 0)
    else:
        begin = start + (tile - (start - origin) // rows_per_tile - low) * rows_per_tile
        used = begin < stop
    out = slice_head * max_tiles + tile
    tl.store(bucket_ptr + out, tl.where(used, low, -1), mask=tile < max_tiles)
    tl.store(begin_ptr + out, begin, mask=tile < max_tiles)
    tl.store(end_ptr + out, tl.minimum(begin + rows_per_tile, stop), mask=tile < max_tiles)


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
    return max(1, triton.cdiv(n_blocks * _ENTRIES_PER_COUNTER, _TILE))


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
    # the last counter stays 0: after it, the running sum says where the last bucket ends
    counts = torch.zeros(len(kv_heads) * n_blocks * n_chunks + 1, dtype=torch.int32, device=device)
    entries = torch.empty(len(kv_heads) * n_entries, dtype=torch.int32, device=device)
    grid = (n_chunks, len(kv_heads))
    shape = (n_entries, n_blocks, n_chunks, tiles, tokens.start, kv_heads.start, heads)
    sizes = dict(GROUP=group, SLOTS=slots, TILE=_TILE)
    count_kernel[grid](selected_blocks, layout.first_block, counts, *shape, **sizes)
    # one long running sum, not one per head: PyTorch's scan of few long rows is ten times slower
    ends = counts.cumsum(0, dtype=torch.int32)
    scatter_kernel[grid](selected_blocks, layout.first_block, ends, entries, *shape, **sizes)
    # counted down, each is where its bucket's entries of its chunk begin: those of chunk 0 are the offsets
    offsets = ends.as_strided((len(kv_heads), n_blocks + 1), (n_blocks * n_chunks, n_chunks))
    return Buckets(entries.expand(len(kv_heads), -1), offsets, n_entries)


def _stable_sort(selected_blocks, layout, tokens, kv_heads, group, n_blocks) -> Buckets:
    chosen = selected_blocks[tokens.start : tokens.stop, kv_heads.start * group : kv_heads.stop * group]
    first = layout.first_block[tokens.start : tokens.stop, None, None]
    block = torch.where(chosen >= 0, chosen + first, n_blocks)
    block = block.unflatten(1, (len(kv_heads), group)).transpose(0, 1).flatten(1)
    sorted_block, entries = block.sort(dim=1, stable=True)
    edges = torch.arange(n_blocks + 1, dtype=torch.int32, device=block.device).expand(len(kv_heads), -1)
    offsets = torch.searchsorted(sorted_block, edges.contiguous(), out_int32=True)
    return Buckets(entries.int(), offsets, entries.shape[1])


def bucket_tiles(buckets: Buckets, rows_per_tile: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the buckets into tiles of at most `rows_per_tile` entries of one block.

    Returns (bucket, begin, end), int32 [kv heads, max_tiles] each; bucket is −1 where a tile is not used. max_tiles
    follows from shapes, and so does where a bucket's tiles lie, without a running sum of their numbers: with p entries
    before it, bucket b takes the tiles from p // rows_per_tile + b on, of which the next bucket leaves it enough. Where
    there are fewer entries than such tiles, a tile lies at the place of its first entry.
    """
    heads, n_blocks = len(buckets.offsets), buckets.offsets.shape[1] - 1
    max_tiles = min(buckets.most // rows_per_tile + n_blocks, buckets.most)
    tiles = torch.empty((3, heads, max_tiles), dtype=torch.int32, device=buckets.offsets.device).unbind()
    tile_kernel[(triton.cdiv(max_tiles, _TILES), heads)](
        buckets.offsets, *tiles, *buckets.offsets.stride(), n_blocks, max_tiles, rows_per_tile,
        BY_PLACE=max_tiles == buckets.most, TILES=_TILES,
    )  # fmt: skip
    return tiles
