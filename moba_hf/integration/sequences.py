"""Padding, segment ids, position_ids, cu_seq_lens_* → one packed layout, and back.

A *sequence* is one document, or one row of the batch without its padding. Whatever a model signals, attention sees the
same thing: queries and keys of all sequences one after the other, and two cumulative lengths.

Segment ids [batch, kv_len] (made by `masking`): > 0 document number, rising along a row; 0 padding; −1 a slot of a
static cache that is not written yet.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedSequences:
    """Where the sequences of a batch lie, and the way there and back.

    cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1]; a sequence's queries are its last positions.
    query_rows, key_rows: int64 rows of the flattened [batch · length] in packed order; None: all rows, as they are.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    query_rows: torch.Tensor | None = None
    key_rows: torch.Tensor | None = None

    def pack(self, query, key, value):
        """[batch, heads, length, head_dim] each → [rows, heads, head_dim] each; views where nothing has to move."""
        return _flatten(query, self.query_rows), _flatten(key, self.key_rows), _flatten(value, self.key_rows)

    def unpack(self, output: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """[rows, heads, head_dim] → [batch, length, heads, head_dim]; zeros at padding."""
        if self.query_rows is not None:
            padded = output.new_zeros(batch * length, *output.shape[1:])
            output = padded.index_copy(0, self.query_rows, output)
        return output.view(batch, length, *output.shape[1:])


def _flatten(states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    flat = states.transpose(1, 2).flatten(0, 1)
    return flat if rows is None else flat[rows]


def find_sequences(segments, query_shape, kv_len, device, *, cu_seq_lens_q=None, cu_seq_lens_k=None, position_ids=None):
    """The sequences of a batch, from the first source that speaks: segment ids, cu_seq_lens_*, position_ids.

    segments: int32 [batch, 1, 1, kv_len] or None. query_shape: (batch, q_len). cu_seq_lens_*: int [sequences + 1] over
    the single row of the batch. position_ids: [batch or 1, q_len].
    Returns None where every row of the batch is one sequence without padding.
    """
    batch, q_len = query_shape
    if segments is not None:
        return _remembered(segments, q_len, lambda: _from_segments(segments[:, 0, 0], q_len))
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        return _from_cu_seq_lens(cu_seq_lens_q, cu_seq_lens_k, batch, q_len, kv_len, device)
    if position_ids is not None and q_len == kv_len and q_len > 1 and position_ids.ndim == 2:
        return _remembered(position_ids, batch, lambda: _from_position_ids(position_ids, batch))
    return None


def whole_rows(batch: int, q_len: int, kv_len: int, device) -> PackedSequences:
    """Every row of the batch is one sequence."""
    row = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return PackedSequences(row * q_len, row * kv_len)


@dataclass(frozen=True)
class CachedRows:
    """Rows of a key cache that each hold one sequence without holes, from its first token to the end of the cache.

    starts: place of each row's first token; on_device: the same, int64 [batch], where the cache is.
    """

    starts: tuple[int, ...]
    on_device: torch.Tensor


def find_cached_rows(segments, query_shape, device) -> CachedRows | None:
    """Where the rows of a cache begin, or None where a row is more, or less, than one sequence up to the cache's end.

    segments: int32 [batch, 1, 1, kv_len] or None. query_shape: (batch, q_len).
    """
    batch, q_len = query_shape
    if segments is None:
        return CachedRows((0,) * batch, torch.zeros(batch, dtype=torch.int64, device=device))
    return _remembered(segments, ("rows", q_len), lambda: _cached_rows(segments[:, 0, 0], q_len))


def _cached_rows(segments: torch.Tensor, q_len: int) -> CachedRows | None:
    same = segments == segments[:, -1:]  # as the newest token
    length = same.flip(-1).cumprod(-1).sum(-1)
    fits = (segments[:, -1] > 0) & (length == same.sum(-1)) & (length >= q_len)
    starts = segments.shape[1] - length
    *places, all_fit = torch.cat([starts, fits.all()[None]]).tolist()
    return CachedRows(tuple(places), starts) if all_fit else None


def _remembered(source: torch.Tensor, key, find):
    """`find()`, kept on the tensor it came from: the layers of a model share mask and position_ids, and finding out
    costs a wait for the device. In-place changes of the tensor count as another tensor."""
    if torch.compiler.is_compiling() or source.is_inference():  # changes of an inference tensor are not counted
        return find()
    kept = getattr(source, "_moba_sequences", None)
    if kept is None or kept[0] != source._version:
        kept = source._moba_sequences = (source._version, {})
    if key not in kept[1]:
        kept[1][key] = find()
    return kept[1][key]


def _from_cu_seq_lens(cu_q, cu_k, batch, q_len, kv_len, device) -> PackedSequences:
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k belong together, but only one was given")
    if batch != 1:
        raise ValueError(f"cu_seq_lens_* describe one packed row, but the batch has {batch} rows")
    return PackedSequences(*(cu.to(device=device, dtype=torch.int32) for cu in (cu_q, cu_k)))


def _from_position_ids(position_ids: torch.Tensor, batch: int) -> PackedSequences | None:
    """A document starts wherever a position does not follow the one before it."""
    starts = position_ids.diff(dim=-1) != 1
    if not torch.compiler.is_compiling() and not starts.any():
        return None
    segments = torch.nn.functional.pad(starts.cumsum(-1), (1, 0)) + 1
    return _from_segments(segments.expand(batch, -1), position_ids.shape[-1])


def _from_segments(segments: torch.Tensor, q_len: int) -> PackedSequences:
    """Segment ids [batch, kv_len] → layout. The queries are the last q_len written slots of each row.

    All shapes follow from the input's, so that it compiles: sequences that could exist but do not are empty ones at
    the end. Outside a compiled graph these are cut off, which costs one wait for the device.
    """
    batch, kv_len = segments.shape
    total = batch * kv_len
    slot = torch.arange(total, device=segments.device)
    real = (segments > 0).flatten()
    key_rows = torch.argsort(~real, stable=True)
    document = segments.long() + slot.view(batch, kv_len) // kv_len * (kv_len + 1)  # one number per (row, document)
    document = document.flatten()[key_rows]
    is_start = torch.cat([document.new_ones(1, dtype=torch.bool), document[1:] != document[:-1]]) & real[key_rows]
    count = real.sum()
    cu_k = torch.cat([torch.where(is_start, slot, count).sort().values, count[None]])

    written = (segments[0] >= 0).sum()
    query_slots = written - q_len + torch.arange(q_len, device=segments.device)
    query_cells = (torch.arange(batch, device=segments.device)[:, None] * kv_len + query_slots).flatten()
    query_real = real[query_cells]
    query_rows = torch.argsort(~query_real, stable=True)
    number = torch.empty_like(slot).scatter_(0, key_rows, is_start.cumsum(0) - 1)  # sequence of each real cell
    lengths_q = torch.zeros_like(slot).scatter_add_(0, number[query_cells].clamp(min=0), query_real.long())
    cu_q = torch.nn.functional.pad(lengths_q.cumsum(0), (1, 0))
    if not torch.compiler.is_compiling():
        sequences, keys, queries = torch.stack([is_start.sum(), count, query_real.sum()]).tolist()
        cu_q, cu_k = cu_q[: sequences + 1], cu_k[: sequences + 1]
        key_rows, query_rows = key_rows[:keys], query_rows[:queries]
        if sequences == 0:
            cu_q = cu_k = torch.zeros(2, dtype=torch.int32, device=segments.device)
    return PackedSequences(cu_q.int(), cu_k.int(), query_rows, key_rows)
