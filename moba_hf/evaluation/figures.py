"""Every figure in one style. Colours are Okabe and Ito's, which colour-blind readers can tell apart; those of heat maps
run from red over yellow to green, and get lighter all the way, so that grey tells low from high too.

Each function returns a matplotlib Figure that belongs to no window; `save` writes it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .routing import Routing

FULL, MOBA = "#0072B2", "#D55E00"
HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.0, "#5C0A14"), (0.23, "#A32020"), (0.46, "#D2642A"), (0.69, "#D9AE32"), (1.0, "#A8EC9C")]
)
DARK = 0.4  # below it white writing on HEAT has more contrast than black
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def save(figure: Figure, path: Path) -> None:
    """Write the figure; the suffix names the format."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)


def loss_figure(
    steps: Sequence[int],
    full: Mapping[str, Sequence[float]],
    moba: Mapping[str, Sequence[float]],
    *,
    trailing_tokens: int,
    title: str = "",
) -> Figure:
    """Held-out loss in full and MoBA attention over training, on all positions and on the trailing ones.

    Args:
        steps: optimizer steps at which both were measured.
        full, moba: "mean" and "trailing" loss at each of them, in nats per token.
        trailing_tokens: what "trailing" means, for the title.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4))
        panels = figure.subplots(1, 2)
        names = {"mean": "All positions", "trailing": f"Last {trailing_tokens} positions"}
        for panel, (key, name) in zip(panels, names.items(), strict=True):
            _loss_panel(panel, steps, full[key], moba[key], name)
        handles = [
            Line2D([], [], color=MOBA, marker="o", label="MoBA attention"),
            Line2D([], [], color=FULL, marker="s", label="full attention, same weights"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=12)
        return figure


def _loss_panel(panel, steps, full, moba, name: str) -> None:
    panel.fill_between(steps, full, moba, color=MOBA, alpha=0.10, linewidth=0)
    panel.plot(steps, moba, color=MOBA, marker="o", zorder=3)
    panel.plot(steps, full, color=FULL, marker="s", zorder=3)
    for at, side, shift in ((0, "left", 6), (-1, "right", -6)):
        panel.annotate(
            f"gap {moba[at] - full[at]:.2f}",
            (steps[at], (moba[at] + full[at]) / 2),
            xytext=(shift, 0),
            textcoords="offset points",
            ha=side,
            va="center",
        )
    panel.set(title=name, xlabel="optimizer step", ylabel="held-out loss (nats per token)")
    panel.xaxis.get_major_locator().set_params(integer=True)


def routing_figure(
    routing: Routing,
    *,
    block_size: int,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """Which blocks each query of one document attends: a row of panels per layer, a column per head.

    Args:
        routing: as `record_routing` returns, of a model with a sparse layer.
        block_size: tokens per block.
        layers, heads: what to draw; by default three of each, spread evenly.
    """
    layers = _spread(sorted(routing.layers), 3) if layers is None else layers
    heads = _spread(range(routing.layers[layers[0]].shape[1]), 3) if heads is None else heads
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2.7 * len(heads) + 0.6, 2.6 * len(layers) + 1))
        panels = figure.subplots(len(layers), len(heads), sharex=True, sharey=True, squeeze=False)
        for row, layer in zip(panels, layers, strict=True):
            for panel, head in zip(row, heads, strict=True):
                _routing_panel(panel, routing, routing.layers[layer][:, head], block_size)
                panel.set_title(f"layer {layer}, head {head}")
        for panel in panels[-1]:
            panel.set_xlabel(f"key block ({block_size} tokens each)")
        for panel in panels[:, 0]:
            panel.set_ylabel("query position")
        names = ("past block, not chosen", "past block, chosen", "own block (causal)")
        handles = [Patch(color=c, label=n) for c, n in zip(_ROUTING.colors[1:], names, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=12)
        return figure


_ROUTING = ListedColormap(["white", "#E3E3E3", FULL, MOBA])


def _routing_panel(panel, routing: Routing, selected: torch.Tensor, block_size: int) -> None:
    """selected: int32 [queries, slots]."""
    blocks = -(-routing.length // block_size)
    own, columns = routing.positions[:, None] // block_size, torch.arange(blocks)[None]
    chosen = (selected[:, :, None] == columns).any(1)
    image = (columns < own).int() + chosen.int() + 3 * (columns == own).int()
    panel.imshow(
        image.numpy(),
        cmap=_ROUTING,
        vmin=0,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, blocks - 0.5, routing.length, 0),
    )


def _spread(items: Sequence[int], number: int) -> list[int]:
    """At most `number` of the items, evenly spread, first and last among them."""
    items = list(items)
    if len(items) <= number:
        return items
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]
