"""The library: what `vtrain` does on the command line, from Python.

    import vtrain.api
    import vtrain.contract

    with vtrain.api.run("config.toml") as events:
        for event in events:
            match event:
                case vtrain.contract.Logged(steps):
                    print(steps[-1].step, steps[-1].loss)

A run continues when the next event is taken. Leaving the with block, by its end, an exception or a Ctrl-C, ends it: what is cached
or saved is whole, and another run resumes from there. Errors that a user can mend are `vtrain.contract.VtrainError`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtrain.contract import DType
    from vtrain.contract.pipelines import ExportFormat
    from vtrain.run.certificate import Certificate
    from vtrain.run.export import Exported
    from vtrain.run.prepare import Prepared
    from vtrain.run.session import Session


def plan(
    config: Path | str, on_file: Callable[[int], None] | None = None, device_memory: int | None = None
) -> Prepared:
    """Everything a run would do, without loading a weight: the plan, what was found in the data, the estimate. Imports no torch.

    on_file: called with the number of files that were looked at so far. device_memory: bytes of the card of another machine that
    the plan is for.
    Raises ConfigError, ModelError, PluginError or DataError with every problem found.
    """
    from vtrain.contract.rooms import Room
    from vtrain.run.prepare import prepare

    room = None if device_memory is None else Room(device_memory, name="--device-memory")
    return prepare(Path(config), on_file, room)


def run(
    config: Path | str,
    *,
    signals: bool = False,
    heard: Callable[[], None] = lambda: None,
    process_ends: bool = False,
) -> Session:
    """A run as a context manager over its events, which are those of `vtrain.contract.events`.

    signals: whether Ctrl-C and SIGTERM ask the run to save and end (of the main thread only), and heard is called when they
    do; without, a Ctrl-C is a KeyboardInterrupt, and what was done since the last checkpoint is lost.
    process_ends: this process does nothing after the run, so that its memory need not be given back.
    """
    from vtrain.run.session import Session

    return Session(Path(config), signals=signals, heard=heard, process_ends=process_ends)


def export(
    source: Path | str,
    to: Path | str | None = None,
    form: ExportFormat | None = None,
    *,
    ema: bool = False,
    model: str | None = None,
    dtype: DType = "fp32",
    on_part: Callable[[str], None] = lambda text: None,
) -> Exported:
    """A run's newest checkpoint, or a checkpoint, for other tools: read back by the original library before it is kept.

    form: "lora", "comfyui", "merged" or "pipeline"; absent: "lora" of an adapter, "pipeline" of a whole model. to: a new folder;
    absent: in exports/ of the run. ema: the averaged weights. model: where the model folder is now. dtype: of whole weights.
    on_part: called with what is done next. Raises CheckpointError, ConfigError, ModelError or PluginError, and leaves nothing then.
    """
    from vtrain.run.export import export

    place = None if to is None else Path(to).absolute()
    return export(Path(source), place, form, ema=ema, model=model, dtype=dtype, on_part=on_part)


def verify(path: Path | str, all: bool = False, *, on_line: Callable[[str], None] = lambda text: None) -> Certificate:
    """Whether a run is what it says, by its output folder or one of its checkpoints; its certificate, which is written there, too.

    all: train all of its steps again, not only those that led to its last checkpoint. on_line: called with each line for people.
    Raises CheckpointError where there is no run with a checkpoint, or one is going on there.
    """
    from vtrain.run.verify import verify

    return verify(Path(path), everything=all, say=on_line)


def fill(config: Path | str, *, process_ends: bool = False) -> Session:
    """The same until the caches are filled."""
    from vtrain.run.session import Session

    return Session(Path(config), until="filled", process_ends=process_ends)
