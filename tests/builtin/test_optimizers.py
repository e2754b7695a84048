"""The built-in optimizers on the conformance kit, each against something that is not ours, and with bf16 weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain.contract import OptimizedRun, OptimizerSpec, ParameterGroup
from vtrain.contract.options import resume_rule
from vtrain.contract.run_rules import built_groups
from vtrain.testing import OptimizerTests, SpecTests
from vtrain.testing.optimizer import Trained, restore, saved
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


SPLIT = [spec for spec in HERE if spec.name.startswith("optimi-") and "bf16" in spec.moves]


def exact(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    """What a bf16 weight and the bits beside it stand for."""
    from vtrain_builtin.split_weights import REST, joined

    return joined(weight.detach(), optimizer.state[weight][REST])


@pytest.mark.parametrize("spec", SPLIT, ids=lambda spec: spec.name)
@pytest.mark.parametrize("lr", [1e-4, 1e-5, 1e-6])
def test_bf16_weights_and_the_bits_beside_them_go_where_fp32_weights_go(spec: OptimizerSpec, lr: float) -> None:
    """Gradients that bf16 holds; the moments differ, as they are bf16. A bf16 weight is the nearest to what it stands for."""
    low, high = weights(torch.bfloat16), nn.Parameter(weights(torch.bfloat16).detach().float())
    start = high.detach().double()
    options = spec.options.model_validate({"lr": lr, "weight_decay": 0.0})
    ours, theirs = (spec.build(options, [group(("w", each))]) for each in (low, high))
    for slope in slopes(100):
        low.grad, high.grad = slope.to(torch.bfloat16), slope.to(torch.bfloat16).float()
        ours.step()
        theirs.step()
    found, wanted = start - exact(ours, low).double(), start - high.detach().double()
    assert float(found.mean() / wanted.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(exact(ours, low).to(torch.bfloat16), low.detach())


@pytest.mark.parametrize(("lr", "decay"), [(1e-4, 0.01), (1e-3, 0.01), (1e-4, 0.1), (1e-6, 0.1)])
def test_bf16_weights_decay_as_they_should_at_usual_rates(lr: float, decay: float) -> None:
    """Without a slope 1,000 steps scale them by (1 - lr x weight_decay)^1000; the first is the default of optimi-adamw."""
    spec, weight = SPECS["optimi-adamw"], weights(torch.bfloat16, size=256)
    start = weight.detach().double()
    optimizer = spec.build(spec.options.model_validate({"lr": lr, "weight_decay": decay}), [group(("w", weight))])
    for _ in range(1000):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    shrunk = float(1 - exact(optimizer, weight).double().sum() / start.sum())
    # 1 - lr x weight_decay itself is a number of fp32, 6e-8 from the next.
    assert shrunk == pytest.approx(1 - (1 - lr * decay) ** 1000, rel=0.05, abs=6e-8 * 1000)


def test_a_weight_is_taken_apart_and_joined_again() -> None:
    from vtrain_builtin.split_weights import joined, take_apart

    drawn = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    value = drawn.to(torch.int32).view(torch.float32)
    odd = [0.0, -0.0, 1.0, 3.4e38, -3.4e38, float("inf"), -float("inf"), float("nan"), 1e-42]
    nan_of_cuda = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    value = torch.cat([value, torch.tensor(odd), nan_of_cuda])
    low, rest = torch.empty_like(value, dtype=torch.bfloat16), torch.empty_like(value, dtype=torch.int16)
    take_apart(value, low, rest)
    again = joined(low, rest)
    assert torch.equal(low.nan_to_num(7.0), value.to(torch.bfloat16).nan_to_num(7.0))
    assert torch.equal(again.isnan(), value.isnan())
    there = ~value.isnan()
    off = value.view(torch.int32)[there].long() - again.view(torch.int32)[there].long()
    assert set(off.tolist()) <= {0, 1}  # 1 where it lies half way up from an even neighbour
    assert float((off != 0).float().mean()) < 1e-4


def test_pieces_of_a_bf16_weight_are_moved_as_the_whole_is_and_one_of_channels_last_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vtrain_builtin import torch_optimizers

    slope = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for spec in SPLIT:
        ends = []
        for at_once, order in (
            (10_000, torch.contiguous_format),
            (100, torch.contiguous_format),
            (100, torch.channels_last),
        ):
            monkeypatch.setattr(torch_optimizers, "AT_ONCE", at_once)
            weight = nn.Parameter(torch.ones(8, 6, 3, 3, dtype=torch.bfloat16).to(memory_format=order))
            optimizer = spec.build(spec.options.model_validate({"lr": 0.01}), [group(("w", weight))])
            for number in range(3):
                weight.grad = slope * (number + 1)
                optimizer.step()
            ends.append(exact(optimizer, weight))
            count = optimizer.param_groups[0].get("step")
            assert count is None or int(count) == 3, "each piece counted"
        assert all(torch.allclose(each, ends[0], rtol=1e-6) for each in ends[1:]), spec.name


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


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (spec, dtype)
        for spec in HERE
        for dtype in (torch.float32, torch.bfloat16)
        if dtype is torch.float32 or "bf16" in spec.moves
    ],
    ids=lambda each: getattr(each, "name", str(each)),
)
def test_it_solves_least_squares(spec: OptimizerSpec, dtype: torch.dtype) -> None:
    """150 steps at a rate that falls to 0: of the loss at the start less than a hundredth is left."""
    generator = torch.Generator().manual_seed(0)
    inputs, matrix, bias = (torch.randn(size, generator=generator) for size in ((64, 8), (8, 6), (6,)))
    wanted = inputs @ matrix + bias
    own = nn.Parameter(torch.zeros(8, 6, dtype=dtype)), nn.Parameter(torch.zeros(6, dtype=dtype))
    options = spec.options.model_validate(
        {**table(spec), "lr": {"prodigy": 1.0, "muon": 0.5, "optimi-ranger": 0.5}.get(spec.name, 0.1)}
    )
    optimizer: Any = spec.build(options, [group(("w", own[0])), group(("b", own[1]), decay=False)])
    rates = [each["lr"] for each in optimizer.param_groups]

    def loss() -> Tensor:
        first, second = own
        return (inputs @ first.float() + second.float() - wanted).square().mean()

    start = float(loss().detach())
    for step in range(150):
        for each, rate in zip(optimizer.param_groups, rates, strict=True):
            each["lr"] = rate if spec.name == "schedulefree-adamw" else rate * (1 - step / 150)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    if hasattr(optimizer, "eval_weight"):
        for weight in own:
            weight.data = optimizer.eval_weight(weight)
    assert float(loss().detach()) < 0.01 * start


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


def test_where_the_average_is_searched_for_does_not_grow_with_the_weights() -> None:
    """A group's weights are not gone through again for each of them, which of 2,000 took 50 ms at each update of an average."""
    spec = SPECS["schedulefree-adamw"]
    named = [(f"w{number}", nn.Parameter(torch.ones(2))) for number in range(3)]
    optimizer: Any = spec.build(spec.options.model_validate({"lr": 1e-2}), [group(*named)])
    for _, weight in named:
        weight.grad = torch.ones_like(weight)
    optimizer.step()

    class Unread(list[nn.Parameter]):
        def __iter__(self) -> Any:
            raise AssertionError("the group's weights are searched")

    wanted = [optimizer.eval_weight(weight) for _, weight in named]
    optimizer.param_groups[0]["params"] = Unread(optimizer.param_groups[0]["params"])
    assert all(
        torch.equal(optimizer.eval_weight(weight), each) for (_, weight), each in zip(named, wanted, strict=True)
    )


