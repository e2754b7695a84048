"""CREPA's loss equals its paper's equation, and every token of every frame counts in it."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vtrain.contract import Condition, NoiseLevel, RunLength, StepView, Text
from vtrain_sanavideo.crepa_loss import CrepaLoss, align, on_tokens, projector
from vtrain_sanavideo.crepa_options import CrepaOptions

RUN = RunLength(steps=100, per_epoch=10.0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def options(**values: object) -> CrepaOptions:
    return CrepaOptions.model_validate({"block": 2, **values})


def loss_of(given: CrepaOptions, width: int, features: int) -> CrepaLoss:
    torch.manual_seed(0)
    return CrepaLoss(given, width, features)


def view_of(tap: Tensor, features: Tensor | None, step: int = 0, run: RunLength = RUN) -> StepView:
    """A step in which nothing but the tap and the features counts."""
    none = torch.zeros(tap.shape[0], 1, tap.shape[1], 1, 1)
    level = NoiseLevel(torch.zeros(tap.shape[0]), torch.zeros(tap.shape[0]))
    condition = Condition(Text.of(torch.zeros(tap.shape[0], 1, 1), torch.ones(tap.shape[0], 1, dtype=torch.bool)))
    return StepView(none, none, none, none, none, level, condition, {2: tap}, step, run, features=features)


def cosine(first: Tensor, second: Tensor) -> float:
    return float(first @ second) / math.sqrt(float(first @ first) * float(second @ second))


def equation(y: Tensor, h: Tensor, d: int, tau: float, cumulative: bool) -> tuple[float, float, float]:
    """arXiv 2506.09229, by hand: L_align, the mean of sim(y_f, h_f), the mean of sim(y_k, h_f) as K weighs it."""
    clips, frames, high, wide, _ = y.shape
    total = own = beside = weights = 0.0
    for b in range(clips):
        for f in range(frames):
            for i in range(high):
                for j in range(wide):
                    same = cosine(y[b, f, i, j], h[b, f, i, j])
                    own, total = own + same, total + same
                    reached = range(1, d + 1) if cumulative else [d] if d else []
                    for k in [f - r for r in reached] + [f + r for r in reached]:
                        if 0 <= k < frames:
                            weight = math.exp(-abs(k - f) / tau)
                            other = cosine(y[b, k, i, j], h[b, f, i, j])
                            total += weight * other
                            beside, weights = beside + weight * other, weights + weight
    count = clips * frames * high * wide
    return -total / count, own / count, beside / weights if weights else 0.0


SHAPES = [(2, 5, 2, 3), (1, 1, 3, 2), (3, 4, 1, 1), (1, 2, 2, 2), (2, 7, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("d", [0, 1, 2, 3])
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("cumulative", [False, True], ids=["at d", "up to d"])
def test_the_alignment_equals_the_papers_equation_in_float64(
    shape: tuple[int, ...], d: int, tau: float, cumulative: bool
) -> None:
    y, h = drawn(*shape, 6, seed=1), drawn(*shape, 6, seed=2)
    found = align(y, h, range(1 if cumulative else max(d, 1), d + 1), tau)
    wanted = equation(y, h, d, tau, cumulative)
    assert [float(value) for value in (found.loss, found.similarity, found.neighbours)] == pytest.approx(
        wanted, rel=1e-12, abs=1e-12
    )


def test_a_masked_clip_is_aligned_where_its_mask_is_white_and_counts_as_any_other() -> None:
    """The mask is of latents, two a token each way. The first clip trains left, the second whole, the third one frame."""
    y, h = drawn(3, 4, 2, 6, 5, seed=5), drawn(3, 4, 2, 6, 5, seed=6).requires_grad_()
    mask = torch.ones(3, 4, 4, 12, dtype=torch.float64)
    mask[0, :, :, 4:] = 0
    mask[2, [0, 1, 3]] = 0
    found = align(y, h, [1], 1.0, mask)
    left = equation(y[:1, :, :, :2], h[:1, :, :, :2].detach(), 1, 1.0, False)
    whole = equation(y[1:2], h[1:2].detach(), 1, 1.0, False)
    cosines = torch.cosine_similarity(
        y[2, 1:], h[2, 2].detach().expand(3, -1, -1, -1), dim=-1
    )  # of frame 2 with frames 1, 2 and 3
    alone = cosines[1].mean(), math.exp(-1) * (cosines[0] + cosines[2]).mean()
    assert float(found.loss.detach()) == pytest.approx((left[0] + whole[0] - float(sum(alone))) / 3, rel=1e-12)
    assert float(found.similarity.detach()) == pytest.approx((left[1] + whole[1] + float(alone[0])) / 3, rel=1e-12)
    found.loss.backward()
    assert h.grad is not None
    assert h.grad[0, :, :, :2].any(-1).all()
    assert not h.grad[0, :, :, 2:].any()
    assert not h.grad[2, [0, 1, 3]].any()


def test_a_mask_that_leaves_no_frame_with_a_neighbour_breaks_no_number() -> None:
    mask = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    mask[:, 1] = 1
    found = align(drawn(1, 3, 1, 1, 5, seed=7), drawn(1, 3, 1, 1, 5, seed=8), [2], 1.0, mask)
    assert float(found.neighbours) == 0
    assert float(found.loss) == pytest.approx(-float(found.similarity))


def plain(y: Tensor, h: Tensor, reach: list[int], tau: float, mask: Tensor | None) -> Tensor:
    """The same equation as plain autograd differentiates it, all frames at once. mask: (B, f, h, w) of tokens."""
    weights = torch.ones_like(h[..., 0]) if mask is None else mask
    pulls = torch.cosine_similarity(y, h, dim=-1)
    for r in reach:
        beside = (
            torch.cosine_similarity(y[:, r:], h[:, :-r], dim=-1),
            torch.cosine_similarity(y[:, :-r], h[:, r:], dim=-1),
        )
        pulls[:, :-r] += math.exp(-r / tau) * beside[0]
        pulls[:, r:] += math.exp(-r / tau) * beside[1]
    return -((pulls * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))).mean()


@pytest.mark.parametrize("at_once", [1, 24, 4096], ids=["a frame", "two frames", "all frames"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("reach", [[], [1], [1, 2], [3]], ids=str)
def test_gradients_made_some_frames_at_a_time_are_those_of_the_equation(
    monkeypatch: pytest.MonkeyPatch, at_once: int, masked: bool, reach: list[int]
) -> None:
    """Of the hidden states and of each of the projector's weights, added up over two micro-batches."""
    monkeypatch.setattr("vtrain_sanavideo.crepa_loss.AT_ONCE", at_once)
    torch.manual_seed(0)
    project = projector(options().projector, 8, 6).double()
    micro_batches = [
        (drawn(2, 5, 2, 3, 6, seed=n), drawn(2, 5, 2, 3, 8, seed=n + 9).requires_grad_()) for n in range(2)
    ]
    mask = (drawn(2, 5, 2, 3, seed=4) > 0).double() if masked else None

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [*project.parameters(), *(tap for _, tap in micro_batches)]
        for leaf in leaves:
            leaf.grad = None
        for y, tap in micro_batches:
            (0.3 * loss(y, tap)).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    found = gradients(lambda y, tap: align(y, tap, reach, 1.5, mask, project).loss)
    wanted = gradients(lambda y, tap: plain(y, project(tap), reach, 1.5, mask))
    assert len(found) == len(wanted) == 6
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


