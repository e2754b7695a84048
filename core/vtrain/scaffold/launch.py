"""Files that start a run on other machines: lines for torchrun, a Slurm script, a SkyPilot task, a Kubeflow PyTorchJob.

All four start the same command under torchrun, with the same two settings that it does not have by itself: SIGUSR1 reaches the run,
and from a signal to the end there is as much time as the machine gives (`Job.grace`). Torch-free.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped]

from vtrain.config.record import TABLES, Config, Part
from vtrain.contract import Options, Problem
from vtrain.estimate.render import counted
from vtrain.plan.parallel import OWN_STORE
from vtrain.plan.records import Plan

RESTARTS = 3
"""How often torchrun starts all processes again after one has failed."""
MARGIN = 10
"""Seconds before the machine's end at which torchrun ends what still runs."""
JOIN = 3600
"""Seconds for which nodes wait for one that is not there, or not any more."""
PORT = 29500
ROOT = PurePosixPath("/")
CORES = 8
"""Of a node's processor, for each process."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""torchrun passes these on; by itself all but the last, by which it would be ended."""


@dataclass(frozen=True)
class Job:
    """What is started where. name: of letters, digits and dashes. per_node: processes of a node, each on a card of its own.

    grace: seconds from the signal that ends it to the end. inputs: files and folders that the run reads. installed: for pip.
    """

    name: str
    config: Path
    nodes: int
    per_node: int
    grace: int
    summary: str
    output: Path
    cache: Path
    inputs: tuple[Path, ...]
    installed: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan, nodes: int, grace: int) -> Job:
        """plan: made for all processes of all nodes."""
        config, per_node = plan.config, plan.processes // nodes
        train = config.train
        samples = train.batch_size * train.accumulate * plan.processes
        summary = (
            f"{counted(nodes, 'node')} with {per_node} process{'es' if per_node > 1 else ''}"
            f"{' each' if nodes > 1 else ''}; a step takes "
            f"{samples} samples (batch_size {train.batch_size} x accumulate {train.accumulate} x {plan.processes} processes)"
        )
        name = re.sub(r"[^a-z0-9]+", "-", config.run.name.lower()).strip("-")[:40].rstrip("-") or "run"
        name = name if name[0].isalpha() else f"run-{name}"
        versions = {part.distribution: part.version for part in config.parts()}
        folders = (config.run.output_dir, config.cache.dir)
        inputs = tuple(path for path in _paths(config) if path not in folders and path.exists())
        return cls(
            name, config.path.absolute(), nodes, per_node, grace, summary, *folders, inputs,
            tuple(f"{name}=={version}" for name, version in versions.items()),
        )  # fmt: skip

    def outside(self, folder: PurePosixPath, *, uploaded: bool) -> list[Problem]:
        """What all nodes have to see and is not in the folder that they share. uploaded: what is only read gets there by itself."""
        needed = [("run.output_dir", self.output), ("cache.dir", self.cache)]
        if not uploaded:
            needed += [("the configuration", self.config), *(("what the run reads", path) for path in self.inputs)]
        remedy = "Put it there, or name the folder of the volume in which it is."
        return [
            Problem("--volume", f"{what} ({path}) is not in {folder}, which is all that the machines share.", remedy)
            for what, path in needed
            if not path.is_relative_to(folder)
        ]


def _paths(config: Config) -> Iterator[Path]:
    """Of all that the file names, each once."""
    found: dict[Path, None] = {}
    for table in TABLES.values():
        for _, held in config.held(table):
            for options in (held.table, held.options) if isinstance(held, Part) else (held,):
                found.update(dict.fromkeys(_values(options)))
    yield from found


def _values(options: Options) -> Iterator[Path]:
    for _, value in options:
        for each in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(each, str) and each.startswith("/"):
                each = Path(each)  # of a part's own: a folder, or the name of a model
            if isinstance(each, Path) and each.is_absolute():
                yield each


