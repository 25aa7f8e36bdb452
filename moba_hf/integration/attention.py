"""The adapter: what Transformers calls in every attention layer of a model loaded with attn_implementation="moba"."""

import contextlib
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from ..config import MobaConfig
from ..ops import cached_attention, dense_attention, moba_attention
from .sequences import find_cached_rows, find_sequences, whole_rows

logger = logging.get_logger(__name__)


def moba_attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention of one layer: MoBA, or full attention where the settings or the shapes ask for it.

    Args:
        module: the attention layer; `module.config.moba` holds the settings, `module.layer_idx` its number.
        query: [batch, heads, q_len, head_dim]; key, value: [batch, kv_heads, kv_len, head_dim]; any strides. The
            queries are the last q_len positions of each sequence.
        attention_mask: None or the segment ids of `masking.moba_mask`; for layers that keep the model's own attention
            (sliding window, bidirectional) a mask of `sdpa_mask`.
        dropout: must be 0. scaling: factor on the scores; head_dim ** -0.5 where None.
        kwargs: `sliding_window`, `cu_seq_lens_q`, `cu_seq_lens_k` and `position_ids` are read. Documents come from the
            first of mask, cu_seq_lens_*, position_ids that speaks of any.

    Returns:
        ([batch, q_len, heads, head_dim], None), as every attention function of Transformers.

    Raises:
        ValueError: what MoBA cannot compute correctly, before any work is done.
    """
    own_attention = kwargs.get("sliding_window") is not None or not getattr(module, "is_causal", True)
    _refuse(module, query, key, value, attention_mask, dropout, kwargs, own_attention)
    query, key, value = _same_dtype(query, key, value)
    if own_attention:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    settings = MobaConfig.from_dict(module.config.moba or {})
    q_len, kv_len = query.shape[2], key.shape[2]
    dense = _is_dense(module, settings, q_len, kv_len)
    if q_len == 1 and dense:
        return _decode(module, query, key, value, attention_mask, scaling)
    if not dense and (rows := _rows_with_means(query, key, attention_mask, settings, kwargs)):
        _warn_untrained(module)
        return _attend_cached(query, key, value, rows, settings, scaling), None
    sequences = find_sequences(
        attention_mask,
        (query.shape[0], q_len),
        kv_len,
        query.device,
        cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
        cu_seq_lens_k=kwargs.get("cu_seq_lens_k"),
        position_ids=kwargs.get("position_ids"),
    )
    if dense and sequences is None and q_len == kv_len:
        return sdpa_attention_forward(module, query, key, value, None, 0.0, scaling, is_causal=True)
    if not dense:
        _warn_untrained(module)
    sequences = sequences or whole_rows(query.shape[0], q_len, kv_len, query.device)
    output = _attend(query, key, value, sequences, settings, scaling, dense)
    return sequences.unpack(output, query.shape[0], q_len), None


def _rows_with_means(query, key, segments, settings: MobaConfig, kwargs):
    """Where to attend through the means that a MobaCache keeps: few queries, each row one sequence; else None.

    Few: gathering their blocks, for each query anew, takes no more keys than a head has.
    """
    few = query.shape[2] == 1 or query.shape[2] * settings.block_size * settings.top_k <= key.shape[2]
    packed = kwargs.get("cu_seq_lens_q") is not None or query.shape[2] == key.shape[2]
    if not hasattr(key, "moba_layer") or not few or packed or settings.engine == "reference":
        return None
    return find_cached_rows(segments, (query.shape[0], query.shape[2]), key.device)


def _attend_cached(query, key, value, rows, settings: MobaConfig, scaling) -> torch.Tensor:
    means = key.moba_layer.block_means(key, rows.starts, settings.block_size)
    where = dict(block_size=settings.block_size, top_k=settings.top_k, scale=scaling, engine=settings.engine)
    return cached_attention(query, key, value, means, rows.on_device, **where)


def _attend(query, key, value, sequences, settings: MobaConfig, scaling, dense: bool) -> torch.Tensor:
    query, key, value = sequences.pack(query, key, value)
    where = dict(cu_seqlens_q=sequences.cu_seqlens_q, cu_seqlens_k=sequences.cu_seqlens_k, scale=scaling)
    if dense:
        return dense_attention(query, key, value, **where)
    return moba_attention(
        query, key, value, block_size=settings.block_size, top_k=settings.top_k, engine=settings.engine, **where
    )


def _is_dense(module, settings: MobaConfig, q_len: int, kv_len: int) -> bool:
    """Whether this layer attends everything: by its number, when decoding, or where the blocks cover all keys."""
    if settings.full_attention_layers:
        if module.layer_idx in settings.full_layers(module.config.num_hidden_layers):
            return True
    if q_len == 1 and settings.decode == "full":
        return True
    return settings.engine == "auto" and settings.block_size * settings.top_k >= kv_len


def _decode(module, query, key, value, segments, scaling):
    """One new token per row against all keys of its sequence: [batch, 1, 1, kv_len] is all the mask it takes."""
    visible = None
    if segments is not None:  # the new token's document is the last one of its row
        visible = segments == segments.amax(-1, keepdim=True)
    with _kernels_without_plans(query):
        return sdpa_attention_forward(module, query, key, value, visible, 0.0, scaling, is_causal=False)


# cuDNN, which PyTorch prefers on Hopper, makes a plan for every new length of the cache: 32 ms a token on an H100,
# where FlashAttention takes 0.2 ms a layer at 128K keys.
_DECODING = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


def _kernels_without_plans(query):
    """PyTorch's dense kernels, those first that take any length as it comes; a choice that the user has made stays."""
    if not query.is_cuda or torch.compiler.is_compiling():  # a compiled step has a static cache, of one length
        return contextlib.nullcontext()
    cuda = torch.backends.cuda
    enabled = cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled, cuda.math_sdp_enabled
    if not all(kernel() for kernel in enabled):  # sdpa_kernel would enable them, and leave the user's ones first
        return contextlib.nullcontext()
    return sdpa_kernel(_DECODING, set_priority=True)


