"""The planner against hand-computed cases, the design's table, PyTorch's FLOP counter and measured memory."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import moba_hf
from moba_hf import planner
from moba_hf.planner import ModelShape, Sharing, Work

H100 = planner.DEVICES["h100"]
CPU = dataclasses.replace(H100, workspace=0)  # the blockwise engine keeps no partial results
LLAMA = planner.PRESETS["llama-3.1-8b"]

# The design's cost model (kernels.md): gate, forward, backward in TFLOP; floor forward, forward + backward in ms.
S1 = dict(batch=2, heads=16, kv_heads=16, block_size=128, top_k=8)
S4 = dict(batch=1, heads=32, kv_heads=8, block_size=512, top_k=8)
SETTINGS = {
    "S1 8K": (S1, 8 << 10, (0.002, 0.12, 0.30), (0.23, 0.70)),
    "S1 32K": (S1, 32 << 10, (0.03, 0.51, 1.3), (0.97, 2.9)),
    "S1 64K": (S1, 64 << 10, (0.14, 1.0, 2.6), (2.0, 5.9)),
    "S1 128K": (S1, 128 << 10, (0.55, 2.1, 5.1), (4.4, 12)),
    "S1 512K": (S1, 512 << 10, (8.8, 8.2, 20.6), (28, 59)),
    "S2 1M": (dict(S4, block_size=4096, top_k=12), 1 << 20, (1.1, 791, 1978), (1221, 4264)),
    "S3 10M": (dict(S4, block_size=(10 << 20) // 64, top_k=3), 10 << 20, (2.7, 69e3, 173e3), (106e3, 372e3)),
    "S4 top-8": (S4, 128 << 10, (0.14, 8.1, 20), (13, 44)),
    "S4 top-16": (dict(S4, top_k=16), 128 << 10, (0.14, 16.5, 41), (26, 90)),
}


def counted(setting: dict, length: int, sparse: bool = True) -> planner.AttentionCounts:
    heads, kv_heads = (setting["batch"] * setting[name] for name in ("heads", "kv_heads"))
    work = Work(length, setting["block_size"], setting["top_k"])
    return (planner.moba_counts if sparse else planner.dense_counts)(heads, kv_heads, 128, work)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_designs_table_is_reproduced(name):
    setting, length, flops, floor = SETTINGS[name]
    count = counted(setting, length)
    found = (count.gate_flops, count.forward_flops, count.backward_flops)
    for value, expected in zip(found, flops):  # the table has one to four digits
        assert value / 1e12 == pytest.approx(expected, rel=0.16 if expected < 0.1 else 0.03)
    time = planner.floor_time(count)
    assert (time.select + time.forward) * 1e3 == pytest.approx(floor[0], rel=0.02)
    assert time.both * 1e3 == pytest.approx(floor[1], rel=0.03)


# docs/measurements/h100-stages.txt: select, forward, backward, and cuDNN's forward and forward + backward, in ms
MEASURED = {
    "S1 32K": (0.76, 3.35, 6.45, 13.65, 54.28),
    "S1 64K": (2.35, 6.87, 12.77, 56.44, 219.34),
    "S1 128K": (6.58, 14.11, 26.25, 242.65, 912.42),
    "S1 512K": (64.54, 61.52, 110.49, 4469.81, 14872.43),
    "S2 1M": (32.90, 1787.73, None, 18574.57, None),
    "S4 top-8": (2.67, 26.11, 71.34, 248.56, 917.49),
    "S4 top-16": (5.03, 53.22, 140.85, 248.80, 910.32),
}


@pytest.mark.parametrize("name", MEASURED)
def test_predicted_times_are_near_those_measured_on_an_h100(name):
    setting, length, *_ = SETTINGS[name]
    ours = planner.attention_time(counted(setting, length), H100)
    dense = planner.attention_time(counted(setting, length, sparse=False), H100)
    predicted = (ours.select, ours.forward, ours.backward, dense.forward, dense.both)
    for value, measured, margin in zip(predicted, MEASURED[name], (0.20, 0.12, 0.05, 0.06, 0.05)):
        assert measured is None or value * 1e3 == pytest.approx(measured, rel=margin)


def test_counts_by_hand():
    # 10 tokens in blocks of 4: the blocks have 0, 1, 2 past ones, the last 2 tokens; top-2 takes one of them
    count = planner.moba_counts(heads=3, kv_heads=1, head_dim=2, work=Work(10, block_size=4, top_k=2))
    assert count.selections == 3 * (4 * 0 + 4 * 1 + 2 * 1)
    assert count.forward_flops == 4 * 2 * (count.selections * 4 + 3 * (16 + 16 + 4) / 2)
    assert count.gate_flops == 2 * 3 * 10 * 2.5
    assert count.forward_bytes == 2 * 10 * 2 * (3 + 1 + 1 + 3)
    assert count.backward_bytes == 2 * 10 * 2 * (4 * 3 + 4 * 1)
    assert count.selection_forward_bytes == count.selections * (3 * 2 * 2 + 12)


def test_full_attention_where_the_blocks_cover_all():
    work = Work(4096, block_size=512, top_k=8)
    assert planner.moba_counts(4, 2, 64, work) == planner.dense_counts(4, 2, 64, work)


@pytest.mark.parametrize(
    "length, block_size, top_k", [(256, 16, 4), (100, 16, 3), (33, 16, 2), (64, 16, 1), (90, 8, 50)]
)
def test_selections_are_those_that_the_operator_makes(length, block_size, top_k):
    query, key = torch.randn(length, 4, 8), torch.randn(length, 2, 8)
    chosen = (moba_hf.select_blocks(query, key, block_size=block_size, top_k=top_k) >= 0).sum().item()
    assert 4 * planner.selections_per_head(length, block_size, top_k) == chosen


def small_config(**changes) -> LlamaConfig:
    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
                 num_key_value_heads=2)  # fmt: skip
    return LlamaConfig(**{**sizes, **changes}, moba={"block_size": 128, "top_k": 4})


def test_parameters():
    assert LLAMA.parameters == 8_030_261_248  # as its model card's weights
    for changes in ({}, {"tie_word_embeddings": True}):
        config = small_config(**changes)
        model = LlamaForCausalLM(config)
        assert ModelShape.from_config(config).parameters == sum(p.numel() for p in model.parameters())


def flops_beside_rope(counter: FlopCounterMode) -> int:
    """Transformers before 5.23 makes the rotary angles by a matrix product; the planner leaves them out."""
    rope = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(rope)


def test_operations_are_those_that_pytorch_counts():
    """With eager attention PyTorch counts the whole square of scores; the planner its causal half."""
    config, length = small_config(), 128
    shape, work = ModelShape.from_config(config), Work(length)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), logits_to_keep=1)
    half = shape.layers * planner.dense_counts(shape.heads, shape.kv_heads, shape.head_dim, work).forward_flops
    assert flops_beside_rope(counter) == planner.operations("prefill", shape, work, False)[0] + half
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
    # PyTorch's 2 + 4 products of scores; the planner's 1 + 2.5 halves of them
    assert flops_beside_rope(counter) == planner.operations("train", shape, work, False)[0] + (3 * 2 - 3.5) * half


def peak_bytes(run) -> int:
    """The most that PyTorch's CPU allocator held at a time while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize("attention", ["sdpa", "moba"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_prefill_is_what_is_measured(attention, dtype):
    config, length = small_config(), 1024

    def run():
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=getattr(torch, dtype))
        with torch.no_grad():
            return model, model.eval()(torch.zeros(1, length, dtype=torch.long), use_cache=True, logits_to_keep=1)

    work = Work(length, 128, 4, dtype=dtype)
    predicted = planner.prefill_memory(ModelShape.from_config(config), work, Sharing(), CPU, attention == "moba")
    assert predicted.total == pytest.approx(peak_bytes(run), rel=0.15)


