"""The built-in optimizers on the conformance kit, each against something that is not ours, and with bf16 weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import OptimizerSpec, ParameterGroup
from vtrain.testing import OptimizerTests, SpecTests
from vtrain_builtin.plugin import vtrain_optimizers

SPECS = {spec.name: spec for spec in vtrain_optimizers()}
HERE = [spec for spec in SPECS.values() if spec.library is None or find_spec(spec.library[0])]
TABLES: Mapping[str, Mapping[str, Any]] = {"prodigy": {"lr": 1.0, "d0": 1e-3}}


def table(spec: OptimizerSpec) -> Mapping[str, Any]:
    return TABLES.get(spec.name, {"lr": 1e-2})


def conformance(spec: OptimizerSpec) -> type:
    """The kit's tests of one optimizer."""

    class Tests(SpecTests, OptimizerTests):
        @pytest.fixture(scope="class")
        @classmethod
        def spec(cls) -> OptimizerSpec:  # type: ignore[override]
            return spec

    Tests.table = table(spec)
    Tests.__qualname__ = Tests.__name__ = f"Test_{spec.name}"
    return Tests


for each in HERE:
    globals()[f"Test_{each.name}"] = conformance(each)


def weights(dtype: torch.dtype = torch.float32, size: int = 4096, seed: int = 0) -> nn.Parameter:
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.5
    return nn.Parameter(drawn.to(dtype))


def group(*named: tuple[str, nn.Parameter], decay: bool = True, lr_factor: float = 1.0) -> ParameterGroup:
    return ParameterGroup(named, decay=decay, lr_factor=lr_factor)


def stepped(spec: OptimizerSpec, weight: nn.Parameter, steps: int, gradients: Any = None, **options: Any) -> Tensor:
    """The weight after so many steps. gradients: of a step's number; of ones by default."""
    optimizer = spec.build(spec.options.model_validate({**table(spec), **options}), [group(("w", weight))])
    for number in range(steps):
        weight.grad = torch.ones_like(weight) if gradients is None else gradients(number).to(weight.dtype)
        optimizer.step()
    return weight.detach().double()


@pytest.mark.parametrize("spec", [spec for spec in HERE if spec.name != "prodigy"], ids=lambda spec: spec.name)
def test_bf16_weights_move_at_a_rate_of_1e_4_where_an_optimizer_says_so_and_nowhere_else(spec: OptimizerSpec) -> None:
    """Of 200 steps down a slope of one the way in bf16, of that in fp32. Weights lie between 0.5 and 1.5."""
    way = {
        dtype: float((weights(dtype).detach().double() - stepped(spec, weights(dtype), 200, lr=1e-4)).mean())
        for dtype in (torch.float32, torch.bfloat16)
    }
    share = way[torch.bfloat16] / way[torch.float32]
    if "bf16" in spec.moves:
        assert 0.8 < share < 1.25
    else:
        assert share < 0.5


@pytest.mark.parametrize("spec", [spec for spec in HERE if "bf16" in spec.moves], ids=lambda spec: spec.name)
def test_weight_decay_of_bf16_weights_is_not_lost(spec: OptimizerSpec) -> None:
    """lr x weight_decay is 2e-5, of which nothing is left of 1 - 2e-5 in bf16. Without a slope, decay alone moves the weights."""
    if spec.name == "optimi-adam":
        pytest.skip("its decay is a slope")
    options = {"lr": 1e-4, "weight_decay": 0.2}
    start = weights(torch.bfloat16).detach().double()
    end = stepped(spec, weights(torch.bfloat16), 300, lambda _: torch.zeros(4096), **options)
    wanted = start * (1 - 2e-5) ** 300
    assert float((start - end).sum() / (start - wanted).sum()) == pytest.approx(1.0, abs=0.1)


def adamw_reference(
    start: Tensor, slopes: list[Tensor], lr: float, decay: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """Algorithm 2 of arXiv 1711.05101 in float64."""
    weight, mean, square = start.double(), torch.zeros(start.shape).double(), torch.zeros(start.shape).double()
    for step, slope in enumerate(slopes, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * slope.double()
        square = betas[1] * square + (1 - betas[1]) * slope.double() ** 2
        update = (mean / (1 - betas[0] ** step)) / ((square / (1 - betas[1] ** step)).sqrt() + eps)
        weight = weight - lr * decay * weight - lr * update
    return weight


def slopes(steps: int, size: int = 4096) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) + 0.5 for _ in range(steps)]


