"""Attention cut into tiles — some rows of queries against some keys — that are merged by their log-sum-exp.

The forward of a tile yields its own softmax output and LSE. The backward takes the *merged* output and LSE: then each
tile's gradients are exactly its share of the whole: P = exp(scores − LSE) and Δ = Σ dO·O are those of the union.
Own blocks and full attention are regular batches of contiguous tiles (`Tile`, `attend`, `attend_backward`); the engines
add what else they need to the same accumulators.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..blocks import Span, merge_uniform_spans

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The CPU kernel computes all keys of a causal square in steps of 512. So an own block is cut into bands of rows that
# attend the block's keys up to the band's last row, with a mask for the triangle at the end: half a band's width is
# computed for nothing, and no row needs merging. CPU µs per token of 3 heads, block 512, forward and backward: bands of
# 32 rows 3.8 and 9.1, of 64 3.6 and 8.7, of 128 3.9 and 9.0; squares halved down to 64 and merged 4.2 and 10.0.
_BAND = 64
_LONGEST_BAND = 512  # keys: bounds the mask; longer squares are halved, and the rectangle beside the halves is merged
_MOST_ROWS = 8192  # of all heads of a group, in one call


class Tile(NamedTuple):
    """`count` pieces of attention at regular distances: rows of queries against keys, all contiguous."""

    query_start: int
    key_start: int
    rows: int
    keys: int
    causal: bool = False  # then the last row attends all keys, and each row before it one fewer
    count: int = 1
    query_stride: int = 1
    key_stride: int = 1

    @property
    def square(self) -> bool:
        """Left to the kernel's own causal rule, head by head; smaller causal tiles take a mask."""
        return self.causal and self.rows > _BAND


# ---- geometry ------------------------------------------------------------------------------------------------------


def own_block_tiles(spans: list[Span], block_size: int) -> list[Tile]:
    """Every query's own block. Causal bands come first and cover each row once, so that they can assign."""
    bands: list[Tile] = []
    rectangles: list[Tile] = []
    for span in _joined(spans, block_size):
        inside = span.first_position % block_size  # how far into its block the first query stands
        head = min(-inside % block_size, span.query_length)
        full, tail = divmod(span.query_length - head, block_size)
        query, key = span.query_start, span.key_start + span.first_position
        if head:
            rectangles.append(Tile(query, key - inside, head, inside))
        for start, size, count in ((0, head, 1), (head, block_size, full), (head + full * block_size, tail, 1)):
            if size and count:
                _cut_square(Tile(query + start, key + start, size, size, True, count, size, size), bands, rectangles)
    return bands + rectangles


def full_attention_tiles(spans: list[Span]) -> list[Tile]:
    """Everything up to each query: one causal square a sequence, and the keys before its first query."""
    squares, rectangles = [], []
    for span, count in merge_uniform_spans(spans):
        rows, before = span.query_length, span.first_position
        regular = (count, rows, span.key_length)
        squares.append(Tile(span.query_start, span.key_start + before, rows, rows, True, *regular))
        if before:
            rectangles.append(Tile(span.query_start, span.key_start, rows, before, False, *regular))
    return squares + rectangles


