"""Each adapter against the real signatures, recorded here, and against what goes wrong when a package does not fit.

A stub takes exactly the parameters of the real function, in its order, and answers with results of the real shapes; so
a misspelt, misplaced or missing argument fails as it would there. Recorded from flash-attn 2.7.4.post1 and 2.8.3
(PyPI), their `hopper/` folders and that of the main branch (FlashAttention-3), flash-attn-4 4.0.0b36 (PyPI), and
torch.ops.aten of PyTorch 2.11 (CUDA build) and 2.13.
"""

import inspect
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moba_hf.ops.engines import flash_providers as providers
from moba_hf.ops.engines.flash_providers import Segments

# Parameters in order; after "*" keyword-only; "=" marks one with a default. Types and values play no part.
SIGNATURES = {
    "fa2 2.7.4, 2.8.3": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left= "
        "window_size_right= softcap= alibi_slopes= return_softmax= block_table= leftpad_k= seqused_k= zero_tensors=",
        "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
        "softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic rng_state= "
        "zero_tensors=",
    ),
    "fa3 in 2.7.4": (
        "q k v k_new v_new out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q "
        "max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin q_descale k_descale v_descale "
        "softmax_scale causal window_size= sink_token_length= softcap= rotary_interleaved= num_splits= pack_gqa= "
        "sm_margin=",
        "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv "
        "softmax_scale causal window_size= sink_token_length= softcap= deterministic= sm_margin=",
    ),
    "fa3 in 2.8.3": (
        "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q "
        "max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale "
        "v_descale softmax_scale causal window_size= attention_chunk= softcap= rotary_interleaved= scheduler_metadata= "
        "num_splits= pack_gqa= sm_margin=",
        "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv "
        "softmax_scale causal window_size= softcap= deterministic= sm_margin=",
    ),
    "fa3 main": (
        "q k v k_new= v_new= qv= out_= cu_seqlens_q= cu_seqlens_k= cu_seqlens_k_new= seqused_q= seqused_k= "
        "max_seqlen_q= max_seqlen_k= page_table= kv_batch_idx= leftpad_k= rotary_cos= rotary_sin= seqlens_rotary= "
        "q_descale= k_descale= v_descale= softmax_scale= causal= window_size_left= window_size_right= attention_chunk= "
        "softcap= rotary_interleaved= scheduler_metadata= num_splits= pack_gqa= sm_margin=",
        "dout q k v out softmax_lse cu_seqlens_q= cu_seqlens_k= sequed_q= sequed_k= max_seqlen_q= max_seqlen_k= dq= "
        "dk= dv= softmax_scale= is_causal= window_size_left= window_size_right= softcap= deterministic= sm_margin=",
    ),
    "fa4 4.0.0b36": (
        "q k v qv= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= min_seqlen_k= "
        "page_table= softmax_scale= causal= softcap= window_size_left= window_size_right= learnable_sink= tile_mn= "
        "mma_pv_is_rs= intra_wg_overlap= num_threads= num_splits= pack_gqa= _arch= score_mod= mask_mod= "
        "block_sparse_tensors= return_lse= out= lse= aux_tensors= aux_scalars= q_descale= k_descale= v_descale= "
        "gather_kv_indices= scheduler_metadata= seqlen_k_per_split= disable_scheduler_metadata= "
        "gather_bwd_recompute_p=",
        "q k v out dout lse softmax_scale= causal= softcap= window_size_left= window_size_right= m_block_size= "
        "n_block_size= num_threads= pack_gqa= num_stages_Q= num_stages_dO= SdP_swapAB= dKV_swapAB= dQ_swapAB= "
        "AtomLayoutMSdP= AtomLayoutNdKV= AtomLayoutMdQ= V_in_regs= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= "
        "max_seqlen_q= max_seqlen_k= deterministic= dq= dk= dv= score_mod= score_mod_bwd= mask_mod= aux_tensors= "
        "aux_scalars= block_sparse_tensors= dlse= learnable_sink=",
    ),
    "torch 2.11": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask * scale= "
        "window_size_left= window_size_right= seqused_k= alibi_slopes=",
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused * "
        "scale= window_size_left= window_size_right=",
    ),
    "torch 2.13": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask * scale= "
        "window_size_left= window_size_right= seqused_k= alibi_slopes= block_table= num_splits=",
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused * "
        "scale= window_size_left= window_size_right=",
    ),
}
ALIASES = {  # one vocabulary for what the adapters pass
    "query": "q", "key": "k", "value": "v", "grad_out": "dout", "logsumexp": "lse", "softmax_lse": "lse",
    "cum_seq_q": "cu_seqlens_q", "cum_seq_k": "cu_seqlens_k", "max_q": "max_seqlen_q", "max_k": "max_seqlen_k",
    "scale": "softmax_scale", "is_causal": "causal",
}  # fmt: skip
DEFAULT = object()


