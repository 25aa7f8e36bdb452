"""Fine-tune a MoBA model on conversations: hybrid SFT, the last layers in full attention.

    python scripts/sft.py --config configs/smollm2-135m/sft.yaml
    accelerate launch scripts/sft.py --config configs/llama-3.1-8b/sft-32k.yaml
    python scripts/sft.py --config configs/llama-3.1-8b/sft-1m.yaml --plan    # memory, and no more

A config file holds any of the arguments below, and a flag overrides it; besides ours, every argument of TRL's SFTConfig
is one. Rows hold `messages`, `conversations`, or `prompt` and `completion`; only what the assistant says carries loss.
Conversations are packed whole, and attention stays inside each. The output folder gets

    model/         the checkpoint (safetensors) with its MoBA settings, tokenizer and model card; or the LoRA adapter
    report.json    the loss of held-out answers in full and in MoBA attention, before and after, and what was run

A run that is interrupted goes on from its last checkpoint when it is started again; one that fails leaves an earlier
result as it was.
"""

import dataclasses
import itertools
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, default_data_collator, set_seed
from trl import SFTConfig

import moba_hf
from moba_hf.training import sequence_parallel
from moba_hf.training.arguments import ModelArguments, model_location, parse
from moba_hf.training.checkpointing import check_checkpointing
from moba_hf.training.conversations import Conversation, conversation_sequences, load_chat_template
from moba_hf.training.data import PackingCount
from moba_hf.training.loss import check_liger
from moba_hf.training.model import (
    describe,
    load_model,
    load_tokenizer,
    loading_code,
    lora_config,
    reload,
    save_config_beside_adapter,
)  # fmt: skip
from moba_hf.training.model_card import write_model_card
from moba_hf.training.planning import PlanArguments, for_planning, plan
from moba_hf.training.run_folder import BeforeTraining, RunFolder, write_json
from moba_hf.training.sft_trainer import MobaSFTTrainer, check_sft_config
from moba_hf.training.sources import read_rows, sources

logger = logging.getLogger("sft")


