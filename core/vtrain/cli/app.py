"""`vtrain`: the commands. Each imports what it needs when it is called, so that `--help` stays instant."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Optional

import typer

from vtrain.cli.launch import launch
from vtrain.run.collector import uncollected

app = typer.Typer(
    name="vtrain",
    help="Fine-tune video diffusion models. One TOML file describes a run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
plugins = typer.Typer(
    help="What is installed, whether it is sound, and a new one.", no_args_is_help=True, rich_markup_mode=None
)
config = typer.Typer(help="The configuration file.", no_args_is_help=True, rich_markup_mode=None)
cache = typer.Typer(help="Encoded text and video.", no_args_is_help=True, rich_markup_mode=None)
data = typer.Typer(help="Source files, and what becomes of them.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plugins, name="plugins")
app.add_typer(config, name="config")
app.add_typer(cache, name="cache")
app.add_typer(data, name="data")
app.add_typer(launch, name="launch")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="the TOML file of the run", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def _version(wanted: bool) -> None:
    if wanted:
        from vtrain import __version__

        typer.echo(f"vtrain {__version__}")
        raise typer.Exit


def _say_at_once(config: Path) -> None:
    """What happens in the seconds that follow: torch is imported before anything else can be said."""
    with suppress(OSError):  # a file that may not be read, or nobody who reads: what comes next says so
        if os.environ.get("RANK", "0") == "0" and config.is_file():
            typer.echo(f"{config}: loading torch, then looking at every file")


def _in_all_processes(config: Path) -> None:
    """Leave the command to as many processes as run.processes says, and end with them; return in each of these."""
    from vtrain.cli.children import follow, launch, processes_of

    if (count := processes_of(config)) > 1:
        raise typer.Exit(launch(count, config))
    follow()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Fine-tune video diffusion models. One TOML file describes a run."""


@app.command("run")
def _run(
    config: ConfigFile,
    json: Annotated[
        bool, typer.Option("--json", help="print every event as a JSON object on a line of its own")
    ] = False,
) -> None:
    """Train."""
    _in_all_processes(config)
    if not json:
        _say_at_once(config)
    from vtrain.cli.run import run

    run(config, json)


@app.command("plan")
def _plan(
    config: ConfigFile,
    json: Json = False,
    plots: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--plots",
            metavar="FOLDER|FILE",
            help="also draw learning rate, noise levels and regularizers' weights over the run, as a PNG (needs vtrain[plot])",
        ),
    ] = None,
    device_memory: Annotated[
        str,
        typer.Option(
            "--device-memory", help="Plan for a card with so much memory, such as 24GiB, not for this machine's."
        ),
    ] = "",
) -> None:
    """Everything the run would do, estimated, without loading a weight."""
    with uncollected(collect_first=False):
        from vtrain.cli.plan import plan

    plan(config, json, plots, device_memory)


@app.command("export")
def _export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CHECKPOINT",
            help="a run's output folder (its newest checkpoint), or a checkpoint",
            show_default=False,
        ),
    ],
    form: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--format",
            help="lora: a LoRA file for diffusers; comfyui: one for ComfyUI; merged: the trained denoiser alone; pipeline: with "
            "all other parts. Default: lora of an adapter, pipeline of a whole model",
        ),
    ] = None,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--to", metavar="FOLDER", help="a new folder; default: exports/ in the run's output folder"),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="the averaged weights instead of the last step's")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32 or bf16: of merged and pipeline")] = "fp32",
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", metavar="FOLDER", help="where the model folder is now, if it was moved"),
    ] = None,
    json: Json = False,
) -> None:
    """A checkpoint for other tools, read back by the original library and compared before it is kept."""
    from vtrain.cli.export import export

    export(source, to, form, ema, dtype, model, json)


@app.command("verify")
def _verify(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="a run's output folder, or one of its checkpoints", show_default=False
        ),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="train all of it again, not only from its last checkpoint but one to the last")
    ] = False,
    json: Json = False,
) -> None:
    """Whether a run is what it says: files, data, model, and some of its steps trained again; with a finding the exit code is 2."""
    if not json and run.is_dir():
        typer.echo(f"{run}: loading torch, then reading every file")
    from vtrain.cli.verify import verify

    verify(run, everything, json)


@plugins.command("list")
@uncollected(collect_first=False)
def _plugins_list(json: Json = False) -> None:
    """Every installed part, and below them what cannot be used and why."""
    from vtrain.cli.plugins import list_plugins

    list_plugins(json)


