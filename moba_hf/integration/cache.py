"""MobaCache: a key cache that also keeps the mean of every key block, so that decoding need not read all keys.

The attention function is never handed the cache. A layer therefore leaves a note on the keys that it returns from
`update`: the attribute `moba_layer` of a view of them, which lives no longer than the attention call.
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..ops import block_means

_SPARE = 16  # one part in 16 of the cache is room to grow: then a new token copies 16 tokens on average, not all


class MobaCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers keep block means; pass it as `past_key_values=`.

        model.generate(**inputs, past_key_values=MobaCache(model.config))

    With `decode="moba"` a new token then reads the means and the blocks it attends, and nothing else of the cache; the
    result is that of every other cache. Sliding-window layers are those of Transformers. The means take at most
    1 / block_size of the memory of the keys, room to grow at most 1/16 of keys and values.

    Args:
        config: config of the model, or of its language model.
        offloading, offload_only_non_sliding: as for `DynamicCache`. Means stay where they were computed.
    """

    def __init__(
        self, config: PreTrainedConfig, *, offloading: bool = False, offload_only_non_sliding: bool = False
    ) -> None:
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.layers = [MobaLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Bring the next offloaded layer back, after the work queued so far; called in the turn of layer_idx - 1.

        That work holds the copy to the CPU, and the last read of keys fetched before, whose memory these ones may get.
        Transformers waits for it since 5.20: before, its own offloaded caches may return wrong keys.
        """
        defaults = self._default_streams()
        for default in defaults:
            self.prefetch_stream.wait_stream(default)
        due = self.layers[layer_idx - 1]
        keys = due.keys
        super().prefetch(layer_idx, only_non_sliding)
        if due.keys is not keys:  # the only offloaded layer comes back in its own turn, with no other to hide behind
            for default in defaults:
                default.wait_stream(self.prefetch_stream)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.offloading:  # the first layer may still be on its way back
            for default in self._default_streams():
                default.wait_stream(self.prefetch_stream)
        super().reorder_cache(beam_idx)

    def _default_streams(self) -> list[torch.Stream]:
        """Of every device that holds a layer."""
        devices = {layer.device for layer in self.layers if getattr(layer, "is_initialized", False)}
        return [torch.cuda.default_stream(device) for device in devices]


class MobaLayer(DynamicLayer):
    """Keys and values of one layer [batch, kv_heads, length, head_dim], and the means of their blocks.

    New tokens are written behind the old ones, in buffers with room to grow, where `DynamicLayer` copies the whole
    cache for each token: that alone would read everything that sparse attention leaves unread.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._means = _RunningMeans()

    def block_means(self, key: torch.Tensor, starts: tuple[int, ...], block_size: int) -> torch.Tensor:
        """Mean keys [batch, kv_heads, blocks, head_dim] of the complete blocks, in the key dtype; others mean nothing.

        key: what `update` returned. starts: place of each row's first token, from where its blocks are counted.
        """
        return self._means.update(key.detach(), starts, block_size)

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [batch, kv_heads, new, head_dim] each; returns all keys, with the note, and all values."""
        if torch.compiler.is_compiling():  # a graph takes no notes on tensors: attention goes on without the means
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if torch.is_grad_enabled():  # a backward pass may need the keys as they are
            self._buffers = None
            super().update(key_states, value_states, *args, **kwargs)
        else:
            self._append(key_states, value_states)
        keys = self.keys.view_as(self.keys)
        keys.moba_layer = self
        return keys, self.values

    def _append(self, *states: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*states)
        old = self.get_seq_length()
        length = old + states[0].shape[2]
        if self._buffers is None or not self._fits(length):
            buffers = []
            for kept, new in zip((self.keys, self.values), states):
                buffer = new.new_empty((*new.shape[:2], length + length // _SPARE, new.shape[3]), dtype=self.dtype)
                if old:
                    buffer[:, :, :old] = kept
                buffers.append(buffer)
            self._buffers = tuple(buffers)
        for buffer, new in zip(self._buffers, states):
            buffer[:, :, old:length] = new
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _fits(self, length: int) -> bool:
        """Whether the buffers have room, and may be written: those made in inference mode only there."""
        buffer = self._buffers[0]
        return length <= buffer.shape[2] and (torch.is_inference_mode_enabled() or not buffer.is_inference())

    # ---- what moves the keys moves the means; buffers stay behind, and the next update makes new ones ----

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._means.crop(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self._buffers = None
        self._means.forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx if self.get_seq_length() else self._rows())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self._rows().repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._take_rows(rows)

    def batch_select_indices(self, indices) -> None:
        rows = self._rows()
        super().batch_select_indices(indices)
        self._take_rows(rows[indices] if len(rows) else rows)

    def offload(self) -> None:
        super().offload()
        self._buffers = None

    def _rows(self) -> torch.Tensor:
        """Row numbers; none while the cache is empty and Transformers leaves its rows alone."""
        return torch.arange(self.keys.shape[0], device=self.keys.device) if self.get_seq_length() else torch.arange(0)

    def _take_rows(self, rows: torch.Tensor) -> None:
        self._buffers = None
        self._means.take_rows(rows)


class _RunningMeans:
    """Block means of a growing key cache. Each block's keys are read once, in the first call that finds it complete.

    means: [batch, kv_heads, blocks, head_dim], valid for the blocks that are complete within the first `covered` places
    of the cache; they belong to `starts`, one number per row, and `block_size`.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.means: torch.Tensor | None = None
        self.starts: tuple[int, ...] = ()
        self.block_size = 0
        self.covered = 0

    def update(self, key: torch.Tensor, starts: tuple[int, ...], block_size: int) -> torch.Tensor:
        """The means of `key` [batch, kv_heads, length, head_dim], which continues the key of the last call."""
        if (starts, block_size) != (self.starts, self.block_size) or not self._continued_by(key):
            self.forget()
            self.starts, self.block_size = starts, block_size
        batch, kv_heads, length, head_dim = key.shape
        blocks = (length - min(starts)) // block_size
        if self.means is None:
            self.means = key.new_zeros((batch, kv_heads, blocks, head_dim))
        elif (missing := blocks - self.means.shape[2]) > 0:
            self.means = torch.cat([self.means, key.new_zeros((batch, kv_heads, missing, head_dim))], 2)
        for start in set(starts):
            done, complete = max(0, self.covered - start) // block_size, (length - start) // block_size
            if done < complete:
                rows = slice(None) if len(set(starts)) == 1 else [r for r, s in enumerate(starts) if s == start]
                tokens = key[rows, :, start + done * block_size : start + complete * block_size]
                self.means[rows, :, done:complete] = _means_of(tokens, block_size)
        self.covered = length
        return self.means

    def crop(self, length: int) -> None:
        self.covered = min(self.covered, length)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        if self.means is None or not len(rows):
            self.forget()
            return
        self.means = self.means.index_select(0, rows.to(self.means.device))
        if len(set(self.starts)) == 1:  # then their order need not be known, which would cost a wait for the device
            self.starts = self.starts[:1] * len(rows)
        else:
            self.starts = tuple(self.starts[row] for row in rows.tolist())

    def _continued_by(self, key: torch.Tensor) -> bool:
        means = self.means
        if means is None or (means.dtype, means.device) != (key.dtype, key.device):
            return False
        return torch.is_inference_mode_enabled() or not means.is_inference()  # else they may not be written


def _means_of(tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """[rows, kv_heads, blocks · block_size, head_dim] → [rows, kv_heads, blocks, head_dim], as routing takes them."""
    rows = tokens.shape[:2]
    return block_means(tokens.flatten(0, 1).transpose(0, 1), block_size).unflatten(1, rows).permute(1, 2, 0, 3)
