"""The figures of the evaluation scripts, in the style of `figures`.

Lines and bars differ in marker, dash or hatching as well as in colour, so that grey tells them apart too. Heat maps
carry their values where there is room.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import DARK, FULL, HEAT, MOBA, STYLE
from .recall import Mass

HYBRID = "#009E73"
_LINES = {
    "full": {"color": FULL, "marker": "s", "linestyle": "-"},
    "moba": {"color": MOBA, "marker": "o", "linestyle": "--"},
    "hybrid": {"color": HYBRID, "marker": "^", "linestyle": ":"},
}
_NAMES = {"full": "full attention", "moba": "MoBA", "hybrid": "hybrid"}
_HEAT = {**STYLE, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}


def needle_figure(
    tables: Mapping[str, Sequence[Sequence[float | None]]],
    lengths: Sequence[int],
    depths: Sequence[int],
    *,
    title: str = "",
) -> Figure:
    """Length × depth grids, dark red where the needle was not found, light green where it was; side by side, or wide
    ones stacked.

    Args:
        tables: mode → mean score, 0 … 1, [depth][length]; None where nothing was measured.
        lengths: tokens of the columns. depths: percent of the rows.
    """
    with matplotlib.rc_context(_HEAT):
        width, height = max(3.2, 0.36 * len(lengths) + 1), max(2.6, 0.28 * len(depths) + 1.6)
        shape = (1, len(tables)) if len(lengths) <= 16 else (len(tables), 1)
        figure = Figure(figsize=(width * shape[1] + 0.8, height * shape[0]))
        panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).flatten()
        for panel, (mode, table) in zip(panels, tables.items(), strict=True):
            values = np.array([[np.nan if v is None else 100 * v for v in row] for row in table])
            image = panel.imshow(values, cmap=HEAT, vmin=0, vmax=100, aspect="auto")
            _write_values(panel, values)
            panel.set_xticks(range(len(lengths)), [_thousands(n) for n in lengths], rotation=90)
            panel.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
            found = f"{np.nanmean(values):.0f} % found" if np.isfinite(values).any() else "not measured"
            panel.set(title=f"{_NAMES[mode]}: {found}", xlabel="tokens")
            panel.set_ylabel("depth of the needle")
            panel.label_outer()
        figure.colorbar(image, ax=panels, label="found (%)", shrink=0.9)
        figure.suptitle(title, fontsize=12)
        return figure


def ruler_figure(
    scores: Mapping[str, Mapping[str, Mapping[int, float]]], tasks: Sequence[str], lengths: Sequence[int], *, title=""
) -> Figure:
    """Bars per task, modes next to each other, a panel per length.

    Args:
        scores: mode → task → length → percent, as `ruler.table` returns; "mean" among the tasks.
        tasks: in the order they are to be drawn.
    """
    with matplotlib.rc_context(STYLE):
        rows = [*tasks, "mean"]
        figure = Figure(figsize=(4.2 * len(lengths) + 1.2, 0.42 * len(rows) + 1.7))
        panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        thick = 0.8 / len(scores)
        for panel, length in zip(panels, lengths, strict=True):
            for i, (mode, by_task) in enumerate(scores.items()):
                values = [by_task.get(task, {}).get(length, np.nan) for task in rows]
                places = np.arange(len(rows)) + (i - (len(scores) - 1) / 2) * thick
                style = {"color": _LINES[mode]["color"], "hatch": "" if mode == "full" else "///", "edgecolor": "white"}
                bars = panel.barh(places, values, thick, label=_NAMES[mode], linewidth=0, **style)
                panel.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
            panel.set(title=f"{length} tokens", xlabel="score (%)", xlim=(0, 110))
            panel.set_yticks(range(len(rows)), rows)
            panel.grid(axis="y", visible=False)
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=12)
        return figure


def position_figure(
    curves: Mapping[str, Sequence[float]], window: int, *, names: Mapping[str, str] = _NAMES, title: str = ""
) -> Figure:
    """Loss over the position, and what sparsity adds to the loss of full attention.

    Args:
        curves: mode → mean loss (nats per token) of each window of positions; "full" among the modes.
        window: positions in one of them.
        names: mode → what the legend calls it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9))
        left, right = figure.subplots(1, 2)
        full = np.asarray(curves["full"])
        middle = (np.arange(len(full)) + 0.5) * window
        for mode, curve in curves.items():
            style = {**_LINES[mode], "markersize": 4, "label": names[mode]}
            left.plot(middle, curve, **style)
            if mode != "full":
                right.plot(middle, np.asarray(curve) - full, **style)
        right.axhline(0, color=FULL, linewidth=1.2)
        left.set(title="Loss", xlabel="position in the document (tokens)", ylabel="nats per token")
        right.set(title="Above full attention", xlabel="position in the document (tokens)", ylabel="nats per token")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=12)
        return figure


