"""Write docs/configuration.md from MobaConfig: `python scripts/write_configuration_reference.py`."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

from moba_hf import MobaConfig

FILE = Path(__file__).parent.parent / "docs" / "configuration.md"


def main() -> None:
    FILE.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The whole page. Each field's meaning is the one in MobaConfig's docstring."""
    meanings = attributes(inspect.getdoc(MobaConfig))
    rows = [f"| `{f.name}` | `{f.default!r}` | {meanings[f.name]} |" for f in fields(MobaConfig)]
    return "\n".join(
        [
            "# Configuration",
            "",
            "Generated from `MobaConfig` by `scripts/write_configuration_reference.py`.",
            "",
            "| field | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
            "Where: `from_pretrained(..., moba={...})`, `moba_hf.configure(model, **fields)`, `moba:` in a YAML file.",
            "They are saved in `config.json` as the mapping `moba`; unknown fields and values out of range raise.",
            "Older code's `moba_chunk_size` and `moba_topk` are taken as `block_size` and `top_k`.",
            "",
        ]
    )


def attributes(docstring: str) -> dict[str, str]:
    """The entries of a docstring's Attributes section, each in one line."""
    section = docstring.split("Attributes:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section + "\n", re.M | re.S)
    return {name: " ".join(text.split()) for name, text in entries}


if __name__ == "__main__":
    main()
