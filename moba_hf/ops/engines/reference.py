"""The oracle: a dense mask built from the selection, plain softmax, differentiated by autograd. Never fast.

Accumulates in float32 or wider. Every other engine is tested against it; none imports it.
"""

import torch

from ..blocks import Span, sequence_spans


def unavailable() -> None:
    """Runs wherever PyTorch does."""
    return None


def attention(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale):
    """Attention over the own block and `selected_blocks`; the shapes of the engine contract, returns output alone."""
    group = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = []
    for span in sequence_spans(cu_seqlens_q, cu_seqlens_k):
        q = query[span.query_start : span.query_end].to(wide).transpose(0, 1)
        k, v = (
            x[span.key_start : span.key_end].to(wide).transpose(0, 1).repeat_interleave(group, 0) for x in (key, value)
        )
        visible = selection_mask(selected_blocks[span.query_start : span.query_end], span, block_size)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible.transpose(0, 1), float("-inf"))
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    outside = query.shape[0] - sum(r.shape[0] for r in rows)
    rows.append(query[query.shape[0] - outside :].to(wide) * 0)
    return torch.cat(rows).to(query.dtype)


def selection_mask(selected_blocks: torch.Tensor, span: Span, block_size: int) -> torch.Tensor:
    """bool [queries, heads, keys] of one sequence: which keys each query attends."""
    device = selected_blocks.device
    position = torch.arange(span.first_position, span.key_length, device=device)
    key_position = torch.arange(span.key_length, device=device)
    key_block = key_position // block_size
    own = (key_block == (position // block_size)[:, None]) & (key_position <= position[:, None])
    past = (selected_blocks[..., None].long() == key_block).any(2)
    return own[:, None] | past
