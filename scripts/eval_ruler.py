"""RULER: 13 long-context tasks with the official generation lengths and scores, full and MoBA side by side.

    python scripts/eval_ruler.py --model_name_or_path runs/demo/model --lengths 2048 4096 --samples 20
    python scripts/eval_ruler.py --model_name_or_path my/1m-model --lengths 131072 524288 --essays essays/ \
        --squad dev-v2.0.json --hotpotqa hotpot_dev_distractor_v1.json

Nothing is downloaded: haystacks of prose and the two QA sets are files of yours. Tasks whose files are missing are
named, on the screen and in the report. Any length works that the model has positions for. The output folder gets

    samples.jsonl   every answer as it came; started again, the script goes on after the last one
    ruler.json      settings, tasks not run and why, scores, every answer
    ruler.png       scores of each task

The wording of the prompts is ours; `moba-hf lm-eval --tasks ruler` has the benchmark's own. Like every script here it
also takes --config FILE.yaml with any of the arguments below.
"""

from dataclasses import dataclass, field
from pathlib import Path

from evaluation_runs import PromptArguments, at_least, describe, different, open_checkpoint
from tqdm.auto import tqdm

from moba_hf.evaluation import ruler
from moba_hf.evaluation.checkpoint import digest
from moba_hf.evaluation.evaluation_figures import ruler_figure
from moba_hf.evaluation.figures import save
from moba_hf.evaluation.modes import side_by_side
from moba_hf.evaluation.result_log import ResultLog
from moba_hf.training.arguments import ModelArguments, parse
from moba_hf.training.run_folder import write_json
from moba_hf.training.sources import read_documents


@dataclass
class RulerArguments(PromptArguments):
    """Which tasks, at which lengths, made of what."""

    lengths: list[int] = field(default_factory=lambda: [4096], metadata={"help": "Tokens of prompt and answer."})
    tasks: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "Names of tasks, or all."})
    samples: int = field(default=500, metadata={"help": "Samples per task and length; the benchmark takes 500."})
    seed: int = field(default=0, metadata={"help": "Another one makes other samples."})
    essays: str | None = field(default=None, metadata={"help": "Prose to hide needles in: file, folder, or pydoc."})
    squad: str | None = field(default=None, metadata={"help": "SQuAD 2.0 development set (JSON), for qa_1."})
    hotpotqa: str | None = field(default=None, metadata={"help": "HotpotQA development set (JSON), for qa_2."})
    words: str = field(
        default=ruler.WONDERWORDS,
        metadata={"help": "Words of keys and lists: the package wonderwords, or a text file."},
    )
    output_dir: str = field(default="runs/ruler", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        super().__post_init__()
        different(lengths=self.lengths)
        at_least(1, samples=self.samples)


# Samples of other tasks and lengths, and more of them, may join the same log.
_NOT_IN_A_SAMPLE = ("lengths", "tasks", "samples", "batch_size", "prefill_chunk_size")


def main(argv: list[str] | None = None) -> dict:
    """Run the tasks; returns the report."""
    model_args, args = parse((ModelArguments, RulerArguments), argv, description=__doc__)
    material = ruler.gather(
        words=args.words,
        essays=read_documents(args.essays) if args.essays else None,
        squad=args.squad,
        hotpotqa=args.hotpotqa,
    )
    tasks, not_run = ruler.choose_tasks(args.tasks, material)
    for name, needed in not_run.items():
        print(f"Not run: {name}, which needs {needed}")
    checkpoint = open_checkpoint(model_args, longest=max(args.lengths))
    writer = ruler.Writer(checkpoint.tokenizer(), material, args.seed)
    writer.check(tasks, args.lengths, args.samples)
    model = checkpoint.model()
    settings = {**describe(model, model_args, args), "material": digest(material)}
    folder = Path(args.output_dir)
    log = ResultLog(folder / "samples.jsonl", settings, leave_out=_NOT_IN_A_SAMPLE)
    run(model, writer, tasks, args, log, model_args)
    settings = {name: value for name, value in settings.items() if name not in _NOT_IN_A_SAMPLE}
    return report(folder, settings, tasks, not_run, args, asked_for(log.results, tasks, args))


def asked_for(results: list[dict], tasks, args: RulerArguments) -> list[dict]:
    """Those of this run: the log may hold more, of runs before."""
    names = [task.name for task in tasks]
    return [r for r in results if r["task"] in names and r["length"] in args.lengths and r["sample"] < args.samples]


def run(model, writer: ruler.Writer, tasks, args: RulerArguments, log: ResultLog, model_args: ModelArguments) -> None:
    modes = side_by_side(model_args.dense_attention)
    total = len(tasks) * len(args.lengths) * len(modes) * args.samples
    done = len(asked_for(log.results, tasks, args))
    with tqdm(total=total, initial=done, desc="RULER", unit="sample") as bar:
        for added in ruler.run(
            model,
            writer,
            tasks,
            args.lengths,
            modes,
            log,
            samples=args.samples,
            batch_size=args.batch_size,
            prefill_chunk_size=args.prefill_chunk_size,
        ):
            bar.update(added)


def report(folder: Path, settings: dict, tasks, not_run: dict, args: RulerArguments, results: list[dict]) -> dict:
    """Write JSON and figure; print the scores."""
    scores = ruler.table(results)
    names = [task.name for task in tasks]
    result = {
        "settings": settings,
        "samples": args.samples,
        "tasks": {task.name: {"new_tokens": task.new_tokens, **task.options} for task in tasks},
        "not_run": not_run,
        "scores": scores,
        "answers": results,
    }
    write_json(folder / "ruler.json", result)
    title = f"RULER, samples per task: {args.samples} ({settings['model']})"
    save(ruler_figure(scores, names, args.lengths, title=title), folder / "ruler.png")
    for length in args.lengths:
        print(f"\n{length} tokens{'full':>14}{'moba':>8}")
        for name in (*names, "mean"):
            print(f"  {name:<18}{scores['full'][name][length]:>8.1f}{scores['moba'][name][length]:>8.1f}")
    print(f"\nEvery answer: {folder / 'ruler.json'}; figure: {folder / 'ruler.png'}")
    return result


if __name__ == "__main__":
    main()
