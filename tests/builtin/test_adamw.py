"""AdamW against its paper's update in float64."""

from __future__ import annotations

import io

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vtrain.config.findings import example_line
from vtrain.contract import ParameterGroup, resume_rule
from vtrain_builtin.adamw import ADAMW, AdamWOptions, build_adamw


def gradients(steps: int, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for _ in range(steps)]


def reference(start: Tensor, grads: list[Tensor], options: AdamWOptions, decay: float, lr: float) -> Tensor:
    """Algorithm 2 of arXiv 1711.05101, schedule 1, in float64."""
    weight = start.double()
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    first, second = options.betas
    for step, grad in enumerate(grads, start=1):
        mean = first * mean + (1 - first) * grad.double()
        square = second * square + (1 - second) * grad.double() ** 2
        update = (mean / (1 - first**step)) / ((square / (1 - second**step)).sqrt() + options.eps)
        weight = weight - lr * decay * weight - lr * update
    return weight


def test_updates_are_those_of_the_paper() -> None:
    options = AdamWOptions(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    start = torch.linspace(-1, 1, 64)
    decayed, plain, slow = (nn.Parameter(start.clone()) for _ in range(3))
    groups = [
        ParameterGroup((("decayed", decayed),), decay=True),
        ParameterGroup((("plain", plain),), decay=False),
        ParameterGroup((("slow", slow),), decay=True, lr_factor=0.1),
    ]
    optimizer, grads = build_adamw(options, groups), gradients(25)
    for grad in grads:
        decayed.grad, plain.grad, slow.grad = grad.clone(), grad.clone(), grad.clone()
        optimizer.step()
    for found, decay, lr in ((decayed, 0.1, 1e-2), (plain, 0.0, 1e-2), (slow, 0.1, 1e-3)):
        wanted = reference(start, grads, options, decay, lr)
        assert torch.allclose(found.detach().double(), wanted, rtol=0, atol=1e-5)


def test_parts_of_a_weight_are_moved_as_the_whole_is() -> None:
    """What `moves` says of "sharded": each process has a part, and moves it by itself."""
    assert ADAMW.moves == {"fp32", "sharded"}
    whole = nn.Parameter(torch.linspace(-1, 1, 64))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split(24)]
    options = AdamWOptions(lr=1e-2, weight_decay=0.1)
    apart = [build_adamw(options, [ParameterGroup((("w", part),), decay=True)]) for part in parts]
    together = build_adamw(options, [ParameterGroup((("w", whole),), decay=True)])
    for grad in gradients(25):
        whole.grad = grad.clone()
        together.step()
        for part, own, optimizer in zip(parts, grad.split(24), apart, strict=True):
            part.grad = own.clone()
            optimizer.step()
    torch.testing.assert_close(torch.cat([part.detach() for part in parts]), whole.detach(), rtol=1e-6, atol=1e-7)


def test_the_fused_kernel_is_used_on_the_cpu() -> None:
    optimizer = build_adamw(AdamWOptions(lr=1e-3), [ParameterGroup((("w", nn.Parameter(torch.ones(2))),), decay=True)])
    assert all(group["fused"] for group in optimizer.param_groups)


def test_groups_without_parameters_are_left_out_and_names_are_kept() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = build_adamw(
        AdamWOptions(lr=1e-3), [ParameterGroup((), decay=False), ParameterGroup((("block.w", weight),), decay=True)]
    )
    assert [group["param_names"] for group in optimizer.param_groups] == [["block.w"]]


def test_no_parameter_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="without a parameter"):
        build_adamw(AdamWOptions(lr=1e-3), [ParameterGroup((), decay=True)])


def test_a_run_resumed_from_its_state_is_the_same_bit_for_bit() -> None:
    grads = gradients(10)

    def trained(interrupted: bool) -> Tensor:
        weight = nn.Parameter(torch.linspace(-1, 1, 64))
        optimizer = ADAMW.build(AdamWOptions(lr=1e-2), [ParameterGroup((("w", weight),), decay=True)])
        for number, grad in enumerate(grads):
            if interrupted and number == 5:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                weight = nn.Parameter(weight.detach().clone())
                optimizer = ADAMW.build(AdamWOptions(lr=1e-2), [ParameterGroup((("w", weight),), decay=True)])
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            weight.grad = grad.clone()
            optimizer.step()
        return weight.detach()

    assert torch.equal(trained(interrupted=False), trained(interrupted=True))


def test_every_option_may_change_at_a_resume() -> None:
    assert {resume_rule(AdamWOptions, name) for name in AdamWOptions.model_fields} == {"tell"}


def test_its_state_takes_the_bytes_that_a_plan_is_told() -> None:
    weight = nn.Parameter(torch.ones(1000))
    optimizer = build_adamw(AdamWOptions(lr=1e-3), [ParameterGroup((("w", weight),), decay=True)])
    weight.grad = torch.ones(1000)
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[weight].values() if value.ndim)
    assert held == ADAMW.state_bytes * weight.numel()


@pytest.mark.parametrize(
    "wrong",
    [{}, {"lr": 0.0}, {"lr": 1e-3, "betas": [0.9, 1.0]}, {"lr": 1e-3, "weight_decay": -1.0}, {"lr": 1e-3, "eps": 0.0}],
)
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AdamWOptions.model_validate(wrong)


def test_a_missing_learning_rate_is_shown_one_that_could_be_used() -> None:
    assert example_line(ADAMW.options.model_fields["lr"], "lr") == "lr = 0.0001"
