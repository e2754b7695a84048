"""Entries of the cache, plain and compressed: what is written is read, and what was harmed is found."""

import os
import stat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vtrain.contract import DataError
from vtrain.data.caching.entries import Entries, checksum

KEY = "ab" * 32
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool]


def latents(seed: int = 0, shape: tuple[int, ...] = (16, 5, 16, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["plain", "compressed"])
def entries(request, tmp_path) -> Entries:
    return Entries(tmp_path, "video", compress=request.param)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 5, 16, 8), (3, 7), (1,), (0, 6)], ids=str)
def test_what_is_written_is_read_bit_for_bit(entries, dtype, shape) -> None:
    written = {"mean": latents(1, shape).to(dtype), "std": latents(2, shape).to(dtype)}
    entries.write(KEY, written)
    read = entries.read(KEY)
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == dtype
        assert read[name].shape == shape
        assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8))


def test_entries_of_one_layout_are_read_as_one_batch(entries) -> None:
    keys = [f"{number:064x}" for number in range(3)]
    for number, key in enumerate(keys):
        entries.write(key, {"mean": latents(number), "std": latents(9 + number, (2, 3))})
    read = entries.read_all([keys[2], keys[0], keys[2]])
    assert torch.equal(read["mean"], torch.stack([latents(2), latents(0), latents(2)]))
    assert torch.equal(read["std"], torch.stack([latents(11, (2, 3)), latents(9, (2, 3)), latents(11, (2, 3))]))


def test_a_file_that_changes_between_two_reads_is_checked_again(entries) -> None:
    entries.write(KEY, {"mean": latents()})
    entries.read(KEY)
    path = entries.path(KEY)
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    with path.open("r+b") as file:  # the same inode, the same length
        file.write(data)
    with pytest.raises(DataError, match="damaged"):
        entries.read(KEY)


def test_an_entry_of_another_shape_than_the_others_of_its_batch_is_damaged(entries) -> None:
    other = "cd" * 32
    entries.write(KEY, {"mean": latents()})
    entries.write(other, {"mean": latents(shape=(16, 5, 8, 16))})
    with pytest.raises(DataError, match="of another shape"):
        entries.read_all([KEY, other])
    assert entries.read_all([KEY])["mean"].shape == (1, 16, 5, 16, 8)


def test_not_a_number_and_signed_zero_survive(entries) -> None:
    odd = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), 1e-45]).view(torch.int32)
    entries.write(KEY, {"mean": odd.view(torch.float32)})
    assert torch.equal(entries.read(KEY)["mean"].view(torch.int32), odd)


def test_entries_of_either_kind_are_read_alike(tmp_path) -> None:
    plain, compressed = Entries(tmp_path, "video"), Entries(tmp_path, "video", compress=True)
    for writer, key in ((plain, KEY), (compressed, "cd" * 32)):
        writer.write(key, {"mean": latents()})
        for reader in (plain, compressed):
            assert reader.sound(key)
            assert reader.damage(key) is None
            assert torch.equal(reader.read(key)["mean"], latents())


def test_a_compressed_entry_is_smaller_and_as_safetensors_well_formed(tmp_path) -> None:
    smooth = torch.linspace(0, 1, 40_000).reshape(4, 100, 100)
    sizes = {}
    for compress in (False, True):
        entries = Entries(tmp_path / str(compress), "video", compress=compress)
        entries.write(KEY, {"mean": smooth})
        sizes[compress] = entries.path(KEY).stat().st_size
        assert load_file(entries.path(KEY))["mean"].dtype == (torch.uint8 if compress else torch.float32)
    assert sizes[True] < 0.6 * sizes[False]


def test_the_same_numbers_make_the_same_file(entries) -> None:
    entries.write(KEY, {"mean": latents(), "std": latents(1)})
    first = entries.path(KEY).read_bytes()
    entries.write(KEY, {"std": latents(1), "mean": latents()})
    assert entries.path(KEY).read_bytes() == first


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7), compress=st.booleans())
def test_any_flipped_bit_is_found(tmp_path_factory, place, bit, compress) -> None:
    entries = Entries(tmp_path_factory.mktemp("cache"), "video", compress=compress)
    entries.write(KEY, {"mean": latents(shape=(3, 700))})
    path = entries.path(KEY)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    assert entries.damage(KEY) is not None
    with pytest.raises(DataError, match="damaged"):
        entries.read(KEY)
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == data


@pytest.mark.parametrize("cut", [0, 3, 8, 100, 300, 4096, -1])
def test_a_torn_entry_is_found_before_its_numbers_are_read(entries, cut) -> None:
    entries.write(KEY, {"mean": latents()})
    path = entries.path(KEY)
    path.write_bytes(path.read_bytes()[:cut])
    assert not entries.sound(KEY)
    assert entries.damage(KEY) is not None


def test_zeroed_and_swapped_blocks_change_the_checksum() -> None:
    data = np.random.default_rng(0).integers(0, 256, 5 * 4096 + 77, dtype=np.uint8)
    before = checksum(1, data)
    zeroed, swapped = data.copy(), data.copy()
    zeroed[4096:8192] = 0
    swapped[:4096], swapped[4096:8192] = data[4096:8192], data[:4096]
    assert len({before, checksum(1, zeroed), checksum(1, swapped), checksum(2, data)}) == 4
    assert checksum(checksum(1, data[:8192]), data[8192:]) == before


def test_an_entry_under_anothers_name_is_not_its_own(entries) -> None:
    other = "ef" * 32
    entries.write(KEY, {"mean": latents()})
    entries.path(other).parent.mkdir()
    entries.path(KEY).rename(entries.path(other))
    assert not entries.sound(other)
    with pytest.raises(DataError, match="not what its name says"):
        entries.read(other)


def test_a_compressed_entry_that_claims_a_huge_size_is_damaged_and_nothing_is_allocated(tmp_path, monkeypatch) -> None:
    """As made by somebody who can also sign it."""
    from vtrain.data.caching import entries as module

    entries = Entries(tmp_path, "video", compress=True)
    monkeypatch.setattr(module, "words", lambda packed: "mean=F32:1000000,1000000:1")
    entries.write(KEY, {"mean": latents()})
    assert entries.damage(KEY) == "it claims to be larger than any entry is"
    monkeypatch.setattr(module, "words", lambda packed: "mean=F32:16,5,16,9:1")
    entries.write(KEY, {"mean": latents()})
    assert entries.damage(KEY) == "it does not unpack to the size that it names"


def test_entries_may_be_read_by_whoever_the_umask_lets(entries) -> None:
    before = os.umask(0o027)
    try:
        entries.write(KEY, {"mean": latents()})
    finally:
        os.umask(before)
    assert stat.S_IMODE(entries.path(KEY).stat().st_mode) == 0o640


def test_what_is_read_can_be_written_to(entries) -> None:
    entries.write(KEY, {"mean": latents()})
    entries.read(KEY)["mean"].add_(1)
    assert torch.equal(entries.read(KEY)["mean"], latents())
