"""Gradients of attention over the selected blocks: steps 3 to 5 of the paper's Algorithm 1, backwards.

With P = softmax(scale · Q Kᵀ) over the keys taken, rebuilt from the saved log-sum-exp, and δ = rowsum(dO · O):

    dV = Pᵀ dO        dS = P ∘ (dO Vᵀ − δ)        dQ = scale · dS K        dK = scale · dSᵀ Q

Keys own their gradients: one program holds dK and dV of a tile of keys in registers while the rows that attend it pass
by, from all heads of the group. The past-block kernel comes first and leaves float32 sums; the own-block kernel begins
with them, adds its part and rounds once. Queries gather theirs: a past block leaves one partial dQ per entry, addressed
by (row, slot), and the last kernel adds them in slot order, then the own block's part. No result depends on the order
of programs, except where the rows of one block are split over several programs, which then add with atomics.

A *row* is one (token, head of the group) of a KV head: row = (token − first token) · group + head within the group.
An *entry* is one (row, slot): entry = row · slots + slot.
"""

import torch

from .backward_call import Backward, prepare
from .bucket_sort import bucket_tiles, sort_by_block, sort_bytes
from .own_block_backward import own_block_keys, own_block_queries
from .past_block_backward import past_block_keys, past_block_queries
from .workspace import head_passes, token_passes


def backward_pass(
    grad_output, query, key, value, output, lse, selected_blocks, layout, block_size, scale, settings, deterministic
):
    """(grad_query, grad_key, grad_value) of the engine contract, in passes that keep the temporaries bounded.

    Passes go over KV heads, then over queries. The sums of dK and dV are float32 and live for one pass over heads; the
    partial dQ, in the query's dtype, for one pass over queries. `deterministic` gives every bucket one program.
    """
    call = prepare(grad_output, query, key, value, output, lse, selected_blocks, layout, block_size, scale, settings)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    kv_heads, head_dim = key.shape[1:]
    entries_per_token = query.shape[1] // kv_heads * selected_blocks.shape[2]
    sorting = sort_bytes(layout.block_start.shape[0], deterministic)
    token_bytes = entries_per_token * (head_dim * query.element_size() + sorting)
    for heads in head_passes(kv_heads, max(query.shape[0] * token_bytes, key.shape[0] * head_dim * 8)):
        _head_pass(call, layout, heads, len(heads) * token_bytes, grads, deterministic)
    return tuple(grads)


def _head_pass(call: Backward, layout, heads: range, token_bytes: int, grads, deterministic: bool) -> None:
    """Some KV heads, in passes over queries. Temporaries are local here and below, gone before the next are made."""
    total_k, _, head_dim = call.key.shape
    sums = ()
    if call.selected_blocks.numel() and call.block_start.numel():
        shape = (len(heads), total_k, head_dim)
        since = call.block_start.new_empty((len(heads), call.block_start.shape[0]))
        sums = since, *(torch.empty(shape, dtype=torch.float32, device=call.key.device) for _ in "kv")
    for tokens in token_passes(call.query.shape[0], token_bytes):
        _query_pass(call, layout, tokens, heads, sums, grads[0], deterministic)
    own_block_keys(call, heads, sums, *grads[1:])


def _query_pass(call: Backward, layout, tokens: range, heads: range, sums, grad_query, deterministic: bool) -> None:
    entries = len(tokens) * call.query.shape[1] // call.key.shape[1] * call.selected_blocks.shape[2]
    partials = call.query.new_empty((len(heads), entries, call.query.shape[2]))
    if sums:
        _past_blocks(call, layout, tokens, heads, partials, sums, deterministic)
    own_block_queries(call, tokens, heads, partials, grad_query)


def _past_blocks(call: Backward, layout, tokens, kv_heads, partials, sums, deterministic: bool) -> None:
    settings, n_blocks = call.settings, call.block_start.shape[0]
    buckets = sort_by_block(
        call.selected_blocks, layout, tokens, kv_heads, call.key.shape[1], n_blocks, deterministic
    )  # fmt: skip
    rows = buckets.most if deterministic else settings.rows_per_program
    past_block_keys(call, buckets, tokens, kv_heads, partials, sums, rows)
    if not settings.fused:
        tiles = bucket_tiles(buckets, settings.past_queries.rows)
        past_block_queries(call, buckets, tiles, tokens, kv_heads, partials)
