"""Encoding the captions that are not in the cache yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby

import torch

from vtrain.contract import Caption, PluginError, Problem, Role, SupportsTruncation, Text
from vtrain.data.stores import Stores

Report = Callable[[str, int, int], None]
"""Told (stage, done, total): "text" counts captions, "video" counts clips."""


def fill_text(stores: Stores, texts: Iterable[tuple[Caption, Role]], device: str, report: Report) -> int:
    """Encode what is missing; the encoder is opened only if something is. Raises DataError for a full disk.

    Gives how many of the captions encoded now were too long and lost their end, as far as the encoder counts them.
    """
    wanted = {stores.text_key(caption, role): (caption, role) for caption, role in texts}
    missing = {key: text for key, text in wanted.items() if not stores.text.sound(key)}
    done = len(wanted) - len(missing)
    report("text", done, len(wanted))
    if not missing:
        return 0
    with stores.plan.family.open_text_encoder(device) as encoder, torch.no_grad():
        for role, keys in _batches(missing, stores.plan.config.cache.text_batch):
            text = encoder.encode([missing[key][0] for key in keys], role)
            for key, (embeds, count) in zip(keys, _real(text), strict=True):
                stores.text.write(key, {"embeds": embeds[:count]})
            done += len(keys)
            report("text", done, len(wanted))
        return encoder.truncated if isinstance(encoder, SupportsTruncation) else 0


def _batches(missing: Mapping[str, tuple[Caption, Role]], size: int) -> Iterator[tuple[Role, list[str]]]:
    """Keys of one role, captions of like length together, so that little is spent on padding."""
    order = sorted(missing, key=lambda key: (missing[key][1], len(missing[key][0].text), key))
    for role, group in groupby(order, key=lambda key: missing[key][1]):
        keys = list(group)
        for start in range(0, len(keys), size):
            yield role, keys[start : start + size]


def _real(text: Text) -> Iterator[tuple[torch.Tensor, int]]:
    """(embeds (L, D), number of real tokens) of each caption."""
    for embeds, mask in zip(text.embeds, text.mask, strict=True):
        count = int(mask.sum())
        if not bool(mask[:count].all()):
            what = "the text encoder's real tokens do not come first."
            raise PluginError(Problem("", what, "This is a fault of the model family's plugin."))
        yield embeds, count
