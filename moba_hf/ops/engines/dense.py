"""Full causal attention over packed sequences, with the engine contract; it ignores `selected_blocks` and `block_size`.

Not an engine users name: layers that stay full, and sequences that the blocks cover anyway, run through it. Never a
[queries, keys] mask in memory.
"""

import torch

from ..blocks import sequence_spans
from .tiles import Accumulators, attend, attend_backward, full_attention_tiles


def unavailable() -> None:
    """Runs wherever PyTorch does."""


def forward(query, key, value, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale):
    """See the engine contract in `engines/__init__.py`."""
    if _has_cuda_kernel(query):
        return _cuda_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    result = Accumulators.empty(query)
    tiles = full_attention_tiles(sequence_spans(cu_seqlens_q, cu_seqlens_k))
    attend(tiles, query, key, value, scale, result)
    return result.output.to(query.dtype), result.lse


def backward(
    grad_output, query, key, value, output, lse, selected_blocks, cu_seqlens_q, cu_seqlens_k, block_size, scale
):
    """See the engine contract in `engines/__init__.py`."""
    if _has_cuda_kernel(query):
        return _cuda_backward(grad_output, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, scale)
    grads = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (query, key, value)]
    tiles = full_attention_tiles(sequence_spans(cu_seqlens_q, cu_seqlens_k))
    attend_backward(tiles, grad_output, query, key, value, output, lse, scale, grads)
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (query, key, value)))


# ---- CUDA: the variable-length FlashAttention 2 inside PyTorch; no host sync, lengths bounded by the totals ---------


def _has_cuda_kernel(query) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256


def _cuda_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, scale):
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0], 0.0, True, False, scale=scale
    )
    outside = _past_end(cu_seqlens_q, query)
    return output.masked_fill_(outside[:, None, None], 0), lse.T.masked_fill(outside[:, None], float("-inf"))


def _cuda_backward(grad_output, query, key, value, output, lse, cu_seqlens_q, cu_seqlens_k, scale):
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device)  # dropout state
    grads = torch.ops.aten._flash_attention_backward(
        grad_output.contiguous(), query, key, value, output, lse.T.contiguous(), cu_seqlens_q, cu_seqlens_k,
        query.shape[0], key.shape[0], 0.0, True, unused, unused, scale=scale,
    )  # fmt: skip
    ends = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
    return tuple(grad.masked_fill_(_past_end(cu, grad)[:, None, None], 0) for cu, grad in zip(ends, grads))


def _past_end(cu_seqlens, states) -> torch.Tensor:
    """Rows that belong to no sequence: the kernel leaves them as it found the memory."""
    return torch.arange(states.shape[0], device=states.device) >= cu_seqlens[-1]