def stub(signature: str, calls: list, results):
    """A function with these parameters that notes its arguments, by name, and answers with `results(arguments)`."""
    kind, parameters = inspect.Parameter.POSITIONAL_OR_KEYWORD, []
    for word in signature.split():
        if word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        default = DEFAULT if word.endswith("=") else inspect.Parameter.empty
        parameters.append(inspect.Parameter(word.rstrip("="), kind, default=default))
    signature = inspect.Signature(parameters)

    def function(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        calls.append({ALIASES.get(name, name): x for name, x in bound.arguments.items()})
        return results(calls[-1])

    function.__signature__ = signature
    return function


def forward_results(given):
    """(output, lse [heads, rows], and as much besides as each package returns)."""
    rows, heads, _ = given["q"].shape
    return given["q"] + 1, torch.arange(heads * rows, dtype=torch.float32).view(heads, rows), None, None, None


def backward_results(given):
    """Gradients into dq, dk, dv where these are passed; otherwise as the result."""
    if "dq" in given:
        for name in ("dq", "dk", "dv"):
            given[name].copy_(given[name[1:]] * 2)
        return torch.zeros(1)
    return tuple(given[name] * 2 for name in ("q", "k", "v"))


def adapter(package: str):
    """(provider over stubs of this package, the notes of its forward calls, of its backward calls)."""
    calls = [], []
    forward, backward = (stub(*x) for x in zip(SIGNATURES[package], calls, (forward_results, backward_results)))
    kind = package.split()[0]
    if kind == "fa2":
        module = SimpleNamespace(_flash_attn_varlen_forward=forward, _flash_attn_varlen_backward=backward)
        return providers.FlashAttention2(module), *calls
    if kind == "fa3":
        module = SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)
        return providers.FlashAttention3(module), *calls
    if kind == "fa4":
        module = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
        return providers.FlashAttention4(module), *calls
    module = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    return providers.TorchFlashAttention(module), *calls


