"""Sparse attention of the newest tokens over a key cache, from block means kept beside it.

Of the cache it touches the attended blocks alone. Shapes follow from the input's and nothing waits for the device.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import engines


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    means: torch.Tensor,
    starts: torch.Tensor,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
    engine: str = "auto",
) -> torch.Tensor:
    """MoBA of the last q_len tokens of every row against its cache (arXiv 2502.13189, section 2.2).

    Meant for few queries: the work is heads · q_len · top_k · block_size keys per row, and where the Triton kernel does
    not run (or gradients are wanted) that many keys and values are gathered.

    Args:
        query: [batch, heads, q_len, head_dim].
        key, value: [batch, kv_heads, kv_len, head_dim], heads a multiple of kv_heads.
        means: mean keys of the blocks, [batch, kv_heads, blocks, head_dim] in the key dtype. Those before a query's own
            block are read, so that many there must be.
        starts: int64 [batch], place of each row's first token in the cache: blocks are counted from there, and what
            lies before is padding. A row's last token is the last of the cache.
        block_size, top_k, scale, engine: as in `moba_attention`. The Triton kernel stands for "triton", and for "flash"
            where it runs; plain PyTorch for the others.

    Returns:
        [batch, q_len, heads, head_dim] in the query's dtype; differentiable in query, key and value.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    slots = min(top_k - 1, means.shape[2])
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    kernels = None if trains else engines.decode_kernels(engine, query, block_size)
    past = None if kernels is None else kernels.select_cached(query, means, starts, kv_len, block_size, slots)
    if past is None:
        position = kv_len - q_len + torch.arange(q_len, device=key.device) - starts[:, None]  # [batch, q_len]
        past = select_from_means(query, means, position // block_size, slots)
    if kernels is not None:
        return kernels.decode(query, key, value, past, starts, block_size, scale)
    return _attend_gathered(query, key, value, past, position, starts, block_size, scale)


def _attend_gathered(query, key, value, past, position, starts, block_size: int, scale: float) -> torch.Tensor:
    """`cached_attention` in plain PyTorch. past: [batch, heads, q_len, slots]; position: [batch, q_len]."""
    position = position[:, None, :, None]
    blocks = torch.cat([past, (position // block_size).expand(-1, past.shape[1], -1, -1)], -1)
    attended = blocks[..., None] * block_size + torch.arange(block_size, device=key.device)
    visible = (blocks >= 0)[..., None] & (attended <= position[..., None])
    # A place without a token to see stands for the query's own: so nothing outside the attended blocks is read.
    slots = torch.where(visible, attended, position[..., None]) + starts[:, None, None, None, None]
    key, value = (_gather(states, slots.flatten(2)).unflatten(2, (query.shape[2], -1)) for states in (key, value))
    output = scaled_dot_product_attention(
        query.flatten(1, 2)[:, :, None],
        key.flatten(1, 2),
        value.flatten(1, 2),
        attn_mask=visible.flatten(3).flatten(1, 2)[:, :, None],
        scale=scale,
    )
    return output.view(query.shape).transpose(1, 2)


@torch.no_grad()
def select_from_means(query: torch.Tensor, means: torch.Tensor, own: torch.Tensor, slots: int) -> torch.Tensor:
    """Past blocks of each query and head: int64 [batch, heads, q_len, slots], best first, then −1.

    query: [batch, heads, q_len, head_dim]; means: [batch, kv_heads, blocks, head_dim], at least `slots` blocks; own:
    int64 [batch, q_len], number of each query's own block. Of equal scores the most recent block wins.
    """
    wide = torch.promote_types(means.dtype, torch.float32)
    kv_heads, blocks = means.shape[1:3]
    grouped = query.to(wide).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    scores = (grouped @ means.to(wide).mT).view(*query.shape[:3], blocks)
    newest_first = torch.arange(blocks - 1, -1, -1, device=means.device)
    own = own[:, None, :, None]
    scores = scores.flip(-1).masked_fill(newest_first >= own, float("-inf"))
    chosen = newest_first[scores.sort(dim=-1, descending=True, stable=True).indices[..., :slots]]
    return chosen.masked_fill(chosen >= own, -1)


def _gather(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows of a cache by heads that share it: [batch, kv_heads, length, d], [batch, heads, n] → [batch, heads, n, d].

    The cache is read as one list of rows through its strides: for 8 blocks of 128 of 9 heads (float32, d 64) an
    index_select takes 0.12 ms on a CPU, an index by batch, head and place 0.47, and neither repeats it for a group.
    """
    batch, kv_heads, length, head_dim = states.shape
    row = states.stride(2)
    if states.stride(3) != 1 or row < head_dim or states.stride(0) % row or states.stride(1) % row:
        states, row = states.contiguous(), head_dim
    per_batch, per_head = states.stride(0) // row, states.stride(1) // row
    count = (batch - 1) * per_batch + (kv_heads - 1) * per_head + length
    head = torch.arange(slots.shape[1], device=slots.device) // (slots.shape[1] // kv_heads)
    first = torch.arange(batch, device=slots.device)[:, None] * per_batch + head * per_head
    rows = states.as_strided((count, head_dim), (row, 1))
    return rows.index_select(0, (first[..., None] + slots).flatten()).view(*slots.shape, head_dim)
