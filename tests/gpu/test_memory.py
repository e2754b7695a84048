"""What saves memory, on a card: the result of the plain run, with less of the card."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., str]
Record = Callable[[str, object], None]
LORA = "\n[model.lora]\nrank = 8\ndropout = 0.1\n"
VALIDATION = """
[validation]
every = "6 steps"
size = "64x64"
frames = 9
fps = 8
steps = 2
prompts = { one = "a red circle moves left" }
"""
EMA = '\n[ema]\ndecay = 0.9\nvalidation = "both"\n'
"""The average, and an optimizer's weights for evaluation, are put into a denoiser that leaves the card and comes back."""
MODES: dict[str, tuple[dict[str, object], str]] = {
    "block": ({"train": "lora", "checkpointing": "true"}, LORA + '[offload]\ngroup = "block"\n'),
    "two blocks": (
        {"train": "lora", "checkpointing": "true"},
        LORA + '[offload]\ngroup = "block"\nblocks_per_group = 2\n',
    ),
    "stream": ({"train": "lora", "checkpointing": "true"}, LORA + '[offload]\ngroup = "block"\nstream = true\n'),
    "leaf": ({"train": "lora", "checkpointing": "true"}, LORA + '[offload]\ngroup = "leaf"\n'),
    "disk": ({"train": "lora", "checkpointing": "true"}, LORA + '[offload]\ngroup = "block"\ndisk = "{disk}"\n'),
    "model_cpu": ({"train": "lora"}, LORA + "[offload]\nmodel_cpu = true\n" + VALIDATION),
    "model_cpu beside an average": ({"train": "lora"}, LORA + EMA + "[offload]\nmodel_cpu = true\n" + VALIDATION),
    "model_cpu of full training at other weights": (
        {"optimizer": "schedulefree-adamw"},
        EMA + "[offload]\nmodel_cpu = true\n" + VALIDATION,
    ),
    "every second block": ({"checkpointing": "true\ngradient_checkpointing_interval = 2"}, ""),
    "feed-forward": ({"checkpointing": '"feed_forward"'}, ""),
}


def plain(values: dict[str, object], more: str) -> tuple[dict[str, object], str]:
    """The same run without what saves memory."""
    kept = "true" if values.get("checkpointing") == "true" else "false"
    before, _, after = more.partition("[offload]")
    return values | {"checkpointing": kept}, before + (VALIDATION if "[validation]" in after else "")


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_saves_memory_is_the_plain_run(
    world: Any, run: Run, tmp_path: Path, record_property: Record, mode: str
) -> None:
    values, more = MODES[mode]
    name = mode.replace(" ", "-")
    run(world.config(f"{name}-saving", more.replace("{disk}", str(tmp_path / "away")), **values))
    without, before = plain(values, more)
    run(world.config(f"{name}-plain", before, **without))
    ours, theirs = world.tensors(f"{name}-saving", 12), world.tensors(f"{name}-plain", 12)
    assert ours.keys() == theirs.keys()
    losses = [[row["loss"] for row in world.rows(f"{name}-{kind}")] for kind in ("saving", "plain")]
    if "group" in more or "model_cpu" in more:
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
        assert world.numbers(f"{name}-saving") == world.numbers(f"{name}-plain")
    else:  # recomputed activations, as in test_gradient_checkpointing_gives_the_same_loss
        assert losses[0][0] == losses[1][0]
        assert max(abs(a - b) / b for a, b in zip(*losses, strict=True)) < 1e-3
    peaks = {kind: world.rows(f"{name}-{kind}")[-1]["memory"] / 2**20 for kind in ("saving", "plain")}
    record_property("peak MiB", peaks)


def test_states_on_the_cpu_train_as_on_the_card(world: Any, run: Run, record_property: Record) -> None:
    """Two kernels of the same formula, so that last bits may differ; the processor's own is compared bit for bit elsewhere."""
    for name, more in (("states-card", ""), ("states-cpu", "[offload]\noptimizer = true\n")):
        run(world.config(name, more))
    ours, theirs = ([row["loss"] for row in world.rows(name)] for name in ("states-cpu", "states-card"))
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    record_property("largest relative difference of a loss", apart)
    assert apart < 1e-3
    run(world.config("states-halved", "[offload]\noptimizer = true\n", steps=6))
    run(world.config("states-halved", "[offload]\noptimizer = true\n"))
    assert world.numbers("states-halved") == world.numbers("states-cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose weights are what counts: 12 blocks of 28 MiB."""
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformer3DModel

    torch.manual_seed(0)
    return SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=8, attention_head_dim=112, num_layers=12,
        num_cross_attention_heads=8, cross_attention_head_dim=112, cross_attention_dim=896, caption_channels=64,
        mlp_ratio=2.5, sample_size=30, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads",
    ).bfloat16()  # fmt: skip


@pytest.mark.parametrize(
    ("values", "blocks"),
    [({"group": "block"}, 1), ({"group": "block", "stream": True}, 2), ({"group": "leaf"}, 0.9)],
    ids=["block", "stream", "leaf"],
)
def test_groups_take_the_weights_off_the_card(
    wide: Any, card: Any, record_property: Record, values: dict[str, Any], blocks: float
) -> None:
    """Peak of a forward and backward pass: also in the backward pass all blocks are away but as many as the documentation says,
    with room for three quarters of one, for what the allocator rounds up."""
    import copy

    from vtrain.config.tables import LoraTable, OffloadTable
    from vtrain.contract import FrameRule, LatentGeometry
    from vtrain.train.offload import offload
    from vtrain.train.parameters import add_lora
    from vtrain_sanavideo.denoiser import SanaVideoDenoiser

    def peak(table: Any) -> tuple[int, torch.Tensor]:
        denoiser = SanaVideoDenoiser(copy.deepcopy(wide), LatentGeometry(16, FrameRule(4, 1), 8, (1, 2, 2)))
        add_lora(denoiser, LoraTable(rank=4), 0, "")
        denoiser.gradient_checkpointing(True)
        denoiser.module.train()
        card.release()
        card.reset_peak()
        before = card.allocated()
        with ExitStack() as held:
            if table is None:
                denoiser.module.to(card.torch)
            else:
                offload(denoiser, table, card, held)
            loss = None
            for _ in range(2):
                latents = torch.ones(1, 16, 2, 4, 4, device=card.torch)
                text = torch.ones(1, 4, 64, device=card.torch)
                with card.autocast("bf16"):
                    out = denoiser.module(
                        latents, encoder_hidden_states=text, timestep=torch.ones(1, device=card.torch)
                    )
                loss = out.sample.float().square().mean()
                loss.backward()
            card.synchronise()
            return card.peak() - before, loss.detach().cpu()

    whole, wanted = peak(None)
    away, found = peak(OffloadTable.model_validate(values))
    record_property("peak MiB with all weights and with groups", [whole / 2**20, away / 2**20])
    assert torch.equal(found, wanted)
    block = sum(weight.nbytes for weight in wide.transformer_blocks[0].parameters())
    assert whole - away > (len(wide.transformer_blocks) - blocks - 0.75) * block
