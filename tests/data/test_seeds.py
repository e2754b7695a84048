"""The one place where randomness starts."""

import hashlib
import statistics

import torch

from vtrain.data.seeds import chance, derive, generator


def test_a_derived_seed_is_the_top_63_bits_of_blake2b_of_its_text() -> None:
    digest = hashlib.blake2b(b"7/noise/3/4", digest_size=8).digest()
    assert derive(7, "noise", 3, 4) == int.from_bytes(digest, "big") >> 1


def test_seed_purpose_and_each_number_all_matter() -> None:
    seeds = {derive(*a) for a in [(1, "a"), (2, "a"), (1, "b"), (1, "a", 0), (1, "a", 1), (1, "a", 1, 0), (1, "a", 10)]}
    assert len(seeds) == 7


def test_derived_seeds_fit_torch_and_give_the_same_noise_each_time() -> None:
    first = torch.randn(5, generator=generator(2**62, "noise", 10**12))
    second = torch.randn(5, generator=generator(2**62, "noise", 10**12))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(5, generator=generator(2**62, "noise", 10**12 + 1)))


def test_chances_are_uniform_in_zero_to_one() -> None:
    draws = [chance(5, "caption_dropout", n) for n in range(4000)]
    assert min(draws) >= 0
    assert max(draws) < 1
    assert abs(statistics.mean(draws) - 0.5) < 0.02  # standard error 0.0046
    assert abs(sum(d < 0.1 for d in draws) / 4000 - 0.1) < 0.02
