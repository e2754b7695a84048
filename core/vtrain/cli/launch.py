"""`vtrain launch`: files that start a run elsewhere, from its own plan."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vtrain.run.collector import uncollected

if TYPE_CHECKING:
    from vtrain.scaffold.launch import Job

launch = typer.Typer(
    help="Write a file that starts a run on other machines, after its plan has been checked.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="the TOML file of the run", show_default=False)]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="how many machines")]
PerNode = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--processes-per-node", min=1, help="of each, one a card; default: run.processes", show_default=False),
]
Grace = Annotated[
    int,
    typer.Option(
        "--grace", min=20, help="seconds from the signal that asks the run to save and end to its end by force"
    ),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--output", metavar="FILE", help="a new file; default: print it", show_default=False),
]
VOLUME = "what all machines share, and where it is mounted; output and cache are in it"


@launch.command("torchrun")
def _torchrun(
    config: ConfigFile, nodes: Nodes = 1, per_node: PerNode = None, grace: Grace = 120, output: Output = None
) -> None:
    """A script to start on each machine."""
    job = _job(config, nodes, per_node, grace)
    from vtrain.scaffold.launch import torchrun

    _write(torchrun(job), output)


@launch.command("slurm")
def _slurm(
    config: ConfigFile,
    nodes: Nodes = 1,
    per_node: PerNode = None,
    time: Annotated[
        str, typer.Option("--time", help="of the job, such as 24:00:00; it is queued again until done")
    ] = "",
    partition: Annotated[str, typer.Option("--partition", help="as sbatch has it")] = "",
    account: Annotated[str, typer.Option("--account", help="as sbatch has it")] = "",
    grace: Grace = 120,
    output: Output = None,
) -> None:
    """A script for sbatch that queues itself again."""
    job = _job(config, nodes, per_node, grace)
    from vtrain.scaffold.launch import slurm

    _write(slurm(job, time, partition, account), output)


@launch.command("skypilot")
def _skypilot(
    config: ConfigFile,
    gpu: Annotated[str, typer.Option("--gpu", help="as `sky gpus list` names it, such as H100", show_default=False)],
    nodes: Nodes = 1,
    per_node: PerNode = None,
    volume: Annotated[str, typer.Option("--volume", metavar="NAME:FOLDER", help=f"{VOLUME}. Default: buckets")] = "",
    grace: Grace = 120,
    output: Output = None,
) -> None:
    """A managed job on spot instances."""
    job = _job(config, nodes, per_node, grace)
    from vtrain.contract import ConfigError, Problem
    from vtrain.scaffold.launch import skypilot

    if nodes > 1 and not volume:
        what = (
            "several nodes need one output folder and one cache, and a bucket is not one: each node has its own copy."
        )
        raise ConfigError(Problem("--nodes", what, "Give --volume NAME:FOLDER, or use one node."))
    _write(skypilot(job, gpu, *_volume(volume, job, uploaded=True)), output)


@launch.command("kubeflow")
def _kubeflow(
    config: ConfigFile,
    image: Annotated[str, typer.Option("--image", help="a container image with vtrain", show_default=False)],
    volume: Annotated[str, typer.Option("--volume", metavar="CLAIM:FOLDER", help=VOLUME, show_default=False)],
    nodes: Nodes = 1,
    per_node: PerNode = None,
    grace: Grace = 120,
    output: Output = None,
) -> None:
    """A PyTorchJob for Kubernetes."""
    job = _job(config, nodes, per_node, grace)
    from vtrain.scaffold.launch import kubeflow

    _write(kubeflow(job, image, *_volume(volume, job, uploaded=False)), output)


@uncollected(collect_first=False)
def _job(config: Path, nodes: int, per_node: int | None, grace: int) -> Job:
    """Raises ConfigError and what else planning does, for so many processes."""
    from vtrain.run.prepare import Elsewhere, planned
    from vtrain.scaffold.launch import Job

    plan = planned(config, elsewhere=Elsewhere(nodes, per_node))
    for warning in plan.warnings:
        sys.stderr.write(f"WARNING: {warning}\n")
    return Job.of(plan, nodes, grace)


def _volume(text: str, job: Job, *, uploaded: bool) -> tuple[str, PurePosixPath]:
    """(name, folder) of NAME:FOLDER. Raises ConfigError."""
    from vtrain.contract import ConfigError, Problem

    name, _, folder = text.partition(":")
    if not text:
        return "", PurePosixPath("/")
    if not name or not folder.startswith("/"):
        raise ConfigError(Problem("--volume", f'"{text}" is no name and folder.', 'Such as "claim:/mnt/shared".'))
    if outside := job.outside(PurePosixPath(folder), uploaded=uploaded):
        raise ConfigError(outside)
    return name, PurePosixPath(folder)


def _write(text: str, output: Path | None) -> None:
    """Print it, or write a new file; one that is there is kept."""
    from vtrain.contract import ConfigError, Problem

    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
        if text.startswith("#!"):
            output.chmod(0o755)
    except FileExistsError:
        raise ConfigError(
            Problem(str(output), "this is there already.", "Take another --output; nothing is overwritten.")
        ) from None
    except OSError as error:
        raise ConfigError(Problem(str(output), f"it cannot be written: {error.strerror}.")) from error
    typer.echo(f"wrote {output}")