@dataclass
class SftArguments:
    """Which conversations, how they are packed, and which layers stay full."""

    dataset: list | str | None = field(
        default=None,
        metadata={
            "help": "Hub id; a file or folder of .jsonl or .parquet; pydoc (Python's own manual, as questions); or, in "
            "YAML, a mixture: a list of {dataset, weight, config, split}."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    streaming: bool = field(default=False, metadata={"help": "Read and pack while training; needs max_steps."})
    sequence_length: int = field(default=32768, metadata={"help": "Tokens per packed sequence."})
    last_layers_full: int | None = field(
        default=None, metadata={"help": "Hybrid SFT: this many last layers in full attention (the paper: 3)."}
    )
    held_out_share: float = field(default=0.02, metadata={"help": "Share of the conversations for evaluation only."})
    held_out_sequences: int = field(default=4, metadata={"help": "Packed sequences of them that are measured."})
    sample_tokens: int = field(
        default=48, metadata={"help": "Tokens the reloaded checkpoint answers at the end, on a CPU; 0: none."}
    )

    def __post_init__(self):
        if not self.dataset:
            raise ValueError("dataset is missing: name a hub id, a file or folder, pydoc, or a mixture")
        for name, least in (("sequence_length", 2), ("held_out_sequences", 1), ("sample_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but was {getattr(self, name)}")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must lie between 0 and 1, but was {self.held_out_share}")
        if self.last_layers_full is not None and self.last_layers_full < 0:
            raise ValueError(f"last_layers_full must be at least 0, but was {self.last_layers_full}")


def main(argv: list[str] | None = None) -> dict:
    """Run the whole job; returns the report (or, with --plan, what was predicted)."""
    model_args, data_args, training_args, plan_args = parse(
        (ModelArguments, SftArguments, SFTConfig, PlanArguments), for_planning(argv), description=__doc__
    )
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if training_args.process_index == 0 else logging.WARNING)
    if plan_args.plan:
        return plan(
            plan_args, model_args, training_args, data_args.sequence_length, moba_settings(model_args, data_args)
        )
    settings = describe(training_args, model=model_args, data=data_args)
    config = check(model_args, data_args, training_args)
    run = RunFolder(Path(training_args.output_dir))
    with training_args.main_process_first():
        run.start(settings)

    set_seed(training_args.seed)
    tokenizer = load_tokenizer(model_args)
    prepare_tokenizer(tokenizer, training_args)
    held_out, dataset, count = load_data(data_args, tokenizer)
    trainer = make_trainer(load_model(model_args, config), tokenizer, held_out, dataset, model_args, training_args, run)

    before = BeforeTraining(trainer, lambda: run.once("before", trainer.evaluate))
    trainer.train(resume_from_checkpoint=run.last_checkpoint())
    after = run.once("after", trainer.evaluate)

    trainer.model.config.use_cache = config.use_cache  # Trainer turned it off
    run.save_model(trainer)
    report = make_report(trainer, before.found, after, count, settings)
    if trainer.is_world_process_zero():
        finish(trainer, tokenizer, held_out, report, model_args, data_args, run)
        print(closing_words(report, run.finished, model_args))
    return report


# ---- before any work -----------------------------------------------------------------------------------------------


def moba_settings(model_args: ModelArguments, data_args: SftArguments) -> dict:
    """Fields of MobaConfig that the arguments name, the last layers among them."""
    settings = dict(model_args.moba or {})
    if data_args.last_layers_full is not None:
        if settings.get("full_attention_layers"):
            raise ValueError(
                f"last_layers_full={data_args.last_layers_full} and moba: full_attention_layers="
                f"{settings['full_attention_layers']} say the same thing twice: name one"
            )
        settings["full_attention_layers"] = list(range(-data_args.last_layers_full, 0))
    return settings


def check(model_args: ModelArguments, data_args: SftArguments, training_args: SFTConfig):
    """Refuse what cannot work, before anything is loaded; returns the model's config, MoBA settings included."""
    check_sft_config(training_args)
    check_checkpointing(training_args)
    check_liger(training_args)
    conversations_of(data_args)
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError(f"streaming needs max_steps, but it was {training_args.max_steps}")
    if model_args.lora is not None:
        lora_config(model_args.lora)
    config = AutoConfig.from_pretrained(model_location(model_args), gguf_file=model_args.gguf_file)
    settings = moba_hf.configure(config, **moba_settings(model_args, data_args))
    if model_args.sequence_parallel_size > 1:
        sequence_parallel.check(config, model_args.sequence_parallel_size, data_args.sequence_length)
    positions = config.get_text_config().max_position_embeddings
    if data_args.sequence_length > positions:
        raise ValueError(
            f"sequence_length={data_args.sequence_length} is above the model's {positions} positions; "
            f"continue its pretraining at that length first, or shorten the sequences"
        )
    if settings.block_size * settings.top_k >= data_args.sequence_length:
        logger.warning(
            "block_size · top_k = %d covers the whole sequence_length=%d: MoBA is full attention there, and nothing "
            "is trained sparse.",
            settings.block_size * settings.top_k,
            data_args.sequence_length,
        )
    return config


# ---- the parts of the run ------------------------------------------------------------------------------------------


def conversations_of(data_args: SftArguments, count: PackingCount | None = None):
    """The conversations in their order; missing files are refused at once, rows are read as they are asked for."""
    mixture = sources(data_args.dataset, config=data_args.dataset_config, split=data_args.dataset_split)
    readings = {} if count is None else count.sources
    rows = read_rows(mixture, lambda _, row: len(Conversation.from_row(row).text), readings)
    return (Conversation.from_row(row) for _, row in rows)


def prepare_tokenizer(tokenizer, training_args: SFTConfig) -> None:
    """Chat template and end-of-turn token of the arguments; the trainer gives the model the same end token."""
    load_chat_template(tokenizer, training_args.chat_template_path)
    training_args.chat_template_path = None
    if (end := training_args.eos_token) is not None:
        if end not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={end!r} is no token of this tokenizer")
        tokenizer.eos_token = end


def load_data(data_args: SftArguments, tokenizer) -> tuple[Dataset, Dataset | IterableDataset, PackingCount]:
    """Held-out sequences, training sequences, and the count of what became of the conversations."""
    how = dict(sequence_length=data_args.sequence_length, share=data_args.held_out_share)
    few = data_args.held_out_sequences
    rows = conversation_sequences(conversations_of(data_args), tokenizer, held_out=True, open_rows=few, **how)
    held_out = list(itertools.islice(rows, few))
    if not held_out:
        raise ValueError(f"held-out conversations are empty: raise held_out_share={data_args.held_out_share}")
    count = PackingCount()

    def sequences():
        count.reset()  # the trainer looks at the first row, and begins again
        yield from conversation_sequences(
            conversations_of(data_args, count), tokenizer, held_out=False, count=count, **how
        )

    if data_args.streaming:
        dataset = IterableDataset.from_generator(sequences)
    else:
        dataset = Dataset.from_list(list(sequences()))
        if len(dataset) == 0:
            raise ValueError(f"no conversation to train on is left of {data_args.dataset}: {count}")
        logger.info("Conversations: %s.", count)
    logger.info("Held out: %d sequences of %d tokens.", len(held_out), data_args.sequence_length)
    return Dataset.from_list(held_out), dataset, count


def make_trainer(model, tokenizer, held_out, dataset, model_args, training_args, run) -> MobaSFTTrainer:
    training_args.output_dir = str(run.unfinished)
    trainer = MobaSFTTrainer(
        model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        peft_config=None if model_args.lora is None else lora_config(model_args.lora),
        dense_attention=model_args.dense_attention,
    )
    if model_args.sequence_parallel_size > 1:
        sequence_parallel.enable(trainer, model_args.sequence_parallel_size)
    return trainer


# ---- what comes out ------------------------------------------------------------------------------------------------


def make_report(trainer, before: dict, after: dict, count: PackingCount, settings: dict) -> dict:
    losses = {
        f"{name}_{when}": measured[f"eval_{name}"]
        for when, measured in (("before", before), ("after", after))
        for name in ("full_loss", "moba_loss", "gap")
    }
    return {
        "steps": trainer.state.global_step,
        **losses,
        "trained_tokens": trainer.state.num_input_tokens_seen,
        "data": dataclasses.asdict(count),
        "config": {"moba": trainer.model.config.moba, **settings},
        "versions": {"moba_hf": moba_hf.__version__, "torch": torch.__version__},
    }


def finish(trainer, tokenizer, held_out, report, model_args, data_args, run: RunFolder) -> None:
    """Card, answer of the reloaded checkpoint, report; then everything into place."""
    folder = run.result / "model"
    save_config_beside_adapter(trainer.model, folder)
    write_model_card(
        folder, model_args, config=trainer.model.config, stage="supervised fine-tuning", data=data_args.dataset,
        length=data_args.sequence_length, tokens=report["trained_tokens"], published=run.finished / "model",
    )  # fmt: skip
    report["sample"] = None
    if data_args.sample_tokens:
        report["sample"] = answer(reload(folder, model_args), tokenizer, held_out[0], data_args.sample_tokens)
    write_json(run.result / "report.json", report)
    run.publish()


def answer(model, tokenizer, row: dict, tokens: int) -> str:
    """What the model says to the first held-out prompt."""
    first = next(i for i, label in enumerate(row["labels"]) if label >= 0)
    prompt = torch.tensor([row["input_ids"][:first]])
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return tokenizer.decode(output[0, first:], skip_special_tokens=True)


def closing_words(report: dict, folder: Path, model_args: ModelArguments) -> str:
    """The table, and the lines that load the result."""
    rows = [("", "before", "after")]
    for title, name in (("full attention", "full_loss"), ("MoBA attention", "moba_loss"), ("gap (MoBA − full)", "gap")):
        rows.append((title, f"{report[f'{name}_before']:.3f}", f"{report[f'{name}_after']:.3f}"))
    table = "\n".join(f"  {name:<32}{before:>10}{after:>10}" for name, before, after in rows)
    return (
        f"\nLoss of held-out answers after {report['steps']} steps:\n\n{table}\n\n"
        + (f"The reloaded checkpoint answers: {report['sample']!r}\n\n" if report["sample"] else "")
        + f"Report: {folder / 'report.json'}\n"
        f"Load the result:\n\n{loading_code(str(folder / 'model'), model_args, indent='  ')}\n"
    )


if __name__ == "__main__":
    main()
