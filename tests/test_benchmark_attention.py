"""scripts/benchmark_attention.py at small lengths: whom it times, whom it refuses and why, what it counts and draws.

The peers are stand-ins with the signatures of the real functions (MoonshotAI/MoBA; flash-moba 2.0.0) that compute by
the reference, so that a misplaced argument fails as it would there.
"""

import csv
import json
import sys
from types import ModuleType

import attention_contenders
import pytest
import torch
from attention_agreement import disagreement
from attention_contenders import Contender, Problem, block_mask, make
from checkpoints import load_script
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import moba_hf
from moba_hf.ops import blocks, engines
from moba_hf.ops.engines import flash_providers

SMALL = ["--lengths", "512", "--block-size", "64", "--top-k", "2", "--rounds", "2", "--threads", "1"]
ALONE = ["--others"]  # none of them


@pytest.fixture(scope="module")
def script():
    return load_script("benchmark_attention")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(**changes) -> Problem:
    shape = dict(length=320, batch=2, heads=4, kv_heads=2, head_dim=16, block_size=32, top_k=3)
    return Problem(**{**shape, "dtype": torch.float32, "device": "cpu", **changes})


# ---- the run as a whole --------------------------------------------------------------------------------------------


def test_rows_files_and_figures(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    rows = script.main([*SMALL, *ALONE, "--output", str(tmp_path)])
    assert [(r["length"], r["contender"]) for r in rows] == [(512, "dense"), (512, "blockwise")]
    dense, moba = rows
    assert dense["forward_ratio"] == dense["both_ratio"] == 1
    assert 0 < moba["select_s"] and dense["select_s"] != dense["select_s"]  # NaN: dense attention routes nothing
    assert moba["both_s"] > 0 and moba["peak_mb"] >= 0
    said = capsys.readouterr().out
    assert said.count("faster than dense attention") == 2  # forward, and with backward
    assert "OMP_WAIT_POLICY PASSIVE" in said
    with (tmp_path / "results.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [r["contender"] for r in rows]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["settings"]["block_size"] == 64 and written["not_run"] == []
    assert written["omp_wait_policy"] == "PASSIVE"
    assert (tmp_path / "time.png").stat().st_size and (tmp_path / "memory.png").stat().st_size


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_are_timed_and_the_absent_named(script, peers, tmp_path, monkeypatch, capsys):
    """All the others at once, FlexAttention without its compiler, which would take the time of the whole file."""
    compiled = torch.compile

    def uncompiled(function, **settings):
        if function is not flex_attention:
            return compiled(function, **settings)
        assert settings == {"dynamic": False, "fullgraph": True}
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(script, "peak_mb", lambda *_: 1.0)  # its process would not know the stand-ins
    rows = script.main([*SMALL, "--output", str(tmp_path)])
    assert [r["contender"] for r in rows] == ["dense", "flex", "moonshot_moba", "flash_moba", "blockwise"]
    flex = rows[1]
    assert flex["select_s"] > 0 and flex["both_s"] != flex["both_s"] and flex["peak_mb"] != flex["peak_mb"]
    not_run = {
        (each["contender"], each["what"]): each
        for each in json.loads((tmp_path / "results.json").read_text())["not_run"]
    }
    assert set(not_run) == {
        ("fa2", "anything"),
        ("fa3", "anything"),
        ("fa4", "anything"),
        ("flex", "forward + backward"),
    }
    assert all(each["reason"] and each["length"] == 512 for each in not_run.values())
    out = capsys.readouterr().out
    assert "fa3 did not run anything at 512 tokens: no CUDA device" in out
    assert "flex did not run forward + backward at 512 tokens: NotImplementedError: FlexAttention does not" in out


@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4"])
def test_settings_and_what_overrides_them(script, name):
    options = script.parse(["--setting", name, "--device", "cpu", "--top-k", "5"])
    expected = script.SETTINGS[name] | {"device": "cpu", "top_k": 5}
    assert {key: getattr(options, key) for key in expected} == expected


# ---- who may run ---------------------------------------------------------------------------------------------------


def reference(query, key, value, ends, block_size, top_k):
    where = dict(cu_seqlens_q=ends, cu_seqlens_k=ends, block_size=block_size, top_k=top_k)
    return moba_hf.moba_attention(query, key, value, engine="reference", **where)


@pytest.fixture
def peers(monkeypatch):
    """Both peers as importable modules; the arguments of every call by peer."""
    calls = {"moonshot_moba": [], "flash_moba": []}

    def moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk):
        assert k.shape == q.shape  # torch.stack((k, v)), and a gate of as many heads as q
        calls["moonshot_moba"].append((cu_seqlens, max_seqlen))
        return reference(q, k, v, cu_seqlens, moba_chunk_size, moba_topk)

    def flash_moba_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, moba_chunk_size, moba_topk, causal=True
    ):
        assert causal and max_seqlen_q == max_seqlen_k and cu_seqlens_q.equal(cu_seqlens_k)
        calls["flash_moba"].append((cu_seqlens_q, max_seqlen_q))
        return reference(q, k, v, cu_seqlens_q, moba_chunk_size, moba_topk)

    for module, function in (("moba.moba_efficient", moba_attn_varlen), ("flash_moba", flash_moba_varlen_func)):
        for name in (module.split(".")[0], module):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        setattr(sys.modules[module], function.__name__, function)
    return calls


