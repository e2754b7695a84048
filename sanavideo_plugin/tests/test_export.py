"""`vtrain export` of SANA-Video: read by diffusers' own classes, and compared with weights that are merged here by hand."""

# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, unused-ignore"
from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaVideoPipeline, SanaVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtrain import api
from vtrain.config.tables import EmaTable
from vtrain.contract import CheckpointError, ConfigError, Denoiser, Device
from vtrain.plan.adapter import lora_scale
from vtrain.plan.records import Plan
from vtrain.run import export as exports
from vtrain.run import trained_model
from vtrain.run.prepare import planned
from vtrain.train import adapter, parameters
from vtrain.train.checkpoint import write
from vtrain.train.ema import Average, AveragePiece
from vtrain.train.model import load_model
from vtrain.train.parameters import lora_state
from vtrain.train.pieces import AdapterPiece
from vtrain.train.resume import RunState, Start
from vtrain.train.settings import settings

PLAIN = "rank = 4\nalpha = 4"
Trained = tuple[Path, Denoiser, Plan]


def by_hand(model: Path, trained: Trained) -> dict[str, Tensor]:
    """The base's weights with the adapter's effect added in float64: W + scale B A; of DoRA m (W + scale B A) / |W + scale B A|."""
    _, denoiser, plan = trained
    table = plan.config.model.table.lora
    assert table is not None
    state = lora_state(denoiser.module)
    merged = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]:
        first, second = state[f"{name}.lora_A.weight"].double(), state[f"{name}.lora_B.weight"].double()
        whole = merged[f"{name}.weight"].double() + lora_scale(table) * second @ first
        if table.dora:
            lengths = state[f"{name}.lora_magnitude_vector"].double().reshape(-1, 1)
            whole = lengths * whole / whole.norm(dim=1, keepdim=True)
        merged[f"{name}.weight"] = whole.float()
    return merged


def prediction(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 8, 12), (1, 7, 64)))
    with torch.no_grad():
        out: Tensor = transformer(noisy, text, torch.tensor([400.0]), return_dict=False)[0]
    return out


def of_weights(model: Path, weights: Mapping[str, Tensor]) -> Tensor:
    transformer = SanaVideoTransformer3DModel.from_pretrained(model / "transformer")
    transformer.load_state_dict(dict(weights))
    return prediction(transformer.eval())


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


