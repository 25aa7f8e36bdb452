"""One of two or four gloo processes: computes what test_sequence_parallel.py compares with one, and saves it.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=… python tests/sequence_parallel_worker.py FOLDER

The functions here are run by the test itself too, in one process and with whole sequences.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from models import tiny_model, tokens
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments, default_data_collator

from moba_hf.evaluation.modes import attention
from moba_hf.evaluation.position_loss import token_losses
from moba_hf.training import sequence_parallel
from moba_hf.training.meter import Meter, MeteredTrainer
from moba_hf.training.run_folder import RunFolder

LENGTH = 32
# 12 keys of sight. gqa: two query heads a key head, one of each on a rank; replicated: one key head for two ranks.
MODELS = {
    "gqa": dict(num_key_value_heads=2),
    "replicated": dict(num_key_value_heads=1),
    "hybrid": dict(
        num_hidden_layers=3, moba={"block_size": 4, "top_k": 3, "full_attention_layers": [-1]}, num_key_value_heads=2
    ),
}
DOCUMENTS = {"one document": [LENGTH], "packed": [19, 11, 2]}  # the second begins on the first rank, ends on the second


def make_batch(documents: list[int], rows: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in documents]).expand(rows, -1).clone()
    input_ids = tokens(rows, LENGTH, seed)
    labels = torch.where(positions == 0, -100, input_ids)
    return {"input_ids": input_ids, "position_ids": positions, "labels": labels}


def targets(batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def forward_backward(name: str, documents: str, ranks=None) -> dict:
    """Logits [rows, length, vocabulary], and the gradients of the mean loss."""
    model = tiny_model(**MODELS[name]).train()
    batch = make_batch(DOCUMENTS[documents], rows=2)
    items = targets(batch)
    if ranks is None:
        output = model(**batch, num_items_in_batch=items)
        output.loss.backward()
        return {"logits": output.logits.detach(), "gradients": gradients(model)}
    with ranks.sharing(model):
        output = model(**ranks.part(batch), num_items_in_batch=items)
        output.loss.backward()
    logits = [torch.empty_like(output.logits) for _ in range(ranks.size)]
    dist.all_gather(logits, output.logits.detach().contiguous())
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return {"logits": torch.cat(logits, dim=1), "gradients": gradients(model)}


def step(model, batch, items: int, ranks=None, scale: int = 1) -> None:
    """Forward and backward of a batch: whole sequences, or this rank's part of them."""
    with contextlib.nullcontext() if ranks is None else ranks.sharing(model):
        batch = batch if ranks is None else ranks.part(batch)
        (model(**batch, num_items_in_batch=items).loss * scale).backward()


def fully_sharded(mode: str) -> dict:
    """Three steps of SGD on two sequences, before each of them the loss of each token.

    mode: "one" process; "data", weights sharded over two by FSDP2, a sequence on each; "ulysses", weights sharded in
    the same way, half of both sequences on each.
    """
    model = tiny_model(**MODELS["gqa"]).train()
    if mode != "one":
        norm_and_head = [model.model.norm, model.lm_head]  # one group, as accelerate makes it
        for modules in (*model.model.layers, norm_and_head, model):
            fully_shard(modules)
    ranks = sequence_parallel.start(model.config, 2) if mode == "ulysses" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = make_batch(DOCUMENTS["packed"], rows=2)
    items, input_ids = targets(batch), batch["input_ids"]
    if mode == "data":
        batch = {name: x[dist.get_rank(), None] for name, x in batch.items()}
    losses = []
    for _ in range(3):
        model.eval()
        losses.append(token_losses(model, input_ids) if ranks is None else ranks.token_losses(model, input_ids))
        model.train()
        optimizer.zero_grad()
        with contextlib.nullcontext() if ranks is None else ranks.sharing(model):
            own = batch if ranks is None else ranks.part(batch)
            loss = model(**own, num_items_in_batch=items).loss
            (loss if mode == "one" else 2 * loss).backward()  # FSDP averages over its ranks
        optimizer.step()
    whole = {name: getattr(x, "full_tensor", lambda x=x: x)().detach() for name, x in model.named_parameters()}
    return {"weights": whole, "losses": torch.cat(losses)}