def test_the_gradient_is_taken_once_and_a_second_time_is_an_error() -> None:
    tap = drawn(1, 3, 2, 2, 8).float().requires_grad_()
    value = loss_of(options(), 8, 6)(view_of(tap, drawn(1, 3, 2, 2, 6, seed=1).float())).value
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        value.backward()


@pytest.mark.parametrize("square", [4, 9])
def test_frames_aligned_one_at_a_time_see_the_same_resampled_neighbours(
    monkeypatch: pytest.MonkeyPatch, square: int
) -> None:
    given = options(size=56, adjacent_distance=2, cumulative_neighbors=True)
    module = loss_of(given, 8, 6)
    view = view_of(drawn(2, 5, 3, 4, 8).float(), drawn(2, 5, square, square, 6, seed=1).float())
    with torch.no_grad():
        whole = module(view)
        monkeypatch.setattr("vtrain_sanavideo.crepa_loss.AT_ONCE", 1)
        one_at_a_time = module(view)
    assert float(one_at_a_time.value) == pytest.approx(float(whole.value), rel=1e-6)
    assert {name: float(value) for name, value in one_at_a_time.metrics.items()} == pytest.approx(
        {name: float(value) for name, value in whole.metrics.items()}, rel=1e-5
    )


@pytest.mark.parametrize(("d", "cumulative"), [(1, False), (2, True), (3, False)])
def test_the_module_is_the_equation_on_projected_hidden_states(d: int, cumulative: bool) -> None:
    given = options(weight=0.7, adjacent_distance=d, cumulative_neighbors=cumulative, temporal_decay=1.5)
    module = loss_of(given, 10, 6)
    tap, y = drawn(2, 5, 2, 3, 10, seed=3), drawn(2, 5, 2, 3, 6, seed=4)
    with torch.no_grad():
        h = copy.deepcopy(module.projector).double()(tap)
    loss, own, beside = equation(y, h, d, 1.5, cumulative)
    term = module(view_of(tap.float(), y.float()))
    assert float(term.value.detach()) == pytest.approx(0.7 * loss, rel=1e-5)
    assert {name: float(value) for name, value in term.metrics.items()} == pytest.approx(
        {"alignment_loss": loss, "similarity": own, "neighbour_similarity": beside, "weight": 0.7}, rel=1e-4, abs=1e-6
    )


