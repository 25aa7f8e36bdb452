"""FlashAttention kernels behind one interface: the only file that imports any of them.

A provider attends *segments*: the query rows of segment i see the key rows of segment i, no others. Names, best first:

    fa3      FlashAttention-3, module `flash_attn_interface`: Hopper
    fa4      FlashAttention-4, package `flash-attn-4`, module `flash_attn.cute`: Hopper and Blackwell
    fa2      FlashAttention-2, package `flash-attn` ≥ 2.7: Ampere and newer
    torch    the FlashAttention-2 inside PyTorch: Ampere and newer, always installed
    kernels  Hugging Face `kernels` builds of fa3 or fa2; downloads from the hub, so only when asked for
    cpu      the FlashAttention of PyTorch's CPU backend, one segment at a time: a stand-in for tests

The environment variable MOBA_HF_FLASH_PROVIDER names the one to use on CUDA, read at every call.

Signatures were read from flash-attn 2.7.0, 2.7.4 and 2.8.3, the `hopper/` folders of 2.7.4, 2.8.3 and the main branch,
flash-attn-4 4.0.0b36, kernels 0.17.2 and PyTorch 2.11 and 2.13; tests/test_flash_providers.py records them.
"""

import functools
import importlib
import inspect
import itertools
import os
from dataclasses import dataclass
from importlib import metadata

import torch

ORDER = ("fa3", "fa4", "fa2", "torch")  # what is tried when nothing is asked for
_HUB_BUILDS = {"fa3": "kernels-community/flash-attn3", "fa2": "kernels-community/flash-attn2"}


@dataclass(frozen=True)
class Segments:
    """Rows cu_seqlens_q[i]:cu_seqlens_q[i+1] of the query attend rows cu_seqlens_k[i]:cu_seqlens_k[i+1] of the key.

    cu_seqlens_*: int32 [segments + 1] from 0, contiguous. max_seqlen_*: upper bounds of the segment lengths; at least
    2, because for 1 some kernels take a path that assumes one query per segment. causal: the last query of a segment
    sees all its keys, the one before it all but the last key, and so on (aligned bottom right).
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


class Unavailable(Exception):
    """Why a provider cannot run here, with the remedy."""


def choose(device: str, dtype: torch.dtype, head_dim: int) -> "Provider":
    """The best provider for tensors like these. Raises Unavailable, saying of each one tried what it lacks."""
    if device != "cuda":
        return named("cpu", dtype, head_dim)
    asked = os.environ.get("MOBA_HF_FLASH_PROVIDER")
    if asked and asked not in (*ORDER, "kernels"):
        raise Unavailable(f"MOBA_HF_FLASH_PROVIDER={asked!r} is unknown; choose one of {(*ORDER, 'kernels')}")
    reasons = []
    for name in (asked,) if asked else ORDER:
        found = _find(name, dtype, head_dim)
        if isinstance(found, Provider):
            return found
        reasons.append(f"{name}: {found}")
    raise Unavailable("; ".join(reasons))


def named(name: str, dtype: torch.dtype, head_dim: int) -> "Provider":
    """The provider of that name, for tensors like these. Raises Unavailable."""
    if isinstance(found := _find(name, dtype, head_dim), str):
        raise Unavailable(found)
    return found


def status(dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """Each provider of `ORDER` on this machine's GPU: None where it computes tensors like these, else why not."""
    found = {name: _find(name, dtype, head_dim) for name in ORDER}
    return {name: what if isinstance(what, str) else None for name, what in found.items()}


def _find(name: str, dtype: torch.dtype, head_dim: int) -> "Provider | str":
    found = _load(name)
    return found if isinstance(found, str) else found.unfit(dtype, head_dim) or found