def _joined(spans: list[Span], block_size: int) -> list[Span]:
    """Adjacent sequences without a cache whose blocks are all full have own blocks as one long sequence has."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if (
            last
            and last.first_position == span.first_position == 0
            and last.query_length % block_size == 0
            and (last.query_end, last.key_end) == (span.query_start, span.key_start)
        ):
            joined[-1] = Span(last.query_start, span.query_end, last.key_start, span.key_end)
        else:
            joined.append(span)
    return joined


def _cut_square(tile: Tile, bands: list[Tile], rectangles: list[Tile]) -> None:
    """Halve a causal square until its bands are short enough; the lower left quarter is a rectangle of its own."""
    if tile.keys <= _LONGEST_BAND:
        for row in range(0, tile.rows, _BAND):
            rows = min(_BAND, tile.rows - row)
            bands.append(tile._replace(query_start=tile.query_start + row, rows=rows, keys=row + rows))
        return
    half = tile.rows // 2
    rest = tile.rows - half
    below = dict(query_start=tile.query_start + half, rows=rest)
    rectangles.append(tile._replace(**below, keys=half, causal=False))
    if half == rest and tile.rows == tile.query_stride:  # the halves of all pieces lie at regular distances again
        pieces = [tile._replace(rows=half, keys=half, count=2 * tile.count, query_stride=half, key_stride=half)]
    else:
        second = tile._replace(**below, key_start=tile.key_start + half, keys=rest)
        pieces = [tile._replace(rows=half, keys=half), second]
    for piece in pieces:
        _cut_square(piece, bands, rectangles)


# ---- one tile ------------------------------------------------------------------------------------------------------


def tile_forward(query, key, value, scale: float, causal: bool = False, mask=None):
    """query [n, heads, rows, head_dim], key and value [n, heads, keys, head_dim]; mask [rows, keys] is added to scores.

    Returns output like query, lse [n, heads, rows], float32 or wider. Heads of key, value may be expanded (stride 0).
    """
    if query.device.type == "cpu":
        return _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = _scores(query, key, scale, causal, mask)
    lse = scores.logsumexp(-1)
    return (scores.sub_(lse[..., None]).exp_() @ value.to(wide)).to(query.dtype), lse


def tile_backward(grad_output, query, key, value, output, lse, scale: float, causal: bool = False, mask=None):
    """Gradients of query, key and value through one tile; output and lse are the merged ones of its rows."""
    if query.device.type == "cpu":
        return _flash_backward(grad_output, query, key, value, output, lse, 0.0, causal, attn_mask=mask, scale=scale)
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = _scores(query, key, scale, causal, mask).sub_(lse[..., None]).exp_()
    grad = grad_output.to(wide)
    delta = (grad * output.to(wide)).sum(-1, keepdim=True)
    grad_scores = weights * (grad @ value.to(wide).mT - delta) * scale
    return grad_scores @ key.to(wide), grad_scores.mT @ query.to(wide), weights.mT @ grad


def _scores(query, key, scale: float, causal: bool, mask) -> torch.Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT * scale
    if mask is not None:
        scores += mask
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(future, float("-inf"))
    return scores


def merge(output, lse, tile_output, tile_lse) -> None:
    """Fold a tile into the accumulators of its rows, in place: output [..., rows, head_dim], lse [..., rows]."""
    share = torch.sigmoid(tile_lse - lse)  # = exp(tile_lse − merged lse)
    output.lerp_(tile_output.to(output.dtype), share[..., None])
    lse.copy_(torch.logaddexp(lse, tile_lse))


# ---- contiguous tiles over packed tensors --------------------------------------------------------------------------


@dataclass(frozen=True)
class Accumulators:
    """Running result of the forward: output [total_q, heads, head_dim], lse [total_q, heads], float32 or wider."""

    output: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def empty(cls, query: torch.Tensor) -> "Accumulators":
        wide = torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros(query.shape, dtype=wide)
        return cls(output, query.new_full(query.shape[:2], float("-inf"), dtype=wide))


def attend(tiles: list[Tile], query, key, value, scale: float, result: Accumulators) -> None:
    """Compute contiguous tiles over packed tensors into `result`. Causal ones must cover each row at most once."""
    mask = _band_mask(tiles, query, key)
    for tile in _in_small_batches(tiles, query, key):
        for head, heads in _groups(query, key):
            k, v = (_keys(x, tile, head, heads) for x in (key, value))
            rows = _rows(_queries(query, tile, heads), tile)
            result_of_tile = tile_forward(rows, k, v, scale, tile.square, _mask_of(tile, mask, heads))
            output, lse = (_by_head(x, tile, heads) for x in result_of_tile)
            so_far = _queries(result.output, tile, heads), _queries(result.lse[..., None], tile, heads)[..., 0]
            if tile.causal:
                so_far[0].copy_(output)
                so_far[1].copy_(lse)
            else:
                merge(*so_far, output, lse)


def attend_backward(tiles, grad_output, query, key, value, output, lse, scale: float, grads) -> None:
    """Add the tiles' share to grads = (grad_query, grad_key, grad_value): packed, float32 or wider."""
    mask = _band_mask(tiles, query, key)
    for tile in _in_small_batches(tiles, query, key):
        for head, heads in _groups(query, key):
            k, v = (_keys(x, tile, head, heads) for x in (key, value))
            by_row = (_rows(_queries(x, tile, heads), tile) for x in (grad_output, query, output, lse[..., None]))
            grad_rows, rows, rows_output, rows_lse = by_row
            how = scale, tile.square, _mask_of(tile, mask, heads)
            grad_query, *grad_keys = tile_backward(grad_rows, rows, k, v, rows_output, rows_lse[..., 0], *how)
            _queries(grads[0], tile, heads).add_(_by_head(grad_query, tile, heads))
            for total, grad in zip(grads[1:], grad_keys):
                one_head = _pieces(total, tile.key_start, tile.key_stride, tile.keys, tile.count, slice(head, head + 1))
                one_head[:, 0].add_(grad.sum(1, dtype=total.dtype) if tile.square else grad[:, 0])


