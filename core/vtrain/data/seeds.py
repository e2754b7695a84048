"""Where all randomness of a run starts: a seed, a purpose and numbers make another seed, and nothing else does."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_BITS = 63
_SEEDS = 1 << SEED_BITS


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A seed in [0, 2**63), a pure function of its arguments (BLAKE2b of their text, the same on every machine).

    purpose: what it is for ("order", "noise"), so that two uses of one draw number are independent.
    """
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - SEED_BITS)


def chance(seed: int, purpose: str, *numbers: int) -> float:
    """A number in [0, 1), uniform over the seeds, as `derive` makes them."""
    return derive(seed, purpose, *numbers) / _SEEDS


def choice(seed: int, purpose: str, draw: int, count: int) -> int:
    """One of range(count) for a draw, all as likely. Nothing is derived where there is no choice."""
    # The remainder of one of 2**63: no choice is likelier than another by more than count / 2**63.
    return 0 if count == 1 else derive(seed, purpose, draw) % count


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that starts at `derive(seed, purpose, *numbers)`. Imports torch."""
    import torch

    return torch.Generator("cpu").manual_seed(derive(seed, purpose, *numbers))