def test_schedule_free_takes_no_weight_of_0_for_its_average() -> None:
    """Training weights are z then, from which x cannot be told: all that asks for the average would have z."""
    with pytest.raises(ValueError, match="greater than 0"):
        SPECS["schedulefree-adamw"].options.model_validate({"lr": 1e-3, "betas": [0.0, 0.999]})


OTHER: Mapping[str, Any] = {
    "lr": 2e-2, "betas": [0.5, 0.6], "eps": 1e-3, "weight_decay": 0.3, "seed": 5, "nesterov": False, "ns_steps": 2,
    "momentum": 0.0, "k": 2, "alpha": 0.1, "beta3": 0.5, "bias_correction": False, "safeguard_warmup": True, "d_coef": 2.0,
    "growth_rate": 1.02, "warmup_steps": 9, "r": 1.0, "weight_lr_power": 1.0, "adamw_modules": ["block"], "slice_p": 3, "d0": 1e-2,
    "min_8bit_size": 9,
}  # fmt: skip
"""Another value of each option that an optimizer has."""


@pytest.mark.parametrize("spec", HERE, ids=lambda spec: spec.name)
def test_a_state_goes_on_under_another_value_of_each_option_that_may_change(spec: OptimizerSpec) -> None:
    fields = spec.options.model_fields
    for name in (each for each in fields if resume_rule(spec.options, each) != "refuse"):
        other = OTHER[name] if spec.name != "optimi-adan" or name != "betas" else [0.5, 0.6, 0.7]
        for before, after in (({}, {name: other}), ({name: other}, {})):
            runs = []
            for change in (before, after):
                generator = torch.Generator().manual_seed(0)
                named = {
                    key: nn.Parameter(torch.rand(shape, generator=generator) + 0.5)
                    for key, shape in (("block.weight", (8, 6)), ("proj_out.weight", (6, 8)), ("block.bias", (5000,)))
                }
                options = spec.options.model_validate({**table(spec), **change})
                optimizer = spec.build(options, [group(*named.items())])
                runs.append(Trained(named, optimizer, built_groups(optimizer, fields)))
            runs[0].step(0)
            restore(runs[1], *saved(runs[0], spec))
            runs[1].step(1)
            assert all(value.isfinite().all() for value in runs[1].values().values()), name


def test_what_a_state_depends_on_is_refused_at_a_resume() -> None:
    assert resume_rule(SPECS["muon"].options, "adamw_modules") == "refuse"
    assert resume_rule(SPECS["optimi-sgd"].options, "momentum") == "refuse"


def test_a_decay_that_leaves_nothing_of_the_weights_is_pointed_out() -> None:
    run = OptimizedRun("constant", warms_up=False)

    def told(spec: OptimizerSpec, lr: float, decay: float) -> bool:
        assert spec.advice is not None
        texts = spec.advice(spec.options.model_validate({"lr": lr, "weight_decay": decay}), run)
        return any(
            f"lr x weight_decay is {lr * decay:g}, and a step scales weights by 1 less" in text for text in texts
        )

    scaled = {spec.name for spec in SPECS.values() if told(spec, 0.1, 10.0)}
    assert SPECS.keys() - scaled == {
        "optimi-adam",  # a slope
        "optimi-adan",  # which divides by 1 + lr x weight_decay
        "prodigy",  # whose rate is lr times what it finds
    }
    assert not [name for name in scaled if told(SPECS[name], 0.1, 9.0)]


def test_every_optimizer_names_its_library_for_pip_where_it_has_one() -> None:
    from importlib.metadata import metadata

    extras = set(metadata("vtrain").get_all("Provides-Extra") or ())
    assert {"optimizers", "bitsandbytes"} <= extras
    for spec in SPECS.values():
        if spec.library is not None:
            assert spec.library[1].startswith("vtrain[")
