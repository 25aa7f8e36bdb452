"""One table and one figure of a recipe's stages: what each left of the gap, and the training loss through all of them.

    python scripts/summarize_rehearsal.py runs/rehearsal            # what `make rehearse` left there
    python scripts/summarize_rehearsal.py runs/rehearsal --figure runs/rehearsal/stages.png

Reads report.json of the stages 1k, 2k, 2k-moba and sft, in this order. Losses are those of held-out text (of held-out
answers in the SFT stage), before and after the stage, in full and in MoBA attention with the same weights.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moba_hf.evaluation.figures import FULL, MOBA, STYLE, save

STAGES = ("1k", "2k", "2k-moba", "sft")


def main(argv: list[str] | None = None) -> str:
    """Print the table, write the figure, return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path, help="default: stages.png in the folder")
    options = parser.parse_args(argv)
    missing = [stage for stage in STAGES if not (options.folder / stage / "report.json").is_file()]
    if missing:
        parser.error(f"{options.folder} has no report.json of the stages {', '.join(missing)}: run make rehearse first")
    reports = {stage: json.loads((options.folder / stage / "report.json").read_text()) for stage in STAGES}
    text = table(reports) + "\n" + switches(reports)
    print(text)
    save(figure(reports), options.figure or options.folder / "stages.png")
    return text


def table(reports: dict[str, dict]) -> str:
    """Markdown: mean loss before → after each stage, and the gap (MoBA − full)."""
    lines = ["| stage | steps | full attention | MoBA | gap |", "|---|---|---|---|---|"]
    for stage, report in reports.items():
        losses = {mode: [mean(report, mode, when) for when in ("before", "after")] for mode in ("full", "moba")}
        gaps = [moba - full for full, moba in zip(losses["full"], losses["moba"])]
        cells = [f"{before:.3f} → {after:.3f}" for before, after in (losses["full"], losses["moba"], gaps)]
        lines.append(f"| {stage} | {report['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean(report: dict, mode: str, when: str) -> float:
    """Of all positions; the SFT stage's report has no trailing loss beside it."""
    return report[f"{mode}_loss_{when}"] if f"{mode}_loss_{when}" in report else report[f"{mode}_{when}"]["mean"]


def switches(reports: dict[str, dict]) -> str:
    """Where a stage changed its mode: the training losses of the three steps on either side."""
    lines = []
    for stage, report in reports.items():
        history = report.get("history", {"loss": [], "moba_layers": []})
        modes = ["moba" if layers else "full" for layers in history["moba_layers"]]
        for i in range(1, len(modes)):
            if modes[i] != modes[i - 1]:
                sides = [", ".join(f"{x:.3f}" for x in side) for side in (
                    history["loss"][max(0, i - 3) : i], history["loss"][i : i + 3]
                )]  # fmt: skip
                lines.append(
                    f"{stage}, {modes[i - 1]} to {modes[i]} after step {i}: training loss {sides[0]} | {sides[1]}"
                )
    return "\n".join(lines)


def figure(reports: dict[str, dict]) -> Figure:
    """Training loss of every step of the pretraining stages, by what it was trained in."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(9, 3.6))
        panel = drawing.subplots()
        first = 0
        for stage, report in reports.items():
            if "history" not in report:
                continue
            history = report["history"]
            for mode, color, line in (("full", FULL, "s-"), ("moba", MOBA, "o--")):
                chosen = [i for i, layers in enumerate(history["moba_layers"]) if bool(layers) == (mode == "moba")]
                at = [first + i + 1 for i in chosen]
                panel.plot(at, [history["loss"][i] for i in chosen], line, color=color)
            panel.axvline(first + 0.5, color="0.8", linewidth=1, zorder=0)
            panel.text(first + 0.7, 0.99, stage, transform=panel.get_xaxis_transform(), va="top")
            first += len(history["loss"])
        panel.margins(y=0.12)  # for the names of the stages
        panel.set(title="Training loss by stage", xlabel="step of all stages", ylabel="training loss (nats per token)")
        names = (("full attention", FULL, "s", "-"), ("MoBA", MOBA, "o", "--"))
        panel.legend(handles=[Line2D([], [], color=c, marker=m, linestyle=s, label=name) for name, c, m, s in names])
        return drawing


if __name__ == "__main__":
    main()
