"""One table and one figure of the arms of docs/quality.md: loss during training, and at the end against full attention.

    python scripts/summarize_quality.py runs/quality --json runs/quality/arms.json   # after study_quality.py
    python scripts/summarize_quality.py docs/measurements/h100-quality.json --figure docs/quality.png

An arm's loss is that of held-out text in the attention that the arm ends in: full attention where its last phase is,
MoBA elsewhere. What it is held against is the arm in full attention that was trained alike: `full-low-rate`,
`full-high-rate`, `masked-full`, else `full`; nothing, where that one has not run.
"""

import argparse
import json
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from moba_hf.evaluation.figures import STYLE, save

KEPT = ("steps", "trained_tokens", "moba_tokens", "tokens_per_second", "full_before", "moba_before", "full_after",
        "moba_after", "position_loss", "evaluations", "history")  # fmt: skip
# by what an arm's name has in it; else `full`
REFERENCES = {"low-rate": "full-low-rate", "high-rate": "full-high-rate", "masked": "masked-full"}
# Okabe and Ito's colours, and a line for each, so that grey tells them apart too: another where a colour returns
COLORS, LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9"), ("-", "--", "-.", ":")
LOOKS = [(COLORS[i % 6], LINES[(i + i // 6) % 4]) for i in range(24)]


def main(argv: list[str] | None = None) -> str:
    """Print the table, write the figure, return the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", type=Path, help="folder of the arms, or a file that --json wrote")
    parser.add_argument("--figure", type=Path, help="default: quality.png in the folder")
    parser.add_argument("--json", type=Path, help="also write what the page quotes into one file")
    options = parser.parse_args(argv)
    arms = read(options.arms)
    if "full" not in arms:
        parser.error(f"{options.arms} has no report of the arm full, which the others are held against")
    text = table(arms)
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"arms": arms}, indent=1) + "\n", encoding="utf-8")
    folder = options.arms if options.arms.is_dir() else options.arms.parent
    save(figure(arms), options.figure or folder / "quality.png")
    return text


def read(path: Path) -> dict[str, dict]:
    """What the page quotes of each arm's report, by name."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["arms"]
    reports = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in path.glob("*/report.json")}
    return {name: {key: reports[name][key] for key in KEPT} for name in sorted(reports)}


def mode(arm: dict) -> str:
    """The attention that an arm ends in: full where the last tokens were trained so."""
    return "moba" if arm["history"]["moba_layers"][-1] else "full"


def reference(name: str) -> str:
    """The arm that an arm is held against."""
    return next((full for part, full in REFERENCES.items() if part in name), "full")


def table(arms: dict[str, dict]) -> str:
    """Markdown: loss at the end, and against the arm full."""
    lines = ["| arm | ends in | mean | trailing | against full | tokens/s |", "|---|---|---|---|---|---|"]
    for name, arm in arms.items():
        loss, against = arm[f"{mode(arm)}_after"], ""
        if (base := reference(name)) in arms and base != name:
            full = arms[base]["full_after"]
            against = " / ".join(f"{loss[key] - full[key]:+.4f}" for key in ("mean", "trailing"))
        cells = (name, mode(arm), f"{loss['mean']:.4f}", f"{loss['trailing']:.4f}", against,
                 f"{arm['tokens_per_second'] / 1e3:.0f}K" if arm["tokens_per_second"] else "")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(arms: dict[str, dict]) -> Figure:
    """Three panels: loss during training, the same against full attention by position at the end, recall; and a fourth
    of the arms masked-N, where there are some: loss over their full layers."""
    masked = {name: arm for name, arm in arms.items() if name.startswith("masked-")}
    whole = {name: arm for name, arm in arms.items() if name not in masked}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(15 if masked else 11, 4))
        training, positions, recall, *layers = drawing.subplots(1, 4 if masked else 3)
        for (name, arm), (color, line) in zip(whole.items(), cycle(LOOKS)):
            how, look = mode(arm), dict(color=color, linestyle=line, label=name)
            steps = [entry["step"] for entry in arm["evaluations"]]
            training.plot(steps, [entry[f"{how}_mean"] for entry in arm["evaluations"]], **look)
            measured = [(entry["step"], entry["recall"]) for entry in arm["evaluations"] if "recall" in entry]
            if measured:
                recall.plot(*zip(*measured), **look)
            if (full := reference(name)) in arms:
                base = arms[full]["position_loss"]["after"]
                lost = [a - b for a, b in zip(arm["position_loss"]["after"][how], base["full"], strict=True)]
                positions.plot(base["ends"], lost, **look)
        training.set(title="Held-out loss, each in its attention", xlabel="step", ylabel="nats per token")
        positions.set(title="At the end, above full attention", xlabel="positions up to", ylabel="nats per token")
        recall.set(title="Recall of attention's mass", xlabel="step", ylabel="share on what MoBA selects")
        drawing.legend(*training.get_legend_handles_labels(), loc="outside lower center", ncols=6)
        for panel in layers:
            draw_masked(panel, masked)
        return drawing


def draw_masked(panel, masked: dict[str, dict]) -> None:
    """Trailing loss of the arms masked-N over N, before and after; a level line where masked-full ends."""
    arms = sorted((int(name.split("-")[1]), arm) for name, arm in masked.items() if name != "masked-full")
    for when, (color, line) in zip(("before", "after"), LOOKS):
        losses = [arm[f"{mode(arm)}_{when}"]["trailing"] for _, arm in arms]
        panel.plot([last for last, _ in arms], losses, color=color, linestyle=line, marker="o", label=when)
    if "masked-full" in masked:
        panel.axhline(
            masked["masked-full"]["full_after"]["trailing"], color="#000000", linestyle=":", label="never MoBA"
        )
    panel.set(title="Masked loss, trailing", xlabel="last layers in full attention", ylabel="nats per token")
    panel.legend()


if __name__ == "__main__":
    main()
