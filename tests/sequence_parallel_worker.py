"""One of two gloo processes: computes what test_sequence_parallel.py compares with one process, and saves it.

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

from moba_hf.training import sequence_parallel
from moba_hf.training.meter import Meter, MeteredTrainer

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


def make_batch(documents: list[int], rows: int = 1) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(length) for length in documents]).expand(rows, -1).clone()
    input_ids = tokens(rows, LENGTH)
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


def fully_sharded(mode: str) -> dict[str, torch.Tensor]:
    """Weights after three steps of SGD on two sequences: in "one" process; with weights sharded over two by FSDP2, a
    sequence on each rank ("data"), or half of both sequences on each rank ("ulysses")."""
    torch.manual_seed(0)
    model = tiny_model(**MODELS["gqa"]).train()
    if mode != "one":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    ranks = sequence_parallel.start(model.config, 2) if mode == "ulysses" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = make_batch(DOCUMENTS["packed"], rows=2)
    items = targets(batch)
    if mode == "data":
        batch = {name: x[dist.get_rank(), None] for name, x in batch.items()}
    for _ in range(3):
        optimizer.zero_grad()
        step(model, batch, items, ranks, scale=1 if mode == "one" else 2)  # FSDP averages over the ranks
        optimizer.step()
    return {name: getattr(x, "full_tensor", lambda x=x: x)().detach() for name, x in model.named_parameters()}


def train(folder: Path, *, size: int = 1, resume: bool = False) -> dict:
    """Four steps through Trainer, the first half in full attention: losses, tokens and weights. Saves after two."""
    model = tiny_model(**MODELS["replicated"], moba={"block_size": 4, "top_k": 3, "full_attention_layers": [-1]})
    layouts = [[19, 11, 2], [LENGTH], [3, 29], [8, 8, 16], [LENGTH - 1, 1]]
    rows = [make_batch(layout) for layout in layouts]
    dataset = Dataset.from_list([{name: x[0].tolist() for name, x in row.items()} for row in rows])
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1, save_steps=2, report_to="none", seed=0,
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
    weights = {
        name: x.detach().clone() for name, x in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    }
    measurement = trainer.measure()
    return {
        **logged,
        "tokens": trainer.state.num_input_tokens_seen,
        "weights": weights,
        "full": measurement.full.by_token,
        "moba": measurement.moba.by_token,
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {
        ("fsdp", "data"): fully_sharded("data"),
        ("fsdp", "ulysses"): fully_sharded("ulysses"),
    }
    ranks = sequence_parallel.start(tiny_model().config, 2)
    found |= {(name, documents): forward_backward(name, documents, ranks) for name in MODELS for documents in DOCUMENTS}
    found["train"] = train(folder / "train", size=2)
    found["resumed"] = train(folder / "train", size=2, resume=True)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