class Provider:
    """Variable-length attention kernels. Subclasses adapt one package each.

    forward(query, key, value, segments, scale) -> (output, lse)
    backward(grad_output, query, key, value, output, lse, segments, scale) -> (grad_query, grad_key, grad_value)

    query, output, grad_output: [rows, heads, head_dim]; key, value: [keys, kv_heads, head_dim]; heads of a group are
    adjacent. lse: float32 [heads, rows], natural logarithm. Backward may be given an output and an lse that were merged
    with other streams: the gradients are then those of this stream's share. Rows and keys of no segment come back
    undefined, and keys of a segment without queries get zero gradients.
    """

    name: str
    # Whether one thread block is launched for every tile of max_seqlen_q in every segment, needed or not.
    launches_by_max_seqlen = False

    def unfit(self, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why tensors of this dtype and head_dim cannot be computed; None when they can."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"computes float16 and bfloat16, not {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"computes head_dim up to 256 in steps of 8, not {head_dim}"
        return None


class FlashAttention2(Provider):
    """flash-attn 2.7 and 2.8. `interface` is the module `flash_attn.flash_attn_interface`."""

    name = "fa2"
    launches_by_max_seqlen = True

    def __init__(self, interface):
        self._interface = interface

    def forward(self, query, key, value, segments, scale):
        output, lse, *_ = self._interface._flash_attn_varlen_forward(
            *_kernel_ready(query, key, value), **_packed(segments),
            dropout_p=0.0, softmax_scale=scale, causal=segments.causal,
        )  # fmt: skip
        return output, lse

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        grads = _empty_grads(query, key, value)
        self._interface._flash_attn_varlen_backward(
            *_kernel_ready(grad_output, query, key, value, output), lse.contiguous(), *grads, **_packed(segments),
            dropout_p=0.0, softmax_scale=scale, causal=segments.causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads


class FlashAttention3(Provider):
    """FlashAttention-3, betas and main branch. `interface` is the module `flash_attn_interface`.

    Its argument lists differ between versions: older ones have parameters without defaults, which want None, and the
    backward's window is a pair or two numbers. The first 17 of the backward are the same, so they go by position.
    """

    name = "fa3"

    def __init__(self, interface):
        self._interface = interface

    def forward(self, query, key, value, segments, scale):
        function = self._interface._flash_attn_forward
        absent = dict.fromkeys(_required(function))
        query, key, value = _kernel_ready(query, key, value)
        given = dict(q=query, k=key, v=value, **_packed(segments), softmax_scale=scale, causal=segments.causal)
        output, lse, *_ = function(**{**absent, **given})
        return output, lse

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        grads = _empty_grads(query, key, value)
        self._interface._flash_attn_backward(
            *_kernel_ready(grad_output, query, key, value, output), lse.contiguous(),
            segments.cu_seqlens_q, segments.cu_seqlens_k, None, None, segments.max_seqlen_q, segments.max_seqlen_k,
            *grads, scale, segments.causal, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return grads


class FlashAttention4(Provider):
    """flash-attn-4. `interface` is the module `flash_attn.cute.interface`.

    Seen with 4.0.0b36 on an H100: the gradient of the query is wrong at head_dim 40, and values past the last sequence
    are read, times a weight of 0, so NaN or inf there reaches the last rows; the other kernels do not read them.
    """

    name = "fa4"

    def __init__(self, interface):
        self._interface = interface

    def unfit(self, dtype, head_dim):
        if head_dim not in (64, 128):
            return f"is used for head_dim 64 and 128, where it was verified, not {head_dim}"
        return super().unfit(dtype, head_dim)

    def forward(self, query, key, value, segments, scale):
        output, lse, *_ = self._interface._flash_attn_fwd(
            *_kernel_ready(query, key, value), **_packed(segments),
            softmax_scale=scale, causal=segments.causal, return_lse=True,
        )  # fmt: skip
        return output, lse

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        grad_output, query, key, value, output = _kernel_ready(grad_output, query, key, value, output)
        return self._interface._flash_attn_bwd(
            query, key, value, output, grad_output, lse.contiguous(), **_packed(segments),
            softmax_scale=scale, causal=segments.causal, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip


class TorchFlashAttention(Provider):
    """FlashAttention-2 inside PyTorch. `ops` is `torch.ops.aten`. Determinism follows PyTorch's own global setting."""

    name = "torch"
    launches_by_max_seqlen = True

    def __init__(self, ops):
        self._ops = ops

    def forward(self, query, key, value, segments, scale):
        output, lse, *_ = self._ops._flash_attention_forward(
            *_kernel_ready(query, key, value), segments.cu_seqlens_q, segments.cu_seqlens_k,
            segments.max_seqlen_q, segments.max_seqlen_k, 0.0, segments.causal, False, scale=scale,
        )  # fmt: skip
        return output, lse

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        no_dropout_state = query.new_empty(2, dtype=torch.uint64)
        return self._ops._flash_attention_backward(
            *_kernel_ready(grad_output, query, key, value, output), lse.contiguous(),
            segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k,
            0.0, segments.causal, no_dropout_state, no_dropout_state[:0], scale=scale,
        )  # fmt: skip


class CpuFlashAttention(Provider):
    """The stand-in for tests: same contract, any float dtype, a Python loop over the segments.

    What the contract leaves undefined is NaN here, so that a test shows any use of it.
    """

    name = "cpu"

    def unfit(self, dtype, head_dim):
        return None

    def forward(self, query, key, value, segments, scale):
        output = torch.full(query.shape, float("nan"), dtype=query.dtype)
        lse = torch.full(query.shape[1::-1], float("nan"), dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, keys in _spans(segments):
            arguments = _as_batch(query[rows], key[keys], value[keys])
            out, row_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *arguments, attn_mask=_mask(arguments, segments.causal), scale=scale
            )
            output[rows], lse[:, rows] = _as_rows(out), row_lse.flatten(0, 1)
        return output, lse

    def backward(self, grad_output, query, key, value, output, lse, segments, scale):
        grads = tuple(torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (query, key, value))
        for grad in grads[1:]:
            grad[: segments.cu_seqlens_k[-1]] = 0
        for rows, keys in _spans(segments):
            arguments = _as_batch(query[rows], key[keys], value[keys])
            grad, out = (_as_batch(x[rows], key[keys], value[keys])[0].contiguous() for x in (grad_output, output))
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, *arguments, out, lse[:, rows].unflatten(0, grad.shape[:2]).contiguous(), 0.0, False,
                attn_mask=_mask(arguments, segments.causal), scale=scale,
            )  # fmt: skip
            grads[0][rows] = _as_rows(dq)
            grads[1][keys], grads[2][keys] = (x.sum(1).transpose(0, 1) for x in (dk, dv))
        return grads


def _spans(segments: Segments):
    """(query rows, key rows) of every segment that has queries, as slices. Holds the caller to its bounds."""
    for cu, longest in ((segments.cu_seqlens_q, segments.max_seqlen_q), (segments.cu_seqlens_k, segments.max_seqlen_k)):
        if cu.dtype != torch.int32 or cu[0] != 0 or not 0 <= cu.diff().min() <= cu.diff().max() <= longest:
            raise ValueError(f"segments {cu.tolist()} must be int32, begin at 0 and be no longer than {longest}")
    q, k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    pairs = zip(itertools.pairwise(q), itertools.pairwise(k))
    return [(slice(*rows), slice(*keys)) for rows, keys in pairs if rows[0] < rows[1]]


def _as_batch(query, key, value):
    """[rows, heads, head_dim] → [kv_heads, group, rows, head_dim]; a group sees its one key head through stride 0."""
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    key, value = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (key, value))
    return query.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3), key, value


def _as_rows(x):
    """The way back: [kv_heads, group, rows, head_dim] → [rows, heads, head_dim]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _mask(batch, causal: bool) -> torch.Tensor | None:
    """Additive [rows, keys], aligned bottom right; the CPU kernel's own causal mask is aligned top left."""
    if not causal:
        return None
    query, key, _ = batch
    rows, keys = query.shape[2], key.shape[2]
    return torch.full((rows, keys), float("-inf"), dtype=query.dtype).triu_(keys - rows + 1)


# ---- arguments -----------------------------------------------------------------------------------------------------


def _packed(segments: Segments) -> dict:
    """The arguments that FA2, FA3 and FA4 name alike."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return {name: getattr(segments, name) for name in names}


def _kernel_ready(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies what the kernels cannot load 16 bytes at a time; their own checks cover the last stride only."""

    def aligned(x):
        strides = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
        return x.stride(-1) == 1 and all(s % 16 == 0 for s in strides)

    # clone, because contiguous() leaves alone what is contiguous but begins at an odd place
    return [x if aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _empty_grads(query, key, value):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _required(function) -> list[str]:
    """Parameters without a default. Custom ops show none, which is right for the versions that are custom ops."""
    parameters = inspect.signature(function).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in plain and p.default is inspect.Parameter.empty]


# ---- loading -------------------------------------------------------------------------------------------------------


@functools.cache  # once per process: looking for a package that is not there takes as long as a few kernels
def _load(name: str) -> Provider | str:
    """The provider, or why it is not available."""
    try:
        return dict(fa3=_fa3, fa4=_fa4, fa2=_fa2, torch=_torch, kernels=_hub_build, cpu=CpuFlashAttention)[name]()
    except Unavailable as reason:
        return str(reason)


def _fa3() -> Provider:
    if _capability()[0] != 9:
        raise Unavailable("runs on Hopper GPUs (compute capability 9.0) only")
    return FlashAttention3(_import("flash_attn_interface", "FlashAttention-3 is not installed"))


def _fa4() -> Provider:
    if _capability()[0] not in (9, 10, 11):
        raise Unavailable("its backward runs on Hopper and Blackwell GPUs (compute capability 9, 10, 11) only")
    # flash-attn 2.8 carries an early flash_attn.cute of its own, so the distribution decides, not the module.
    _version("flash-attn-4", "pip install flash-attn-4")
    return FlashAttention4(_import("flash_attn.cute.interface", "flash-attn-4 cannot be imported"))


def _fa2() -> Provider:
    _check_ampere()
    version = _version("flash-attn", "pip install 'flash-attn>=2.7'")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):
        raise Unavailable(f"flash-attn {version} is too old: 2.7 or newer is needed")
    return FlashAttention2(_import("flash_attn.flash_attn_interface", "flash-attn cannot be imported"))


def _torch() -> Provider:
    _check_ampere()
    if not torch.backends.cuda.is_flash_attention_available():
        raise Unavailable("this PyTorch was built without FlashAttention")
    return TorchFlashAttention(torch.ops.aten)


def _hub_build() -> Provider:
    adapter = FlashAttention3 if _capability()[0] == 9 else FlashAttention2
    _check_ampere()
    kernels = _import("kernels", "pip install kernels")
    repository = _HUB_BUILDS[adapter.name]
    try:
        module = kernels.get_kernel(repository, version=1)
        return adapter(module.flash_attn_interface)
    except Exception as error:  # the hub, the network, the cache and the build can each fail in ways of their own
        raise Unavailable(f"{repository} could not be loaded: {error}; restart Python to try again") from error


def _check_ampere() -> None:
    if _capability()[0] < 8:
        raise Unavailable("runs on Ampere GPUs (compute capability 8.0) and newer only")


def _capability() -> tuple[int, int]:
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    return torch.cuda.get_device_capability()


def _version(distribution: str, remedy: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Unavailable(f"not installed ({remedy})") from None


def _import(module: str, problem: str):
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared library of another PyTorch or CUDA
        raise Unavailable(f"{problem}: {error}") from error
