"""What the plan says of CREPA before anything is loaded: encoders that are nowhere, clips too short, keys without effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from vtrain.contract import ClipShape, Regularizer, SupportsCheck, TokenGrid
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.crepa_options import HUB_IDS, CrepaOptions

CLIPS = [(ClipShape(9, 32, 32), TokenGrid(3, 2, 2)), (ClipShape(17, 16, 32), TokenGrid(5, 1, 2))]


def crepa(**values: object) -> Crepa:
    return Crepa(CrepaOptions.model_validate(values))


def said(part: Crepa, clips: list[tuple[ClipShape, TokenGrid | None]] | None = None) -> str:
    return "\n".join(str(problem) for problem in part.check(CLIPS if clips is None else clips))


def test_the_defaults_are_the_quickstarts() -> None:
    given = CrepaOptions()
    assert (given.block, given.weight, given.adjacent_distance, given.temporal_decay) == (10, 0.5, 1, 1.0)
    assert (given.encoder, given.size, given.teacher) == ("dinov2_vitg14", "match", "cached")
    assert not given.cumulative_neighbors
    assert not given.drop_vae_encoder


def test_torch_hubs_names_stay_names_and_folders_become_absolute(tmp_path: Path) -> None:
    def encoder(text: str) -> str:
        return CrepaOptions.model_validate({"encoder": text}, context={"folder": str(tmp_path)}).encoder

    assert [encoder(name) for name in HUB_IDS] == list(HUB_IDS)
    assert encoder("facebook/dinov2-small") == "facebook/dinov2-small"
    assert encoder("./dino") == str(tmp_path / "dino")
    assert encoder("weights/dinov2_vits14_pretrain.pth") == str(tmp_path / "weights" / "dinov2_vits14_pretrain.pth")


@pytest.mark.parametrize(
    "values",
    [
        {"weight": 0},
        {"block": -1},
        {"adjacent_distance": -1},
        {"temporal_decay": 0},
        {"size": "518"},
        {"size": 0},
        {"encoder": ""},
        {"teacher": "decoded"},
        {"projector": {"layers": 0}},
        {"schedule": {"decay": "exponential"}},
        {"schedule": {"threshold": 1.5}},
        {"schedule": {"warmup": "3 min"}},
        {"schedule": {"warm_up": "3 steps"}},
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CrepaOptions.model_validate(values)


def test_a_sound_encoder_has_no_problems(dino: Path) -> None:
    part: Regularizer = crepa(encoder=str(dino))
    assert isinstance(part, SupportsCheck)
    assert list(part.check(CLIPS)) == []
    assert list(part.warnings()) == []


def test_an_encoder_that_is_nowhere_is_named_with_the_ways_to_name_one(tmp_path: Path) -> None:
    text = said(crepa(encoder=str(tmp_path / "none")))
    assert f"{tmp_path / 'none'}: there is no such encoder" in text
    assert "dinov2_vitg14" in text
    assert "facebook/dinov2-small" in text


@pytest.mark.parametrize(("name", "wanted"), [("dinov2_vitg14", "facebook/dinov2-giant"), ("own/dino", "own/dino")])
def test_an_encoder_that_is_missing_offline_is_prefetched_with_this_command(
    tmp_path: Path, name: str, wanted: str
) -> None:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    probe = (
        "import sys; from vtrain_sanavideo.crepa import Crepa; from vtrain_sanavideo.crepa_options import CrepaOptions\n"
        "for problem in Crepa(CrepaOptions(encoder=sys.argv[1])).check([]): print(problem)"
    )
    told = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", probe, name], env=told, capture_output=True, text=True, check=True, timeout=120
    )
    assert f"hf download {wanted}" in done.stdout
    assert "cannot be had from the hub" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def in_hub_cache(home: Path, name: str, model: Path, *, weights: bool) -> None:
    """The files of `model` as the hub's client keeps those of `name`."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for file in model.iterdir():
        if weights or file.suffix == ".json":
            (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("weights", [True, False], ids=["whole", "config alone"])
def test_an_encoder_in_the_hubs_cache_is_used_offline(tmp_path: Path, dino: Path, weights: bool) -> None:
    in_hub_cache(tmp_path, "facebook/dinov2-small", dino, weights=weights)
    probe = (
        "from vtrain.contract import TokenGrid; from vtrain_sanavideo.crepa import Crepa\n"
        "from vtrain_sanavideo.crepa_options import CrepaOptions\n"
        "part = Crepa(CrepaOptions(encoder='dinov2_vits14'))\n"
        "found = [str(problem) for problem in part.check([])]\n"
        "print(*found)\n"
        "if not found:\n"
        "    import torch\n"
        "    with part.open_feature_encoder('cpu') as encoder:\n"
        "        print(tuple(encoder.encode(torch.zeros(1, 3, 1, 32, 32), TokenGrid(1, 2, 2)).shape))\n"
    )
    told = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", probe], env=told, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if weights:
        assert "(1, 1, 2, 2, 64)" in done.stdout
    else:
        assert "hf download facebook/dinov2-small" in done.stdout


def test_weights_that_are_missing_or_cut_are_named(tmp_path: Path, dino: Path) -> None:
    whole = (dino / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    assert "model.safetensors: this weight file is missing" in said(crepa(encoder=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    assert "is truncated" in said(crepa(encoder=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "clip"}, "this is no DINOv2 but a clip"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"patch_size": None}, "patch_size"),
        ({"num_channels": 4}, "takes 4 channels"),
    ],
    ids=str,
)
def test_a_config_of_another_kind_is_named(tmp_path: Path, dino: Path, change: dict[str, object], words: str) -> None:
    config = json.loads((dino / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in said(crepa(encoder=str(tmp_path)))


def test_what_is_not_there_is_told_as_missing_with_what_an_encoder_is(tmp_path: Path) -> None:
    """A .pth file that is not there was once called no dictionary of tensors; a folder, not in diffusers' layout."""
    file = said(crepa(encoder=str(tmp_path / "dinov2_vits14_pretrain.pth")))
    folder = said(crepa(encoder=str(tmp_path)))
    assert f"{tmp_path / 'dinov2_vits14_pretrain.pth'}: there is no such file." in file
    assert f"{tmp_path / 'config.json'}: this file is missing" in folder
    assert all("a .pth file of torch hub's weights" in text and "diffusers" not in text for text in (file, folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 128}, "embeddings.cls_token is [1, 1, 64] instead of [1, 1, 128]"),
        ({"patch_size": 16}, "projection.weight is [64, 3, 14, 14] instead of [64, 3, 16, 16]"),
        ({"model_type": "dinov2_with_registers"}, "embeddings.register_tokens is missing"),
    ],
    ids=str,
)
def test_a_config_of_other_weights_is_refused_before_clips_are_encoded(
    tmp_path: Path, dino: Path, change: dict[str, object], words: str
) -> None:
    config = json.loads((dino / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(dino / "model.safetensors")
    assert words in said(crepa(encoder=str(tmp_path)))


def test_a_size_that_patches_do_not_fill_is_refused_with_the_nearest(dino: Path) -> None:
    assert "size 512 cannot be cut into patches of 14. Write 518" in said(crepa(encoder=str(dino), size=512))
    assert said(crepa(encoder=str(dino), size=518)) == ""


def test_more_neighbours_than_frames_are_refused_unless_one_bucket_has_them(dino: Path) -> None:
    assert said(crepa(encoder=str(dino), adjacent_distance=4)) == ""
    text = said(crepa(encoder=str(dino), adjacent_distance=5))
    assert "adjacent_distance is 5, and the longest clip has 5 frames of tokens" in text
    assert "no two are more than 4 apart" in text
    assert "Write at most 4" in text
    assert said(crepa(encoder=str(dino), adjacent_distance=9, cumulative_neighbors=True)).startswith(
        "adjacent_distance is 9, and the longest clip has 5 frames of tokens: no two are more than 4 apart"
    )
    pictures: list[tuple[ClipShape, TokenGrid | None]] = [(ClipShape(1, 32, 32), TokenGrid(1, 2, 2))]
    assert "has 1 frame of tokens" in said(crepa(encoder=str(dino)), pictures)
    assert said(crepa(encoder=str(dino), adjacent_distance=0), pictures) == ""


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"drop_vae_encoder": True}, "drop_vae_encoder"),
        ({"drop_vae_encoder": True, "teacher": "online", "online_from": "source"}, "drop_vae_encoder"),
        ({"online_from": "source"}, "online_from"),
        ({"cumulative_neighbors": True}, "cumulative_neighbors"),
        ({"adjacent_distance": 0, "temporal_decay": 2.0}, "temporal_decay"),
        ({"encoder": "/models/dino", "encoder_revision": "main"}, "encoder_revision"),
        ({"projector": {"layers": 1, "hidden": 9}}, "projector.hidden"),
        ({"schedule": {"end": 0.1}}, "schedule.end"),
        ({"schedule": {"decay": "cosine", "power": 2.0}}, "schedule.power"),
        ({"schedule": {"smoothing": 0.9}}, "schedule.smoothing"),
        ({"schedule": {"threshold": 0.9, "probe_every": 5}}, "schedule.probe_every"),
    ],
    ids=str,
)
def test_a_key_without_effect_is_warned_of(values: dict[str, object], key: str) -> None:
    (text,) = crepa(**values).warnings()
    assert text.startswith(f"{key} has no effect")