def train(folder: Path, *, size: int = 1, accumulation: int = 2, resume: bool = False) -> dict:
    """Four steps through Trainer, the first half in full attention: what was logged, weights, and the meter."""
    model = tiny_model(**MODELS["replicated"], moba={"block_size": 4, "top_k": 3, "full_attention_layers": [-1]})
    layouts = [[19, 11, 2], [LENGTH], [3, 29], [8, 8, 16], [LENGTH - 1, 1], [20, 12]]
    rows = [make_batch(layout, seed=i) for i, layout in enumerate(layouts)]
    dataset = Dataset.from_list([{name: x[0].tolist() for name, x in row.items()} for row in rows])
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=4, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, optim="sgd", learning_rate=0.1,
        lr_scheduler_type="constant", logging_steps=1, save_steps=2, report_to="none", seed=0,
        include_num_input_tokens_seen="all", disable_tqdm=True,
    )  # fmt: skip
    trainer = MeteredTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=default_data_collator,
        meter=Meter(tokens(2, LENGTH, seed=7)),
        meter_sequences=2,
        trailing_tokens=8,
        schedule=[{"mode": "full", "share": 0.5}, {"mode": "moba"}],
    )
    if size > 1:
        sequence_parallel.enable(trainer, size)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    logged = {name: [entry[name] for entry in entries] for name in ("loss", "grad_norm", "sparsity", "moba_layers")}
    model = trainer.accelerator.unwrap_model(trainer.model)
    measurement = trainer.measure()
    return {
        **logged,
        "tokens": trainer.state.num_input_tokens_seen,
        "weights": {name: x.detach().clone() for name, x in model.named_parameters()},
        "meter": torch.stack([measurement.full.by_token, measurement.moba.by_token]),
        **outside(model),
    }


def outside(model) -> dict[str, torch.Tensor]:
    """Losses of whole sequences, in MoBA and in an attention that reads the module's own count of heads."""
    found = {}
    for name in ("moba", "eager"):
        with attention(model, name):
            found[f"whole sequences, {name}"] = token_losses(model, tokens(2, LENGTH, seed=7))
    return found


def kept_by_the_first(folder: Path) -> list:
    """What `RunFolder.once` gives where only the first process's disk holds a value, and where none does."""
    run = RunFolder(folder / f"disk{dist.get_rank()}")
    run.unfinished.mkdir(parents=True)
    if dist.get_rank() == 0:
        torch.save({"loss": 7.0}, run.unfinished / "before.pt")
    return [run.once("before", lambda: "computed again"), run.once("after", dist.get_rank)]


def refusals(ranks) -> dict[str, str]:
    """What is refused where ranks meet: the name of the error and its message."""
    told = {}

    def note(name: str, do) -> None:
        try:
            do()
        except (ValueError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    def forward(window: int | None = None, **changes):
        model = tiny_model() if window is None else tiny_model("mistral", sliding_window=window)
        with ranks.sharing(model):
            model(**{**ranks.part(make_batch([LENGTH])), **changes})

    half = LENGTH // 2
    note("left padding", lambda: forward(attention_mask=torch.tensor([[0] * 4 + [1] * (half - 4)])))
    note("cu_seq_lens", lambda: forward(cu_seq_lens_q=torch.tensor([0, half]), cu_seq_lens_k=torch.tensor([0, half])))
    axes = torch.zeros(3, 1, half, dtype=torch.long)  # to attention itself: Llama's rotary embedding takes no axes
    states = [torch.zeros(1, 4, half, 16)] * 3
    attend = sequence_parallel.ulysses_attention_forward
    note("position_ids of axes", lambda: attend(torch.nn.Identity(), *states, None, position_ids=axes))
    note("sliding window", lambda: forward(window=8))
    note("wide window", lambda: forward(window=half + 8))  # wider than a part, narrower than the sequence
    note("other rows", lambda: ranks.check_equal([{"input_ids": tokens(1, 8, seed=dist.get_rank())}], "cpu"))
    note("processes", lambda: sequence_parallel.start(tiny_model().config, 4))
    return told


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {"train": train(folder / "train", size=2, accumulation=2 if dist.get_world_size() == 2 else 1)}
    ranks = sequence_parallel.start(tiny_model().config, 2)
    found |= {"refusals": refusals(ranks), "once": kept_by_the_first(folder)}
    if dist.get_world_size() == 2:
        found["resumed"] = train(folder / "train", size=2, resume=True)
        found |= {mode: fully_sharded(mode) for mode in ("data", "ulysses")}
        found |= {(name, how): forward_backward(name, how, ranks) for name in MODELS for how in DOCUMENTS}
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
