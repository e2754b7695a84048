"""The pieces of a step: groups, adapters, draws, taps, losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vtrain.config.tables import LoraTable
from vtrain.contract import ConfigError, Device, LatentShape, RunLength
from vtrain.data.batches import Batch
from vtrain.train.parameters import add_lora, groups, load_lora_state, lora_settings, lora_state, trained
from vtrain.train.prefetch import Prefetcher
from vtrain.train.step import Step, StepInput, Term, clip_gradients, gradient_norm, tapped


def test_norms_and_biases_are_not_decayed() -> None:
    decayed, plain = groups(trained(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1))))
    assert decayed.decay
    assert not plain.decay
    assert [name for name, _ in decayed.parameters] == ["0.weight", "2.weight"]
    assert {name for name, _ in plain.parameters} == {"0.bias", "1.weight", "1.bias", "2.bias"}


def test_a_denoiser_knows_which_of_its_own_parameters_decay() -> None:
    asked = []

    class Knowing:
        def decays(self, name: str, shape: tuple[int, ...]) -> bool | None:
            asked.append((name, shape))
            return {"table": False, "0.bias": True}.get(name)

    inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    inner.register_parameter("table", nn.Parameter(torch.zeros(2, 4)))
    other = nn.ParameterDict({"table": nn.Parameter(torch.zeros(2, 4))})
    step = nn.ModuleDict({"denoiser_module": inner, "other": other})
    decayed, plain = groups(trained(step), denoiser=Knowing())  # type: ignore[arg-type]
    assert {name for name, _ in decayed.parameters} == {
        "denoiser_module.0.weight", "denoiser_module.0.bias", "other.table",
    }  # fmt: skip
    assert {name for name, _ in plain.parameters} == {
        "denoiser_module.table", "denoiser_module.1.weight", "denoiser_module.1.bias",
    }  # fmt: skip
    assert ("0.weight", (4, 3)) in asked
    assert len(asked) == 5, "of another module's parameters it is not asked"


def test_an_adapter_starts_as_no_change_and_only_it_is_trained_in_fp32(denoiser, given, sampler) -> None:
    denoiser.module.to(torch.bfloat16)
    step = given(2)
    noisy = step.noise.bfloat16()
    before = denoiser.predict(noisy, step.level, step.condition)
    add_lora(denoiser, LoraTable(rank=4), seed=1, where="config.toml:1")
    assert torch.equal(before, denoiser.predict(noisy, step.level, step.condition))
    named = trained(denoiser.module)
    assert named
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in named)
    assert not denoiser.module.get_parameter(named[0][0].split(".lora_")[0] + ".base_layer.weight").requires_grad


def test_an_adapters_first_weights_depend_on_the_seed_alone(toy) -> None:
    def first(seed: int, other: int) -> torch.Tensor:
        torch.manual_seed(other)
        denoiser = toy.load_denoiser("cpu", "fp32")
        add_lora(denoiser, LoraTable(rank=4), seed, where="")
        return torch.cat([value.flatten() for value in lora_state(denoiser.module).values()])

    assert torch.equal(first(1, 2), first(1, 3))
    assert not torch.equal(first(1, 2), first(2, 2))


def test_an_adapter_goes_to_disk_and_back_and_another_rank_is_told(toy, tmp_path: Path) -> None:
    denoiser, again, other = (toy.load_denoiser("cpu", "fp32") for _ in range(3))
    add_lora(denoiser, LoraTable(rank=4), 1, "")
    add_lora(again, LoraTable(rank=4), 2, "")
    add_lora(other, LoraTable(rank=8), 2, "")
    denoiser.save_lora(tmp_path, lora_state(denoiser.module), lora_settings(denoiser, LoraTable(rank=4)))
    state = denoiser.load_lora(tmp_path)
    assert load_lora_state(again.module, state) == []
    for name, value in lora_state(denoiser.module).items():
        assert torch.equal(value, lora_state(again.module)[name])
    assert len(load_lora_state(other.module, state)) == len(state)


def test_targets_that_match_nothing_are_the_users_error(denoiser) -> None:
    with pytest.raises(ConfigError, match=r'config\.toml:9: no module of the model is called "to_quu"'):
        add_lora(denoiser, LoraTable(targets=("to_q", "to_quu")), 1, "config.toml:9")
    with pytest.raises(ConfigError, match=r'"blocks" is blocks, a ModuleList, which can have no adapter'):
        add_lora(denoiser, LoraTable(targets=("blocks",)), 1, "config.toml:9")


class FakeBatches:
    """Batches of made latents: what a Prefetcher asks of vtrain.data.batches.Batches."""

    def __init__(self, batch: Callable[[int], Batch]) -> None:
        self.batch = batch

    def get(self, number: int, features: object) -> Batch:
        return self.batch(number)


def batch_of(given: StepInput, draws: tuple[int, ...], number: int) -> Batch:
    from vtrain.contract import Latents

    names = tuple(f"clip {draw}" for draw in draws)
    return Batch(
        micro_batch=number,
        latents=Latents(given.clean),
        text=given.condition.text,
        draws=draws,
        sample_ids=names,
        dropped=(False,) * len(draws),
    )


def test_noise_and_level_of_a_draw_do_not_depend_on_its_batch(given, toy, sampler) -> None:
    def prefetcher(size: int) -> Prefetcher:
        whole = given(size)
        batches = FakeBatches(lambda n: batch_of(whole, tuple(range(n * size, n * size + size)), n))
        return Prefetcher(batches, toy, sampler, 42, Device())  # type: ignore[arg-type]

    pairs = [prefetcher(2).prepare(n, n) for n in range(3)]
    singles = [prefetcher(1).prepare(n, n) for n in range(6)]
    assert torch.equal(torch.cat([f.given.noise for f in pairs]), torch.cat([f.given.noise for f in singles]))
    assert [s for f in pairs for s in f.sigmas] == [s for f in singles for s in f.sigmas]
    noise = torch.cat([f.given.noise for f in singles])
    assert len({row.sum().item() for row in noise}) == 6


def test_a_stream_gives_what_prepare_gives_in_order_and_its_errors(given, toy, sampler) -> None:
    whole = given(1)

    def batch(number: int) -> Batch:
        if number == 4:
            raise OSError("the disk is gone")
        return batch_of(whole, (number,), number)

    prefetcher = Prefetcher(FakeBatches(batch), toy, sampler, 1, Device())  # type: ignore[arg-type]
    stream = prefetcher.stream(iter([(n, n) for n in range(6)]))
    got = [next(stream).micro_batch for _ in range(4)]
    assert got == [0, 1, 2, 3]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


def test_the_flow_loss_is_the_mean_square_against_a_float64_reference(denoiser, given, sampler) -> None:
    step = given(3)
    output = Step(denoiser, sampler, {}, RunLength(100, 10.0))(step)
    sigma = step.level.sigma.double()[:, None, None, None, None]
    noisy = (1 - sigma) * step.clean.double() + sigma * step.noise.double()
    with torch.no_grad():
        prediction = denoiser.predict(noisy.float(), step.level, step.condition).double()
    per_clip = (prediction - (step.noise.double() - step.clean.double())).square().flatten(1).mean(1)
    torch.testing.assert_close(output.flow.double(), per_clip, rtol=1e-5, atol=1e-6)
    assert output.loss.item() == pytest.approx(per_clip.mean().item(), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_taps_are_the_blocks_outputs_in_the_graph_and_fire_once(denoiser, given, checkpointing: bool) -> None:
    step = given(2)
    denoiser.gradient_checkpointing(checkpointing)
    denoiser.module.train()
    seen: list[torch.Tensor] = []
    handle = denoiser.blocks[1].register_forward_hook(lambda m, a, output: seen.append(output))
    _, channels, frames, height, width = step.clean.shape
    with tapped(denoiser, (1,), LatentShape(channels, frames, height, width)) as taps:
        denoiser.predict(step.clean, step.level, step.condition)
    handle.remove()
    assert list(taps) == [1]
    assert torch.equal(taps[1].flatten(), seen[0].flatten())
    taps[1].square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.blocks[0].parameters())
    assert all(p.grad is None for p in denoiser.blocks[2].parameters())
    denoiser.predict(step.clean, step.level, step.condition)
    assert list(taps) == [1], "the hook stayed"


def test_a_regularizer_adds_its_term_and_its_own_parameters_learn(denoiser, given, sampler) -> None:
    from vtrain_toy.smooth import SMOOTH

    regularizer = SMOOTH.build(SMOOTH.options.model_validate({"block": 1, "weight": 0.5}))
    module = regularizer.load({1: 32})
    step = Step(denoiser, sampler, {"toy-smooth": Term(module, (1,))}, RunLength(100, 10.0))
    output = step(given(2))
    term = output.metrics["toy-smooth/loss"]
    assert output.loss.item() == pytest.approx((output.flow.mean() + term).item(), rel=1e-6)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert {name for name, _ in trained(step)} >= {f"regularizers.toy-smooth.{n}" for n, _ in module.named_parameters()}


def test_clipping_by_norm_scales_all_and_by_value_clamps() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, -4.0])
    assert gradient_norm(parameters).item() == pytest.approx(5.0)
    clip_gradients(parameters, "norm", 1.0, gradient_norm(parameters))
    assert gradient_norm(parameters).item() == pytest.approx(1.0, rel=1e-5)
    clip_gradients(parameters, "value", 0.1, None)
    assert [round(p.grad.abs().max().item(), 6) for p in parameters] == [0.1, 0.1]