KINDS = {
    "alpha unlike rank": "rank = 4\nalpha = 7\ndropout = 0.5",
    "rslora": "rank = 4\nalpha = 3\nrslora = true",
    "orthogonal": 'rank = 4\ninit = "orthogonal"\ntargets = ["attn1.to_q"]',
    "dora": "rank = 4\nalpha = 7\ndora = true",
}


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "orthogonal"])
def test_diffusers_loads_a_lora_whole_and_predicts_as_the_trained_model(
    trained: Callable[..., Trained], checkpoint: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, *_ = found = trained(KINDS[kind])
    done = api.export(folder)
    pipeline = SanaVideoPipeline.from_pretrained(checkpoint, text_encoder=None, tokenizer=None, vae=None)
    plain = prediction(pipeline.transformer)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        pipeline.load_lora_weights(done.folder)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    wanted = of_weights(checkpoint, by_hand(checkpoint, found))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert gap(plain, wanted) > 0.05
    assert gap(prediction(pipeline.transformer), wanted) < 1e-5
    assert done.error < 1e-5
    assert done.export == "lora"


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_base_and_the_adapters_effect(
    trained: Callable[..., Trained], checkpoint: Path, kind: str
) -> None:
    found = trained(KINDS[kind])
    done = api.export(found[0], form="merged")
    transformer = SanaVideoTransformer3DModel.from_pretrained(done.folder, subfolder="transformer")
    wanted = by_hand(checkpoint, found)
    state = transformer.state_dict()
    assert state.keys() == wanted.keys()
    assert max(float((state[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5
    assert not (done.folder.parent / f"{done.folder.name}.partial").exists()


def test_a_convolution_gets_an_adapter_too(trained: Callable[..., Trained]) -> None:
    done = api.export(trained('rank = 4\ntargets = ["ff.conv_point"]\ndora = true')[0], form="merged")
    assert done.effect is not None
    assert done.effect > 100 * done.error


def test_a_pipeline_of_all_weights_has_the_bases_other_parts(trained: Callable[..., Trained], checkpoint: Path) -> None:
    folder, denoiser, _ = trained("")
    done = api.export(folder.parent.parent)
    pipeline = SanaVideoPipeline.from_pretrained(done.folder)
    for name, value in denoiser.module.state_dict().items():
        assert torch.equal(pipeline.transformer.state_dict()[name], value)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (checkpoint / part).iterdir():
            assert (done.folder / part / file.name).read_bytes() == file.read_bytes()
    assert done.folder == folder.parents[1] / "exports" / "step-000002-pipeline"
    record = json.loads((done.folder / "export.json").read_text())
    assert (record["step"], record["format"], record["proof"]["error"]) == (2, "pipeline", done.error)
    assert len(record["manifest_sha256"]) == 64
    assert "transformer/diffusion_pytorch_model.safetensors" in record["files"]


def test_bf16_is_for_whole_weights(trained: Callable[..., Trained]) -> None:
    folder, *_ = trained(PLAIN)
    done = api.export(folder, form="merged", dtype="bf16")
    stored = load_file(done.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["transformer_blocks.0.attn1.to_q.weight"].dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="a LoRA is exported in fp32"):
        api.export(folder, form="lora", dtype="bf16")


def test_an_average_is_exported_in_place_of_the_last_weights(trained: Callable[..., Trained]) -> None:
    folder, denoiser, _ = trained(PLAIN, average=True)
    done = api.export(folder, ema=True)
    stored = load_file(done.folder / "pytorch_lora_weights.safetensors")
    own = lora_state(denoiser.module)
    assert all(torch.equal(stored[f"transformer.{name}"], 2 * value) for name, value in own.items())
    assert done.folder.name.endswith("-ema")
    later = shutil.copytree(folder, folder.with_name("step-000003"))  # of the run that goes on without [ema]
    shutil.rmtree(later / "ema")
    with pytest.raises(CheckpointError, match=r"Export without --ema\. step-000002 beside it has some"):
        trained_model._weights(later, ema=True)


def test_a_checkpoint_whose_adapter_says_another_scale_is_none(
    trained: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, denoiser, plan = trained(KINDS["rslora"])
    lora, whole = plan.config.model.table.lora, type(denoiser).save_lora
    assert lora is not None
    average = Average(parameters.trained(denoiser.module), EmaTable(), Device())
    own = parameters.lora_settings(denoiser, lora)
    pieces = [AdapterPiece(denoiser, own), AveragePiece(denoiser, average, own, lambda path: denoiser)]
    good = write(tmp_path / "checkpoints", 3, pieces)
    for wrong, piece in (("step", "adapter"), ("ema", "average")):

        def changed(self: Any, folder: Path, state: Any, settings: Any, wrong: str = wrong) -> None:
            other = {"use_rslora": False} if folder.name.startswith(wrong) else {}
            whole(self, folder, state, {**settings, **other})

        monkeypatch.setattr(type(denoiser), "save_lora", changed)
        with pytest.raises(CheckpointError, match=rf"of {piece} cannot .* scaled by 0.75, and it was trained at 1.5"):
            write(tmp_path / "checkpoints", 4, pieces)
    assert list((tmp_path / "checkpoints").iterdir()) == [good]


def test_a_wrong_scale_is_found_and_nothing_is_kept(
    trained: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = trained(KINDS["alpha unlike rank"])
    monkeypatch.setattr(adapter, "folded_settings", lambda settings: {**settings, "lora_alpha": settings["r"]})
    with pytest.raises(CheckpointError, match="predicts otherwise than the trained model"):
        api.export(folder)
    assert list((folder.parents[1] / "exports").iterdir()) == []


def test_half_an_adapter_is_found_however_little_it_does(
    trained: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = trained("rank = 4\nalpha = 1e-3")
    whole = exports._write

    def half(source: Any, form: Any, to: Path, dtype: Any, denoiser: Any) -> None:
        for name, weight in denoiser.module.named_parameters():
            if ".lora_B." in name and "attn1" in name:
                weight.data.zero_()
        whole(source, form, to, dtype, denoiser)

    monkeypatch.setattr(exports, "_write", half)
    with pytest.raises(CheckpointError, match="and the adapter changes"):
        api.export(folder)


def test_what_cannot_be_exported_is_refused_with_what_can(trained: Callable[..., Trained], tmp_path: Path) -> None:
    folder, *_ = trained(KINDS["dora"])
    whole, *_ = trained("", "full")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: api.export(tmp_path / "clips"), "neither a run's output folder nor a checkpoint"),
        (lambda: api.export(tmp_path / "nothing"), "there is no such folder"),
        (lambda: api.export(folder, tmp_path / "clips"), "nothing is written over"),
        (lambda: api.export(folder, ema=True), "no averaged weights"),
        (lambda: api.export(folder, form="comfyui"), "names by which ComfyUI knows"),
        (lambda: api.export(whole, form="lora"), "there is no LoRA to export"),
        (lambda: api.export(folder, model=str(tmp_path / "clips")), "clips"),
    ]
    for call, why in cases:
        with pytest.raises(Exception, match=why) as raised:
            call()
        assert getattr(raised.value, "exit_code", None) == 2, why
    (whole / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not sound"):
        api.export(whole)


def test_a_model_that_was_moved_is_asked_for_and_another_is_no_base(
    trained: Callable[..., Trained], checkpoint: Path, own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = trained(PLAIN)
    assert api.export(folder, folder.parents[2] / "moved", model=str(own_checkpoint)).step == 2
    weights = own_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(weights)
    save_file({name: value + 1 for name, value in stored.items()}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on other weights"):
        api.export(folder, folder.parents[2] / "other", model=str(own_checkpoint))
    read = checkpoint_settings(folder)
    monkeypatch.setattr("vtrain.train.resume.read_state", lambda path: replace(read, settings=gone(read.settings)))
    with pytest.raises(CheckpointError, match="--model FOLDER"):
        api.export(folder, folder.parents[2] / "gone")


def checkpoint_settings(folder: Path) -> RunState:
    from vtrain.train.resume import read_state

    return read_state(folder)


def gone(values: Mapping[str, object]) -> dict[str, object]:
    return {**values, "model.path": "/nowhere/model"}


def test_a_start_has_the_same_effect_at_another_scale(
    trained: Callable[..., Trained], config: Callable[..., Path], checkpoint: Path
) -> None:
    folder, *_ = found = trained(KINDS["rslora"])
    plan = planned(config(f'rank = 4\nalpha = 11\nstart = "{folder}"', "second"))
    values = {key: setting.value for key, setting in settings(plan).items()}
    denoiser, *_ = load_model(plan, Start(None, RunState(0, 0, values, "", ""), ()), "cpu")
    origin = adapter.start_adapter(plan, denoiser)
    assert origin.endswith(str(folder / "pytorch_lora_weights.safetensors"))
    again = by_hand(checkpoint, (folder, denoiser, plan))
    wanted = by_hand(checkpoint, found)
    assert max(float((again[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5


@pytest.mark.parametrize(
    ("lora", "what", "remedy"),
    [
        ('rank = 8\nstart = "{start}"', "has rank 4, and model.lora.rank is 8", "Set rank = 4."),
        ('rank = 4\ntargets = ["to_q"]\nstart = "{start}"', "24 layers more", '"to_out.0"'),
        ('rank = 4\ndora = true\nstart = "{start}"', "a LoRA without DoRA's magnitudes", "Set dora = false."),
        ('rank = 4\nstart = "{model}/transformer"', "nothing in it is a LoRA of this model", "Name a LoRA"),
        ('rank = 4\nstart = "{start}x"', "no such file or folder", "Correct model.lora.start"),
        ('rank = 4\ntargets = ["to_qq"]', 'no layer of the model is called "to_qq"', 'Did you mean "to_q"?'),
        ('rank = 4\ntargets = ["norm_q"]', 'no layer of the model is called "norm_q"', ""),
        ("rank = 4\ntargets = []", "nothing would be trained", ""),
        ('rank = 4\ntargets = ["conv_point"]\ninit = "orthogonal"', "conv_point is a convolution", "Set another init"),
        ('rank = 3\ninit = "orthogonal"', "of an even rank", "Set rank = 4"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_the_plan(
    trained: Callable[..., Trained], config: Callable[..., Path], checkpoint: Path, lora: str, what: str, remedy: str
) -> None:
    folder, *_ = trained(PLAIN)
    with pytest.raises(ConfigError) as raised:
        planned(config(lora.format(start=folder, model=checkpoint), "second"))
    (problem,) = raised.value.problems
    assert what in problem.what
    assert remedy in problem.remedy
    assert problem.where.startswith(str(folder.parents[2] / "second.toml:"))


@pytest.mark.slow
def test_another_process_loads_what_was_exported_and_generates(
    trained: Callable[..., Trained], checkpoint: Path
) -> None:
    """Slow (20 s): two processes that import diffusers."""
    folder, *_ = trained(KINDS["alpha unlike rank"])
    lora, pipeline = api.export(folder), api.export(folder, form="pipeline")
    code = f"""
import torch
from diffusers import SanaVideoPipeline
settings = dict(prompt="a cat", height=64, width=96, frames=5, num_inference_steps=2, output_type="pt")
settings["use_resolution_binning"] = False
frames = []
for folder, adapter in (({str(checkpoint)!r}, {str(lora.folder)!r}), ({str(pipeline.folder)!r}, None), ({str(checkpoint)!r}, None)):
    pipe = SanaVideoPipeline.from_pretrained(folder)
    if adapter: pipe.load_lora_weights(adapter)
    frames.append(pipe(generator=torch.Generator().manual_seed(0), **settings).frames)
print("same", float((frames[0] - frames[1]).abs().max()), "base", float((frames[0] - frames[2]).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    same, base = (float(words[words.index(word) + 1]) for word in ("same", "base"))
    assert same < 1e-2 < base
    assert "unexpected" not in done.stderr
