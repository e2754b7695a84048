"""Files that start a run elsewhere, read as their tools read them: torchrun's own parser, bash, the keys of two YAML formats."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from vtrain.cli.app import main

Write = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    file = tmp_path / "config.toml"
    file.write_text(
        '[run]\nname = "A run: 1"\noutput_dir = "out"\n[model]\nuse = "toy"\ntrain = "full"\n[precision]\nmixed = "no"\n'
        '[[data]]\nuse = "folder"\npath = "clips"\n[train]\nsteps = 6\naccumulate = 3\n[optimizer]\nlr = 1e-3\n'
    )
    return file


@pytest.fixture
def write(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Write:
    """Call `vtrain launch KIND CONFIG ...`; gives what it prints, or with code=2 what it says is wrong."""

    def call(kind: str, *options: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["vtrain", "launch", kind, str(config), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code, printed.err
        return printed.err if code else printed.out

    return call


def torchrun(words: list[str]) -> Any:
    """The command line as torchrun of the installed torch reads it."""
    from torch.distributed.run import get_args_parser

    at = next(number for number, word in enumerate(words) if word.endswith("torchrun"))
    return get_args_parser().parse_args(words[at + 1 :])


def line(script: str) -> list[str]:
    """Words of the command in a script that starts torchrun."""
    whole = script.replace("\\\n", " ")
    (found,) = (each for each in whole.splitlines() if " torchrun " in each and not each.startswith("#"))
    return shlex.split(found.removesuffix("&"))


def checked(words: list[str], config: Path, nodes: int, per_node: int) -> None:
    read = torchrun(words)
    assert read.nproc_per_node == str(per_node)
    assert read.standalone is (nodes == 1)
    assert read.max_restarts == 3
    assert "SIGUSR1" in read.signals_to_handle.split(",")
    assert read.module
    assert (read.training_script, read.training_script_args) == ("vtrain.cli", ["run", str(config)])
    if nodes > 1:
        assert (read.nnodes, read.rdzv_backend) == (str(nodes), "c10d")
        assert read.rdzv_endpoint.count(":") == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchruns_parser_reads_the_line_of_each_file(write: Write, config: Path, nodes: int) -> None:
    given = ("--nodes", str(nodes), "--processes-per-node", "4")
    shared = ("--volume", f"shared:{config.parent}")
    for script in (write("torchrun", *given), write("slurm", *given)):
        checked(line(script), config, nodes, 4)
        assert f"{nodes * 4 * 3} samples" in script, "of a step: batch_size 1 x accumulate 3 x processes"
    task = yaml.safe_load(write("skypilot", *given, "--gpu", "H100", *shared))
    checked(line(task["run"]), config, nodes, 4)
    job = yaml.safe_load(write("kubeflow", *given, "--image", "me/vtrain:1", *shared))
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        checked(replica["template"]["spec"]["containers"][0]["command"], config, nodes, 4)


def test_a_step_at_the_end_has_less_time_in_torchrun_than_the_machine_gives(write: Write) -> None:
    script = write("slurm", "--grace", "300")
    assert "#SBATCH --signal=B:USR1@300\n" in script
    assert torchrun(line(script)).shutdown_timeout == 290


def test_sbatch_gets_what_it_was_given_and_nothing_empty(write: Write) -> None:
    script = write("slurm", "--time", "1:00:00", "--account", "lab", "--nodes", "2", "--processes-per-node", "8")
    settings = dict(
        each.removeprefix("#SBATCH --").split("=", 1)
        for each in script.splitlines()
        if each.startswith("#SBATCH") and "=" in each
    )
    assert (settings["time"], settings["account"]) == ("1:00:00", "lab")
    assert "partition" not in settings
    assert (settings["nodes"], settings["ntasks-per-node"], settings["gpus-per-node"]) == ("2", "1", "8")
    assert settings["job-name"] == "a-run-1"
    lines = script.splitlines()
    last = max(number for number, each in enumerate(lines) if each.startswith("#SBATCH"))
    assert all(each.startswith("#") for each in lines[:last]), "sbatch reads no further than the first command"


COMMANDS = {
    "srun": 'trap "echo got USR1 >> {log}; exit ${{CODE:-1}}" USR1\necho started >> {log}\n'
    "for _ in $(seq 200); do [ -e {end} ] && exit ${{CODE:-0}}; sleep 0.05; done\n",
    "scontrol": 'echo "scontrol $*" >> {log}\n[ "$1" = show ] && echo node1\n',
}


@pytest.mark.parametrize(
    ("asked", "code", "requeued"),
    [(True, "1", True), (False, "0", False), (False, "1", False), (True, "0", False)],
    ids=["time is over", "done", "failed", "done as its time is over"],
)
def test_a_slurm_job_whose_time_is_over_is_queued_again_and_no_other(
    write: Write, tmp_path: Path, asked: bool, code: str, requeued: bool
) -> None:
    """Run by bash, with an srun and an scontrol of the test's."""
    log, end, script = tmp_path / "log", tmp_path / "end", tmp_path / "job.sh"
    log.touch()
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + text.format(log=log, end=end))
        (tmp_path / name).chmod(0o755)
    script.write_text(write("slurm", "--nodes", "2"))
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "8", "CODE": code}
    running = subprocess.Popen(["bash", str(script)], env={**os.environ, "PATH": path, **slurm}, stderr=subprocess.PIPE)
    limit = time.monotonic() + 30
    while "started" not in log.read_text():
        assert time.monotonic() < limit
        time.sleep(0.02)
    if asked:
        running.send_signal(signal.SIGUSR1)
    else:
        end.touch()
    assert running.communicate(timeout=30)[1] == b""
    assert running.returncode == int(code)
    assert ("got USR1" in log.read_text()) is asked
    assert ("scontrol requeue 7" in log.read_text()) is requeued


