"""Where sequences and blocks lie in a packed batch: integers only, no attention.

Two views of the same facts. `sequence_spans` gives Python integers to engines that loop on the host; `BlockLayout`
gives device tensors of shapes known in advance to kernels that must not wait for the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """One sequence with at least one query: its rows in the packed query and in the packed key."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int

    @property
    def query_length(self) -> int:
        return self.query_end - self.query_start

    @property
    def key_length(self) -> int:
        return self.key_end - self.key_start

    @property
    def first_position(self) -> int:
        """Position, within the sequence, of its first query: queries are the last positions."""
        return self.key_length - self.query_length


def sequence_spans(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> list[Span]:
    """The sequences that have queries, in order. Copies the two cumulative lengths to the host."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [Span(*row) for row in zip(q[:-1], q[1:], k[:-1], k[1:]) if row[0] < row[1]]


def query_ranges(spans: list[Span], most: int) -> Iterator[tuple[slice, list[Span]]]:
    """The packed queries in ranges of `most` rows: the rows, and the pieces of sequences in them.

    A piece has its queries counted from the start of the range, and its keys up to its last query.
    """
    for start in range(0, spans[-1].query_end if spans else 0, most):
        stop, inside = min(start + most, spans[-1].query_end), []
        for span in spans:
            first, last = max(span.query_start, start), min(span.query_end, stop)
            if first < last:
                inside.append(Span(first - start, last - start, span.key_start, span.key_end - span.query_end + last))
        yield slice(start, stop), inside


def merge_uniform_spans(spans: list[Span]) -> list[tuple[Span, int]]:
    """Runs of adjacent sequences with equal lengths, as (first sequence, how many): they form one regular batch."""
    runs: list[tuple[Span, int]] = []
    for span in spans:
        if runs:
            first, count = runs[-1]
            lengths = (first.query_length, first.key_length)
            adjacent = (first.query_start + count * lengths[0], first.key_start + count * lengths[1])
            if lengths == (span.query_length, span.key_length) and adjacent == (span.query_start, span.key_start):
                runs[-1] = (first, count + 1)
                continue
        runs.append((span, 1))
    return runs


@dataclass(frozen=True)
class BlockLayout:
    """Device-side geometry of a packed batch, built without a host sync; shapes depend on input shapes only.

    Only *complete* blocks can be past blocks, so they alone are numbered: block j of a sequence whose keys begin at row
    r is global block r // block_size + j, which no other sequence's can be. However many sequences a batch holds, these
    numbers are below total_k // block_size; between two sequences a number may be unused.

    query_position: int32 [total_q], position of each query within its sequence; −1 for rows past the last sequence.
    own_start:      int32 [total_q], row of the first key of the query's own block; total_k past the last sequence.
    key_row:        int32 [total_q], row of the query's own key, the last it attends; total_k past the last sequence.
    first_block:    int32 [total_q], global number of the first complete block of the query's sequence; 0 past the last.
    block_start:    int32 [total_k // block_size], row of the first key of each complete block; total_k where unused.

    own_start and key_row rise with the query. The candidates of the query at position p are the global blocks
    first_block … first_block + p // block_size − 1.
    """

    query_position: torch.Tensor
    own_start: torch.Tensor
    key_row: torch.Tensor
    first_block: torch.Tensor
    block_start: torch.Tensor

    @classmethod
    def build(
        cls, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_q: int, total_k: int, block_size: int
    ) -> "BlockLayout":
        """cu_seqlens_*: int32 [sequences + 1], non-decreasing from 0. Equal neighbours are empty sequences."""
        device = cu_seqlens_q.device
        q_start, k_start = cu_seqlens_q[:-1], cu_seqlens_k[:-1]
        offset = (cu_seqlens_k[1:] - k_start) - (cu_seqlens_q[1:] - q_start)

        row = torch.arange(total_q, dtype=torch.int32, device=device)
        sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True)
        inside = sequence < q_start.shape[0]
        sequence = sequence.clamp(max=q_start.shape[0] - 1)

        first_block = k_start // block_size
        block = torch.arange(total_k // block_size, dtype=torch.int32, device=device)
        owner = torch.searchsorted(cu_seqlens_k[1:] // block_size, block, right=True)
        owner = owner.clamp(max=k_start.shape[0] - 1)
        block_start = k_start[owner] + (block - first_block[owner]) * block_size
        used = block_start + block_size <= cu_seqlens_k[1:][owner]

        position = row - q_start[sequence] + offset[sequence]
        key_row = k_start[sequence] + position

        return cls(
            query_position=torch.where(inside, position, -1).int(),
            own_start=torch.where(inside, key_row - position % block_size, total_k).int(),
            key_row=torch.where(inside, key_row, total_k).int(),
            first_block=torch.where(inside, first_block[sequence], 0).int(),
            block_start=torch.where(used, block_start, total_k).int(),
        )
