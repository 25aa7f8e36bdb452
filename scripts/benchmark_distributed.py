"""Training steps of one model over several GPUs: Ulysses and FSDP2, full attention beside MoBA.

    torchrun --nproc_per_node=2 scripts/benchmark_distributed.py --check                          # needs 2 GPUs
    torchrun --nproc_per_node=2 scripts/benchmark_distributed.py --lengths 65536 --layers 8       # needs 2 GPUs
    torchrun --nproc_per_node=1 scripts/benchmark_distributed.py --lengths 65536 --layers 8       # the same on one
    torchrun --nproc_per_node=2 scripts/benchmark_distributed.py --device cpu --preset tiny --lengths 1024 --check

All processes share every sequence (`moba_hf.training.sequence_parallel`), and weights, gradients and moments are split
over them by `fully_shard`, as accelerate does it: float32, gathered and reduced in bfloat16. Random weights in the
preset's shape; AdamW; layers are checkpointed, with --offload their inputs wait in host memory; the loss is computed in
tiles of tokens. A step is timed between barriers, after a warm-up step; medians. --profile adds the share of
communication in one step's kernel time.

--check compares a small hybrid model, packed documents and grouped queries: logits and gradients of all processes
together beside one process alone. It fails where they differ by more than float32's rounding, or in bfloat16 by more
than bfloat16 does to the same model in eager attention.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from moba_hf import planner
from moba_hf.training import sequence_parallel

TINY = planner.ModelShape("tiny", 2, 64, 4, 2, 16, 128, 256)
ALONE = sequence_parallel.SharingRanks(size=1, rank=0, group=None)  # whole sequences, labels shifted all the same
FLOAT32 = 1e-5  # relative error that another order of sums may make
LOSS_TILE = 4096  # tokens whose logits exist together


class WithLoss(torch.nn.Module):
    """A causal language model that returns its summed loss and never holds the logits of a whole sequence."""

    def __init__(self, model, offload: bool):
        super().__init__()
        self.model, self.offload = model, offload

    def forward(self, input_ids, position_ids, labels):
        """int64 [1, tokens] each; labels are those of the next position. Returns a float32 scalar."""
        with torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else contextlib.nullcontext():
            hidden = self.model.model(input_ids, position_ids=position_ids, use_cache=False).last_hidden_state[0]
        tiles = zip(hidden.split(LOSS_TILE), labels[0].split(LOSS_TILE))
        return sum(checkpoint(self.tile_loss, *tile, use_reentrant=False) for tile in tiles)

    def tile_loss(self, hidden, labels):
        return torch.nn.functional.cross_entropy(self.model.lm_head(hidden).float(), labels, reduction="sum")


def main(argv: list[str] | None = None) -> dict:
    """Run in every process; rank 0 prints, and writes --output."""
    options = parse(argv)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        report = {"processes": size, "options": {**vars(options), "output": None}}
        if options.check:
            report["check"] = check(options)
            say(rank, f"{size} processes beside one, relative error: {json.dumps(report['check'])}")
        if options.lengths:
            say(rank, f"{options.preset}, {options.layers or 'all'} layers, {size} processes; a step of one sequence")
            report["rows"] = [row for length in options.lengths for row in measure(options, length)]
        if options.output and rank == 0:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1))
        return report
    finally:
        dist.destroy_process_group()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=[*planner.PRESETS, "tiny"], default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="of the preset; default: all")
    parser.add_argument("--lengths", type=int, nargs="*", default=[])
    parser.add_argument("--attention", nargs="+", choices=["full", "moba"], default=["full", "moba"])
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun")
    if options.profile and options.device == "cpu":
        parser.error("--profile looks at NCCL's kernels: it needs --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    return options


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def shape_of(options) -> planner.ModelShape:
    shape = TINY if options.preset == "tiny" else planner.PRESETS[options.preset]
    return replace(shape, layers=options.layers or shape.layers)


def build(options, shape: planner.ModelShape, length: int, dtype=torch.float32, attention: str = "moba", **moba):
    """Random weights, the same in every process."""
    config = LlamaConfig(**shape.llama_settings(), max_position_embeddings=length, moba=moba, moba_trained_tokens=1)
    torch.manual_seed(0)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


# ---- equality ------------------------------------------------------------------------------------------------------


def check(options) -> dict:
    """Largest relative error over logits and gradients, of all processes beside one, and of eager attention's rounding.

    RuntimeError where the processes differ by more.
    """
    shape = planner.ModelShape("check", 6, 512, 8, 4, 64, 1024, 512)
    length, found = 1024, {}
    batch = make_batch(length, shape.vocabulary, options.device, documents=[400, 524, 100])
    for dtype in (torch.float32, torch.bfloat16):
        model = build(options, shape, length, dtype, block_size=16, top_k=4, full_attention_layers=[-3, -2, -1])
        found[dtype, "one"] = logits_and_gradients(model, batch, None)
        ranks = sequence_parallel.start(model.config, dist.get_world_size())
        found[dtype, "all"] = logits_and_gradients(model, batch, ranks)
        eager = build(options, shape, length, dtype, "eager")
        found[dtype, "eager"] = logits_and_gradients(eager, batch, None)
    together = {dtype: error(found[dtype, "all"], found[dtype, "one"]) for dtype in (torch.float32, torch.bfloat16)}
    rounding = error(found[torch.bfloat16, "eager"], found[torch.float32, "eager"])
    if together[torch.float32] > FLOAT32 or together[torch.bfloat16] > rounding:
        raise RuntimeError(f"all processes differ from one: {together}; eager attention's rounding: {rounding}")
    return {
        "float32": together[torch.float32],
        "bfloat16": together[torch.bfloat16],
        "eager attention, bfloat16 beside float32": rounding,
    }


def make_batch(length: int, vocabulary: int, device: str, documents: list[int] | None = None) -> dict:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(device)
    positions = torch.cat([torch.arange(n, device=device) for n in documents or [length]])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def logits_and_gradients(model, batch: dict, ranks) -> list[torch.Tensor]:
    """float32 logits [1, length, vocabulary] and every gradient, of whole sequences, the same in every process."""
    model.zero_grad()
    items = batch["labels"].shape[1] - 1
    with contextlib.nullcontext() if ranks is None else ranks.sharing(model):
        out = model(**(batch if ranks is None else ranks.part(batch)), use_cache=False, num_items_in_batch=items)
        out.loss.backward()
    gradients = [x.grad for x in model.parameters()]
    logits = out.logits.detach()
    if ranks is not None:
        parts = [torch.empty_like(logits) for _ in range(ranks.size)]
        dist.all_gather(parts, logits.contiguous())
        logits = torch.cat(parts, dim=1)
        for gradient in gradients:
            dist.all_reduce(gradient)
    return [logits.float(), *[gradient.float().clone() for gradient in gradients]]


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


# ---- steps ---------------------------------------------------------------------------------------------------------


def measure(options, length: int) -> list[dict]:
    """A row for each attention; one that does not fit says so."""
    rows = []
    for attention in options.attention:
        try:
            row = train(options, length, attention)
        except torch.OutOfMemoryError:
            row = {"length": length, "attention": attention, "seconds": None}
        gc.collect()  # sharded models hold cycles: the next one would stand beside this one's weights
        torch.cuda.empty_cache()
        rows.append(row)
        say(dist.get_rank(), json.dumps(row))
    return rows


def train(options, length: int, attention: str) -> dict:
    """Median seconds of a step, tokens/s of all processes, and the largest memory of any of them."""
    shape, size = shape_of(options), dist.get_world_size()
    moba = {"block_size": options.block_size, "top_k": options.top_k}
    if attention == "full":
        moba["full_attention_layers"] = list(range(shape.layers))
    model = build(options, shape, length, **moba).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})  # its inputs pass through save_on_cpu
    whole = WithLoss(model, options.offload)
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=precision)
    fully_shard(whole, mp_policy=precision)
    ranks = sequence_parallel.start(model.config, size) if size > 1 else ALONE
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-5, fused=options.device == "cuda")
    batch = make_batch(length, shape.vocabulary, options.device)

    def step():
        with contextlib.nullcontext() if ranks is ALONE else ranks.sharing(model):
            part = ranks.part(batch)
            loss = whole(part["input_ids"], part["position_ids"], part["shift_labels"])
            (loss / length).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    reset_peak(options)
    times = [clock(options, step) for _ in range(options.steps)]
    seconds = statistics.median(times)
    row = {
        "length": length, "attention": attention, "seconds": seconds, "spread": max(times) - min(times),
        "tokens_per_second": length / seconds, "peak_gib": peak_gib(options),
        "planned_gib": planned(options, length, attention),
    }  # fmt: skip
    return row | ({"communication_share": communication_share(step)} if options.profile else {})


def clock(options, step) -> float:
    synchronize(options)
    dist.barrier()
    begin = time.perf_counter()
    step()
    synchronize(options)
    dist.barrier()
    return time.perf_counter() - begin


def synchronize(options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def reset_peak(options) -> None:
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(options) -> float | None:
    """The largest of all processes; None on a CPU."""
    if options.device == "cpu":
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated() / planner.GIB, device="cuda")
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


def planned(options, length: int, attention: str) -> float | None:
    """What `moba_hf.planner` predicts for one GPU; None for a shape that is no preset's, and for one process: the plan
    counts autocast's copies of the weights there, which `fully_shard` does not make."""
    if options.preset == "tiny" or dist.get_world_size() == 1:
        return None
    kept = "offload" if options.offload else "layer"
    work = planner.Work(length, options.block_size, options.top_k, mixed=True, checkpointing=kept)
    sharing = planner.Sharing(dist.get_world_size())
    return (
        planner.train_memory(shape_of(options), work, sharing, planner.DEVICES["h100"], attention == "moba").total
        / planner.GIB
    )


def communication_share(step) -> float:
    """NCCL kernels' part of all kernel time of one step; they overlap others, so it is no part of the step's time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    rows = profiler.key_averages()
    total = sum(row.device_time_total for row in rows)
    return sum(row.device_time_total for row in rows if "nccl" in row.key.lower()) / total


if __name__ == "__main__":
    main()
