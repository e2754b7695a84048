"""cache.latents: the mode, or mean and std with a fresh draw at each use."""

import pytest
import torch

from vtrain.contract import Latents
from vtrain.data.batches import Batches, drawn
from vtrain.data.caching.caches import fill_caches
from vtrain.data.scanning.scan import scan


def filled(setup, latents: str, **train):
    setup.cache_keys = {"latents": latents}
    plan = setup.plan(**train)
    return plan, fill_caches(plan, scan(plan).samples, (), "cpu", lambda *_: None)


@pytest.fixture
def two(setup, make_video):
    for k in range(2):
        setup.add(f"{k}.mp4", make_video(frames=27 + k, fps=24))
    return setup


def joined(*clips: Latents) -> Latents:
    std = None if clips[0].std is None else torch.cat([clip.std for clip in clips])
    return Latents(torch.cat([clip.mean for clip in clips]), std)


def clips(count: int) -> list[Latents]:
    random = torch.Generator().manual_seed(3)
    return [
        Latents(torch.randn((1, 4, 3, 8, 8), generator=random), torch.full((1, 4, 3, 8, 8), 0.5)) for _ in range(count)
    ]


def test_a_draw_has_the_mean_and_the_std_and_depends_on_seed_and_number_alone() -> None:
    a, b = clips(2)
    many = drawn(1, joined(*[a] * 4000), range(4000))
    torch.testing.assert_close(many.mean(0), a.mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(many.std(0), a.std[0], rtol=0.1, atol=0)
    assert torch.equal(drawn(1, joined(a, b), [7, 9]), torch.cat([drawn(1, a, [7]), drawn(1, b, [9])]))
    assert not torch.equal(drawn(1, a, [7]), drawn(1, a, [8]))
    assert not torch.equal(drawn(1, a, [7]), drawn(2, a, [7]))
    noise = (drawn(1, a, [7]) - a.mean) / 0.5
    torch.testing.assert_close(noise, (drawn(1, b, [7]) - b.mean) / 0.5, rtol=1e-4, atol=1e-5)


def test_without_std_clips_are_as_they_are_cached() -> None:
    a, b = (Latents(clip.mean) for clip in clips(2))
    assert torch.equal(drawn(1, joined(a, b), [7, 9]), torch.cat([a.mean, b.mean]))


def test_batches_draw_anew_at_each_use_where_mean_and_std_are_cached(two) -> None:
    plan, mode = filled(two, "mode", batch_size=2)
    modes = Batches(plan, mode.caches, mode.index)
    assert torch.equal(modes[0].latents.mean.sum(0), modes[1].latents.mean.sum(0))
    plan, sample = filled(two, "sample", batch_size=2)
    draws = Batches(plan, sample.caches, sample.index)
    assert not torch.equal(draws[0].latents.mean.sum(0), draws[1].latents.mean.sum(0))
    assert torch.equal(draws[1].latents.mean, draws[1].latents.mean)
    off = (draws[1].latents.mean - modes[1].latents.mean) / ((modes[1].latents.mean + 2) / 10)
    assert off.std().item() == pytest.approx(1, abs=0.05)
    assert draws[0].latents.std is None


def test_mean_and_std_are_entries_of_their_own_so_that_changing_back_encodes_nothing(two) -> None:
    for latents, expected in (("mode", 2), ("sample", 4), ("mode", 4), ("sample", 4)):
        filled(two, latents)
        assert two.family.clips == expected
