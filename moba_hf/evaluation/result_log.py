"""Results of a long measurement, kept as they come, so that an interrupted one goes on where it stopped."""

import json
from collections.abc import Collection
from pathlib import Path


class ResultLog:
    """A file of JSON lines: first what is being measured, then one result a line.

    Args:
        path: the file; it and its folder are made where they do not exist.
        settings: what is being measured, in plain JSON values.
        leave_out: settings that change no result, but only which of them are asked for: they may differ.

    Attributes:
        results: everything measured so far, by this run and those before it.

    Raises:
        ValueError: the file holds results of other settings: they do not belong into one figure.
    """

    def __init__(self, path: Path, settings: dict, leave_out: Collection[str] = ()):
        self.path, self.results = path, []
        settings = json.loads(json.dumps({name: value for name, value in settings.items() if name not in leave_out}))
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut off in the middle of writing
        if lines:
            self._check_same(json.loads(lines[0]), settings)
            self.results = [json.loads(line) for line in lines[1:]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines) or _line(settings), encoding="utf-8")

    def add(self, results: list[dict]) -> None:
        """Append results; they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, results))
        self.results += results

    def _check_same(self, former: dict, settings: dict) -> None:
        different = [
            f"{name} was {former.get(name)!r} and now is {settings.get(name)!r}"
            for name in sorted({*former, *settings})
            if former.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.path} holds results of another run ({'; '.join(different)}); "
                f"name another output_dir, or remove the file to start over"
            )


def _line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
