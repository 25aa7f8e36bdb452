"""Continue the pretraining of a causal language model with MoBA attention, and measure what it brings.

    python scripts/continue_pretrain.py --config configs/smollm2-135m-demo.yaml
    python scripts/continue_pretrain.py --config configs/smollm2-135m-demo.yaml --max_steps 60 --output_dir runs/longer
    accelerate launch scripts/continue_pretrain.py --config configs/llama-3.1-8b/1m-moba.yaml

A config file holds any of the arguments below, and a flag overrides it; besides ours, every argument of Transformers'
TrainingArguments is one. The held-out text is measured in full and in MoBA attention before, during and after. The
output folder gets

    model/         the checkpoint (safetensors) with its MoBA settings and tokenizer
    report.json    both losses before and after, the gap between them, speed, and what was run
    loss.png       both losses over the steps
    routing.png    which past blocks the queries of one held-out sequence chose

A run that is interrupted goes on from its last checkpoint when it is started again; one that fails leaves an earlier
result as it was.
"""

import dataclasses
import json
import logging
import statistics
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import moba_hf
from moba_hf.evaluation.figures import loss_figure, routing_figure, save
from moba_hf.evaluation.position_loss import HeldOutLoss
from moba_hf.evaluation.routing import Routing, record_routing
from moba_hf.training.arguments import DataArguments, ModelArguments, model_location, parse
from moba_hf.training.data import HeldOut, PackingCount, hold_out, read_documents, training_sequences
from moba_hf.training.meter import Measurement, Meter, MeteredTrainer
from moba_hf.training.run_folder import RunFolder, write_json

logger = logging.getLogger("continue_pretrain")


def main(argv: list[str] | None = None) -> dict:
    """Run the whole job; returns the report."""
    model_args, data_args, training_args = parse(
        (ModelArguments, DataArguments, TrainingArguments), argv, description=__doc__
    )
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if training_args.process_index == 0 else logging.WARNING)
    settings = describe(model_args, data_args, training_args)
    config = check(model_args, data_args, training_args)
    run = RunFolder(Path(training_args.output_dir))
    with training_args.main_process_first():
        run.start(settings)

    set_seed(training_args.seed)
    tokenizer = load_tokenizer(model_args)
    held_out, dataset, count = load_data(data_args, tokenizer, training_args)
    model = load_model(model_args, config)
    trainer = make_trainer(model, tokenizer, held_out, dataset, data_args, model_args, training_args, run)

    before = measure_once(run, "before", trainer)
    trainer.train(resume_from_checkpoint=run.last_checkpoint())
    after = measure_once(run, "after", trainer)

    routing = record_routing(model, torch.tensor(held_out.sequences[:1], device=model.device))
    model.config.use_cache = config.use_cache  # Trainer turned it off
    trainer.save_model(str(run.result / "model"))
    report = make_report(trainer, before, after, count, settings, data_args)
    if trainer.is_world_process_zero():
        draw_losses(run.result / "loss.png", trainer, before, after, data_args)
        draw_routing(run.result / "routing.png", routing, model)
        report["sample"] = generate(run.result / "model", tokenizer, held_out, data_args)
        write_json(run.result / "report.json", report)
        run.publish()
        print(closing_words(report, run.finished))
    return report


# ---- before any work -----------------------------------------------------------------------------------------------


def check(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments):
    """Refuse what cannot work, before anything is loaded; returns the model's config, MoBA settings included."""
    read_documents_of(data_args)
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError(f"streaming needs max_steps, but it was {training_args.max_steps}")
    location = model_location(model_args)
    config = AutoConfig.from_pretrained(location, gguf_file=model_args.gguf_file)
    if model_args.moba is not None:
        config.moba = model_args.moba
    settings = moba_hf.configure(config)
    positions = config.get_text_config().max_position_embeddings
    if data_args.sequence_length > positions:
        raise ValueError(
            f"sequence_length={data_args.sequence_length} is above the model's {positions} positions; "
            f"interpolate positions first or shorten the sequences"
        )
    if settings.block_size * settings.top_k >= data_args.sequence_length:
        logger.warning(
            "block_size · top_k = %d covers the whole sequence_length=%d: MoBA is full attention there, and nothing "
            "is trained sparse.",
            settings.block_size * settings.top_k,
            data_args.sequence_length,
        )
    return config