def test_the_projector_is_in_fp32_under_autocast_too() -> None:
    module = loss_of(options(), 8, 6)
    tap, y = drawn(1, 3, 2, 2, 8).bfloat16(), drawn(1, 3, 2, 2, 6, seed=1).bfloat16()
    plain = module(view_of(tap, y)).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(view_of(tap, y)).value, plain)
    assert plain.dtype == torch.float32
    with torch.no_grad():
        h = copy.deepcopy(module.projector).double()(tap.double())
    assert float(plain.detach()) == pytest.approx(0.5 * equation(y.double(), h, 1, 1.0, False)[0], rel=1e-5)


def test_a_frame_at_an_end_has_one_neighbour() -> None:
    """All cosines are 1, so that only the number of neighbours shows: 1, 2, 2, 1."""
    same = torch.ones(1, 4, 1, 1, 3, dtype=torch.float64)
    found = align(same, same, [1], 2.0)
    assert float(found.loss) == pytest.approx(-(4 + 6 * math.exp(-0.5)) / 4, rel=1e-12)
    assert float(found.neighbours) == pytest.approx(1.0, rel=1e-12)


def test_a_small_tau_leaves_the_neighbours_cosine_readable() -> None:
    same = torch.ones(1, 4, 1, 1, 3)
    found = align(same, same, [1, 2], 0.005)
    assert float(found.neighbours) == pytest.approx(1.0, rel=1e-5)
    assert float(found.loss) == pytest.approx(-1.0, rel=1e-6)


def test_a_clip_of_one_frame_has_no_neighbours() -> None:
    y, h = drawn(2, 1, 2, 2, 5), drawn(2, 1, 2, 2, 5, seed=1)
    found = align(y, h, [1], 1.0)
    assert float(found.loss) == -float(found.similarity) != 0
    assert float(found.neighbours) == 0


def test_tokens_in_other_places_give_another_loss() -> None:
    y, h = drawn(2, 4, 3, 5, 8), drawn(2, 4, 3, 5, 8, seed=1)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    moved = [value.flatten(2, 3)[:, :, order].unflatten(2, (3, 5)) for value in (y, h)]
    plain = align(y, h, [1], 1.0).loss
    assert abs(float(align(moved[0], h, [1], 1.0).loss - plain)) > 1e-3
    assert float(align(moved[0], moved[1], [1], 1.0).loss) == pytest.approx(float(plain), rel=1e-12)


def test_frames_in_another_order_give_another_loss() -> None:
    y, h = drawn(1, 5, 2, 2, 8), drawn(1, 5, 2, 2, 8, seed=1)
    order = torch.tensor([1, 0, 3, 2, 4])
    assert abs(float(align(y[:, order], h[:, order], [1], 1.0).loss - align(y, h, [1], 1.0).loss)) > 1e-3


def test_the_gradient_reaches_every_token_of_every_frame() -> None:
    module = loss_of(options(), 8, 6)
    tap = drawn(2, 4, 3, 5, 8).float().requires_grad_()
    module(view_of(tap, drawn(2, 4, 3, 5, 6, seed=1).float())).value.backward()
    assert tap.grad is not None
    assert bool((tap.grad.norm(dim=-1) > 1e-7).all())


def test_every_frame_is_pulled_to_its_neighbours_features() -> None:
    """The gradient of frame f depends on y of f - 1, f and f + 1 alone."""
    module = loss_of(options(), 8, 6)
    y = drawn(1, 5, 1, 1, 6, seed=1).float()

    def gradient(features: Tensor) -> Tensor:
        tap = drawn(1, 5, 1, 1, 8).float().requires_grad_()
        module(view_of(tap, features)).value.backward()
        assert tap.grad is not None
        return tap.grad[0, :, 0, 0]

    plain = gradient(y)
    for k in range(5):
        other = y.clone()
        other[:, k] = drawn(1, 1, 1, 6, seed=9).float()
        changed = [bool((row.abs() > 1e-9).any()) for row in gradient(other) - plain]
        assert changed == [abs(f - k) <= 1 for f in range(5)]