@plugins.command("show")
@uncollected(collect_first=False)
def _plugins_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of a part", show_default=False)],
    kind: Annotated[Optional[str], typer.Option("--kind", help="only the part of this kind")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Every option of a part: type, default, limits, meaning."""
    from vtrain.cli.plugins import show_plugin

    show_plugin(name, kind, json)


@plugins.command("check")
@uncollected(collect_first=False)
def _plugins_check(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="an entry point, a distribution, or a part of one", show_default=False),
    ],
    kind: Annotated[Optional[str], typer.Option("--kind", help="only parts of this kind")] = None,  # noqa: UP045
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--config", metavar="CONFIG", help="a run's file: parts with required options are built of it"),
    ] = None,
    json: Json = False,
) -> None:
    """Whether a plugin keeps the rules that need no model; with a problem the exit code is 2."""
    from vtrain.cli.plugins import check_plugin

    check_plugin(name, kind, config, json)


@plugins.command("new")
@uncollected(collect_first=False)
def _plugins_new(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help='of the distribution, such as "vtrain-motion"', show_default=False),
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="family, sampler, regularizer, data-backend, optimizer or tracker", show_default=False
        ),
    ],
    directory: Annotated[Path, typer.Option("--directory", metavar="D", help="where to put its folder")] = Path(),
) -> None:
    """Write a plugin that works: package, tests on the conformance kit, settings of ruff and mypy, CI."""
    from vtrain.cli.plugins import write_plugin

    write_plugin(name, kind, directory)


@config.command("schema")
@uncollected(collect_first=False)
def _config_schema() -> None:
    """The JSON Schema of the file with all installed parts, for editors."""
    from vtrain.cli.plan import print_schema

    print_schema()


@config.command("show")
@uncollected(collect_first=False)
def _config_show(config: ConfigFile, json: Json = False) -> None:
    """Every resolved value, and where it comes from."""
    from vtrain.cli.plan import show_config

    show_config(config, json)


@cache.command("fill")
def _cache_fill(config: ConfigFile) -> None:
    """Encode what a run would encode, without training; run.processes or torchrun share the work."""
    _in_all_processes(config)
    _say_at_once(config)
    from vtrain.cli.cache import fill

    fill(config)


@cache.command("status")
def _cache_status(config: ConfigFile, json: Json = False) -> None:
    """What of a run's entries is there, missing, damaged or no longer used; counts and bytes."""
    from vtrain.cli.cache import status

    status(config, json)


@cache.command("prune")
def _cache_prune(
    configs: Annotated[
        list[Path],
        typer.Argument(metavar="CONFIG...", help="the TOML files of all runs that share the cache", show_default=False),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it, only say what would be")] = False,
) -> None:
    """Delete entries that none of the configurations uses."""
    from vtrain.cli.cache import prune

    prune(configs, yes)


@cache.command("verify")
def _cache_verify(config: ConfigFile, json: Json = False) -> None:
    """Read every entry and check it; damaged ones are moved aside, and the exit code is 2."""
    from vtrain.cli.cache import verify

    verify(config, json)


@data.command("list")
def _data_list(
    config: ConfigFile,
    used: Annotated[bool, typer.Option("--used", help="files that are used")] = False,
    dropped: Annotated[bool, typer.Option("--dropped", help="files that a setting drops")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="files that are bad")] = False,
    truncated: Annotated[
        bool,
        typer.Option("--truncated", help="files whose captions the text encoder does not read to the end, and prompts"),
    ] = False,
    dataset: Annotated[Optional[str], typer.Option("--dataset", metavar="ID", help="only this dataset")] = None,  # noqa: UP045
    json: Annotated[bool, typer.Option("--json", help="print a JSON object a line, one for each file")] = False,
    limit: Annotated[Optional[int], typer.Option("--limit", min=0, help="at most so many of them")] = None,  # noqa: UP045
) -> None:
    """Every source file: used or skipped, its bucket and caption, or why not; files that changed are scanned first."""
    chosen = [name for name, wanted in (("used", used), ("dropped", dropped), ("failed", failed)) if wanted]
    if truncated:
        if chosen:
            raise typer.BadParameter(
                f"--truncated lists files that are used, and goes without --{' and --'.join(chosen)}"
            )
        from vtrain.cli.data_truncated import list_truncated

        list_truncated(config, dataset, json, limit)
        return
    from vtrain.cli.data import list_files

    list_files(config, chosen, dataset, json, limit)


@data.command("show")
def _data_show(
    config: ConfigFile,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="its name in the dataset, DATASET/NAME, or a path", show_default=False),
    ],
    sheet: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--sheet", metavar="PNG", help="where to write the contact sheet; else to sheets/ in cache.dir"),
    ] = None,
    no_sheet: Annotated[bool, typer.Option("--no-sheet", help="decode nothing, write no contact sheet")] = False,
    full_size: Annotated[bool, typer.Option("--full-size", help="a sheet of every frame, every pixel")] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="also show what the video codec makes of the cached latents")
    ] = False,
    json: Json = False,
) -> None:
    """One source file: what it holds, what becomes of it, and a contact sheet of exactly what the model will see."""
    from vtrain.cli.data_show import Asked, show_file

    show_file(config, file, Asked(sheet, no_sheet, full_size, decode), json)


def main() -> None:
    """The console script. Errors a user can mend end with exit code 2 and a listing; anything else keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and captions need not fit the terminal's encoding
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from vtrain.cli.report import report_error
        from vtrain.contract import VtrainError

        if not isinstance(error, VtrainError):
            raise
        if not error.reported:
            report_error(error)
        _leave(error.exit_code)


def _leave(code: int) -> None:
    """End. Among processes that work together at once: torch ends by SIGABRT where others are still waited for."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
