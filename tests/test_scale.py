"""Every table of docs/scale.md against what the `moba-hf plan` command above it says now."""

import json
import re
import shlex
from pathlib import Path

import pytest

from moba_hf import cli, planner

PAGE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"```bash\n(for .*)\n```\n\n((?:\|.*\n)+)((?:(?!#).*\n)*)", PAGE)
COMMAND = re.compile(r"for gpus in ([\d ]+); do moba-hf (.*) --gpus \$gpus; done")


def plans(command: str, capsys) -> list[dict]:
    """The plan for each number of GPUs of the command's loop."""
    gpus, arguments = COMMAND.fullmatch(command).groups()
    found = []
    for count in gpus.split():
        assert cli.main([*shlex.split(arguments), "--gpus", count, "--json"]) == 0
        found += json.loads(capsys.readouterr().out)
    return found


def row(plan: dict) -> str:
    """A plan as a row of the page."""
    dense, moba = plan["columns"]
    split = " × ".join(str(plan["sharing"][name]) for name in ("sequence", "stages", "replicas"))
    seconds = [f"{s:,.0f}" if s >= 100 else f"{s:.3g}" for s in (c["seconds"]["total"] for c in (dense, moba))]
    rates = [f"{c['tokens_per_second']:,.0f}" for c in (dense, moba)]
    memory = {name: size / planner.GIB for name, size in moba["memory"]["parts"].items()}
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in memory.items() if size >= 0.05)
    fits = "yes" if moba["fits"] else "**no**"
    cells = (plan["gpus"], split, *seconds, *rates, f"{moba['memory']['total'] / planner.GIB:.1f}", parts, fits,
             f"{moba['largest_length']:,}")  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def test_the_page_has_its_six_tables():
    assert len(SECTIONS) == 6


@pytest.mark.parametrize(("command", "table", "after"), SECTIONS, ids=[str(i) for i in range(len(SECTIONS))])
def test_tables_are_what_the_commands_say(command, table, after, capsys):
    found = plans(command, capsys)
    assert table.splitlines()[2:] == [row(plan) for plan in found]
    if found[0]["crossover"]:
        assert f"from {found[0]['crossover']:,} tokens on" in after
    host = [plan["columns"][1]["memory"]["host"] / planner.GIB for plan in found]
    if any(host):
        assert f"layer inputs: {', '.join(f'{size:.0f}' for size in host)} GiB a GPU" in after
