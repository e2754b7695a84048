"""The manifest backend: what its rows may say, what is refused and how it is told."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from vtrain.contract import DataBackend, DataError, SourceRef, Words
from vtrain_builtin.folder import in_order
from vtrain_builtin.manifest import MANIFEST


def manifest(path: object, **options: object) -> Any:
    return MANIFEST.build(MANIFEST.options.model_validate({"path": str(path), **options}))


def read(backend: DataBackend) -> dict[str, bytes | str]:
    """id -> its bytes, or why it does not open."""
    found: dict[str, bytes | str] = {}
    for ref in backend.refs():
        try:
            with backend.open(ref) as file:
                found[ref.id] = file.read()
        except OSError as error:
            found[ref.id] = str(error)
    return found


def problems(rows: Iterable[object]) -> list[tuple[str, str]]:
    with pytest.raises(DataError) as caught:
        list(rows)
    return [(Path(problem.where).name, f"{problem.what} {problem.remedy}") for problem in caught.value.problems]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        (folder / name).write_bytes(name.encode())
    return folder


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_missing_column_is_an_error_that_offers_the_others(clips: Path) -> None:
    table = write(clips / "t.csv", "pathh,captoin", "a.mp4,a cat")
    assert problems(manifest(table).refs()) == [
        (
            "t.csv",
            'there is no column "path". Did you mean "pathh"? Set data.columns.path to one of its columns: "captoin", "pathh".',
        )
    ]
    right = manifest(table, columns={"path": "pathh"})
    assert [ref.id for ref in right.refs()] == ["a.mp4"]
    assert 'Did you mean "captoin"?' in problems(right.captions())[0][1]


def test_braces_that_count_down_are_an_error_of_the_path(tmp_path: Path) -> None:
    found = problems(manifest(tmp_path / "t-{5..1}.csv").refs())
    assert [name for name, _ in found] == ["t-{5..1}.csv"]
    assert "counts from 5 to 1" in found[0][1]


def test_columns_have_the_names_that_the_table_gives(clips: Path) -> None:
    table = write(clips / "t.tsv", "file\ttext\tmoves\tkey", "a.mp4\ta cat\t30\tone", "sub/c.mp4\ta dog\t\ttwo.mp4")
    columns = {"path": "file", "caption": "text", "extras": {"motion_score": "moves"}, "id": "key"}
    backend = manifest(table, columns=columns)
    assert read(backend) == {"one.mp4": b"a.mp4", "two.mp4": b"sub/c.mp4"}
    assert list(backend.captions()) == [
        ("one.mp4", Words(("a cat",), {"motion_score": "30"})),
        ("two.mp4", Words(("a dog",))),
    ]


def test_rows_with_one_path_are_one_clip_with_all_their_captions(clips: Path) -> None:
    table = write(
        clips / "t.csv", "path,caption,motion_score", "b.mp4,one,5", "a.mp4,x,", "./b.mp4,two,", f"{clips}/b.mp4,one,5"
    )
    backend = manifest(table)
    assert list(read(backend)) == ["a.mp4", "b.mp4"]
    told = dict(backend.captions(["motion_score"]))["b.mp4"]
    assert told == Words(("one", "two"), {"motion_score": "5"})
    assert told.where == f"{table}:2"
    assert dict(backend.captions())["b.mp4"] == Words(("one", "two")), "nobody asked"
    same = write(clips / "u.csv", "path,caption,pace", "b.mp4,one,5", "b.mp4,two,5.0")
    assert dict(manifest(same).captions(["pace"]))["b.mp4"].extras == {"pace": "5"}


def test_rows_of_one_clip_with_different_extras_are_an_error(clips: Path) -> None:
    table = write(clips / "t.csv", "path,caption,motion_score", "b.mp4,one,5", "b.mp4,two,6")
    assert (
        'the rows of "b.mp4" differ in motion_score: 5 and 6.'
        in problems(manifest(table).captions(["motion_score"]))[0][1]
    )


def test_a_column_that_the_options_name_for_an_extra_has_to_be_there(clips: Path) -> None:
    table = write(clips / "t.csv", "path,caption", "b.mp4,one")
    found = problems(manifest(table, columns={"extras": {"pace": "speed"}}).captions(["pace"]))
    assert [what.partition(" Set ")[0] for _, what in found] == ['there is no column "speed".']
    assert "data.columns.extras.pace" in found[0][1]
    assert manifest(table, columns={"extras": {"pace": "speed"}}).location == f"{table}#extras.pace=speed"


def test_two_files_under_one_id_are_told_and_neither_is_used(clips: Path) -> None:
    table = write(clips / "t.csv", "path,key", "a.mp4,x", "b.mp4,x", "sub/c.mp4,y")
    found = read(manifest(table, columns={"id": "key"}))
    assert found == {
        "x.mp4": "2 different files have this id in the manifest: set data.columns.id",
        "y.mp4": b"sub/c.mp4",
    }


def test_a_file_that_is_not_there_is_told_by_its_path_and_the_others_are_used(clips: Path) -> None:
    found = read(manifest(write(clips / "t.csv", "path", "none.mp4", "a.mp4")))
    assert found == {"a.mp4": b"a.mp4", "none.mp4": f"{clips}/none.mp4: No such file or directory"}


def test_paths_are_relative_to_the_manifest_they_stand_in(clips: Path) -> None:
    write(clips / "sub" / "part-1.jsonl", '{"path": "c.mp4", "caption": ["one", "two"]}')
    write(clips / "part-0.jsonl", '{"path": "a.mp4", "caption": "x"}', "", '{"path": "../outside.mp4"}')
    (clips.parent / "outside.mp4").write_bytes(b"out")
    backend = manifest(clips / "**/part-*.jsonl")
    outside = f"file:{clips.parent}/outside.mp4"
    assert read(backend) == {"a.mp4": b"a.mp4", outside: b"out", "sub/c.mp4": b"sub/c.mp4"}
    assert dict(backend.captions())["sub/c.mp4"] == Words(("one", "two"))


def test_wrong_rows_are_told_all_at_once_with_their_lines(clips: Path) -> None:
    lines = [
        json.dumps(row) for row in ({"path": "a.mp4", "caption": 3, "motion_score": 1}, {"path": ""}, {"path": 4}, {})
    ]
    found = problems(manifest(write(clips / "t.jsonl", *lines)).refs())
    assert [where for where, _ in found] == ["t.jsonl:2", "t.jsonl:3", "t.jsonl:4"]
    assert problems(manifest(clips / "t.jsonl").captions())[0][0] == "t.jsonl:1"


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("t.csv", b"path\n\xff\xfe.mp4\n", "not UTF-8"),
        ("t.csv", b"path,caption\na.mp4,one, two\n", "3 cells"),
        ("t.csv", b'path,caption\na.mp4,"one\n', "not CSV"),
        ("t.csv", b"", "no column"),
        ("t.jsonl", b"{not json}\n", "not JSON"),
        ("t.jsonl", b"[1]\n", "no JSON object"),
        ("t.jsonl", b"[" * 200_000, "nested too deep|not JSON"),
        ("t.jsonl", b'{"path": "' + b"x" * (17 << 20), "longer than 16 MiB"),
        ("t.parquet", b"PAR1 is not all PAR1", "no Parquet file"),
        ("t.parquet", b"", "no Parquet file"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_error_that_names_it(
    tmp_path: Path, name: str, data: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=what) as caught:
        list(manifest(tmp_path / name).refs())
    assert caught.value.problems[0].where.startswith(str(tmp_path / name))


def test_a_manifest_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for path in ("none.csv", "none-*.parquet", "none"):
        assert problems(manifest(tmp_path / path).refs())


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ";"), ("t.csv", "\t"), ("t.csv", "|"), ("t.tsv", ",")])
def test_what_separates_columns_is_known_by_the_first_row(clips: Path, name: str, delimiter: str) -> None:
    table = write(clips / name, delimiter.join(("path", "caption")), delimiter.join(("a.mp4", '"a ball, red; round"')))
    assert list(manifest(table).captions()) == [("a.mp4", Words(("a ball, red; round",)))]
    assert [ref.id for ref in manifest(table).refs()] == ["a.mp4"]


def test_csv_takes_quotes_line_breaks_and_a_byte_order_mark(clips: Path) -> None:
    (clips / "t.csv").write_bytes('\ufeffpath,caption\r\na.mp4,"a ""red""\nball, é"\r\n\r\n'.encode())
    assert list(manifest(clips / "t.csv").captions()) == [("a.mp4", Words(('a "red" ball, é',)))]


def test_a_remote_manifest_names_no_local_file(bucket: Any) -> None:
    bucket.put({"t.csv": b"path\n/etc/passwd\nfile:///etc/passwd\n../x.mp4\n"})
    options = {"storage_options": {"endpoint_url": bucket.endpoint}}
    found = problems(manifest(f"s3://{bucket.name}/t.csv", **options).refs())
    assert [where for where, _ in found] == ["t.csv:2", "t.csv:3", "t.csv:4"]


def test_a_local_manifest_names_files_of_storages(clips: Path, bucket: Any) -> None:
    bucket.put({"deep/x.mp4": b"far"})
    table = write(clips / "t.csv", "path", "a.mp4", f"s3://{bucket.name}/deep/x.mp4", f"s3://{bucket.name}/none.mp4")
    found = read(manifest(table, storage_options={"endpoint_url": bucket.endpoint}))
    assert found.pop(f"s3://{bucket.name}/none.mp4") != b""
    assert found == {"a.mp4": b"a.mp4", f"s3://{bucket.name}/deep/x.mp4": b"far"}


def as_parquet(path: Path, columns: Mapping[str, list[Any]], group: int = 2) -> Path:
    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=group)
    return path


def test_rows_of_bytes_are_named_by_their_number(tmp_path: Path) -> None:
    videos = [bytes([n]) * 50 for n in range(5)]
    table = as_parquet(
        tmp_path / "t.parquet", {"v": [{"bytes": v, "path": "x"} for v in videos], "caption": list("abcde")}
    )
    backend = manifest(table, columns={"bytes": "v.bytes"}, suffix=".webm")
    assert read(backend) == {f"t.parquet/{n + 1:09}.webm": video for n, video in enumerate(videos)}
    assert [words.texts for _, words in backend.captions()] == [(letter,) for letter in "abcde"]


def test_rows_of_bytes_are_read_in_any_order_and_by_threads(tmp_path: Path) -> None:
    videos = [random.Random(n).randbytes(1000 + n) for n in range(60)]
    backend = manifest(as_parquet(tmp_path / "t.parquet", {"v": videos}, group=7), columns={"bytes": "v"})
    jobs = list(zip(backend.refs(), videos, strict=True)) * 3
    random.Random(1).shuffle(jobs)

    def right(job: tuple[SourceRef, bytes]) -> bool:
        with backend.open(job[0]) as file:
            return bool(file.read() == job[1])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(right, jobs))


def test_a_row_of_bytes_keeps_its_version_while_it_keeps_its_bytes_and_place(tmp_path: Path) -> None:
    table = as_parquet(tmp_path / "t.parquet", {"v": [b"one", b"two"]})
    backend = manifest(table, columns={"bytes": "v"})
    one, two = backend.refs()
    as_parquet(table, {"v": [b"one", b"TWO"]})
    assert next(backend.refs()) == one
    assert [ref.version == two.version for ref in backend.refs()] == [False, False]
    with pytest.raises(OSError, match="has changed since it was listed"):
        backend.open(two)
    assert read(backend) == {one.id: b"one", two.id: b"TWO"}


def test_rows_of_bytes_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    columns = {"v": [b"1", b"2", b"3", None, b"5"], "key": ["a", "b", "a", "d", "../e"]}
    backend = manifest(as_parquet(tmp_path / "t.parquet", columns), columns={"bytes": "v", "id": "key"})
    assert read(backend) == {
        "t.parquet/(without an id).mp4": "1 rows have no id that names a file, the first is row 5",
        "t.parquet/a.mp4": "2 rows have this id, the first is row 1",
        "t.parquet/b.mp4": b"2",
        "t.parquet/d.mp4": b"",
    }
    backend = manifest(as_parquet(tmp_path / "t.parquet", {"v": ["text"]}), columns={"bytes": "v"})
    assert read(backend) == {"t.parquet/000000001.mp4": "row 1 holds no bytes, but str"}


def test_bytes_stand_in_parquet_alone_and_not_beside_paths(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"bytes.*\.parquet"):
        manifest(tmp_path / "t.csv", columns={"bytes": "v"})
    with pytest.raises(ValidationError, match="either"):
        manifest(tmp_path / "t.parquet", columns={"bytes": "v", "path": "p"})


LIST = """
import sys, pyarrow
from vtrain_builtin.manifest import MANIFEST
backend = MANIFEST.build(MANIFEST.options.model_validate({"path": sys.argv[1], "columns": {"bytes": "v"}}))
refs = list(backend.refs())
with backend.open(refs[-1]) as file:
    assert len(file.read()) == refs[-1].size
