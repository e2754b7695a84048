"""Captions in one file: rows in any order become the clips' words in the order of their ids."""

from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtrain.config.data_tables import DataTable
from vtrain.contract import CaptionExtra, DataError, Size, Words
from vtrain.data.decoding.video import FileFault
from vtrain.data.scanning.caption_rows import caption_rows
from vtrain.plan.records import DatasetPlan

Found = list[tuple[str, Words | str]]


def dataset(backend: Any = None, **table: Any) -> DatasetPlan:
    backend = backend or SimpleNamespace(location="/data/clips")
    score = CaptionExtra("motion_score", "int", "how much moves", minimum=0, default="30")
    return DatasetPlan(
        "clips", "", backend, DataTable.model_validate(table), (Size(64, 64),), 9, 9, 16.0, extras=(score,),
        foreign_extras={"camera": "other"},
    )  # fmt: skip


def found(plan: DatasetPlan) -> Found:
    """Faults as their reasons."""
    return [(ref, words.reason if isinstance(words, FileFault) else words) for ref, words in caption_rows(plan)]


@pytest.fixture
def of_csv(tmp_path: Path) -> Callable[..., Found]:
    def of_csv(text: str | bytes, name: str = "captions.csv", **table: Any) -> Found:
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return found(dataset(captions="csv", captions_file=file, **table))

    return of_csv


def refused(of_csv: Callable[..., Found], text: str | bytes, **table: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        of_csv(text, **table)
    return [f"{Path(p.where).name}: {p.what} {p.remedy}".strip() for p in caught.value.problems]


def test_rows_are_sorted_and_several_of_a_clip_are_several_captions(of_csv: Callable[..., Found]) -> None:
    text = 'caption,file\nlast,z.mp4\n" a\n cat ",b/x.mp4\nfirst,a.mp4\na dog,b/x.mp4\n\n,c.mp4\n'
    assert of_csv(text) == [
        ("a.mp4", Words(("first",))),
        ("b/x.mp4", Words(("a cat", "a dog"))),
        ("c.mp4", Words(())),
        ("z.mp4", Words(("last",))),
    ]


def test_other_columns_a_byte_order_mark_tabs_and_windows_line_ends(of_csv: Callable[..., Found]) -> None:
    text = "\ufeffid\tText\tclip\r\n1\ta, b\t./sub/../a.mp4\r\n2\tc\t/data/clips/b.mp4\r\n".encode()
    assert of_csv(text, name="captions.tsv", file_column="clip", caption_column="Text") == [
        ("a.mp4", Words(("a, b",))),
        ("b.mp4", Words(("c",))),
    ]


@pytest.mark.parametrize(
    ("name", "delimiter", "columns"),
    [
        ("captions.csv", ";", ("file", "caption")),
        ("captions.csv", "\t", ("file", "caption")),
        ("captions.csv", "|", ("file", "caption")),
        ("captions.tsv", ",", ("file", "caption")),
        ("captions.csv", ";", ("file", '"caption"', "seen, by")),
    ],
)
def test_what_separates_columns_is_known_by_the_first_row(
    of_csv: Callable[..., Found], name: str, delimiter: str, columns: tuple[str, ...]
) -> None:
    rows = [columns, ("a.mp4", '"a ball, red; a\tlawn|"'), ("b.mp4", "x")]
    assert of_csv("".join(delimiter.join(row) + "\n" for row in rows), name=name) == [
        ("a.mp4", Words(("a ball, red; a lawn|",))),
        ("b.mp4", Words(("x",))),
    ]


def test_a_column_that_is_not_there_is_told_of_a_file_that_is_separated_by_semicolons(
    of_csv: Callable[..., Found],
) -> None:
    assert refused(of_csv, "file;text\na.mp4;x\n") == [
        'captions.csv: there is no column "caption". Set data.caption_column to one of its columns: "file", "text".'
    ]


def test_a_motion_score_stands_in_a_column_of_that_name(of_csv: Callable[..., Found]) -> None:
    text = "file,caption,motion_score\na.mp4,x,30\nb.mp4,y,\nc.mp4,z,7.0\nd.mp4,w\na.mp4,x2,30\n"
    assert of_csv(text) == [
        ("a.mp4", Words(("x", "x2"), {"motion_score": 30})),
        ("b.mp4", Words(("y",))),
        ("c.mp4", Words(("z",), {"motion_score": 7})),
        ("d.mp4", Words(("w",))),
    ]


def test_a_bad_motion_score_is_that_clips_fault_and_no_others(of_csv: Callable[..., Found]) -> None:
    text = "file,caption,motion_score\na.mp4,x,fast\nb.mp4,y,1\nb.mp4,y,2\nc.mp4,z,3\n"
    assert of_csv(text) == [
        ("a.mp4", "its motion score 'fast' in captions.csv:2 is no whole number from 0 on: write one such as 30"),
        ("b.mp4", "its rows differ in motion_score (1, 2)"),
        ("c.mp4", Words(("z",), {"motion_score": 3})),
    ]


def test_a_clip_of_too_many_rows_is_its_own_fault(of_csv: Callable[..., Found]) -> None:
    assert of_csv("file,caption\n" + "a.mp4,x\n" * 1001 + "b.mp4,x\n" * 1000) == [
        ("a.mp4", "its rows have 1001 captions, more than 1000"),
        ("b.mp4", Words(("x",) * 1000)),
    ]


def test_columns_that_are_not_there_are_told_with_those_that_are(of_csv: Callable[..., Found]) -> None:
    assert refused(of_csv, "files,text\na.mp4,x\n") == [
        'captions.csv: there is no column "file". Did you mean "files"? Set data.file_column to one of its columns: '
        '"files", "text".',
        'captions.csv: there is no column "caption". Set data.caption_column to one of its columns: "files", "text".',
    ]
    assert refused(of_csv, "file,caption,file\n") == ['captions.csv: the column "file" is there 2 times. Rename one.']
    assert len(refused(of_csv, "")) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            b"file,caption\na.mp4,caf\xe9\n",
            "captions.csv: the file is not UTF-8 (invalid continuation byte). Save it as UTF-8.",
        ),
        ('file,caption\na.mp4,"x\n', "captions.csv:2: not CSV: unexpected end of data. Fix the line."),
        ('file,caption\na.mp4,"x"y\n', "captions.csv:2: not CSV: ',' expected after '\"'. Fix the line."),
        (
            "file,caption\na.mp4," + "x" * 200_000,
            "captions.csv:2: not CSV: field larger than field limit (131072). Fix the line.",
        ),
        ("file,caption\n,x\na.mp4,y\n ,z\n", "captions.csv: no file is named in rows 2, 4. Fill in the column"),
    ],
)
def test_a_file_that_cannot_be_read_as_rows_is_an_error_with_its_line(
    of_csv: Callable[..., Found], text: str | bytes, told: str
) -> None:
    (problem,) = refused(of_csv, text)
    assert problem.startswith(told)