@pytest.mark.parametrize(
    "attention, checkpointing, vocabulary, moment",
    [
        ("sdpa", "none", 512, "loss"),
        ("moba", "none", 512, "loss"),
        ("moba", "layer", 512, "backward of the first layer"),
        ("moba", "layer", 8192, "loss"),
    ],
)
def test_memory_of_a_training_step_is_what_is_measured(attention, checkpointing, vocabulary, moment):
    config, length = small_config(vocab_size=vocabulary, num_hidden_layers=3), 1024

    def run():
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention).train()
        if checkpointing == "layer":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = torch.zeros(1, length, dtype=torch.long)
        for _ in range(2):  # the moments of AdamW exist from the second step on
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    work = Work(length, 128, 4, dtype="float32", mixed=False, checkpointing=checkpointing, fused_loss=False)
    predicted = planner.train_memory(ModelShape.from_config(config), work, Sharing(), CPU, attention == "moba")
    assert predicted.moment == moment
    assert predicted.total == pytest.approx(peak_bytes(run), rel=0.15)


def test_memory_by_hand():
    """Llama-3.1-8B, 1M tokens: 128 GiB of cache, 16 bytes a parameter in mixed training."""
    work, eight = Work(1 << 20), Sharing(8)
    decode = planner.decode_memory(LLAMA, work, Sharing(), H100, True)
    assert decode.parts["kv cache"] == 2 * (1 << 20) * 32 * 8 * 128 * 2 == 128 * planner.GIB
    assert (
        planner.decode_memory(LLAMA, work, Sharing(32), H100, True).parts["kv cache"] == 16 * planner.GIB
    )  # replicated
    assert planner.decode_memory(LLAMA, work, Sharing(8, 4), H100, True).parts["kv cache"] == 4 * planner.GIB
    train = planner.train_memory(LLAMA, work, eight, H100, True)
    assert train.parts["weights"] + train.parts["optimizer"] == 12 * LLAMA.parameters / 8
    offloaded = planner.train_memory(LLAMA, dataclasses.replace(work, checkpointing="offload"), eight, H100, True)
    assert offloaded.host == 32 * (1 << 20) / 8 * 4096 * 2
    assert offloaded.total < train.total