@pytest.mark.parametrize("name", ["optimi-adamw", "adamw_bf16"])
def test_fp32_weights_follow_the_papers_adamw(name: str) -> None:
    given = slopes(30)
    options = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    found = stepped(SPECS[name], weights(), 30, given.__getitem__, **options)
    wanted = adamw_reference(weights().detach(), given, 1e-3, 0.1, (0.9, 0.99), 1e-8)
    assert float((found - wanted).abs().max()) < 2e-6


@pytest.mark.parametrize("name", ["optimi-adamw", "adamw_bf16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_weights_follow_the_papers_adamw_on_average(name: str, seed: int) -> None:
    """300 steps at a rate of which one step is lost in rounding; the mean over 4,096 weights, whose own errors are chance's."""
    given = [each.to(torch.bfloat16) for each in slopes(300)]
    options = {"lr": 1e-4, "weight_decay": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    options |= {"seed": seed} if name == "adamw_bf16" else {}
    start = weights(torch.bfloat16, seed=seed)
    wanted = start.detach().double() - adamw_reference(start.detach(), given, 1e-4, 0.01, (0.9, 0.99), 1e-8)
    way = start.detach().double() - stepped(SPECS[name], start, 300, given.__getitem__, **options)
    assert float(way.mean() / wanted.mean()) == pytest.approx(1.0, abs=0.1)


def test_stochastic_rounding_is_right_on_average_and_leaves_what_bf16_holds() -> None:
    from vtrain_builtin.torch_optimizers import rounded

    below, above = (
        torch.tensor(1.0),
        torch.tensor(1.0).to(torch.bfloat16).nextafter(torch.tensor(2.0).to(torch.bfloat16)),
    )
    for share in (0.1, 0.5, 0.9):
        value = torch.full((100_000,), float(below + share * (above.float() - below)))
        chance = torch.randint(
            -(2**15), 2**15, value.shape, dtype=torch.int16, generator=torch.Generator().manual_seed(3)
        )
        for sign in (1.0, -1.0):
            found = rounded(sign * value, chance)
            assert set(found.tolist()) == {sign * 1.0, sign * float(above)}
            assert float((found.abs() > 1).float().mean()) == pytest.approx(share, abs=0.01)
    # 0x7fffffff is the NaN of CUDA's arithmetic: noise added to its bits would make a number of it.
    kept = torch.tensor([0.0, 1.5, -3.0, float("inf"), -float("inf"), float("nan")])
    kept = torch.cat([kept, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    found = rounded(kept, torch.full((7,), -1, dtype=torch.int16))
    assert torch.equal(found.nan_to_num(7.0), kept.nan_to_num(7.0))
    assert bool(found[5:].isnan().all())


def test_stochastic_rounding_is_a_function_of_seed_step_and_name() -> None:
    def end(name: str = "w", **options: Any) -> Tensor:
        weight = weights(torch.bfloat16)
        spec = SPECS["adamw_bf16"]
        optimizer = spec.build(spec.options.model_validate({"lr": 1e-4, **options}), [group((name, weight))])
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach().clone()

    assert torch.equal(end(), end())
    assert not torch.equal(end(), end(seed=1))
    assert not torch.equal(end(), end("v"))


def test_a_weight_of_many_pieces_and_one_that_is_channels_last_are_moved_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtrain_builtin import torch_optimizers

    monkeypatch.setattr(torch_optimizers, "AT_ONCE", 100)
    spec = SPECS["adamw_bf16"]
    plain = nn.Parameter(torch.ones(8, 6, 3, 3, dtype=torch.bfloat16))
    other = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    sign = torch.where(torch.arange(432).view(8, 6, 3, 3) % 5 == 0, 1.0, -1.0)
    optimizer = spec.build(spec.options.model_validate({"lr": 0.125}), [group(("a", plain), ("b", other), decay=False)])
    for weight in (plain, other):
        weight.grad = sign.to(torch.bfloat16)
    optimizer.step()
    wanted = 1 - 0.125 * sign
    for weight in (plain, other):
        assert torch.allclose(weight.detach().float(), wanted, atol=0.01)


def test_muon_takes_matrices_and_kernels_and_adamw_the_rest() -> None:
    shapes = {
        "blocks.0.attn1.to_q.weight": (8, 12),
        "blocks.0.ff.conv_inverted.weight": (16, 8, 1, 1),
        "blocks.0.ff.conv_temp.weight": (8, 8, 3, 1),
        "blocks.0.ff.conv_depth.weight": (16, 1, 3, 3),
        "patch_embedding.weight": (8, 4, 1, 2, 2),
        "proj_out.weight": (16, 8),
    }
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    table_of_vectors = ("blocks.0.scale_shift_table", nn.Parameter(torch.ones(6, 8)))
    spec = SPECS["muon"]
    optimizer = spec.build(
        spec.options.model_validate({"lr": 1e-3}), [group(*named), group(table_of_vectors, decay=False)]
    )
    for _, weight in (*named, table_of_vectors):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    muon = [name for name, weight in (*named, table_of_vectors) if "momentum_buffer" in optimizer.state[weight]]
    assert muon == list(shapes)[:3]
    assert all(
        "exp_avg_sq" in optimizer.state[weight] for name, weight in (*named, table_of_vectors) if name not in muon
    )


def test_muon_is_torchs_own_for_matrices_and_for_kernels_as_matrices() -> None:
    spec = SPECS["muon"]
    drawn = torch.randn(6, 8, 3, 1, generator=torch.Generator().manual_seed(0))
    kernel, matrix, own = nn.Parameter(drawn.clone()), *(nn.Parameter(drawn.flatten(1).clone()) for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = spec.build(spec.options.model_validate(options), [group(("kernel", kernel), ("matrix", matrix))])
    theirs = torch.optim.Muon([own], **options, adjust_lr_fn="match_rms_adamw")
    for number in range(5):
        slope = torch.randn(6, 24, generator=torch.Generator().manual_seed(number + 1))
        kernel.grad, matrix.grad, own.grad = slope.view(6, 8, 3, 1).clone(), slope.clone(), slope.clone()
        ours.step()
        theirs.step()
    assert torch.equal(matrix, own)
    assert torch.equal(kernel.flatten(1), own)


def test_the_average_of_schedule_free_is_the_librarys_and_training_keeps_its_bits() -> None:
    spec, weight = SPECS["schedulefree-adamw"], weights()
    named = [("w", weight), ("still", nn.Parameter(torch.ones(3)))]
    optimizer: Any = spec.build(spec.options.model_validate({"lr": 1e-2}), [group(*named)])
    assert torch.equal(optimizer.eval_weight(weight), weight)
    for slope in slopes(20):
        weight.grad = slope.clone()
        optimizer.step()
    before = weight.detach().clone()
    found = optimizer.eval_weight(weight)
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.eval_weight(named[1][1]), torch.ones(3))  # which never had a gradient
    optimizer.eval()  # the library's own, which writes it over the weights
    assert torch.equal(weight.detach(), found)
    assert not torch.equal(found, before)


def test_prodigy_is_the_librarys_and_groups_of_another_rate_find_a_d_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from prodigyopt import Prodigy

    spec, one, two, other = SPECS["prodigy"], weights(), weights(), weights(seed=5)
    options = {"weight_decay": 0.01, "bias_correction": True, "d0": 1e-4}
    ours = spec.build(spec.options.model_validate(options), [group(("w", one)), group(("o", other), lr_factor=0.5)])
    assert capsys.readouterr().out == ""
    theirs = Prodigy([two], weight_decay=0.01, use_bias_correction=True, d0=1e-4)
    for slope in slopes(30):
        one.grad, two.grad, other.grad = slope.clone(), slope.clone(), 10 * slope
        ours.step()
        theirs.step()
    assert torch.equal(one, two)
    ds = [group["d"] for group in ours.param_groups]
    assert ds[0] == theirs.param_groups[0]["d"] > 1e-4
    assert ds[1] > 1e-4


def test_every_optimizer_names_its_library_for_pip_where_it_has_one() -> None:
    from importlib.metadata import metadata

    extras = set(metadata("vtrain").get_all("Provides-Extra") or ())
    assert {"optimizers", "bitsandbytes"} <= extras
    for spec in SPECS.values():
        if spec.library is not None:
            assert spec.library[1].startswith("vtrain[")