def describe(model_args, data_args, training_args) -> dict:
    """What was asked for: our arguments, and those of TrainingArguments that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(training_args)}
    values = {
        name: value for name, value in training_args.to_dict().items() if name in defaults and name != "hub_token"
    }
    given = {name: value for name, value in values.items() if (value or None) != (defaults[name] or None)}
    groups = {"model": dataclasses.asdict(model_args), "data": dataclasses.asdict(data_args), "training": given}
    return json.loads(json.dumps(groups, default=str))


# ---- the parts of the run ------------------------------------------------------------------------------------------


def load_tokenizer(model_args: ModelArguments):
    return AutoTokenizer.from_pretrained(model_location(model_args), gguf_file=model_args.gguf_file)


def load_model(model_args: ModelArguments, config):
    """The model to train. GGUF weights are unpacked: packed ones cannot be trained."""
    unpack = {"quantization_config": GgufConfig(dequantize=True)} if model_args.gguf_file else {}
    return AutoModelForCausalLM.from_pretrained(
        model_location(model_args),
        gguf_file=model_args.gguf_file,
        config=config,
        dtype=model_args.dtype,
        attn_implementation="moba",
        **unpack,
    )


def read_documents_of(data_args: DataArguments):
    return read_documents(
        data_args.dataset,
        config=data_args.dataset_config,
        split=data_args.dataset_split,
        text_column=data_args.text_column,
    )


def load_data(data_args, tokenizer, training_args) -> tuple[HeldOut, Dataset | IterableDataset, PackingCount]:
    """Held-out sequences, packed training sequences, and the count of what became of the text."""
    held_out = hold_out(
        read_documents_of(data_args),
        tokenizer,
        sequence_length=data_args.sequence_length,
        share=data_args.held_out_share,
        sequences=data_args.held_out_sequences,
    )
    count = PackingCount()

    def sequences():
        return training_sequences(
            read_documents_of(data_args),
            tokenizer,
            held_out,
            sequence_length=data_args.sequence_length,
            share=data_args.held_out_share,
            document_mask=data_args.document_mask,
            count=count,
        )

    if data_args.streaming:
        dataset = IterableDataset.from_generator(sequences)
    else:
        dataset = Dataset.from_list(list(sequences()))
        if len(dataset) == 0:
            raise ValueError(f"no training text: every document of {data_args.dataset} is held out or empty")
        logger.info("Training text: %s.", count)
    logger.info("Held-out text: %d sequences of %d tokens.", len(held_out.sequences), data_args.sequence_length)
    return held_out, dataset, count


def make_trainer(model, tokenizer, held_out, dataset, data_args, model_args, training_args, run) -> MeteredTrainer:
    training_args.output_dir = str(run.unfinished)
    training_args.include_num_input_tokens_seen = "all"
    meter = Meter(
        torch.tensor(held_out.sequences),
        dense_attention=model_args.dense_attention,
        batch_size=1,
        progress=not training_args.disable_tqdm,
    )
    return MeteredTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=Dataset.from_dict({"input_ids": held_out.sequences}),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        meter=meter,
        meter_sequences=data_args.meter_sequences,
        trailing_tokens=data_args.trailing_tokens,
    )


def measure_once(run: RunFolder, name: str, trainer: MeteredTrainer) -> Measurement:
    """The measurement of all held-out sequences, taken once per run however often it is resumed."""

    def measure():
        measurement = trainer.measure()
        return {"full": measurement.full.by_token, "moba": measurement.moba.by_token}

    losses = run.once(name, measure)
    return Measurement(HeldOutLoss(losses["full"]), HeldOutLoss(losses["moba"]))


# ---- what comes out ------------------------------------------------------------------------------------------------


def make_report(trainer, before: Measurement, after: Measurement, count: PackingCount, settings, data_args) -> dict:
    tokens = data_args.trailing_tokens
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return {
        "steps": trainer.state.global_step,
        "full_before": before.full.summary(tokens),
        "moba_before": before.moba.summary(tokens),
        "full_after": after.full.summary(tokens),
        "moba_after": after.moba.summary(tokens),
        "gap_before": before.gap(tokens),
        "gap_after": after.gap(tokens),
        "tokens_per_second": statistics.harmonic_mean(speeds) if speeds else None,
        "trained_tokens": trainer.state.num_input_tokens_seen,
        "data": dataclasses.asdict(count),
        "config": {"moba": trainer.model.config.moba, **settings},
        "versions": {"moba_hf": moba_hf.__version__, "torch": torch.__version__},
    }


def draw_losses(file: Path, trainer, before: Measurement, after: Measurement, data_args: DataArguments) -> None:
    """Every point of the curves is measured on the same sequences: those that were measured during training."""
    few, tokens = data_args.meter_sequences, data_args.trailing_tokens
    number, length = before.full.by_token.shape[0], data_args.sequence_length
    history = [entry for entry in trainer.state.log_history if "eval_gap" in entry]
    curve = {entry["step"]: {name: entry[f"eval_{name}"] for name in _CURVES} for entry in history}
    for step, measurement in ((0, before.first(few)), (trainer.state.global_step, after.first(few))):
        losses = {"full": measurement.full.summary(tokens), "moba": measurement.moba.summary(tokens)}
        curve[step] = {f"{mode}_{key}": loss for mode in losses for key, loss in losses[mode].items()}
    steps = sorted(curve)
    lines = {name: [curve[step][name] for step in steps] for name in _CURVES}
    figure = loss_figure(
        steps,
        {"mean": lines["full_mean"], "trailing": lines["full_trailing"]},
        {"mean": lines["moba_mean"], "trailing": lines["moba_trailing"]},
        trailing_tokens=tokens,
        title=f"Held-out loss on {min(few, number)} of {number} sequences of {length} tokens",
    )
    save(figure, file)


_CURVES = ("full_mean", "full_trailing", "moba_mean", "moba_trailing")


def draw_routing(file: Path, routing: Routing, model) -> None:
    if not routing.layers:
        logger.warning("No layer ran sparse at this length: %s is not drawn.", file.name)
        return
    moba = moba_hf.MobaConfig.from_dict(model.config.moba)
    title = f"What each query attends (block {moba.block_size}, top-{moba.top_k})"
    save(routing_figure(routing, block_size=moba.block_size, title=title), file)


def generate(model_folder: Path, tokenizer, held_out: HeldOut, data_args) -> str:
    """Reload the saved checkpoint as a user would, and let it go on from the middle of a held-out sequence."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="moba")
    prompt = torch.tensor([held_out.sequences[0][: data_args.sequence_length // 2]])
    if data_args.sample_tokens == 0:
        return ""
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=data_args.sample_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


def closing_words(report: dict, folder: Path) -> str:
    """The table, and the two lines that load the result."""
    rows = [("", "before", "after")]
    for name, mode, key in (
        ("full attention, mean loss", "full", "mean"),
        ("MoBA attention, mean loss", "moba", "mean"),
        ("full attention, trailing loss", "full", "trailing"),
        ("MoBA attention, trailing loss", "moba", "trailing"),
    ):
        rows.append((name, f"{report[f'{mode}_before'][key]:.3f}", f"{report[f'{mode}_after'][key]:.3f}"))
    rows.append(("gap (trailing, MoBA − full)", f"{report['gap_before']:.3f}", f"{report['gap_after']:.3f}"))
    table = "\n".join(f"  {name:<32}{before:>10}{after:>10}" for name, before, after in rows)
    speed = report["tokens_per_second"]
    return (
        f"\nHeld-out text after {report['steps']} steps"
        + (f" ({speed:.0f} tokens per second)" if speed else "")
        + f":\n\n{table}\n\nThe reloaded checkpoint goes on: {report['sample']!r}\n\n"
        f"Report and figures: {folder / 'report.json'}, {folder / 'loss.png'}, {folder / 'routing.png'}\n"
        f"Load the result:\n\n"
        f"  import moba_hf; from transformers import AutoModelForCausalLM\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{folder / "model"}", attn_implementation="moba")\n'
    )


if __name__ == "__main__":
    main()