def torchrun_words(job: Job, endpoint: str, identity: str, *more: str) -> list[str]:
    """The command, a word each. endpoint: of the first node. identity: of the job. Both may be a shell's variables."""
    if job.nodes == 1:
        where = ["--standalone", f"--nproc-per-node={job.per_node}"]
    else:
        where = [f"--nnodes={job.nodes}", f"--nproc-per-node={job.per_node}", "--rdzv-backend=c10d"]
        where += [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={identity}"]
        where += [f"--rdzv-conf=join_timeout={JOIN}", *more]
    ends = [f"--max-restarts={RESTARTS}", f"--shutdown-timeout={job.grace - MARGIN}", f"--signals-to-handle={SIGNALS}"]
    return ["torchrun", *where, *ends, "-m", "vtrain.cli", "run", str(job.config)]


def _shell(words: Sequence[str], indent: str = "    ") -> str:
    """Lines of a shell; variables in a word are the shell's."""
    quoted = [f'"{word}"' if "$" in word else shlex.quote(word) for word in words]
    at = quoted.index("-m")
    return f" \\\n{indent}".join([quoted[0], *quoted[1:at], " ".join(quoted[at:])])


def _head(job: Job, kind: str, *lines: str) -> str:
    shared = f"All nodes need these two in a folder that they share: {job.output} and {job.cache}"
    more = [shared] if job.nodes > 1 else []
    said = [f"vtrain run {job.config}: {job.summary}", f"Written by `vtrain launch {kind}`.", *lines, *more]
    return "".join(f"# {line}\n" for line in said)


def torchrun(job: Job) -> str:
    """A shell script with the line for each node."""
    if job.nodes == 1:
        return f"#!/bin/sh\n{_head(job, 'torchrun')}export {OWN_STORE}=1\nexec {_shell(torchrun_words(job, '', ''))}\n"
    head = _head(
        job,
        "torchrun",
        f"Start it on each of the {job.nodes} nodes, with HOST set to the name or address of one of them, the same on all.",
    )
    check = (
        f': "${{HOST:?set it to the name or address of the first node}}" "${{PORT:={PORT}}}"\nexport {OWN_STORE}=1\n'
    )
    return f"#!/bin/sh\n{head}{check}exec {_shell(torchrun_words(job, '$HOST:$PORT', job.name))}\n"


SLURM = """\
export OMP_NUM_THREADS={cores} {alone}=1
{head}
stopped=
trap 'stopped=yes; kill -USR1 "$step" 2>/dev/null' USR1  # {grace} s before the time is over: the run saves and ends
trap : TERM                                              # Slurm sends it to the run too, which saves and ends

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" {line} &
step=$!
wait "$step"; code=$?
while [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal ends `wait`

# Stopped before its last step: the same job once more, which resumes from the newest checkpoint.
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def slurm(job: Job, time: str = "", partition: str = "", account: str = "") -> str:
    """A batch script. time, partition, account: as sbatch takes them; "": the cluster's own."""
    given = {"time": time, "partition": partition, "account": account}
    settings = {
        "job-name": job.name, "nodes": job.nodes, "ntasks-per-node": 1, "gpus-per-node": job.per_node,
        "cpus-per-task": job.per_node * CORES, **{key: value for key, value in given.items() if value},
        "signal": f"B:USR1@{job.grace}", "output": f"{job.name}-%j.log",
    }  # fmt: skip
    lines = "".join(f"#SBATCH --{key}={value}\n" for key, value in settings.items())
    head = _head(
        job,
        "slurm",
        "Submit it with sbatch where `vtrain` and `torchrun` are on the path. Cores: as the nodes have them.",
    )
    first = ""
    if job.nodes > 1:
        first = 'host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        first += "port=$((20000 + SLURM_JOB_ID % 10000))\n"
    line = _shell(torchrun_words(job, "$host:$port", "$SLURM_JOB_ID"))
    body = SLURM.format(cores=CORES, alone=OWN_STORE, head=first, grace=job.grace, line=line)
    return f"#!/bin/bash\n{lines}#SBATCH --requeue\n#SBATCH --open-mode=append\n{head}\nset -u\n{body}"


def skypilot(job: Job, gpu: str, volume: str = "", folder: PurePosixPath = ROOT) -> str:
    """A task. gpu: its name there. volume: of SkyPilot, mounted at `folder`, "": output and cache are in buckets."""
    shared = bool(volume)
    task: dict[str, Any] = {"name": job.name, "num_nodes": job.nodes}
    recovery = {"max_restarts_on_errors": RESTARTS}
    task["resources"] = {"accelerators": f"{gpu}:{job.per_node}", "use_spot": True, "job_recovery": recovery}
    uploaded = [path for path in (job.config, *job.inputs) if not (shared and path.is_relative_to(folder))]
    mounts: dict[str, Any] = {str(path): str(path) for path in uploaded}
    if shared:
        task["volumes"] = {str(folder): volume}
    else:
        for kind, path in (("output", job.output), ("cache", job.cache)):
            mounts[str(path)] = {"name": f"{job.name}-{kind}", "mode": "MOUNT_CACHED"}
    task |= {"file_mounts": mounts} if mounts else {}
    task["envs"] = {OWN_STORE: "1"}
    task["setup"] = f"pip install {shlex.join(job.installed)}\n"
    host = 'host=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
    own = 'address=$(echo "$SKYPILOT_NODE_IPS" | sed -n "$((SKYPILOT_NODE_RANK + 1))p")\n'
    line = f"exec {_shell(torchrun_words(job, f'$host:{PORT}', job.name, '--local-addr=$address'))}\n"
    task["run"] = (host + own if job.nodes > 1 else "") + line
    buckets = "Buckets: choose names that nobody else has. What is in them when a machine goes was saved some time before that."
    lines = ["Start it with `sky jobs launch FILE`, which starts it again where a spot instance was taken away."]
    return _head(job, "skypilot", *lines, *([] if shared else [buckets])) + _yaml(task)


def kubeflow(job: Job, image: str, volume: str, folder: PurePosixPath) -> str:
    """A PyTorchJob of the Training Operator. image: with vtrain. volume: a claim, mounted at `folder`."""
    words = torchrun_words(job, "$(MASTER_ADDR):$(MASTER_PORT)", job.name)
    pod = {
        "terminationGracePeriodSeconds": job.grace,
        "containers": [
            {
                "name": "pytorch",
                "image": image,
                "command": words,
                "env": [{"name": OWN_STORE, "value": "1"}],
                "resources": {"limits": {"nvidia.com/gpu": str(job.per_node)}},
                "volumeMounts": [
                    {"name": "shared", "mountPath": str(folder)},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": volume}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    counts = {"Master": 1, "Worker": job.nodes - 1}
    replicas = {
        kind: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}
        for kind, count in counts.items()
        if count
    }
    made = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name},
        "spec": {
            "nprocPerNode": str(job.per_node),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": replicas,
        },
    }
    return _head(job, "kubeflow", "Start it with `kubectl apply -f FILE`; the Training Operator (v1) runs it.") + _yaml(
        made
    )


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Text of several lines as a block, and nothing by reference."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _yaml(value: Mapping[str, Any]) -> str:
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=130, allow_unicode=True))