print(len(refs), pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize(("page", "bound"), [(1, 24_000_000), (1024, 70_000_000)])
def test_rows_of_bytes_are_read_a_page_at_a_time(
    tmp_path: Path, python: Callable[..., Any], page: int, bound: int
) -> None:
    video = random.Random(1).randbytes(4_000_000)
    schema = pyarrow.schema([("v", pyarrow.binary())])
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": page}
    with parquet.ParquetWriter(tmp_path / "t.parquet", schema, **options) as writer:
        for _ in range(2):
            writer.write_table(pyarrow.table({"v": [video] * 8}, schema), row_group_size=8)
    done = python("-c", LIST, str(tmp_path / "t.parquet"))
    assert done.returncode == 0, done.stderr
    count, peak = map(int, done.stdout.split())
    assert count == 16
    assert peak < bound, f"{peak:,} bytes of Arrow's for two row groups of 32,000,000"


def test_a_row_group_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtrain_builtin.rows.LARGEST_GROUP", 4000)
    backend = manifest(as_parquet(tmp_path / "t.parquet", {"v": [b"x" * 100]}), columns={"bytes": "v"})
    assert [len(data) for data in read(backend).values()] == [100]
    backend = manifest(as_parquet(tmp_path / "t.parquet", {"v": [b"x" * 3000, b"y" * 3000]}), columns={"bytes": "v"})
    assert "row_group_size" in problems(backend.refs())[0][1]
    with pytest.raises(OSError, match="row_group_size"):  # which core tells of this file alone
        list(backend.members(next(backend.shards())))


def test_a_long_manifest_is_sorted_on_disk(clips: Path) -> None:
    count = 8_000
    with (clips / "t.csv").open("w") as file:
        file.write("path,caption\n")
        for n in range(count):
            file.write(f"{(n * 7919) % count:06}-{'x' * 60}.mp4,{'words ' * 20}{n}\n")
    backend = manifest(clips / "t.csv")
    tracemalloc.start()
    last = ""
    for name, _ in backend.captions():
        assert name > last
        last = name
    for ref in backend.refs():
        assert ref.size == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000, f"{peak:,} bytes for {count:,} rows"


def test_names_are_sorted_by_code_points_in_memory_and_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["é", "z", "a/b", "a.b", "a", "\U0001f600", "￿", os.fsdecode(b"\xff"), "new\nline", "nul\0"]
    assert list(in_order(names)) == sorted(names)
    monkeypatch.setattr("vtrain_builtin.folder._IN_MEMORY", 3)
    assert list(in_order(names)) == sorted(names)
    assert list(in_order(iter(()))) == []


def test_an_io_error_of_the_storage_is_not_taken_for_a_fault_of_the_table(tmp_path: Path) -> None:
    backend = manifest(as_parquet(tmp_path / "t.parquet", {"v": [b"1"]}), columns={"bytes": "v"})
    (ref,) = backend.refs()
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(OSError, match=r"No such file|not there"):
        backend.open(ref)


def test_one_table_read_in_two_ways_is_two_places(clips: Path) -> None:
    table = write(clips / "t.csv", "path,other,caption,text", "a.mp4,b.mp4,one,two")
    ways = [manifest(table, columns=columns) for columns in ({}, {"path": "other"}, {"caption": "text"})]
    assert len({way.location for way in ways}) == 3
    assert ways[0].location == str(table)
    assert manifest(table, columns={"caption": "caption"}).location == str(table)


def test_a_damaged_parquet_file_leaves_the_captions_of_the_others(tmp_path: Path) -> None:
    as_parquet(tmp_path / "t-1.parquet", {"v": [b"1"], "caption": ["one"]})
    (tmp_path / "t-2.parquet").write_bytes(b"junk")
    backend = manifest(tmp_path / "t-{1..3}.parquet", columns={"bytes": "v"})
    assert list(backend.captions()) == [("t-1.parquet/000000001.mp4", Words(("one",)))]
    sound, damaged, missing = backend.shards()
    assert len(list(backend.members(sound))) == 1
    for shard in (damaged, missing):
        with pytest.raises(OSError, match=r"no Parquet file|no such file"):
            list(backend.members(shard))
