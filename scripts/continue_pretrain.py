"""Continue the pretraining of a causal language model with MoBA attention, and measure what it brings.

    python scripts/continue_pretrain.py --config configs/smollm2-135m-demo.yaml
    python scripts/continue_pretrain.py --config configs/smollm2-135m-demo.yaml --max_steps 60 --output_dir runs/longer
    accelerate launch scripts/continue_pretrain.py --config configs/llama-3.1-8b/1m-moba.yaml
    python scripts/continue_pretrain.py --config configs/llama-3.1-8b/1m-moba.yaml --plan    # memory, and no more

A config file holds any of the arguments below, and a flag overrides it; besides ours, every argument of Transformers'
TrainingArguments is one. The held-out text is measured in full and in MoBA attention before, during and after. The
output folder gets

    model/         the checkpoint (safetensors) with its MoBA settings, tokenizer and model card; or the LoRA adapter
    report.json    both losses before and after, the gap between them, speed, and what was run
    loss.png       both losses over the steps
    routing.png    which past blocks the queries of one held-out sequence chose

A run that is interrupted goes on from its last checkpoint when it is started again; one that fails leaves an earlier
result as it was.
"""

import dataclasses
import logging
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, TrainingArguments, default_data_collator, set_seed

import moba_hf
from moba_hf.evaluation.figures import loss_figure, routing_figure, save
from moba_hf.evaluation.position_loss import HeldOutLoss
from moba_hf.evaluation.routing import Routing, record_routing
from moba_hf.training import sequence_parallel
from moba_hf.training.activation import Selection, activated
from moba_hf.training.arguments import DataArguments, ModelArguments, StageArguments, model_location, parse
from moba_hf.training.checkpointing import check_checkpointing, keep_attention
from moba_hf.training.data import HeldOut, PackingCount, hold_out, training_sequences
from moba_hf.training.loss import check_loss, tile_loss
from moba_hf.training.meter import Measurement, Meter, MeteredTrainer
from moba_hf.training.model import (
    add_lora,
    describe,
    load_model,
    load_tokenizer,
    loading_code,
    lora_config,
    reload,
    save_config_beside_adapter,
)
from moba_hf.training.model_card import write_model_card
from moba_hf.training.planning import PlanArguments, for_planning, plan
from moba_hf.training.rope import extend_positions
from moba_hf.training.run_folder import BeforeTraining, RunFolder, write_json
from moba_hf.training.schedule import Schedule
from moba_hf.training.sources import read_documents

logger = logging.getLogger("continue_pretrain")


def main(argv: list[str] | None = None, load: Callable | None = None) -> dict:
    """Run the whole job; returns the report. load: in place of `load_data`, where several runs share their text."""
    kinds = (ModelArguments, DataArguments, StageArguments, TrainingArguments, PlanArguments)
    model_args, data_args, stage_args, training_args, plan_args = parse(kinds, for_planning(argv), description=__doc__)
    logging.basicConfig(format="%(message)s")
    for name in (logger.name, "moba_hf.training"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.process_index == 0 else logging.WARNING)
    if plan_args.plan:
        fused = model_args.tiled_loss or training_args.use_liger_kernel
        moba = model_args.moba or {}
        return plan(plan_args, model_args, training_args, data_args.sequence_length, moba, fused_loss=fused)
    settings = describe(training_args, model=model_args, data=data_args, stage=stage_args)
    config = check(model_args, data_args, stage_args, training_args)
    run = RunFolder(Path(training_args.output_dir))
    with training_args.main_process_first():
        run.start(settings)

    set_seed(training_args.seed)
    tokenizer = load_tokenizer(model_args)
    if stage_args.rope is not None:
        tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    held_out, dataset, count = (load or load_data)(data_args, tokenizer, training_args)
    model = prepare_model(load_model(model_args, config), model_args)
    trainer = make_trainer(model, tokenizer, held_out, dataset, data_args, model_args, stage_args, training_args, run)

    before = BeforeTraining(trainer, lambda: measure_once(run, "before", trainer))
    trainer.train(resume_from_checkpoint=run.last_checkpoint())
    after = measure_once(run, "after", trainer)

    length = data_args.sequence_length // model_args.sequence_parallel_size  # what a rank holds while it trains
    routing = record_routing(model, torch.tensor([held_out.sequences[0][:length]], device=model.device))
    model.config.use_cache = config.use_cache  # Trainer turned it off
    run.save_model(trainer)
    report = make_report(trainer, before.found, after, count, settings, data_args)
    if trainer.is_world_process_zero():
        draw_losses(run.result / "loss.png", trainer, before.found, after, data_args)
        draw_routing(run.result / "routing.png", routing, model)
        describe_model(trainer, report, model_args, data_args, run)
        report["sample"] = None
        if data_args.sample_tokens:
            report["sample"] = generate(reload(run.result / "model", model_args), tokenizer, held_out, data_args)
        write_json(run.result / "report.json", report)
        run.publish()
        print(closing_words(report, run.finished, model_args))
    return report