def test_many_rows_without_a_file_are_counted(of_csv: Callable[..., Found]) -> None:
    (problem,) = refused(of_csv, "file,caption\n" + ",x\n" * 50)
    assert "no file is named in rows 2, 3, " in problem
    assert ", 21, and 30 more." in problem


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        found(dataset(captions="csv", captions_file=tmp_path / "none.csv"))


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8).filter(
    lambda name: name.strip() == name and "/" not in name and name not in (".", "..")
)
ROWS = st.lists(
    st.tuples(NAMES, st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)), max_size=20
)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS)
def test_whatever_the_names_rows_come_back_sorted_as_a_listing_is(
    tmp_path_factory, rows: list[tuple[str, str]]
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("file", "caption"), *rows])
    file = tmp_path_factory.mktemp("rows") / "captions.csv"
    file.write_bytes(text.getvalue().encode())
    expected: dict[str, list[str]] = {}
    for name, caption in rows:
        expected.setdefault(name, []).extend([" ".join(caption.split())] if caption.split() else [])
    plan = dataset(captions="csv", captions_file=file)
    assert found(plan) == [(name, Words(tuple(expected[name]))) for name in sorted(expected)]


def test_many_rows_are_never_all_in_memory(tmp_path: Path) -> None:
    file, many = tmp_path / "captions.csv", 20_000
    with file.open("w") as stream:
        stream.write("file,caption\n")
        stream.writelines(f"{(number * 7919) % many:06}.mp4,{'a long caption ' * 20}\n" for number in range(many))
    tracemalloc.start()
    rows = caption_rows(dataset(captions="csv", captions_file=file))
    count = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == many
    assert peak < 2 << 20  # the file has 6 MB


class Knowing:
    """A backend that is asked for the family's extras and those of others."""

    location = "/x"

    def __init__(self, **more: object) -> None:
        self.more = more

    def captions(self, extras: Sequence[str] = ()) -> Iterator[tuple[str, Words]]:
        assert extras == ("motion_score", "camera")
        yield "a.mp4", Words(("a", " "), {"motion_score": 3.0, **self.more}, "list:3")
        yield "b.mp4", Words(("b",), {"motion_score": 3.5, **self.more}, "list:7")


