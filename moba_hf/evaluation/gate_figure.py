"""MoBA in one picture: a text in blocks, one query's gate scores, the blocks it takes, and what all queries attend."""

import textwrap
from collections.abc import Sequence

import matplotlib
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from .figures import FULL, MOBA, STYLE
from .routing import Gate

OWN, CHOSEN, LEFT_OUT = MOBA, FULL, "#E3E3E3"
_TINTS = {OWN: "#FBE7DA", CHOSEN: "#DCEBF5", LEFT_OUT: "#F6F6F6"}
_PALE = "#B5B5B5"  # in grey, too, lighter than a chosen block
_LINE = 94  # characters of a block's text in a line, two lines at most
_PATTERN = ListedColormap(["white", LEFT_OUT, CHOSEN, OWN])


def gate_figure(gate: Gate, tokens: Sequence[str], *, head: int, query: int | None = None, title: str = "") -> Figure:
    """What one head of one layer does with a text.

    Above, a row for every block up to the query's own: its text, its gate score, and whether it is attended. Below, the
    pairs of query and key that full attention and MoBA compute, for all queries.

    Args:
        gate: as `record_gates` returns, of a document of at most some thousand tokens.
        tokens: text of each token.
        head: the query head. query: the position looked at; the last one by default.

    Raises:
        ValueError: `tokens` are not those of the document, or it has no such head or query.
    """
    length, heads, _ = gate.query.shape
    query = length - 1 if query is None else query
    if len(tokens) != length:
        raise ValueError(f"tokens must be the {length} of the document, but were {len(tokens)}")
    for name, number, end in (("head", head, heads), ("query", query, length)):
        if not 0 <= number < end:
            raise ValueError(f"{name} must lie in 0 … {end - 1}, but was {number}")
    own = query // gate.block_size
    chosen = {block for block in gate.selected[query, head].tolist() if block >= 0}
    colors = [OWN if block == own else CHOSEN if block in chosen else LEFT_OUT for block in range(own + 1)]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        rows = 0.41 * (own + 1) + 0.75
        figure = Figure(figsize=(8.5, rows + 3.35))
        top, bottom = figure.subfigures(2, 1, height_ratios=[rows, 3.35])
        left, right = top.subplots(1, 2, sharey=True, width_ratios=[5.9, 2])
        _draw_text(left, tokens, gate.block_size, query, colors)
        _draw_scores(right, gate.scores()[query, head, :own].tolist(), colors)
        _draw_patterns(bottom.subplots(1, 2), gate, head, query)
        names = {OWN: "own block, up to the query", CHOSEN: "past block, attended", LEFT_OUT: "past block, left out"}
        bottom.legend(handles=[Patch(color=c, label=n) for c, n in names.items()], loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=12)
        return figure


def _draw_text(panel, tokens: Sequence[str], block_size: int, query: int, colors: Sequence[str]) -> None:
    """A box for every block, the newest at the bottom; the own block ends with the query's token."""
    for block, color in enumerate(colors):
        box = FancyBboxPatch(
            (0.004, block - 0.36), 0.992, 0.72, boxstyle="round,pad=0,rounding_size=0.012", mutation_aspect=12,
            facecolor=_TINTS[color], edgecolor=color, linewidth=0.8 if color == LEFT_OUT else 1.6,
        )  # fmt: skip
        panel.add_patch(box)
        text = "".join(tokens[block * block_size : min((block + 1) * block_size, query + 1)])
        text = " ".join(text.split()) + (" ◂" if color == OWN else "")
        lines = textwrap.wrap(text, _LINE, max_lines=2, placeholder=" …")
        panel.text(0.014, block, "\n".join(lines), va="center", fontsize=7.8, linespacing=1.25)
    panel.set_yticks(range(len(colors)), [f"block {block}" for block in range(len(colors))], fontsize=8.5)
    panel.tick_params(length=0)
    panel.set(xlim=(0, 1), ylim=(len(colors) - 0.45, -0.55), xticks=[])
    panel.spines[:].set_visible(False)
    panel.set_title(f"1  A text in blocks of {block_size} tokens. The query: its last word, “{tokens[query].strip()}”")


def _draw_scores(panel, scores: Sequence[float], colors: Sequence[str]) -> None:
    """Bars from the lowest score on: the gate ranks scores, their zero means nothing."""
    lowest, highest = (min(scores), max(scores)) if scores else (0.0, 0.0)
    reach = (highest - lowest) or 1.0
    for block, score in enumerate(scores):
        width = 0.06 + 0.68 * (score - lowest) / reach
        panel.barh(block, width, 0.5, color=_PALE if colors[block] == LEFT_OUT else colors[block], alpha=0.9)
        panel.text(width + 0.02, block, f"{score:.0f}".replace("-", "−"), va="center", fontsize=8.5)
    panel.text(0, len(colors) - 1, "always attended", va="center", fontsize=8.5, color=OWN)
    panel.set(xlim=(0, 1), xticks=[])
    panel.tick_params(left=False, labelleft=False)
    panel.spines[:].set_visible(False)
    panel.set_title("2  Its gate score")


def _draw_patterns(panels, gate: Gate, head: int, query: int) -> None:
    """Queries × keys, token by token: 0 future, 1 left out, 2 past block attended, 3 own block."""
    length, size = gate.query.shape[0], gate.block_size
    position, blocks = torch.arange(length), torch.arange(-(-length // size))
    own, causal = position // size, position <= position[:, None]
    taken = (gate.selected[:, head, :, None] == blocks).any(1)[:, own]
    past = own < own[:, None]
    full, moba = torch.where(past, 2, 3) * causal, torch.where(past, 1 + taken.int(), 3) * causal
    share = (moba > 1).sum().item() / causal.sum().item()
    titles = ("3  Every query in full attention …", f"… and in MoBA: {100 * share:.0f} % of the pairs")
    for panel, image, title in zip(panels, (full, moba), titles, strict=True):
        panel.imshow(image.numpy(), cmap=_PATTERN, vmin=0, vmax=3, interpolation="nearest", aspect="equal")
        panel.set_title(title)
        panel.set_xticks([min((b + 0.5) * size, length - 1) for b in blocks.tolist()], blocks.tolist(), fontsize=8)
        panel.set_yticks([query], ["the query ▸"], fontsize=8)
        panel.tick_params(length=0)
        panel.set(xlabel="key block", ylabel="queries")