# ---- before any work -----------------------------------------------------------------------------------------------


def check(model_args, data_args: DataArguments, stage_args: StageArguments, training_args: TrainingArguments):
    """Refuse what cannot work, before anything is loaded; returns the model's config, MoBA settings included."""
    read_documents_of(data_args)
    check_checkpointing(training_args)
    if model_args.lora is not None:
        lora_config(model_args.lora)
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError(f"streaming needs max_steps, but it was {training_args.max_steps}")
    location = model_location(model_args)
    config = AutoConfig.from_pretrained(location, gguf_file=model_args.gguf_file)
    if model_args.moba is not None:
        config.moba = model_args.moba
    settings = moba_hf.configure(config)
    Schedule.from_list(stage_args.schedule).check(settings, config.get_text_config().num_hidden_layers)
    check_recall_steps(stage_args, training_args)
    if stage_args.rope is not None:
        logger.info("%s.", extend_positions(config, stage_args.rope))
    if model_args.sequence_parallel_size > 1:
        sequence_parallel.check(config, model_args.sequence_parallel_size, data_args.sequence_length)
    sequences = training_args.per_device_train_batch_size / model_args.sequence_parallel_size
    tokens = int(data_args.sequence_length * sequences)
    vocabulary = config.get_text_config().vocab_size
    check_loss(training_args, tiled=model_args.tiled_loss, tokens=tokens, vocabulary=vocabulary)
    positions = config.get_text_config().max_position_embeddings
    if data_args.sequence_length > positions:
        raise ValueError(
            f"sequence_length={data_args.sequence_length} is above the model's {positions} positions; "
            f"interpolate positions first (rope: {{method: interpolate, factor: 2}}) or shorten the sequences"
        )
    if settings.block_size * settings.top_k >= data_args.sequence_length:
        logger.warning(
            "block_size · top_k = %d covers the whole sequence_length=%d: MoBA is full attention there, and nothing "
            "is trained sparse.",
            settings.block_size * settings.top_k,
            data_args.sequence_length,
        )
    return config


def check_recall_steps(stage_args: StageArguments, training_args: TrainingArguments) -> None:
    wanted, every = stage_args.recall_steps, training_args.eval_steps
    if wanted and (training_args.eval_strategy != "steps" or wanted % every):
        raise ValueError(
            f"recall_steps={wanted} must be a multiple of eval_steps with eval_strategy: steps, but they were {every} "
            f"and {training_args.eval_strategy.value}"
        )


# ---- the parts of the run ------------------------------------------------------------------------------------------


def prepare_model(model, model_args: ModelArguments):
    """What the arguments add to the model: a tiled loss, attention that is kept, adapters."""
    if model_args.tiled_loss:
        tile_loss(model)
    keep_attention(model)
    return model if model_args.lora is None else add_lora(model, model_args.lora)