QUERY, KEY, VALUE = torch.randn(6, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
CU_Q, CU_K = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
SEGMENTS = {causal: Segments(CU_Q, CU_K, 4, 5, causal) for causal in (False, True)}
ABSENT = (None, False, 0, 0.0, -1, DEFAULT)  # what an argument may be that the adapter has no use for


def check_call(given: dict, expected: dict):
    for name, value in expected.items():
        assert given[name] is value if isinstance(value, torch.Tensor) else given[name] == value, name
    assert given["cu_seqlens_q"].dtype == given["cu_seqlens_k"].dtype == torch.int32
    used = {*expected, "dq", "dk", "dv", "rng_state", "unused"}
    others = {name: value for name, value in given.items() if name not in used}
    assert all(any(value is x or value == x for x in ABSENT) for value in others.values()), others


@pytest.mark.parametrize("package", SIGNATURES)
@pytest.mark.parametrize("causal", [False, True])
def test_forward_arguments_and_results(package, causal):
    provider, calls, _ = adapter(package)
    output, lse = provider.forward(QUERY, KEY, VALUE, SEGMENTS[causal], 0.3)
    expected = dict(q=QUERY, k=KEY, v=VALUE, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, max_seqlen_q=4, max_seqlen_k=5,
                    softmax_scale=0.3, causal=causal)  # fmt: skip
    if provider.name == "fa4":
        expected["return_lse"] = True
    check_call(*calls, expected)
    assert torch.equal(output, QUERY + 1) and lse.shape == (4, 6)


@pytest.mark.parametrize("package", SIGNATURES)
@pytest.mark.parametrize("causal", [False, True])
def test_backward_arguments_and_results(package, causal):
    provider, _, calls = adapter(package)
    grad, output, lse = torch.randn(6, 4, 8), torch.randn(6, 4, 8), torch.randn(6, 4).T
    grads = provider.backward(grad, QUERY, KEY, VALUE, output, lse, SEGMENTS[causal], 0.3)
    given = calls[0]
    assert torch.equal(given["lse"], lse) and given.pop("lse").is_contiguous()  # the kernels assume it
    expected = dict(dout=grad, q=QUERY, k=KEY, v=VALUE, out=output, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K,
                    max_seqlen_q=4, max_seqlen_k=5, softmax_scale=0.3, causal=causal)  # fmt: skip
    check_call(given, expected)
    assert all(torch.equal(x, y * 2) for x, y in zip(grads, (QUERY, KEY, VALUE)))


@pytest.mark.parametrize("package", [x for x in SIGNATURES if "torch" not in x])
def test_determinism_is_passed_on(package):
    """PyTorch's own kernels read the setting themselves."""
    provider, _, calls = adapter(package)
    torch.use_deterministic_algorithms(True)
    try:
        provider.backward(QUERY, QUERY, KEY, VALUE, QUERY, torch.zeros(4, 6), SEGMENTS[True], 0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[0]["deterministic"] is True


def test_recorded_torch_signature_is_this_torch():
    """Read from torch.ops: a PyTorch that adds optional arguments passes, one that changes the others does not."""
    for name, recorded in zip(("forward", "backward"), SIGNATURES["torch 2.11"]):
        arguments = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema.arguments
        positional = [x.name for x in arguments if not x.kwarg_only]
        assert positional == recorded.split("*")[0].split() and "scale" in {x.name for x in arguments if x.kwarg_only}


def test_misaligned_views_are_copied():
    """The kernels load 16 bytes at a time: a view that begins or steps elsewhere goes as a copy, others as they are."""
    provider, calls, _ = adapter("fa2 2.7.4, 2.8.3")
    shifted = torch.randn(6 * 4 * 8 + 1)[1:].view(6, 4, 8)
    odd_step = torch.randn(9, 2, 9)[..., :8]
    heads_first = torch.randn(2, 9, 8).transpose(0, 1)
    provider.forward(shifted, odd_step, heads_first, SEGMENTS[True], 1.0)
    assert calls[0]["q"] is not shifted and torch.equal(calls[0]["q"], shifted)
    assert calls[0]["k"].is_contiguous() and torch.equal(calls[0]["k"], odd_step)
    assert calls[0]["v"] is heads_first


# ---- which provider, and why not ------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine described by (compute capability, installed distributions, importable modules)."""

    def describe(capability, versions=(), modules=()):
        versions = dict(versions)
        providers._load.cache_clear()
        monkeypatch.delenv("MOBA_HF_FLASH_PROVIDER", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: "torch" in modules)
        for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute", "kernels"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name) if name in modules else None)
        for name in ("flash_attn.flash_attn_interface", "flash_attn.cute.interface"):
            parent = name.rpartition(".")[0]
            monkeypatch.setitem(sys.modules, name, ModuleType(name) if parent in modules else None)

        def version(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(providers.metadata, "version", version)

    yield describe
    providers._load.cache_clear()


EVERYTHING = dict(
    versions={"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36"},
    modules=("flash_attn_interface", "flash_attn", "flash_attn.cute", "torch"),
)


def best(head_dim=128, dtype=torch.bfloat16):
    return providers.choose("cuda", dtype, head_dim).name


def test_best_first(machine):
    machine(9, **EVERYTHING)
    assert best() == "fa3"
    machine(10, **EVERYTHING)
    assert best() == "fa4" and best(head_dim=40) == best(head_dim=256) == "fa2"
    machine(8, **EVERYTHING)
    assert best() == "fa2"
    machine(9, modules=("torch",))
    assert best() == "torch"


def test_looks_for_what_is_missing_once(machine, monkeypatch):
    """Every layer of a model asks; a search for packages that are not there takes as long as a kernel."""
    machine(9, modules=("torch",))
    asked, version = [], providers.metadata.version
    monkeypatch.setattr(providers.metadata, "version", lambda name: asked.append(name) or version(name))
    assert best() == best() == "torch"
    assert sorted(asked) == ["flash-attn", "flash-attn-4"]


def test_asked_for(machine, monkeypatch):
    machine(9, **EVERYTHING)
    monkeypatch.setenv("MOBA_HF_FLASH_PROVIDER", "torch")
    assert best() == "torch"
    monkeypatch.setenv("MOBA_HF_FLASH_PROVIDER", "fa5")
    with pytest.raises(providers.Unavailable, match="'fa5' is unknown"):
        best()
    monkeypatch.setenv("MOBA_HF_FLASH_PROVIDER", "kernels")
    with pytest.raises(providers.Unavailable, match="pip install kernels"):
        best()


def test_kernels_from_the_hub(machine, monkeypatch):
    """A build of FlashAttention-3 on Hopper, of FlashAttention-2 elsewhere; a hub out of reach is only a reason."""
    for capability, repository, name in ((9, "flash-attn3", "fa3"), (8, "flash-attn2", "fa2")):
        machine(capability, modules=("kernels",))
        monkeypatch.setenv("MOBA_HF_FLASH_PROVIDER", "kernels")
        build = SimpleNamespace(flash_attn_interface=SimpleNamespace())
        asked = []
        sys.modules["kernels"].get_kernel = lambda *x, asked=asked, build=build, **y: asked.append((x, y)) or build
        assert best() == name and asked == [((f"kernels-community/{repository}",), {"version": 1})]

    def offline(*_, **__):
        raise ConnectionError("no route to the hub")

    providers._load.cache_clear()
    sys.modules["kernels"].get_kernel = offline
    with pytest.raises(providers.Unavailable, match="no route to the hub"):
        best()


@pytest.mark.parametrize(
    ("capability", "versions", "modules", "reasons"),
    [
        (None, {}, (), ["fa3: no CUDA device", "torch: no CUDA device"]),
        (7, {}, ("torch",), ["torch: runs on Ampere GPUs"]),
        (9, {}, (), ["fa3: FlashAttention-3 is not installed", "pip install flash-attn-4", "built without"]),
        (9, {"flash-attn": "2.6.3"}, ("flash_attn",), ["flash-attn 2.6.3 is too old"]),
        # flash-attn 2.8 has a flash_attn.cute of its own, and flash-attn-4 alone a flash_attn without FlashAttention-2
        (
            10,
            {"flash-attn": "2.8.3"},
            ("flash_attn.cute",),
            ["fa4: not installed", "fa2: flash-attn cannot"],
        ),
        (9, {"flash-attn-4": "4.0.0b36"}, (), ["fa4: flash-attn-4 cannot be imported"]),
    ],
)
def test_reasons(machine, capability, versions, modules, reasons):
    machine(capability, versions, modules)
    with pytest.raises(providers.Unavailable) as error:
        best()
    assert all(reason in str(error.value) for reason in reasons), error.value


def test_tensors_that_no_kernel_takes(machine):
    machine(9, **EVERYTHING)
    for head_dim, dtype in ((128, torch.float32), (100, torch.bfloat16), (264, torch.float16)):
        with pytest.raises(providers.Unavailable, match="computes"):
            best(head_dim, dtype)