def granularity_figure(
    splits: Sequence[tuple[int, int]],
    losses: Mapping[str, Sequence[float]],
    full: Mapping[str, float],
    *,
    trailing_tokens: int,
    title: str = "",
) -> Figure:
    """Loss at equal sparsity, from coarse to fine blocks; full attention as a line across.

    Args:
        splits: (blocks taken, blocks there are) of each point.
        losses: "mean" and "trailing" loss of each. full: the same two of full attention.
        trailing_tokens: what "trailing" means.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.9))
        titles = {"mean": "All positions", "trailing": f"Last {trailing_tokens} positions"}
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # no line strikes a value through
        small = {"textcoords": "offset points", "fontsize": 9}
        for panel, (key, name) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            panel.plot(range(len(splits)), losses[key], **_LINES["moba"], label="MoBA")
            panel.axhline(full[key], color=FULL, label="full attention")
            for i, loss in enumerate(losses[key]):
                panel.annotate(f"{loss:.3f}", (i, loss), (0, 8), ha="center", bbox=behind, **small)
            panel.set_xticks(range(len(splits)), [f"{taken}/{all_}" for taken, all_ in splits])
            panel.margins(x=0.16, y=0.18)
            panel.set(title=name, xlabel="blocks taken / blocks in the sequence", ylabel="loss (nats per token)")
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.suptitle(title, fontsize=12)
        return figure


def recall_figure(layers: Mapping[int, Mass], suggested: Sequence[int], *, title: str = "") -> Figure:
    """Recall by layer and head, and each layer's mean between a sliding window's and the best possible one.

    Args:
        layers: as `recall.measure` returns.
        suggested: layers marked as those to keep in full attention.
    """
    numbers = sorted(layers)
    values = np.array([layers[n].selected.numpy() for n in numbers])
    with matplotlib.rc_context(_HEAT):
        figure = Figure(figsize=(max(4.5, 0.42 * values.shape[1] + 1.5) + 4, 0.19 * len(numbers) + 2))
        left, right = figure.subplots(1, 2, width_ratios=[max(4.5, 0.42 * values.shape[1] + 1.5), 4])
        image = left.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        if values.shape[1] <= 16:
            _write_values(left, 100 * values)
        marked = [f"{n} ◂" if n in suggested else str(n) for n in numbers]
        left.set_yticks(range(len(numbers)), marked, fontsize=8)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set(title="Mass on the selected blocks (%)", xlabel="head", ylabel="layer (◂ suggested full)")
        figure.colorbar(image, ax=left, label="share of full attention's mass", shrink=0.9)
        _recall_means(right, layers, numbers)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=3)
        figure.suptitle(title, fontsize=12)
        return figure


def _recall_means(panel, layers: Mapping[int, Mass], numbers: Sequence[int]) -> None:
    marks = {"recent": ("sliding window", "x", "#666666"), "selected": ("MoBA", "o", MOBA), "best": ("best", "|", FULL)}
    for field, (name, marker, color) in marks.items():
        means = [getattr(layers[n], field).mean().item() for n in numbers]
        panel.plot(means, range(len(numbers)), marker, color=color, label=name, markersize=6, markeredgewidth=1.8)
    panel.set_yticks(range(len(numbers)), [])
    panel.set(ylim=(len(numbers) - 0.5, -0.5), xlim=(0, 1.02), xlabel="share of the mass", title="Mean over heads")
    panel.grid(visible=True)


def _write_values(panel, values: np.ndarray) -> None:
    """The percent in every cell; white where the cell is dark."""
    size = 8 if values.shape[1] <= 16 else 6
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value < 100 * DARK else "black"
            panel.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size, color=color)


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:g}K" if tokens >= 1000 and tokens % 100 == 0 else str(tokens)
