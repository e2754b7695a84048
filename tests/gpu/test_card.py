"""What a card gives beside a CPU: encoders that fill caches, noise, memory figures, threads, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vtrain.contract import DeviceError

Record = Callable[[str, object], None]
TEXT, LATENTS, FEATURES = 2e-2, 5e-3, 2e-2
"""How far a cache filled on a card may be from one filled on a CPU, |a - b| / |b|: bf16 products, summed in other orders; the
VAE's fp32 convolutions, whose products cuDNN rounds to TF32 (10 bits); bf16 features."""


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def test_caches_filled_on_the_card_are_those_of_the_cpu(
    world: Any, device: Any, tmp_path: Path, record_property: Record
) -> None:
    from vtrain.contract import Caption
    from vtrain.data.batches import Batches
    from vtrain.data.caching.caches import fill_caches
    from vtrain.data.scanning.scan import scan
    from vtrain.run.prepare import planned

    more = f'\n[[regularizer]]\nuse = "crepa"\nblock = 3\nencoder = "{world.folder / "dino"}"\n'
    found = {}
    for where in (str(device), "cpu"):
        plan = planned(world.config(f"caches-{where.replace(':', '')}", more, cache=tmp_path / where.replace(":", "")))
        filled = fill_caches(plan, scan(plan).samples, [(Caption("a red circle"), "prompt")], where, lambda _: None)
        batches = Batches(plan, filled.caches, filled.index)
        parts = [batches[number] for number in range(4)]
        found[where] = {
            "text": torch.cat([part.text.only.embeds.flatten() for part in parts]),
            "latents": torch.cat([part.latents.mean for part in parts]),
            "features": torch.cat([part.features["crepa"] for part in parts]),
        }
    for kind, limit in (("text", TEXT), ("latents", LATENTS), ("features", FEATURES)):
        distance = apart(found[str(device)][kind], found["cpu"][kind])
        record_property(f"{kind}: relative distance of card and CPU", distance)
        assert distance <= limit, kind


def test_validation_starts_from_the_noise_of_a_cpu(world: Any, device: Any) -> None:
    from contextlib import nullcontext

    from vtrain.data.caching.caches import Caches
    from vtrain.run.prepare import planned
    from vtrain.validate.generate import Validator

    more = '\n[validation]\nevery = "6 steps"\nsize = "64x64"\nframes = 9\nfps = 8\nseed = 5\nprompts = { one = "a red circle" }\n'
    plan = planned(world.config("noise", more))
    validator = Validator(
        plan.validation, plan.family, plan.sampler, Caches.open(plan), None, device, nullcontext, lambda: False
    )
    shape = (1, *plan.family.latent_shape(plan.validation.shape))
    drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(validator.device.move(validator.start()).cpu(), drawn)


def test_what_the_prefetcher_puts_on_the_card_is_what_it_read(world: Any, device: Any) -> None:
    """Also while the card is busy: copies that nobody waits for must not read memory that is used again."""
    from vtrain.contract import Device
    from vtrain.data.batches import Batches
    from vtrain.data.caching.caches import fill_caches
    from vtrain.data.scanning.scan import scan
    from vtrain.run.prepare import planned
    from vtrain.train.prefetch import Prefetcher

    plan = planned(world.config("prefetched"))
    filled = fill_caches(plan, scan(plan).samples, (), str(device), lambda _: None)
    batches = Batches(plan, filled.caches, filled.index)
    busy = torch.randn(2048 if device.accelerated else 64, 2048 if device.accelerated else 64, device=device.torch)
    unit = plan.config.sampler.registered.spec.timesteps_of
    ours, theirs = (
        Prefetcher(batches, plan.family, plan.sampler, 1, each, timesteps_of=unit) for each in (device, Device())
    )
    stream = ours.stream((number, number) for number in range(24))
    for number in range(24):
        for _ in range(20):
            busy = busy @ busy / busy.norm()
        here, there = next(stream).given, theirs.prepare(number, number).given
        assert torch.equal(here.clean.cpu(), there.clean)
        assert torch.equal(here.noise.cpu(), there.noise)
        assert torch.equal(here.level.timestep.cpu(), there.level.timestep)
        assert torch.equal(here.condition.text.only.embeds.cpu(), there.condition.text.only.embeds)


