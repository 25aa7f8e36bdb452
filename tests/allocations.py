"""What is allocated, counted from shapes: for tensors without data ("meta") as well as for others."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made under it: `live` now, and `peak`, the most at a time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen | given:
                self._count(x.untyped_storage())
        return result

    def _count(self, storage) -> None:
        size, name = storage.nbytes(), storage._cdata
        self.seen.add(name)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size, name)

    def _free(self, size: int, name: int) -> None:
        self.live -= size
        self.seen.discard(name)
