"""Gradient checkpointing and offload on real model classes: every mode gives the gradients of none, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtrain.config.tables import LoraTable, OffloadTable, PrecisionTable
from vtrain.contract import (
    ClipShape,
    Condition,
    ConfigError,
    Device,
    LatentShape,
    NoiseLevel,
    SupportsFeedForward,
    Text,
)
from vtrain.train.checkpointing import checkpoint_gradients
from vtrain.train.offload import offload
from vtrain.train.parameters import add_lora
from vtrain.train.step import tapped


def sana(folder: Path) -> Any:
    from vtrain_sanavideo import tiny
    from vtrain_sanavideo.family import SanaVideoFamily
    from vtrain_sanavideo.options import SanaVideoOptions

    return SanaVideoFamily(SanaVideoOptions(path=str(tiny.build(folder))))


def wan(folder: Path) -> Any:
    from vtrain_wan import tiny
    from vtrain_wan.plugin import WAN21, Wan21Options

    return WAN21.build(Wan21Options(path=str(tiny.build(folder))))


@pytest.fixture(scope="module", params=[sana, wan], ids=["sana", "wan"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture
def loaded(family: Any) -> Callable[..., Any]:
    def load(*, lora: bool) -> Any:
        denoiser = family.load_denoiser("cpu", "fp32")
        if lora:
            add_lora(denoiser, LoraTable(rank=2, dropout=0.3), 0, "")
            for name, weight in denoiser.module.named_parameters():
                if "lora_B" in name:  # of a new adapter 0: nothing of it would reach the rest
                    torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(1))
        else:
            denoiser.module.requires_grad_(True)
        denoiser.module.train()
        return denoiser

    return load


def gradients(family: Any, denoiser: Any, mixed: bool = False) -> dict[str, Tensor]:
    """Of a loss on the prediction and on a tap, with dropout."""
    latents = family.latent_shape(ClipShape(9, 64, 96))
    draw = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, *latents, generator=draw)
    (part,) = (part for each in family.text_encoders().values() for part in each.parts.values())
    embeds = torch.randn(2, part.tokens, part.width, generator=draw)
    mask = torch.arange(part.tokens)[None].expand(2, -1) < 7
    condition = Condition(Text.of(embeds, mask))
    denoiser.module.zero_grad()
    Device().seed(5)
    with Device().autocast("bf16" if mixed else None):
        with tapped(denoiser, (1,), LatentShape(*latents)) as taps:
            prediction = denoiser.predict(
                noisy, NoiseLevel(torch.tensor([0.3, 0.8]), torch.tensor([300.0, 800.0])), condition
            )
        loss = prediction.float().square().mean() + taps[1].float().square().mean()
    loss.backward()
    found = {name: w.grad.clone() for name, w in denoiser.module.named_parameters() if w.grad is not None}
    assert any(bool(each.any()) for each in found.values())
    return found


MODES: dict[str, dict[str, Any]] = {
    "every block": {},
    "every second block": {"gradient_checkpointing_interval": 2},
    "feed-forward": {"gradient_checkpointing": "feed_forward"},
}


NAMES = ("attention 0", "feed-forward 0", "attention 1", "feed-forward 1")
RUNS = {
    mode: dict(zip(NAMES, runs, strict=True))
    for mode, runs in (
        ("every block", (2, 2, 2, 2)),
        ("every second block", (2, 2, 1, 1)),
        ("feed-forward", (1, 2, 1, 2)),
    )
}
"""How often a part of each block runs in a step."""


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora with dropout"])
@pytest.mark.parametrize("mode", MODES, ids=list(MODES))
def test_checkpointing_changes_no_gradient(family: Any, loaded: Callable[..., Any], mode: str, lora: bool) -> None:
    plain = loaded(lora=lora)
    plain.gradient_checkpointing(False)
    wanted = gradients(family, plain, mixed=True)
    runs: dict[str, int] = {}
    denoiser = loaded(lora=lora)
    checkpoint_gradients(denoiser, PrecisionTable.model_validate(MODES[mode]), "config.toml:1")
    for number, part in enumerate(denoiser.feed_forwards):
        count(runs, f"feed-forward {number}", next(each for each in part.modules() if hasattr(each, "weight")))
    for number, block in enumerate(denoiser.blocks):
        count(runs, f"attention {number}", block.get_submodule("attn1"))
    found = gradients(family, denoiser, mixed=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {name: runs[name] for name in NAMES} == RUNS[mode]


def count(runs: dict[str, int], name: str, module: torch.nn.Module) -> None:
    """Calls of a module."""
    runs[name] = 0

    def add(*_: object) -> None:
        runs[name] += 1

    module.register_forward_pre_hook(add)


@pytest.mark.parametrize(
    "values",
    [
        {"group": "block"},
        {"group": "block", "blocks_per_group": 2},
        {"group": "block", "stream": True},
        {"group": "leaf"},
        {"group": "block", "disk": "away"},
    ],
    ids=lambda values: " ".join(map(str, values.values())),
)
def test_offload_changes_no_gradient(
    family: Any, loaded: Callable[..., Any], tmp_path: Path, poisoned: Callable[..., Any], values: dict[str, Any]
) -> None:
    plain = loaded(lora=True)
    plain.gradient_checkpointing(True)
    wanted = gradients(family, plain, mixed=True)
    moves = poisoned(streams=True)
    denoiser = loaded(lora=True)
    denoiser.gradient_checkpointing(True)
    table = OffloadTable.model_validate(values | ({"disk": str(tmp_path / "away")} if "disk" in values else {}))
    with ExitStack() as held:
        offload(denoiser, table, Device(), held)
        for _ in range(2):  # also when it begins where a backward pass ended
            found = gradients(family, denoiser, mixed=True)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert moves.sent


def test_a_family_that_names_no_feed_forward_layers_is_told_what_else_there_is(toy: Any) -> None:
    denoiser = toy.load_denoiser("cpu", "fp32")
    assert not isinstance(denoiser, SupportsFeedForward)
    with pytest.raises(ConfigError, match=r"config.toml:9: .* does not say .* feed-forward layer.*interval = 2"):
        checkpoint_gradients(denoiser, PrecisionTable(gradient_checkpointing="feed_forward"), "config.toml:9")


@pytest.mark.parametrize(("many", "left", "away"), [(1, 4, []), (2, 2, [3, 1])])
def test_diffusers_own_group_offload_is_not_made_for_backward_passes(
    monkeypatch: pytest.MonkeyPatch, many: int, left: int, away: list[int]
) -> None:
    """Why vtrain has its own: after a backward pass every group is still there, and of a group of two blocks the second one is
    computed again before its weights have come. If this fails, diffusers has mended it."""
    from diffusers.hooks import apply_group_offloading
    from diffusers.hooks.group_offloading import ModuleGroup
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=48, num_layers=4, num_cross_attention_heads=2,
        cross_attention_head_dim=48, cross_attention_dim=96, caption_channels=64,
    )  # fmt: skip
    model.enable_gradient_checkpointing()
    model.train()
    here: dict[int, bool] = {}
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: here.__setitem__(id(group), True))
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: here.__setitem__(id(group), False))
    apply_group_offloading(model, "cpu", "cpu", offload_type="block_level", num_blocks_per_group=many)
    missing: list[int] = []
    groups = []
    for number, block in enumerate(model.transformer_blocks):
        group = id(block._diffusers_hook.get_hook("group_offloading").group)
        groups.append(group)

        def note(*_: object, number: int = number, group: int = group) -> None:
            if not here[group]:
                missing.append(number)

        block.attn1.register_forward_pre_hook(note)
    inputs = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 4, 64), torch.ones(1)
    out = model(inputs[0], encoder_hidden_states=inputs[1], timestep=inputs[2], return_dict=False)[0]
    assert sum(here[group] for group in set(groups)) == 0
    out.square().mean().backward()
    assert sum(here[group] for group in set(groups)) == left
    assert missing == away