def _band_mask(tiles: list[Tile], query, key) -> torch.Tensor | None:
    """[rows · heads of a group, keys] for the longest of the bands; a shorter one has the last of its rows and keys."""
    keys = max((tile.keys for tile in tiles if tile.causal and not tile.square), default=0)
    if not keys:
        return None
    future = torch.ones(_BAND, keys, dtype=torch.bool, device=query.device).triu(keys - _BAND + 1)
    mask = query.new_zeros(future.shape).masked_fill_(future, float("-inf"))
    return mask.repeat_interleave(query.shape[1] // key.shape[1], 0)


def _mask_of(tile: Tile, mask, heads: slice) -> torch.Tensor | None:
    """[1, 1, rows · heads, keys]: what makes a band causal."""
    if not tile.causal or tile.square:
        return None
    return mask[-tile.rows * (heads.stop - heads.start) :, -tile.keys :][None, None]


def _in_small_batches(tiles: list[Tile], query, key):
    """The same tiles, fewer pieces at a time: what a call returns stays in the cache, and memory small."""
    for tile in tiles:
        most = max(1, _MOST_ROWS // (tile.rows * (query.shape[1] // key.shape[1])))
        for first in range(0, tile.count, most):
            starts = (tile.query_start + first * tile.query_stride, tile.key_start + first * tile.key_stride)
            yield tile._replace(query_start=starts[0], key_start=starts[1], count=min(most, tile.count - first))


def _groups(query, key):
    """(kv head, the slice of its query heads), one after the other."""
    group = query.shape[1] // key.shape[1]
    return [(head, slice(head * group, (head + 1) * group)) for head in range(key.shape[1])]


def _queries(states, tile: Tile, heads: slice) -> torch.Tensor:
    return _pieces(states, tile.query_start, tile.query_stride, tile.rows, tile.count, heads)


def _keys(states, tile: Tile, head: int, heads: slice) -> torch.Tensor:
    """[count, heads or 1, keys, head_dim]: what `_rows` attend."""
    one_head = _pieces(states, tile.key_start, tile.key_stride, tile.keys, tile.count, slice(head, head + 1))
    return one_head.expand(-1, heads.stop - heads.start, -1, -1) if tile.square else one_head


def _rows(states, tile: Tile) -> torch.Tensor:
    """[count, heads, rows, …] as it is for a square, else [count, 1, rows · heads, …]: one product for a group.

    Measured at 3 heads, ns per query and key, forward and backward: 2.0 and 4.5 by head, 1.8 and 3.9 together for tiles
    of 256 rows; 3.0 and 6.5, 2.3 and 5.0 for 128.
    """
    return states if tile.square else states.transpose(1, 2).flatten(1, 2)[:, None]


def _by_head(states, tile: Tile, heads: slice) -> torch.Tensor:
    """The way back: a view [count, heads, rows, …]."""
    return states if tile.square else states[:, 0].unflatten(1, (tile.rows, heads.stop - heads.start)).transpose(1, 2)


def _pieces(states, start: int, stride: int, length: int, count: int, heads: slice) -> torch.Tensor:
    """A view [count, heads, length, head_dim] of packed [tokens, heads, head_dim]."""
    window = states[start : start + (count - 1) * stride + length, heads]
    return window.unfold(0, length, stride).movedim(-1, 2)
