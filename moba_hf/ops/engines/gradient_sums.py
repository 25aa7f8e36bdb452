"""dK and dV of one KV head while they are added up in float32, over ranges of queries that come last to first.

Keys whose queries are all done are finished: from then on their gradient holds the result. Two ways, the same numbers:

    WholeSums   one float32 tensor for each gradient: 8 bytes per key and element of head_dim, both together.
    HalvedSums  the upper 16 bits of each number in the gradient's own storage, the lower 16 in another tensor of 16-bit
                elements, whose dtype plays no part. The caller may lend storage that is not needed yet.
"""

import torch


class WholeSums:
    """grads: [keys, head_dim] each, zero. Gradients as wide as their sums are the sums themselves."""

    def __init__(self, grads: list[torch.Tensor]):
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        self._grads = grads
        self._sums = [x if x.dtype == wide else torch.zeros_like(x, dtype=wide) for x in grads]

    def add(self, keys: slice, parts: list[torch.Tensor]) -> None:
        """parts: [keys of the slice, head_dim] each."""
        for total, part in zip(self._sums, parts):
            total[keys].add_(part)

    def finish(self, keys: slice) -> None:
        for grad, total in zip(self._grads, self._sums):
            if grad is not total:
                grad[keys] = total[keys]


class HalvedSums:
    """grads, lower: [keys, head_dim] each, 16-bit elements, zeroed here; any strides.

    first: the place of grads[0] among the parts that are added; parts without a gradient here are dropped.
    """

    def __init__(self, grads: list[torch.Tensor], lower: list[torch.Tensor], first: int = 0):
        for x in (*grads, *lower):
            x.zero_()
        self._grads, self._first = grads, first
        self._halves = [(low.view(torch.int16), high.view(torch.int16)) for low, high in zip(lower, grads)]

    def add(self, keys: slice, parts: list[torch.Tensor]) -> None:
        """parts: [keys of the slice, head_dim] each. None of the keys may be finished."""
        for (low, high), part in zip(self._halves, parts[self._first :]):
            bits = torch.stack((low[keys], high[keys]), -1)  # little-endian, as GPUs are
            bits.view(torch.float32)[..., 0].add_(part)
            low[keys], high[keys] = bits.unbind(-1)

    def finish(self, keys: slice) -> None:
        for grad, (low, high) in zip(self._grads, self._halves):
            grad[keys] = torch.stack((low[keys], high[keys]), -1).view(torch.float32)[..., 0]