def test_a_backends_own_captions_are_taken_with_the_extras_that_the_family_reads() -> None:
    assert found(dataset(Knowing())) == [
        ("a.mp4", Words(("a",), {"motion_score": 3})),
        ("b.mp4", "its motion score '3.5' in list:7 is no whole number from 0 on: write one such as 30"),
    ]
    assert found(dataset(Knowing(), captions="textfile")) == []
    assert found(dataset(captions="textfile")) == []


@pytest.fixture
def of_parquet(tmp_path: Path) -> Callable[..., Found]:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")

    def of_parquet(columns: dict[str, Any], **table: Any) -> Found:
        file = tmp_path / "captions.parquet"
        parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
        return found(dataset(captions="parquet", captions_file=file, **table))

    return of_parquet


def test_parquet_has_texts_or_lists_of_texts(of_parquet: Callable[..., Found]) -> None:
    assert of_parquet(
        {"file": ["b.mp4", "a.mp4", "b.mp4"], "caption": ["x", None, "y"], "motion_score": [3, None, 3]}
    ) == [
        ("a.mp4", Words(())),
        ("b.mp4", Words(("x", "y"), {"motion_score": 3})),
    ]
    lists = {"clip": ["a.mp4", "b.mp4"], "texts": [["x", "y "], None], "motion_score": [3.0, 4.0]}
    assert of_parquet(lists, file_column="clip", caption_column="texts") == [
        ("a.mp4", Words(("x", "y"), {"motion_score": 3})),
        ("b.mp4", Words((), {"motion_score": 4})),
    ]


def test_parquet_of_other_types_is_each_clips_fault(of_parquet: Callable[..., Found]) -> None:
    assert of_parquet({"file": ["a.mp4", "b.mp4"], "caption": [3, 4], "motion_score": [0.5, 1.0]}) == [
        ("a.mp4", "its caption '3' is no text"),
        ("b.mp4", "its caption '4' is no text"),
    ]
    with pytest.raises(DataError, match="no file is named in rows 1, 2"):
        of_parquet({"file": [1, 2], "caption": ["x", "y"]})
    with pytest.raises(DataError, match='there is no column "file"'):
        of_parquet({"files": ["a.mp4"], "caption": ["x"]})


def test_what_is_no_parquet_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    for data in (b"", b"PAR1 and so on", b"file,caption\n"):
        (tmp_path / "captions.parquet").write_bytes(data)
        with pytest.raises(DataError, match="not a Parquet file that can be read"):
            found(dataset(captions="parquet", captions_file=tmp_path / "captions.parquet"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"camera": "still"},
            'this model family does not read "camera" (other does: an extra of another model family); 2 clips have it. '
            'Remove the column, or set data.ignore_extras = ["camera"] to train without it.',
        ),
        (
            {"motion_scroe": 5},
            'this model family does not read "motion_scroe" (no installed model family does); 2 clips have it. Did you mean '
            '"motion_score"? Remove the column, or set data.ignore_extras = ["motion_scroe"] to train without it.',
        ),
    ],
)
def test_an_extra_of_a_backend_that_the_family_does_not_read_is_an_error_with_its_place(
    more: dict[str, object], told: str
) -> None:
    with pytest.raises(DataError) as caught:
        found(dataset(Knowing(**more)))
    assert [(problem.where, f"{problem.what} {problem.remedy}") for problem in caught.value.problems] == [
        ("list:3", told)
    ]
    assert len(found(dataset(Knowing(**more), ignore_extras=list(more)))) == 2
    assert len(found(dataset(Knowing(**dict.fromkeys(more, " "))))) == 2, "blank is as good as absent"


def test_a_column_that_another_family_reads_is_an_error_and_other_columns_are_nobodys(
    of_csv: Callable[..., Found],
) -> None:
    text = "file,caption,url,camera\na.mp4,x,http://x,\nb.mp4,y,http://y,still\nc.mp4,z,,left\n"
    (problem,) = refused(of_csv, text)
    assert problem.startswith('captions.csv:3: this model family does not read "camera"')
    assert "; 2 clips have it." in problem
    assert of_csv(text.replace("still", "").replace("left", "")) == [
        (f"{name}.mp4", Words((text,))) for name, text in zip("abc", "xyz", strict=True)
    ]