def _same_dtype(query, key, value):
    """Under autocast query and key arrive in float32 (rotary embedding) and value in the autocast dtype."""
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    device = query.device.type
    target = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return query.to(target), key.to(target), value.to(target)


def _warn_untrained(module) -> None:
    if module.training or torch.compiler.is_compiling() or getattr(module.config, "moba_trained_tokens", None):
        return
    logger.warning_once(
        "moba_hf: this model runs sparse attention (MoBA), but nothing in its config says that it was trained with it. "
        "MoBA needs continued training; without it the output gets worse with length. Train it with "
        "scripts/continue_pretrain.py, or use full attention: model.set_attn_implementation('sdpa'). "
        "If it was trained, set config.moba_trained_tokens to the number of tokens."
    )


# ---- what cannot be computed is refused ----------------------------------------------------------------------------

_UNSUPPORTED = {
    "softcap": "a soft cap on the scores (Gemma 2)",
    "s_aux": "attention sinks (gpt-oss)",
    "position_bias": "a position bias added to the scores (T5)",
}


def _refuse(module, query, key, value, attention_mask, dropout, kwargs, own_attention: bool) -> None:
    """Raise ValueError for anything MoBA would compute wrongly."""
    if kwargs.get("cache") is not None:
        raise ValueError(
            "moba does not support continuous batching (paged caches); use model.generate, or sdpa for full attention"
        )
    if _in_ring_context_parallel():
        raise ValueError(
            "moba cannot run under ring context parallelism: a shard cannot route over the whole sequence. "
            "Use Ulysses sequence parallelism, where each rank holds all tokens of some heads"
        )
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"moba does not support {name}, {what}; use attn_implementation='eager' for this model")
    if kwargs.get("output_attentions"):
        raise ValueError("moba does not compute attention weights (output_attentions); use attn_implementation='eager'")
    if own_attention:
        return
    if dropout:
        raise ValueError(f"moba does not support attention dropout, but it was {dropout}; set attention_dropout to 0")
    if kwargs.get("is_causal") is False:
        raise ValueError("moba is causal attention, but is_causal=False was given")
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(f"moba needs equal head dims, but key has {key.shape[-1]} and value {value.shape[-1]}")
    batch, kv_len = query.shape[0], key.shape[2]
    if attention_mask is not None and (
        attention_mask.dtype != torch.int32 or tuple(attention_mask.shape) != (batch, 1, 1, kv_len)
    ):
        raise ValueError(
            f"moba takes no custom attention mask, but got {attention_mask.dtype} {tuple(attention_mask.shape)}; "
            f"pass a 2D padding mask [batch, length], or pack documents with position_ids"
        )


def _in_ring_context_parallel() -> bool:
    """PyTorch's ring attention replaces F.scaled_dot_product_attention and records the replacement."""
    ring = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    return ring is not None and torch.nn.functional.scaled_dot_product_attention in ring._replaced_functions