def test_a_zero_vector_has_no_direction_and_breaks_nothing() -> None:
    y, h = drawn(1, 2, 1, 2, 4).float(), drawn(1, 2, 1, 2, 4, seed=1).float()
    y[0, 0, 0, 0] = 0
    h[0, 1, 0, 1] = 0
    h.requires_grad_()
    loss = align(y, h, [1], 1.0).loss
    loss.backward()
    assert loss.isfinite()
    assert h.grad is not None
    assert h.grad.isfinite().all()


@pytest.mark.parametrize(("high", "wide"), [(30, 52), (52, 30), (33, 48), (5, 8), (8, 5)])
@pytest.mark.parametrize("square", [37, 16, 60])
def test_half_a_square_of_features_lands_on_that_half_of_the_tokens(high: int, wide: int, square: int) -> None:
    """Left and top, on frames that are no squares, whether features are more or fewer than tokens."""
    for axis in (2, 3):
        features = torch.zeros(2, 3, square, square, 2)
        features[..., 1] = 1
        half = features.narrow(axis, 0, square // 2)
        half[..., 0], half[..., 1] = 1, 0
        tokens = on_tokens(features, high, wide)
        assert tokens.shape == (2, 3, high, wide, 2)
        length = tokens.shape[axis]
        cut = length * (square // 2) / square
        first = tokens[..., 0].mean(dim=[d for d in range(4) if d != axis])
        reach = 1 + length / square
        for place in range(length):
            if place + 1 < cut - reach:
                assert float(first[place]) == pytest.approx(1, abs=1e-5)
            elif place > cut + reach:
                assert float(first[place]) == pytest.approx(0, abs=1e-5)
        assert float(first.sum()) == pytest.approx(cut, abs=0.51)


def test_features_of_the_tokens_own_grid_are_not_touched() -> None:
    features = drawn(2, 3, 5, 8, 4).bfloat16()
    assert torch.equal(on_tokens(features, 5, 8), features.float())


def test_a_plane_of_features_is_resampled_to_its_values_at_the_tokens_centres() -> None:
    """Linear in place, so that bilinear resampling is exact away from the border: 4 x 6 features on 8 x 12 tokens."""
    rows, columns = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(6) + 0.5) / 6, indexing="ij")
    tokens = on_tokens(torch.stack([rows, columns], -1)[None, None], 8, 12)[0, 0]
    assert torch.allclose(tokens[1:-1, 0, 0], (torch.arange(8)[1:-1] + 0.5) / 8, atol=1e-6)
    assert torch.allclose(tokens[0, 1:-1, 1], (torch.arange(12)[1:-1] + 0.5) / 12, atol=1e-6)


@pytest.mark.parametrize(
    "features",
    [None, torch.zeros(2, 3, 2, 2), torch.zeros(2, 2, 2, 2, 6), torch.zeros(1, 3, 2, 2, 6), torch.zeros(2, 3, 2, 2, 7)],
    ids=["none", "no grid", "other frames", "other clips", "other width"],
)
def test_features_of_other_clips_frames_or_width_are_refused(features: Tensor | None) -> None:
    with pytest.raises(ValueError, match="features"):
        loss_of(options(), 8, 6)(view_of(drawn(2, 3, 2, 2, 8).float(), features))


@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        ({}, [(10, 10), (6, 10)]),
        ({"layers": 3}, [(10, 10), (10, 10), (6, 10)]),
        ({"layers": 1}, [(6, 10)]),
        ({"layers": 2, "hidden": 4}, [(4, 10), (6, 4)]),
    ],
)
def test_the_projector_has_the_documented_shape(given: dict[str, int], shapes: list[tuple[int, int]]) -> None:
    module = loss_of(options(projector=given), 10, 6)
    assert [tuple(value.shape) for name, value in module.named_parameters() if name.endswith("weight")] == shapes
    assert all(value.dtype == torch.float32 for value in module.parameters())
    assert tuple(next(loss_of(options(), 1100, 6).parameters()).shape) == (1024, 1100)
    kinds = [type(layer).__name__ for layer in module.projector]
    assert kinds == ["Linear", *["SiLU", "Linear"] * (len(shapes) - 1)]


def test_buckets_of_different_shape_go_through_one_module() -> None:
    module = loss_of(options(size=56), 8, 6)
    for frames, high, wide in ((5, 2, 3), (1, 3, 2), (3, 4, 4)):
        view = view_of(drawn(2, frames, high, wide, 8).float(), drawn(2, frames, 4, 4, 6, seed=1).float())
        term = module(view)
        assert term.value.isfinite()
        assert not torch.equal(term.value, module(replace(view, features=drawn(2, frames, 4, 4, 6).float())).value)
