"""Training by transformers' Trainer that goes on where a kill or a full disk stopped it, and the bar that it shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from calm_fast.core.checks import bad_value
from calm_fast.core.progress import progress_bar

History = list[dict[str, Any]]
_STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def quiet_arguments(out: str | os.PathLike[str], seed: int, **settings: Any) -> TrainingArguments:
    """Return TrainingArguments for `train_or_resume`: one newest checkpoint, one device, no bar or report of its own.

    out: the output folder. seed: of the weights' noise and of the data's order. settings: other TrainingArguments.
    """
    arguments = TrainingArguments(
        output_dir=os.fspath(out),
        lr_scheduler_type="cosine",
        save_total_limit=1,
        seed=seed,
        data_seed=seed,
        report_to=[],
        disable_tqdm=True,  # `train_or_resume` shows the bar
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )
    # on several GPUs Trainer would wrap the model in DataParallel, which a composition refuses and which replicates no
    # shared teacher
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. state: the content of its trainer_state.json."""

    folder: Path
    step: int
    state: dict[str, Any]


class _Progress(TrainerCallback):
    """A bar over the steps of a training, with the last logged loss."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
        self.bar = progress_bar(desc=self.title, shown=state.is_world_process_zero, **steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix({"loss": f"{float(logs['loss']):.3f}"}, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def train_or_resume(
    trainer: Trainer,
    where: str,
    weights: str,
    load: Callable[[Path], Any],
    *,
    what: str = "stage",
    title: str | None = None,
) -> tuple[History, int]:
    """Train up to `max_steps`, from the newest whole checkpoint in the trainer's output folder if there is one.

    A training that was stopped after its last step is not trained further: its weights are loaded.

    Args:
        where: the function that errors name. weights: the file of a checkpoint that holds the model.
        load: copies the weights of a checkpoint's folder into the model. what: the word for this training in messages.
        title: show a progress bar with this title.
    Returns:
        (the log entries of the whole training, the step that it went on from).
    Raises:
        ValueError: the output folder holds a checkpoint beyond `max_steps`.
    """
    trainer.remove_callback(PrinterCallback)  # Trainer prints every log line if its own bar is off
    if title is not None:
        trainer.add_callback(_Progress(title))
    out, steps = Path(str(trainer.args.output_dir)), trainer.args.max_steps
    last = newest_checkpoint(out, where, trainer.args, weights, what)
    if last is None:
        trainer.train()
        return list(trainer.state.log_history), 0
    if last.step > steps:
        expected = f"a new folder or that of a {what} of at most {steps} steps"
        raise bad_value(where, "out", expected, f"{out}, which holds {last.folder.name}; choose another folder")
    if last.state.get("max_steps") != steps:
        warnings.warn(
            f"{where}: `out` holds {last.folder.name} of a {what} of {last.state.get('max_steps')} steps; it goes on "
            f"to {steps} steps with their learning rates, and ends at other weights than a {what} begun with them",
            stacklevel=4,
        )
    if last.step == steps:
        # Trainer.train would still take one step
        load(last.folder)
        return list(last.state["log_history"]), last.step
    trainer.train(resume_from_checkpoint=os.fspath(last.folder))
    return list(trainer.state.log_history), last.step


def newest_checkpoint(
    out: Path, where: str, args: TrainingArguments, weights: str, what: str = "stage"
) -> Checkpoint | None:
    """Return the newest checkpoint in `out` whose files can all be read, or None; remove newer ones that cannot.

    A checkpoint is written file by file, so that a killed process or a full disk leaves a folder with missing or cut
    files. The one before is still there, because it is deleted only after the next one is whole. A warning names the
    file and what the training goes on from.
    """
    if not out.is_dir():
        return None
    found = [(int(match[1]), folder) for folder in out.iterdir() if (match := _FOLDER.fullmatch(folder.name))]
    broken: list[tuple[Path, str]] = []
    newest = None
    for step, folder in sorted(found, reverse=True):
        try:
            newest = Checkpoint(folder, step, _read(folder, step, args.world_size, weights))
            break
        except ValueError as problem:
            broken.append((folder, str(problem)))
    for folder, reason in broken:
        follows = f"the {what} begins anew" if newest is None else f"it goes on from {newest.folder.name}"
        warnings.warn(f"{where}: {folder.name} in {out} is incomplete ({reason}), so {follows}", stacklevel=4)
        if args.process_index == 0:
            shutil.rmtree(folder)  # or its files would mix with those of the next checkpoint of that name
    return newest


def _read(folder: Path, step: int, world_size: int, weights: str) -> dict[str, Any]:
    """Return the state of a checkpoint; raise ValueError with the reason if a file is missing or cut."""
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{i}.pth" for i in range(world_size)]
    readers: dict[str, Callable[[Path], Any]] = {weights: _read_tensor_names}
    readers |= {name: _read_archive for name in ("optimizer.pt", "scheduler.pt", *names)}
    for name, reader in {**readers, _STATE: _read_state}.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"it has no {name}")
        try:
            content = reader(file)
        except (ValueError, BadZipFile, SafetensorError) as problem:  # no OSError: a disk may read the file later
            raise ValueError(f"{name}, {file.stat().st_size} bytes, cannot be read: {problem}") from problem
    if content.get("global_step") != step:
        raise ValueError(f"{_STATE} is that of step {content.get('global_step')}")
    return content


def _read_tensor_names(file: Path) -> list[str]:
    # opening compares the header's offsets with the size of the file
    with safe_open(file, framework="pt") as content:
        return list(content.keys())


def _read_archive(file: Path) -> list[str]:
    # torch.save writes a zip, whose table of contents is at the end
    with ZipFile(file) as content:
        return content.namelist()


def _read_state(file: Path) -> Any:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content