SKY = {
    "": {
        "name": str,
        "num_nodes": int,
        "resources": dict,
        "file_mounts": dict,
        "volumes": dict,
        "envs": dict,
        "setup": str,
        "run": str,
    },
    "resources": {"accelerators": str, "use_spot": bool, "job_recovery": dict},
    "job_recovery": {"max_restarts_on_errors": int},
}
"""Those keys of SkyPilot 0.14.1's task that are written here, with their types."""


def held_to(value: Mapping[str, Any], keys: Mapping[str, Mapping[str, type]], at: str = "") -> None:
    for name, each in value.items():
        assert isinstance(each, keys[at][name]), f"{at}.{name}"
        if name in keys:
            held_to(each, keys, name)


def test_a_skypilot_task_of_one_node_has_buckets_and_uploads_what_it_reads(write: Write, config: Path) -> None:
    task = yaml.safe_load(write("skypilot", "--gpu", "H100", "--processes-per-node", "8"))
    held_to(task, SKY)
    assert task["resources"]["accelerators"] == "H100:8"
    mounts, folder = task["file_mounts"], config.parent
    assert mounts[str(folder / "out")] == {"name": "a-run-1-output", "mode": "MOUNT_CACHED"}
    assert mounts[str(folder / "cache")]["mode"] == "MOUNT_CACHED"
    assert {path for path, source in mounts.items() if path == source} == {str(config), str(folder / "clips")}
    assert "vtrain-toy==" in task["setup"]


def test_skypilot_reads_the_task(write: Write, config: Path, tmp_path: Path) -> None:
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed: a test above looks at its keys")
    for number, options in enumerate(((), ("--nodes", "2", "--volume", f"shared:{config.parent}"))):
        file = tmp_path / f"{number}.yaml"
        file.write_text(write("skypilot", "--gpu", "H100", *options))
        assert sky.Task.from_yaml(str(file)).num_nodes == number + 1


KUBEFLOW = {
    "": {"apiVersion": str, "kind": str, "metadata": dict, "spec": dict},
    "spec": {"nprocPerNode": str, "runPolicy": dict, "pytorchReplicaSpecs": dict},
    "runPolicy": {"cleanPodPolicy": str},
}
POD = {"": {"terminationGracePeriodSeconds": int, "containers": list, "volumes": list}}
CONTAINER = {
    "": {"name": str, "image": str, "command": list, "env": list, "resources": dict, "volumeMounts": list},
    "resources": {"limits": dict},
}
"""Those keys of a PyTorchJob (Training Operator 1.9, kubeflow.org/v1) and of a pod that are written here, with their types."""


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_pytorchjob_has_a_master_and_the_other_nodes_as_workers(write: Write, config: Path, nodes: int) -> None:
    given = ("--image", "me/vtrain:1", "--volume", f"claim:{config.parent}", "--nodes", str(nodes), "--grace", "60")
    job = yaml.safe_load(write("kubeflow", *given))
    held_to(job, KUBEFLOW)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    counts = {kind: replica["replicas"] for kind, replica in replicas.items()}
    assert counts == ({"Master": 1} if nodes == 1 else {"Master": 1, "Worker": 2})
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"
        pod = replica["template"]["spec"]
        held_to(pod, POD)
        (container,) = pod["containers"]
        held_to(container, CONTAINER)
        assert pod["terminationGracePeriodSeconds"] == 60
        assert container["volumeMounts"][0]["mountPath"] == str(config.parent)
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


def test_everything_wrong_with_the_configuration_is_said_and_nothing_is_written(write: Write, config: Path) -> None:
    config.write_text(config.read_text().replace("steps", "stepps").replace("mixed", "mixd"))
    said = write("slurm", "--output", str(config.parent / "job.sh"), code=2)
    assert "train.stepps" in said
    assert "precision.mixd" in said
    assert not (config.parent / "job.sh").exists()


def test_what_several_processes_cannot_do_is_found_for_their_number(write: Write, config: Path) -> None:
    text = config.read_text().replace('"full"', '"lora"')
    config.write_text(text + '[model.lora]\nrank = 4\n[offload]\ngroup = "block"\n')
    write("torchrun")
    assert "2 train together" in write("torchrun", "--nodes", "2", code=2)


def test_a_memory_limit_is_not_that_of_the_machine_that_writes_the_file(write: Write, config: Path) -> None:
    config.write_text(config.read_text() + "[memory]\n")
    assert "torchrun" in write("torchrun", "--nodes", "2", "--processes-per-node", "512")


def test_a_file_that_is_there_stays(write: Write, config: Path) -> None:
    file = config.parent / "job.sh"
    assert "wrote " in write("slurm", "--output", str(file))
    assert os.access(file, os.X_OK)
    before = file.read_text()
    assert "this is there already" in write("torchrun", "--output", str(file), code=2)
    assert file.read_text() == before


def test_folders_that_the_machines_would_not_share_are_named(write: Write, config: Path) -> None:
    said = write("kubeflow", "--image", "me/vtrain:1", "--volume", "claim:/mnt/shared", code=2)
    for path in (config, config.parent / "out", config.parent / "cache", config.parent / "clips"):
        assert f"({path}) is not in /mnt/shared" in said
    assert '"claim" is no name and folder' in write("kubeflow", "--image", "i", "--volume", "claim", code=2)
    assert "a bucket is not one" in write("skypilot", "--gpu", "H100", "--nodes", "2", code=2)