def test_crossover_lies_where_it_was_measured():
    """docs/benchmarks.md, setting S1: dense attention's forward is faster at 8K, MoBA's at 32K; with backward at 8K."""
    shape, work = ModelShape("S1", 1, 4096, 32, 32, 128, 1, 1), Work(1, 128, 8)
    assert 8 << 10 < planner.crossover(shape, work, H100, training=False) < 32 << 10
    assert planner.crossover(shape, work, H100, training=True) < 8 << 10


def test_largest_length_fits_and_the_next_does_not():
    for mode in planner.MODES:
        plan = planner.make_plan(mode, LLAMA, Work(1 << 20, prefill_chunk=1 << 16, mlp_tiles=8), H100, 8)
        longest = plan.columns[1].largest_length
        again = planner.make_plan(mode, LLAMA, plan.work.at(longest), H100, 8, plan.sharing.sequence)
        beyond = planner.make_plan(mode, LLAMA, plan.work.at(longest + 1024), H100, 8, plan.sharing.sequence)
        assert again.columns[1].fits or again.sharing != plan.sharing
        assert not beyond.columns[1].fits or beyond.sharing != plan.sharing


def test_suggestion_is_the_least_split_that_fits():
    small = planner.make_plan("prefill", LLAMA, Work(1 << 14), H100, 8)
    assert small.suggested == Sharing(1, 1, 8)
    large = planner.make_plan("prefill", LLAMA, Work(10 << 20), H100, 8)
    assert large.suggested is None and not large.columns[1].fits
    nine = planner.make_plan("prefill", planner.PRESETS["smollm2-135m"], Work(1 << 14), H100, 8)
    assert nine.sharing.sequence == 1  # 9 heads cannot be halved


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(length=0), "length must be at least 1"),
        (dict(length=1, dtype="int8"), "dtype must be one of"),
        (dict(length=1, checkpointing="some"), "checkpointing must be one of"),
        (dict(length=1, full_layers=-1), "full_layers must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Work(**change)


def test_other_things_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="has 32 layers"):
        planner.make_plan("prefill", LLAMA, Work(1 << 20, full_layers=33), H100, 1)
    with pytest.raises(ValueError, match="possible"):
        planner.make_plan("train", LLAMA, Work(1 << 20), H100, 8, sequence=3)
    with pytest.raises(ValueError, match="num_local_experts"):
        from transformers import MixtralConfig

        ModelShape.from_config(MixtralConfig(), "mixtral")
    with pytest.raises(ValueError, match="unknown device"):
        planner.device_named("abacus", {})
    with pytest.raises(ValueError, match="unknown rate"):
        planner.device_named("h100", {"speed": 1.0})
