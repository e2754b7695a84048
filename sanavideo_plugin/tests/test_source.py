"""Checkpoints on the hub, through a cache folder made here; no connection is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY, COMMIT = "someone/tiny-sana", "0123456789abcdef0123456789abcdef01234567"

PROBE = """
import hashlib, json, sys
from vtrain.contract import Caption, VtrainError
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions
options = json.loads(sys.argv[1])
family = SanaVideoFamily(SanaVideoOptions.model_validate(options))
read = []
def hash_file(path):
    read.append(path.name)
    return hashlib.sha256(path.read_bytes()).hexdigest()
told = {"problems": [[p.where, p.what, p.remedy] for p in family.check()]}
told["heavy"] = sorted({"torch", "diffusers", "transformers", "accelerate"} & sys.modules.keys())
try:
    told["rows"] = dict(family.describe())
    told["text"] = family.text_encoders()["gemma"].fingerprint(hash_file)
    told["read"] = read
    if sys.argv[2] == "load":
        denoiser = family.load_denoiser("cpu", "fp32")
        told["weights"] = sum(weight.numel() for weight in denoiser.module.parameters())
        with family.text_encoders()["gemma"].open("cpu") as encoder:
            told["tokens"] = encoder.encode([Caption("a cat")], "prompt").only.mask.shape[1]
except VtrainError as error:
    told["error"] = str(error)
print(json.dumps(told))
"""


def cached(checkpoint: Path, hub: Path, revision: str = "main") -> Path:
    """Put a checkpoint into a hub cache as the hub's client does: blobs by hash, a snapshot of links, a ref. -> snapshot."""
    home = hub / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text(COMMIT)
    for path in checkpoint.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            # Large files are named by their sha256, small ones by git's sha1.
            name = (hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1)(content).hexdigest()
            (home / "blobs" / name).write_bytes(content)
            link = snapshot / path.relative_to(checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(home / "blobs" / name, link.parent))
    return snapshot


@pytest.fixture
def empty_hub() -> Iterator[str]:
    """The address of a hub that has nothing."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers every request with an error
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def probe(
    hub: Path, *, offline: bool = True, load: bool = False, endpoint: str = "http://127.0.0.1:9", **options: object
) -> dict[str, object]:
    """Use a hub id in a process whose cache is `hub`, with its weights or without. No one listens at the default endpoint."""
    surroundings = os.environ | {"HF_HUB_CACHE": str(hub), "HF_ENDPOINT": endpoint}
    surroundings["HF_HUB_OFFLINE"] = "1" if offline else "0"
    table = json.dumps({"path": REPOSITORY, "text_precision": "fp32"} | options)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, table, "load" if load else "plan"],
        capture_output=True,
        text=True,
        env=surroundings,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


def test_what_the_cache_has_is_used_without_asking_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    cached(checkpoint, tmp_path)
    told = probe(tmp_path, offline=False, load=True)
    assert told["problems"] == []
    assert told["heavy"] == []
    assert told["weights"] == 886_528
    assert told["tokens"] == 7
    rows = told["rows"]
    assert isinstance(rows, dict)
    assert rows["model"] == f"{REPOSITORY} (commit {COMMIT})"


def test_files_that_the_hub_names_by_their_hash_are_not_read_again(checkpoint: Path, tmp_path: Path) -> None:
    cached(checkpoint, tmp_path)
    told = probe(tmp_path)
    assert told["read"] == ["tokenizer.json", "tokenizer_config.json"]
    assert told["text"] == probe(tmp_path, path=str(checkpoint))["text"]


def test_a_revision_is_looked_up(checkpoint: Path, tmp_path: Path) -> None:
    cached(checkpoint, tmp_path, revision="v2")
    assert probe(tmp_path, revision="v2")["problems"] == []
    assert probe(tmp_path, revision=COMMIT)["problems"] == []
    assert "hf download someone/tiny-sana --revision v3" in str(probe(tmp_path, revision="v3")["problems"])


def test_an_unknown_model_says_how_to_get_it(tmp_path: Path) -> None:
    told = probe(tmp_path)
    problems = told["problems"]
    assert isinstance(problems, list)
    assert len(problems) == 1
    assert problems[0][0] == REPOSITORY
    assert "cannot be had from the hub" in problems[0][1]
    assert "hf download someone/tiny-sana" in problems[0][2]
    assert "cannot be had from the hub" in str(told["error"])


def test_weights_that_are_not_there_yet_are_no_problem_with_a_connection_and_one_without(
    checkpoint: Path, tmp_path: Path, empty_hub: str
) -> None:
    snapshot = cached(checkpoint, tmp_path)
    (snapshot / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    online = probe(tmp_path, offline=False, load=True, endpoint=empty_hub)
    assert online["problems"] == []
    assert f"cannot be had from the hub at {empty_hub}" in str(online["error"])
    assert "this weight file is missing" in str(probe(tmp_path)["problems"])


def test_a_cache_that_lacks_a_config_is_not_taken_for_whole(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = cached(checkpoint, tmp_path)
    shutil.rmtree(snapshot / "vae")
    assert "vae" in str(probe(tmp_path)["problems"])