@pytest.mark.parametrize(
    ("values", "source", "alone", "words"),
    [
        ({}, "cached", False, "neither the encoder nor the video codec is in memory"),
        ({"teacher": "online"}, "decoded", False, "the encoder and the whole video codec stay in memory"),
        (
            {"teacher": "online", "drop_vae_encoder": True},
            "decoded",
            True,
            "the encoder and the half of the video codec that decodes stay in memory",
        ),
        ({"teacher": "online", "online_from": "source"}, "source", False, "the encoder stays in memory"),
    ],
    ids=str,
)
def test_the_plan_says_what_stays_in_memory(
    dino: Path, values: dict[str, object], source: str, alone: bool, words: str
) -> None:
    part = crepa(encoder=str(dino), **values)
    needs = part.needs()
    assert (needs.taps, needs.features, needs.decoder_only) == ((10,), source, alone)
    assert words in dict(part.describe())["teacher"]


def test_nothing_heavy_is_imported_for_a_plan(dino: Path) -> None:
    probe = (
        "import sys; from vtrain.contract import ClipShape, TokenGrid; from vtrain_sanavideo.plugin import CREPA\n"
        "part = CREPA.build(CREPA.options(encoder=sys.argv[1]))\n"
        "clip = ClipShape(9, 32, 32), TokenGrid(3, 2, 2)\n"
        "print(part.check([clip]), part.describe(), part.warnings(), part.needs(), part.feature_shape(*clip))\n"
        "print(part.feature_fingerprint(lambda path: path.name))\n"
        "assert not {'torch', 'transformers', 'diffusers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", probe, str(dino)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_block_that_the_model_lacks_is_refused_by_the_plan(tmp_path: Path, checkpoint: Path, dino: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "config.toml").write_text(
        f'[run]\noutput_dir = "out"\n[model]\nuse = "sanavideo"\npath = "{checkpoint}"\ntrain = "full"\n'
        '[[data]]\nuse = "folder"\npath = "clips"\nresolution = "64x64"\n[data.video]\nframes = 9\n'
        '[train]\nsteps = 2\n[optimizer]\nuse = "adamw"\nlr = 1e-4\n'
        f'[[regularizer]]\nuse = "crepa"\nencoder = "{dino}"\nadjacent_distance = 3\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "vtrain.cli", "plan", str(tmp_path / "config.toml")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "400"},
    )
    assert done.returncode == 2
    told = done.stdout + done.stderr
    assert "crepa: it reads block 10; the model has blocks 0 to 3." in told
    assert "crepa: adjacent_distance is 3, and the longest clip has 3 frames of tokens" in told