def test_a_thread_that_uses_the_device_computes_on_it(device: Any) -> None:
    found: list[float] = []

    def work() -> None:
        device.use()
        found.append(float(device.move(torch.full((4,), 2.0)).sum()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [8.0]


def test_seeds_on_the_device_give_the_same_dropout_again(device: Any) -> None:
    ones = torch.ones(1000, device=device.torch)
    masks = []
    for _ in range(2):
        device.seed(3)
        masks.append(torch.nn.functional.dropout(ones, 0.5))
    assert torch.equal(*masks)
    assert 300 < int((masks[0] > 0).sum()) < 700


def test_the_card_has_a_number_a_name_and_figures(card: Any, record_property: Record) -> None:
    assert card.index is not None
    assert card.capability is not None
    assert card.name
    free, total = card.free()
    assert 0 < free < total
    figures = card.figures()
    record_property("figures", str(figures))
    assert figures is not None, "nvidia-ml-py or the driver's library is missing"
    assert abs(figures.total - total) < 0.05 * total
    assert figures.temperature is None or 0 < figures.temperature < 110


def test_peak_and_release_follow_what_is_allocated(card: Any) -> None:
    card.release()
    card.reset_peak()
    before = card.peak()
    held = torch.ones(64 << 20, dtype=torch.uint8, device=card.torch)
    card.synchronise()
    assert card.peak() - before == pytest.approx(64 << 20, abs=1 << 20)
    allocated = card.allocated()
    del held
    card.release()
    assert allocated - card.allocated() == pytest.approx(64 << 20, abs=1 << 20)


def test_a_full_card_says_what_was_asked_for_and_what_is_free(card: Any) -> None:
    words = r"GiB were asked for, .* GiB of .* GiB are free"
    with pytest.raises(DeviceError, match=words) as raised, card.explained("training", ["train.batch_size"]):
        torch.empty(1 << 44, dtype=torch.uint8, device=card.torch)
    assert card.name in str(raised.value)


@pytest.mark.parametrize("name", ["adam", "adamw", "stableadamw", "radam", "adan", "lion", "sgd"])
def test_bf16_weights_go_on_the_card_where_fp32_weights_go(device: Any, name: str, record_property: Record) -> None:
    """With the library's Triton kernels, where they are: of pieces of fp32 weights, and moments in bf16."""
    from vtrain.contract import ParameterGroup
    from vtrain_builtin.plugin import vtrain_optimizers
    from vtrain_builtin.split_weights import REST, joined

    spec = {spec.name: spec for spec in vtrain_optimizers()}[f"optimi-{name}"]
    start = torch.rand(300, 100, generator=torch.Generator().manual_seed(0)).add(0.5).to(device.torch, torch.bfloat16)
    low, high = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    options = spec.options.model_validate({"lr": 1e-5, "weight_decay": 0.01})
    ours, theirs = (spec.build(options, [ParameterGroup((("w", each),), decay=True)]) for each in (low, high))
    for number in range(100):
        slope = torch.randn(start.shape, generator=torch.Generator().manual_seed(number)).add(0.5).to(start)
        low.grad, high.grad = slope.clone(), slope.float()
        ours.step()
        theirs.step()
    found = joined(low.detach(), ours.state[low][REST]).double() - start.double()
    share = float(found.mean() / (high.detach().double() - start.double()).mean())
    record_property(f"optimi-{name}: way of bf16 weights, of that of fp32 ones", share)
    assert share == pytest.approx(1.0, abs=0.02)
