"""The folder of a training run: an interrupted run resumes, and a failing one overwrites nothing that was finished.

runs/demo/               the finished result, replaced only by another finished one
runs/demo/unfinished/    checkpoints and measurements of the run in progress; gone once it has finished
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

_SETTINGS = "settings.json"
_TENSORBOARD = "runs"  # where Transformers has it write, below the output folder
_CLOSING_FILE = "trainer_state.json"  # written last into a checkpoint


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps what it has."""

    finished: Path

    @property
    def unfinished(self) -> Path:
        return self.finished / "unfinished"

    @property
    def result(self) -> Path:
        """Where a result is put together before `publish`."""
        return self.unfinished / "result"

    def start(self, settings: dict[str, Any]) -> None:
        """Claim the folder for a run with these settings (JSON), fresh or resumed.

        Raises ValueError where an unfinished run with checkpoints used other settings: mixing them would give a
        result that neither describes.
        """
        settings = json.loads(json.dumps(settings, default=str))
        file = self.unfinished / _SETTINGS
        if file.is_file():
            former = json.loads(file.read_text(encoding="utf-8"))
            changed = sorted(k for k in settings.keys() | former.keys() if settings.get(k) != former.get(k))
            if changed and self.last_checkpoint() is not None:
                raise ValueError(
                    f"{self.unfinished} holds an interrupted run with other settings ({', '.join(changed)}); "
                    f"finish it with those, name another output_dir, or remove that folder"
                )
            if changed:
                shutil.rmtree(self.unfinished)
        self.unfinished.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)

    def last_checkpoint(self) -> str | None:
        """The newest complete checkpoint. An incomplete one (killed while saving) is removed."""
        while self.unfinished.is_dir() and (newest := get_last_checkpoint(str(self.unfinished))):
            if (Path(newest) / _CLOSING_FILE).is_file():
                return newest
            shutil.rmtree(newest, ignore_errors=True)
        return None

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave before the interruption: tensors, numbers and dicts and lists of them.

        The first process keeps it and tells the others, so that all of them compute, or none.
        """
        file, first = self.unfinished / f"{name}.pt", PartialState().is_main_process
        (kept,) = broadcast_object_list([torch.load(file, weights_only=True) if first and file.is_file() else None])
        if kept is not None:
            return kept
        value = compute()
        if first:
            temporary = file.with_suffix(".tmp")
            torch.save(value, temporary)
            os.replace(temporary, file)
        return value

    def save_model(self, trainer: Trainer) -> None:
        """The finished model, whole, though the checkpoints of a run may be sharded: into `result`/model.

        Under FSDP2 in bfloat16 it is float32, as accelerate trains it.
        """
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(self.result / "model"))

    def publish(self) -> None:
        """Move all of `result` into place, by renaming, and end the run.

        TensorBoard's logs are kept, in `finished`/logs: each run's are a folder named by its date and host.
        """
        for log in (self.unfinished / _TENSORBOARD).glob("*"):
            (self.finished / "logs").mkdir(exist_ok=True)
            os.replace(log, self.finished / "logs" / log.name)
        for new in sorted(self.result.iterdir()):
            target = self.finished / new.name
            if target.is_dir():
                target.rename(self.unfinished / f"former-{new.name}")
            os.replace(new, target)
        shutil.rmtree(self.unfinished)


class BeforeTraining(TrainerCallback):
    """Calls `measure` when training begins: the model is wrapped by then, which puts it on the GPUs (FSDP).

    Attributes:
        found: what it returned.
    """

    def __init__(self, trainer: Trainer, measure: Callable[[], Any]):
        self.measure, self.found = measure, None
        # Ahead of the progress bar, which would count its time as the first step's.
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.found = self.measure()


def write_json(file: Path, value: Any) -> None:
    """Write the file whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, file)
