"""Entries of the cache that are damaged, torn or another's are found and made again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vtrain.contract import DataError
from vtrain.data.caching.caches import fill_caches
from vtrain.data.sample import Sample
from vtrain.data.scanning.scan import scan


def fill(setup, *datasets, extra=(), **train):
    """Scan and fill as a run does."""
    plan = setup.plan(*datasets, **train)
    return fill_caches(plan, scan(plan).samples, extra, "cpu", lambda _: None)


def entries(setup, kind: str):
    return sorted((setup.cache / kind).rglob("*.safetensors"))


def encodes(setup, *datasets, **train) -> tuple[int, int]:
    """How many captions and clips a run encodes."""
    texts, clips = len(setup.family.encoded_texts), setup.family.clips
    fill(setup, *datasets, **train)
    return len(setup.family.encoded_texts) - texts, setup.family.clips - clips


def trained_on(filled) -> list[Sample]:
    """The samples in the index, as the ledger tells of them."""
    ids = {filled.index.id(number) for number in range(len(filled.index))}
    return [sample for sample in scan(filled.caches._stores.plan).samples if sample.id in ids]


def torn(path, key):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path, key):
    path.write_bytes(b"")


def longer(path, key):
    path.write_bytes(path.read_bytes() + b"x")


def garbage(path, key):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def foreign(path, key):
    save_file({"mean": torch.zeros(1)}, path)


def restamped(path, old, new):
    data = path.read_bytes()
    assert data.count(old.encode()) == 1
    path.write_bytes(data.replace(old.encode(), new.encode()))


def wrong_key(path, key):
    restamped(path, key, "0" * 64)


def old_format(path, key):
    restamped(path, "vtrain-cache-3", "vtrain-cache-2")


@pytest.mark.parametrize("kind", ["text", "video"])
@pytest.mark.parametrize("harm", [torn, empty, longer, garbage, foreign, wrong_key, old_format])
def test_a_harmed_entry_is_found_and_made_again(three, kind, harm) -> None:
    fill(three)
    path = entries(three, kind)[0]
    sound = path.read_bytes()
    harm(path, path.stem)
    assert encodes(three) == ((1, 0) if kind == "text" else (0, 1))
    assert path.read_bytes() == sound


def test_a_flipped_byte_is_found_when_read_and_the_next_start_mends_it(three) -> None:
    filled = fill(three)
    for path in entries(three, "video"):
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError, match="damaged") as caught:
        filled.caches.latents(trained_on(filled)[0], trained_on(filled)[0].starts[0])
    assert "Start the run again" in str(caught.value)
    assert encodes(three) == (0, 1)
    filled.caches.latents(trained_on(filled)[0], trained_on(filled)[0].starts[0])


def test_an_entry_names_its_key_and_format(three) -> None:
    fill(three)
    for path in entries(three, "video"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["vtrain"].split()[:2] == ["vtrain-cache-3", path.stem]
        assert path.parent.name == path.stem[:2]