def read_documents_of(data_args: DataArguments, count: PackingCount | None = None):
    return read_documents(
        data_args.dataset,
        config=data_args.dataset_config,
        split=data_args.dataset_split,
        text_column=data_args.text_column,
        readings=None if count is None else count.sources,
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
        count.reset()
        return training_sequences(
            read_documents_of(data_args, count),
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


def make_trainer(
    model, tokenizer, held_out, dataset, data_args, model_args, stage_args, training_args, run
) -> MeteredTrainer:
    training_args.output_dir = str(run.unfinished)
    training_args.include_num_input_tokens_seen = "all"
    meter = Meter(
        torch.tensor(held_out.sequences),
        dense_attention=model_args.dense_attention,
        batch_size=1,
        progress=not training_args.disable_tqdm,
    )
    trainer = MeteredTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=Dataset.from_dict({"input_ids": held_out.sequences}),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        meter=meter,
        meter_sequences=data_args.meter_sequences,
        trailing_tokens=data_args.trailing_tokens,
        schedule=stage_args.schedule,
        recall_steps=stage_args.recall_steps,
    )
    if model_args.sequence_parallel_size > 1:
        sequence_parallel.enable(trainer, model_args.sequence_parallel_size)
    return trainer


@dataclasses.dataclass(frozen=True)
class Measured:
    """Before or after training: both losses of all held-out sequences, and what MoBA selects in the first."""

    losses: Measurement
    selection: Selection


def measure_once(run: RunFolder, name: str, trainer: MeteredTrainer) -> Measured:
    """Taken once per run, however often it is resumed."""

    def measure():
        losses = trainer.measure()
        selection = dataclasses.asdict(trainer.measure_selection())
        return {"full": losses.full.by_token, "moba": losses.moba.by_token, "selection": selection}

    found = run.once(name, measure)
    losses = Measurement(HeldOutLoss(found["full"]), HeldOutLoss(found["moba"]))
    return Measured(losses, Selection(**found["selection"]))


# ---- what comes out ------------------------------------------------------------------------------------------------


def make_report(trainer, before: Measured, after: Measured, count: PackingCount, settings, data_args) -> dict:
    tokens, switch, clock = data_args.trailing_tokens, trainer.switch, trainer.clock
    measured = {"before": before.losses, "after": after.losses}
    gaps = {when: losses.gap(tokens) for when, losses in measured.items()}
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    return {
        "steps": trainer.state.global_step,
        **{f"full_{when}": losses.full.summary(tokens) for when, losses in measured.items()},
        **{f"moba_{when}": losses.moba.summary(tokens) for when, losses in measured.items()},
        **{f"gap_{when}": gap for when, gap in gaps.items()},
        "position_loss": {when: losses.by_position() for when, losses in measured.items()},
        "sequence_loss": {when: losses.by_sequence() for when, losses in measured.items()},
        "selection": {"before": dataclasses.asdict(before.selection), "after": dataclasses.asdict(after.selection)},
        "tokens_per_second": statistics.harmonic_mean(speeds) if speeds else None,
        "history": training_history(trainer),
        "evaluations": evaluations(trainer),
        "trained_tokens": trainer.state.num_input_tokens_seen,
        "moba_tokens": switch.moba_tokens,
        "sparsity": clock.sparsity,
        "activated": activated(
            trainer.model.config.get_text_config(),
            data_args.sequence_length,
            switch.moba_tokens,
            clock.sparsity,
            gaps,
            tokens,
        ),
        "data": dataclasses.asdict(count),
        "config": {"moba": trainer.model.config.moba, **settings},
        "versions": {"moba_hf": moba_hf.__version__, "torch": torch.__version__},
    }


def training_history(trainer) -> dict[str, list]:
    """Training loss, and how many layers ran MoBA, at every logged step."""
    entries = [entry for entry in trainer.state.log_history if "moba_layers" in entry]
    return {name: [entry[name] for entry in entries] for name in ("step", "loss", "moba_layers", "sparsity")}


def evaluations(trainer) -> list[dict[str, float]]:
    """What the meter found during training: both losses, and recall and recent where they were measured."""
    kept = (*_CURVES, "recall", "recent")
    entries = [entry for entry in trainer.state.log_history if "eval_gap" in entry]
    return [
        {"step": entry["step"], **{name: entry[f"eval_{name}"] for name in kept if f"eval_{name}" in entry}}
        for entry in entries
    ]


def draw_losses(file: Path, trainer, before: Measured, after: Measured, data_args: DataArguments) -> None:
    """Every point of the curves is measured on the same sequences: those that were measured during training."""
    few, tokens = data_args.meter_sequences, data_args.trailing_tokens
    number, length = before.losses.full.by_token.shape[0], data_args.sequence_length
    curve = {entry["step"]: {name: entry[name] for name in _CURVES} for entry in evaluations(trainer)}
    for step, measured in ((0, before), (trainer.state.global_step, after)):
        measurement = measured.losses.first(few)
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


def describe_model(trainer, report: dict, model_args: ModelArguments, data_args: DataArguments, run: RunFolder) -> None:
    """Everything beside the weights: the model card, and the config that an adapter needs."""
    save_config_beside_adapter(trainer.model, run.result / "model")
    write_model_card(
        run.result / "model", model_args, config=trainer.model.config, stage="continued pretraining",
        data=data_args.dataset, length=data_args.sequence_length, tokens=report["trained_tokens"],
        published=run.finished / "model",
    )  # fmt: skip


def generate(model, tokenizer, held_out: HeldOut, data_args) -> str:
    """Let the reloaded checkpoint go on from the middle of a held-out sequence."""
    prompt = torch.tensor([held_out.sequences[0][: data_args.sequence_length // 2]])
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=data_args.sample_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


def closing_words(report: dict, folder: Path, model_args: ModelArguments) -> str:
    """The table, and the lines that load the result."""
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
        + f":\n\n{table}\n\n{report['activated']}\n\n"
        + (f"The reloaded checkpoint goes on: {report['sample']!r}\n\n" if report["sample"] else "")
        + f"Report and figures: {folder / 'report.json'}, {folder / 'loss.png'}, {folder / 'routing.png'}\n"
        f"Load the result:\n\n{loading_code(str(folder / 'model'), model_args, indent='  ')}\n"
    )


if __name__ == "__main__":
    main()