@pytest.mark.parametrize("name", ["moonshot_moba", "flash_moba"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_peers_are_called_as_they_are_defined(script, peers, name, kv_heads):
    given = problem(kv_heads=kv_heads)
    contender, backward, reason = script.admitted(name, given, given.states(0), True)
    assert contender and backward and reason is None
    assert peers[name] and all(ends is given.cu_seqlens and longest == 320 for ends, longest in peers[name])
    assert given.cu_seqlens.tolist() == [0, 320, 640] and given.cu_seqlens.dtype == torch.int32


def test_flash_attention_packages_go_through_the_adapters(script, monkeypatch):
    monkeypatch.setattr(flash_providers, "_load", lambda name: flash_providers.CpuFlashAttention())
    given = problem()
    contender, backward, reason = script.admitted("fa3", given, given.states(0), True)
    assert contender.dense and backward and reason is None


def test_no_dense_attention_of_pytorch(script, monkeypatch):
    monkeypatch.setitem(
        attention_contenders.DENSE, "cpu", {"dense cudnn": torch.nn.attention.SDPBackend.CUDNN_ATTENTION}
    )
    with pytest.raises(SystemExit, match="no dense attention of PyTorch's runs.*\n.*dense cudnn did not run anything"):
        script.main([*SMALL[:2], *ALONE])


def test_an_engine_that_cannot_run_ends_the_run(script):
    with pytest.raises(SystemExit, match="triton did not run anything at 512 tokens: RuntimeError"):
        script.main([*SMALL, *ALONE, "--engines", "triton", "--no-backward"])


@pytest.mark.parametrize("module", ["moba.moba_efficient", "flash_moba"])
def test_a_peer_that_cannot_be_imported(script, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    given = problem()
    name = {"flash_moba": "flash_moba"}.get(module, "moonshot_moba")
    contender, backward, reason = script.admitted(name, given, given.states(0), True)
    assert contender is None and not backward and reason.startswith(f"{module}.") and "github.com" in reason


# ---- the same results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dense", "blockwise", "reference"])
def test_what_is_right_agrees(name, dtype):
    given = problem(dtype=dtype)
    for backward in (False, True):
        assert disagreement(given, make(name, given), given.states(1), backward) is None


class Doubled(torch.autograd.Function):
    """The identity, with a gradient twice what it is."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def wrong(given: Problem, what: str) -> Contender:
    """An engine with one fault."""
    right = make("blockwise", given).attend
    faults = {
        "output": lambda q, k, v: right(q, k, v) * 1.001,
        "one block": lambda q, k, v: make("blockwise", problem(top_k=2)).attend(q, k, v),
        "dense": lambda q, k, v: make("dense", given).attend(q, k, v),
        "last row": lambda q, k, v: torch.cat([right(q, k, v)[:-1], q.new_full((1, *q.shape[1:]), float("nan"))]),
        "grad_query": lambda q, k, v: right(Doubled.apply(q), k, v),
        "grad_key": lambda q, k, v: right(q, Doubled.apply(k), v),
        "grad_value": lambda q, k, v: right(q, k, Doubled.apply(v)),
    }
    return Contender("wrong", faults[what])


@pytest.mark.parametrize("what", ["output", "one block", "dense", "last row", "grad_query", "grad_key", "grad_value"])
def test_what_is_wrong_is_not_timed(script, monkeypatch, what):
    given = problem()
    monkeypatch.setattr(script, "make", lambda name, given: wrong(given, what))
    contender, backward, reason = script.admitted("flash_moba", given, given.states(0), True)
    in_backward = what.startswith("grad")
    assert bool(contender) == in_backward and not backward
    assert reason.startswith(f"{what if in_backward else 'output'} is not ours: relative error ")


# ---- FlexAttention's block mask ------------------------------------------------------------------------------------


# tiles are of 128: blocks smaller, equal, larger, and not dividing them; lengths that end inside tile and block;
# top-1; more blocks than there are
@pytest.mark.parametrize("length, block_size, top_k", [
    (512, 64, 3), (512, 128, 2), (700, 256, 2), (300, 48, 4), (640, 200, 2), (260, 32, 1), (400, 64, 20),
])  # fmt: skip
def test_block_mask_is_the_selection(length, block_size, top_k):
    given = problem(length=length, block_size=block_size, top_k=top_k)
    query, key, *_ = given.states(0)
    query.data[:128] = 1.0  # rows alike, so that tiles are seen whole
    selected = moba_hf.select_blocks(query, key, **given.routing)
    found = block_mask(selected, given)
    size = (given.batch, given.heads, length, length)
    dense = create_mask(found.mask_mod, *size, device="cpu")
    for at in range(given.batch):
        rows = slice(at * length, (at + 1) * length)
        span = blocks.sequence_spans(*[torch.tensor([0, length], dtype=torch.int32)] * 2)[0]
        mask = engines.load("reference").selection_mask(selected[rows], span, block_size)
        assert dense[at].equal(mask.transpose(0, 1))
    expected = create_block_mask(found.mask_mod, *size, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(mask, f"{name}_num_blocks") for mask in (found, expected)]
        assert counts[0].equal(counts[1]), name
        indices = [getattr(mask, f"{name}_indices") for mask in (found, expected)]
        listed = torch.arange(indices[0].shape[-1]) < counts[0][..., None]
        assert indices[0][listed].equal(indices[1][listed]), name


# ---- what is said of the results -----------------------------------------------------------------------------------


def test_bounds_by_hand():
    # 10 tokens in blocks of 4, top-2: own blocks 10 + 10 + 3 pairs, past blocks 4 · 4 + 2 · 4
    given = problem(length=10, block_size=4, top_k=2)
    assert given.flop_bound == 55 / (23 + 24)
    row = 2 * 10 * 16 * 4  # bytes of one head of 20 tokens
    assert given.least_bytes(True) == ((4 + 2 + 2 + 4) * row, (4 + 4 + 2 + 2) * row)
    assert given.least_bytes(False) == ((4 + 2 + 2) * row, 4 * row)


def test_crossing(script):
    nan = float("nan")
    row = lambda length, forward, both: dict(  # noqa: E731
        contender="blockwise", dense=False, length=length, forward_ratio=forward, both_ratio=both
    )
    said = script.crossing([row(10, 1.2, 0.5), row(20, 0.9, 0.6), row(30, 1.1, 0.7), row(40, 2, 0.8)]).splitlines()
    assert "forward: faster than dense attention from 30 tokens on" in said[0]
    assert "forward + backward: faster than dense attention at no length measured" in said[1]
    assert len(script.crossing([row(10, 2, nan)]).splitlines()) == 1


def test_floors(script):
    row = lambda length, dense, seconds: dict(  # noqa: E731
        length=length, dense=dense, forward_s=seconds, flop_bound=2.0, floor_mb=7.0
    )
    rows = [row(10, True, 8.0), row(10, True, 6.0), row(10, False, 1.0), row(20, True, 9.0)]
    assert script.floors(rows, "forward_s") == [(10, 3.0), (20, 4.5)]
    assert script.floors(rows, "peak_mb") == [(10, 7.0), (20, 7.0)]
    assert script.floors([row(10, True, float("nan"))], "forward_s") == []


def test_absences_are_joined_by_reason(script):
    each = lambda length, reason: dict(length=length, contender="fa2", what="anything", reason=reason)  # noqa: E731
    said = script.absences([each(10, "no device"), each(20, "no device"), each(30, "full")]).splitlines()
    assert said == [
        "fa2 did not run anything at 10, 20 tokens: no device",
        "fa2 did not run anything at 30 tokens: full",
    ]
