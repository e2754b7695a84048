"""Encoding the captions that are not in the cache yet."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby

import torch

from vtrain.contract import Caption, Filling, PluginError, Problem, Role, SupportsTruncation, Text, TextEncoder
from vtrain.data.caching.sharing import Claims, Peers, digest64, is_share, together_telling
from vtrain.data.caching.stores import Stores

AGAIN_S = 0.5
"""Seconds until one looks again for what another run is making."""

Texts = Iterable[tuple[Caption, Role]]


def fill_text(stores: Stores, texts: Texts, peers: Peers, device: str) -> Generator[Filling, None, int]:
    """Encode what is missing, each process its share; the encoder is opened only if something is.

    Gives how many of the captions encoded now, by all processes, were too long and lost their end, as far as the encoder
    counts them. Raises DataError for a full disk, on all processes.
    """
    return sum((yield from together_telling(peers, _fill_share(stores, texts, peers, device))))


def _fill_share(stores: Stores, texts: Texts, peers: Peers, device: str) -> Generator[Filling, None, int]:
    missing: dict[str, tuple[Caption, Role]] = {}
    present: set[int] = set()
    for caption, role in texts:
        key = stores.text_key(caption, role)
        if is_share(peers, key) and key not in missing and digest64(key) not in present:
            if stores.text.sound(key):
                present.add(digest64(key))
            else:
                missing[key] = (caption, role)
    yield Filling("text", len(present), len(present) + len(missing))
    if not missing:
        return 0
    batches = list(_batches(missing, stores.plan.config.cache.text_batch))
    return (yield from _fill(stores, missing, batches, len(present), device))


def _batches(missing: Mapping[str, tuple[Caption, Role]], size: int) -> Iterator[list[str]]:
    """Keys of one role, captions of like length together, so that little is spent on padding."""
    order = sorted(missing, key=lambda key: (missing[key][1], len(missing[key][0].text), key))
    for _, group in groupby(order, key=lambda key: missing[key][1]):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _fill(
    stores: Stores,
    missing: Mapping[str, tuple[Caption, Role]],
    batches: list[list[str]],
    done: int,
    device: str,
) -> Generator[Filling, None, int]:
    """Encode the missing captions, batch by batch. done: captions that are there."""
    total, made = done + len(missing), 0
    with Claims(stores.plan.config.cache.dir) as claims, ExitStack() as stack:
        encoder: TextEncoder | None = None
        while batches:
            left: list[list[str]] = []
            for batch in batches:
                # What another run has claimed is looked at again later: by then it is there, or that run has ended.
                free = [key for key in batch if claims.take(key)]
                keys = [key for key in free if not stores.text.sound(key)]
                if keys:
                    encoder = encoder or stack.enter_context(stores.plan.family.open_text_encoder(device))
                    _encode(stores, encoder, missing, keys)
                    made += len(keys)
                for key in free:
                    claims.drop(key)
                if free:
                    done += len(free)
                    yield Filling("text", done, total, made=made)
                if len(free) < len(batch):
                    left.append([key for key in batch if key not in free])
            if left == batches:
                time.sleep(AGAIN_S)
            batches = left
        return encoder.truncated if isinstance(encoder, SupportsTruncation) else 0


def _encode(stores: Stores, encoder: TextEncoder, missing: Mapping[str, tuple[Caption, Role]], keys: list[str]) -> None:
    """Encode captions of one role and write their entries."""
    with torch.no_grad():
        text = encoder.encode([missing[key][0] for key in keys], missing[keys[0]][1])
    for key, (embeds, count) in zip(keys, _real(text), strict=True):
        stores.text.write(key, {"embeds": embeds[:count]})


def _real(text: Text) -> Iterator[tuple[torch.Tensor, int]]:
    """(embeds (L, D), number of real tokens) of each caption."""
    for embeds, mask in zip(text.embeds, text.mask, strict=True):
        count = int(mask.sum())
        if not bool(mask[:count].all()):
            what = "the text encoder's real tokens do not come first."
            raise PluginError(Problem("", what, "This is a fault of the model family's plugin."))
        yield embeds, count
