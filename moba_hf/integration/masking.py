"""The mask function: what Transformers knows about padding and documents, in O(kv_len) instead of a [Q, K] mask."""

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask


def moba_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset=0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device="cpu",
    **kwargs,
) -> torch.Tensor | None:
    """Segment ids int32 [batch, 1, 1, kv_length] (see `sequences`), or None where every row is one whole sequence.

    Arguments are those Transformers passes to every mask function. Masks of sliding, chunked, bidirectional and custom
    attention are made by `sdpa_mask`, because those layers do not run MoBA (custom ones are refused by the adapter).
    """
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap,
        allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=bool(allow_is_bidirectional_skip),
        device=device, **kwargs,
    )  # fmt: skip
    index = torch.arange(kv_length, device=device) + kv_offset
    compiling = torch.compiler.is_compiling()
    special = not allow_is_causal_skip and q_length > 1  # documents, or a pattern that is not MoBA's to compute
    bidirectional = allow_is_bidirectional_skip is not None  # said for such masks alone
    if local_size is not None or use_vmap or bidirectional:
        return sdpa_mask(**arguments)
    if special and not compiling and _sees_future(mask_function, batch_size, index):
        return sdpa_mask(**arguments)

    static = isinstance(q_offset, torch.Tensor) or kv_length > q_offset + q_length
    packed = special and attention_mask is None and q_length == kv_length
    if not static and not packed and (attention_mask is None or (not compiling and attention_mask.all())):
        return None
    segments = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    if packed:
        segments = segments + _document_number(mask_function, batch_size, index)
    if attention_mask is not None:
        missing = max(0, kv_length + kv_offset - attention_mask.shape[-1])
        real = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
        segments = torch.where(real[:, kv_offset : kv_offset + kv_length], segments, 0)
    if static:
        segments = torch.where(index < q_offset + q_length, segments, -1)
    return segments[:, None, None, :].int()


def _cells(mask_function, batch_size: int, query_index, key_index) -> torch.Tensor:
    """mask_function at (query_index[i], key_index[i]) for every row: bool [batch, len(query_index)]."""
    row = torch.arange(batch_size, device=query_index.device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=query_index.device)
    return mask_function(row, head, query_index[None], key_index[None]).expand(batch_size, query_index.shape[0])


def _sees_future(mask_function, batch_size: int, index: torch.Tensor) -> bool:
    """Whether any token may attend the token after it: then the mask is not causal."""
    return bool(_cells(mask_function, batch_size, index[:-1], index[1:]).any())


def _document_number(mask_function, batch_size: int, index: torch.Tensor) -> torch.Tensor:
    """Documents counted from 0 along each row: one starts where a token may not attend the token before it."""
    follows = _cells(mask_function, batch_size, index[1:], index[:-1])
    return torch.nn.functional.pad((~follows).cumsum(-1), (1, 0))
