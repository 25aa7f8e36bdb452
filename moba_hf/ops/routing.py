"""The parameter-free gate: block means → gate scores → causal top-k (MoBA, arXiv 2502.13189, section 2.2).

This file is the plain PyTorch version, for any device; it works through ranges of queries, so that no tensor of
[heads, queries, blocks] for the whole sequence ever exists.
"""

import torch

from .blocks import Span, sequence_spans

# Gate scores held at a time. CPU time beside 32 MB, least of 5: 32K tokens, block 512: −7 %; 16K, block 128: −13 %;
# 16K, block 64: −1 %; 4K, block 128: +10 % (2 ms).
_RANGE_BYTES = 4 << 20
# So many maxima, one after the other, beat topk: 5 against 8 ms for 3 of 64 columns and 16K rows; 12 against 9 for 7.
_FEW_SLOTS = 3


def block_means(key: torch.Tensor, block_size: int) -> torch.Tensor:
    """Mean key of each complete block: [tokens, kv_heads, head_dim] → [tokens // block_size, kv_heads, head_dim].

    Summed in float32 or wider, rounded to the key dtype.
    """
    blocks = key.shape[0] // block_size
    wide = torch.promote_types(key.dtype, torch.float32)
    return key[: blocks * block_size].unflatten(0, (blocks, block_size)).mean(1, dtype=wide).to(key.dtype)


def select(query, key, cu_seqlens_q, cu_seqlens_k, block_size: int, slots: int) -> torch.Tensor:
    """Past blocks of each query and head: int32 [total_q, heads, slots], ascending, then −1.

    query [total_q, heads, head_dim], key [total_k, kv_heads, head_dim]; `slots` is top_k − 1.
    Ties go to the most recent block.
    """
    selected = query.new_full((*query.shape[:2], slots), -1, dtype=torch.int32)
    if slots == 0:
        return selected
    for span in sequence_spans(cu_seqlens_q, cu_seqlens_k):
        _select_in_sequence(query, key, span, block_size, selected)
    return selected


def _select_in_sequence(query, key, span: Span, block_size: int, selected: torch.Tensor) -> None:
    heads, slots = query.shape[1], selected.shape[2]
    last_candidates = (span.key_length - 1) // block_size
    if last_candidates == 0:
        return
    means = block_means(key[span.key_start : span.key_end], block_size)
    wide = torch.promote_types(key.dtype, torch.float32)
    means = means[:last_candidates].to(wide).permute(1, 2, 0)
    means = means.repeat_interleave(heads // key.shape[1], 0)  # [heads, head_dim, blocks]
    step = max(1, _RANGE_BYTES // (heads * last_candidates * means.element_size()))
    for start in range(0, span.query_length, step):
        stop = min(start + step, span.query_length)
        position = torch.arange(span.first_position + start, span.first_position + stop, device=query.device)
        candidates = position // block_size
        least, most = ((span.first_position + row) // block_size for row in (start, stop - 1))
        if most == 0:
            continue
        rows = slice(span.query_start + start, span.query_start + stop)
        scores = query[rows].to(wide).transpose(0, 1) @ means[..., :most].flip(-1)
        blocks = top_blocks(scores, candidates, slots, least).transpose(0, 1)
        selected[rows, :, : blocks.shape[-1]] = blocks


def top_blocks(scores: torch.Tensor, candidates: torch.Tensor, slots: int, least: int) -> torch.Tensor:
    """The best `slots` of the candidate blocks: ascending block numbers, then −1; int32 [heads, rows, ≤ slots].

    scores: [heads, rows, blocks], the newest block first; overwritten. candidates: int [rows], how many of the
    oldest blocks each row may choose, at least `least`. Of equal scores the newer block wins.
    """
    blocks = scores.shape[-1]
    number = torch.arange(blocks, device=scores.device)
    if blocks <= slots:
        return torch.where(number >= candidates[:, None], -1, number).int().expand(*scores.shape[:-1], -1)
    newest = scores[..., : blocks - least]  # the others are candidates of every row
    newest.masked_fill_(number.flip(0)[: blocks - least] >= candidates[:, None], float("-inf"))
    chosen = blocks - 1 - (_take_best if slots <= _FEW_SLOTS else _top_columns)(scores, slots)
    chosen = chosen.masked_fill(chosen >= candidates[:, None], blocks).sort(-1).values
    return chosen.masked_fill_(chosen == blocks, -1).int()


def _take_best(scores: torch.Tensor, slots: int) -> torch.Tensor:
    """Columns of the `slots` highest scores, of equal ones the first: one after the other. Overwrites the scores."""
    taken = []
    for _ in range(slots):
        column = scores.max(-1, keepdim=True).indices
        scores.scatter_(-1, column, float("-inf"))
        taken.append(column)
    return torch.cat(taken, -1)


def _top_columns(scores: torch.Tensor, slots: int) -> torch.Tensor:
    """The same by topk, which breaks ties as it likes: only one across the last place matters, and few rows have it."""
    best, columns = scores.topk(slots + 1, sorted=True)
    tied = (best[..., slots - 1] == best[..., slots]) & (best[..., slots] > float("-inf"))
    columns = columns[..., :slots]
    if tied.any():
        columns[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :slots]
    return columns
