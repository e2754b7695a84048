"""The tar backend: patterns, every form of tar, and shards that are damaged, cut off or refused."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vtrain.contract import DataError, SourceRef
from vtrain_builtin.files import expand, matcher
from vtrain_builtin.tar import TAR, TarFault, TarShards, members

CLIP = random.Random(1).randbytes(3000)


def packed(files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return target.getvalue()


def shards(path: object) -> TarShards:
    return TAR.build(TAR.options(path=str(path)))


def content(place: TarShards) -> dict[str, bytes | str]:
    """id -> its bytes, or why it does not open."""
    found: dict[str, bytes | str] = {}
    for ref in place.refs():
        try:
            with place.open(ref) as file:
                found[ref.id] = file.read()
        except OSError as error:
            found[ref.id] = str(error)
    return found


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return tmp_path / "clips.tar"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(tar: Path, form: int) -> None:
    long = "a-long-folder-name/" * 9 + "clip.mp4"
    files = {"é.mp4": CLIP, "sub/b.txt": b"words", "empty.mp4": b""}
    files |= {} if form == tarfile.USTAR_FORMAT else {long: CLIP[:700], "n" * 180 + ".mp4": b"n"}
    tar.write_bytes(packed(files, form))
    assert content(shards(tar)) == {f"clips.tar/{name}": data for name, data in files.items()}


def test_what_the_tar_program_writes_is_read(tmp_path: Path, tar: Path) -> None:
    folder = tmp_path / "clips"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a clip.mp4").write_bytes(CLIP)
    (folder / "b.txt").write_bytes(b"b")
    subprocess.run(["tar", "-C", str(folder), "-cf", str(tar), "."], check=True)
    assert content(shards(tar)) == {"clips.tar/b.txt": b"b", "clips.tar/deep/er/a clip.mp4": CLIP}


def test_members_are_read_anywhere_and_never_beyond_their_end(tar: Path) -> None:
    tar.write_bytes(packed({"a.mp4": CLIP, "b.mp4": b"b" * 600}))
    place = shards(tar)
    with place.open(next(place.refs())) as file:
        assert file.seek(-5, io.SEEK_END) == 2995
        assert file.read(100) == CLIP[-5:]
        assert file.read() == b""
        assert file.seek(10) == 10
        assert file.read(3) == CLIP[10:13]
        with pytest.raises(OSError, match="fileno"):
            file.fileno()  # the descriptor of the whole tar would give its other bytes


def test_a_pattern_names_shards(tmp_path: Path) -> None:
    for name in ("s-000.tar", "s-001.tar", "s-010.tar", "other.tar", "sub/s-002.tar", "s-003.tar.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(packed({"a.mp4": CLIP}))

    def named(path: str) -> list[str]:
        return [shard.id for shard in shards(tmp_path / path).shards()]

    assert named("s-{000..001}.tar") == ["s-000.tar", "s-001.tar"]
    assert named("s-*.tar") == ["s-000.tar", "s-001.tar", "s-010.tar"]
    assert named("**/s-*.tar") == ["s-000.tar", "s-001.tar", "s-010.tar", "sub/s-002.tar"]
    assert named("") == ["other.tar", "s-000.tar", "s-001.tar", "s-010.tar", "sub/s-002.tar"]
    assert named("{other,s-00?}.tar") == ["other.tar", "s-000.tar", "s-001.tar"]
    assert named("s-{003,004}.tar.part") == ["s-003.tar.part", "s-004.tar.part"]


def test_a_shard_of_the_pattern_that_is_not_there_is_told_and_the_others_are_used(tmp_path: Path) -> None:
    (tmp_path / "s-0.tar").write_bytes(packed({"a.mp4": CLIP}))
    place = shards(tmp_path / "s-{0..1}.tar")
    found, absent = place.shards()
    assert [ref.id for ref in place.members(found)] == ["s-0.tar/a.mp4"]
    assert absent == SourceRef("s-1.tar", 1, "missing")
    with pytest.raises(FileNotFoundError):
        list(place.members(absent))


@pytest.mark.parametrize("path", ["none-*.tar", "none-{0..3}.tar", "none", "none.tar"])
def test_a_pattern_that_names_nothing_is_an_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError) as caught:
        list(shards(tmp_path / path).shards())
    assert caught.value.problems[0].where.startswith(str(tmp_path))


def test_braces_count_with_leading_zeros_and_list_words() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    for endless in ("{0..99999999}.tar", "{5..1}.tar", "{0..999}{0..999}{0..999}.tar"):
        with pytest.raises(ValueError, match="files"):
            expand(endless)
        with pytest.raises(ValidationError, match="files"):
            TAR.options(path=endless)


def test_wildcards_stay_in_their_folder() -> None:
    assert matcher("*.tar").fullmatch("a.tar")
    assert not matcher("*.tar").fullmatch("b/a.tar")
    assert matcher("**/*.tar").fullmatch("c/b/a.tar")
    assert matcher("[!ab].tar").fullmatch("c.tar")
    assert not matcher("[!ab].tar").fullmatch("a.tar")
    assert matcher("a+(1).tar").fullmatch("a+(1).tar")
    assert not matcher("[^ab].tar").fullmatch("a.tar")
    assert not matcher("**").fullmatch("b/a.tar")
    assert matcher("a**.tar").fullmatch("abc.tar")


@pytest.mark.parametrize("path", ["part**/*.tar", "{part**,x}/*.tar"])
def test_a_pattern_that_cannot_be_read_is_an_error_of_the_path(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"the pattern cannot be read: .*'\*\*'") as caught:
        list(shards(tmp_path / path).shards())
    assert caught.value.problems[0].where == str(tmp_path / path)


def test_a_range_of_characters_that_is_none_finds_nothing_and_does_not_crash(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed({"a.mp4": CLIP}))
    with pytest.raises(DataError, match="no tar file is called so"):
        list(shards(tmp_path / "[b-a].tar").shards())


def test_a_compressed_tar_is_refused_with_the_remedy(tar: Path) -> None:
    tar.write_bytes(gzip.compress(packed({"a.mp4": CLIP})))
    with pytest.raises(DataError, match=r"compressed \(gzip\).*unpack it to a plain tar"):
        list(shards(tar).refs())
    with pytest.raises(TarFault):
        list(shards(tar).members(next(shards(tar).shards())))
    tar.rename(tar.with_name("clips.tar.gz"))
    for path in (tar.parent, tar.with_name("clips.tar.gz")):
        with pytest.raises(DataError, match="compressed"):
            list(shards(path).refs())


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"x" * 5000])
def test_a_file_that_is_no_tar_is_refused(tar: Path, data: bytes) -> None:
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"no tar file|empty"):
        list(shards(tar).refs())


def test_a_tar_that_is_cut_off_gives_what_came_before_and_names_the_rest(tar: Path) -> None:
    whole = packed({"a.mp4": CLIP, "b.mp4": CLIP, "c.mp4": CLIP}, tarfile.USTAR_FORMAT)
    step = 512 + 3072
    tar.write_bytes(whole[: step + 512 + 1000])
    assert content(shards(tar)) == {
        "clips.tar/a.mp4": CLIP,
        "clips.tar/b.mp4": "the shard ends in the middle of it: 1,000 of its 3,000 bytes are there",
    }
    tar.write_bytes(whole[: step + 200])
    assert content(shards(tar)) == {
        "clips.tar/(damaged from byte 3584).mp4": "the shard is damaged from byte 3584 on: truncated header",
        "clips.tar/a.mp4": CLIP,
    }
    tar.write_bytes(whole[: 2 * step])
    found = content(shards(tar))
    assert (
        found.pop(f"clips.tar/(damaged from byte {2 * step}).mp4")
        == "the shard has no end mark: it may be cut off here"
    )
    assert found == {"clips.tar/a.mp4": CLIP, "clips.tar/b.mp4": CLIP}


def test_a_damaged_header_gives_what_came_before_and_a_row(tar: Path) -> None:
    whole = bytearray(packed({"a.mp4": CLIP, "b.mp4": CLIP}, tarfile.USTAR_FORMAT))
    whole[3584 + 3] ^= 0xFF
    tar.write_bytes(whole)
    found = content(shards(tar))
    assert found["clips.tar/a.mp4"] == CLIP
    assert "bad checksum" in str(found["clips.tar/(damaged from byte 3584).mp4"])
    assert len(found) == 2


def test_two_tar_files_in_one_are_told(tar: Path) -> None:
    tar.write_bytes(packed({"a.mp4": CLIP}) + packed({"b.mp4": CLIP}))
    found = content(shards(tar))
    assert found.pop("clips.tar/a.mp4") == CLIP
    assert [str(reason).partition(" at ")[0] for reason in found.values()] == ["the shard continues after its end mark"]


def test_two_files_of_one_name_are_told_and_neither_is_used(tar: Path) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as made:
        for data in (b"one", b"two!"):
            info = tarfile.TarInfo("./a.mp4")
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    tar.write_bytes(target.getvalue())
    assert content(shards(tar)) == {"clips.tar/a.mp4": "the shard holds 2 files of this name: rename all but one"}


def test_links_devices_and_sparse_files_are_told(tar: Path) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as made:
        for name, kind in (
            ("link.mp4", tarfile.SYMTYPE),
            ("hard.mp4", tarfile.LNKTYPE),
            ("pipe.mp4", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            made.addfile(info)
        info = tarfile.TarInfo("sparse.mp4")
        info.size, info.pax_headers = 512, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        made.addfile(info, io.BytesIO(bytes(512)))
    tar.write_bytes(target.getvalue())
    place = shards(tar)
    assert all(ref.size > 0 for ref in place.refs())
    assert {name.removeprefix("clips.tar/"): str(reason).split()[2] for name, reason in content(place).items()} == {
        "link.mp4": "link:", "hard.mp4": "hard", "pipe.mp4": "pipe", "sparse.mp4": "sparse",
    }  # fmt: skip


def test_names_that_lead_out_of_the_shard_stay_in_it(tar: Path) -> None:
    tar.write_bytes(packed({"../../etc/a.mp4": b"1", "/b.mp4": b"2", "x/./c.mp4": b"3"}))
    assert content(shards(tar)) == {
        "clips.tar/%2e%2e/%2e%2e/etc/a.mp4": b"1",
        "clips.tar/b.mp4": b"2",
        "clips.tar/x/c.mp4": b"3",
    }


def test_a_record_that_claims_a_huge_size_is_damage(tar: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    tar.write_bytes(packed({"a.mp4": CLIP})[:3584] + info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    found = content(shards(tar))
    assert found["clips.tar/a.mp4"] == CLIP
    assert any("1,099,511,627,776 bytes" in str(reason) for reason in found.values())


def test_a_shard_that_was_replaced_since_the_listing_is_told(tar: Path) -> None:
    tar.write_bytes(packed({"a.mp4": CLIP, "b.mp4": CLIP}))
    place = shards(tar)
    refs = list(place.refs())
    tar.write_bytes(packed({"0.mp4": CLIP, "a.mp4": CLIP}))
    for ref in refs:
        with pytest.raises(OSError, match="has changed since it was listed"):
            place.open(ref)
    tar.unlink()
    with pytest.raises(FileNotFoundError):
        place.open(refs[0])


def test_members_come_in_order_whatever_their_order_in_the_tar(tar: Path) -> None:
    names = [f"{n:05}.mp4" for n in range(3000)]
    random.Random(1).shuffle(names)
    tar.write_bytes(packed(dict.fromkeys(names, b"x"), tarfile.USTAR_FORMAT))
    assert [ref.id for ref in shards(tar).refs()] == [f"clips.tar/{name}" for name in sorted(names)]


SOUND = packed({"a.mp4": CLIP, "a.txt": b"words", "d" * 150 + "/b.mp4": CLIP, "c.mp4": b""})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)), max_size=6),
    end=st.integers(0, len(SOUND)),
    cut=st.booleans(),
)
def test_damage_anywhere_ends_in_members_or_in_a_named_fault(flips: list[tuple[int, int]], end: int, cut: bool) -> None:
    data = bytearray(SOUND)
    for place, change in flips:
        data[place] ^= change
    damaged = io.BytesIO(bytes(data[:end] if cut else data))
    try:
        found = list(members(damaged))
    except TarFault:
        return
    length = len(damaged.getvalue())
    assert all(member.fault or member.start + member.size <= length for member in found)
    if data[:end] == SOUND[:end] and cut and end < len(SOUND) - 10240:
        assert any(member.fault for member in found)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed({"a.mp4": CLIP}))
    os.mkfifo(tmp_path / "pipe.mp4")
    assert [ref.id for ref in shards(tmp_path).refs()] == ["a.tar/a.mp4"]
