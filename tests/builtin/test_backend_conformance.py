"""The built-in data backends on the conformance kit, local, in memory and on S3."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from vtrain.contract import DataBackend, Words
from vtrain.testing import DataBackendTests
from vtrain.testing.data_backend import FILES
from vtrain_builtin.frames import header
from vtrain_builtin.plugin import FOLDER, FRAMES, MANIFEST, TAR


class TestFolder(DataBackendTests):
    expects = frozenset({"SupportsFiles"})

    @pytest.fixture
    def place(self, tmp_path: Path, files: Mapping[str, bytes]) -> Path:
        for name, data in files.items():
            (tmp_path / "place" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "place" / name).write_bytes(data)
        return tmp_path / "place"

    @pytest.fixture
    def backend(self, place: Path) -> DataBackend:
        return FOLDER.build(FOLDER.options(path=str(place)))

    @pytest.fixture
    def rewrite(self, place: Path) -> Callable[[str, bytes], None]:
        def replace(name: str, data: bytes) -> None:
            (place / name).write_bytes(data)

        return replace

    @pytest.fixture
    def remove(self, place: Path) -> Callable[[str], None]:
        return lambda name: (place / name).unlink()

    @pytest.fixture
    def missing(self, tmp_path: Path) -> DataBackend:
        return FOLDER.build(FOLDER.options(path=str(tmp_path / "nowhere")))


class TestFrames(DataBackendTests):
    """Two folders of images among other files; what their clips hold is told by tests of their own."""

    rewritten = "deep/er/shot.mov"

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        place = tmp_path / "place"
        for name, data in FILES.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        for shot in ("shot", "deep/er/shot"):
            (place / shot).mkdir()
            for number in range(8, 12):
                (place / shot / f"{number}.png").write_bytes(f"{shot} {number}".encode())
        return place

    @pytest.fixture
    def files(self, place: Path) -> Mapping[str, bytes]:
        shots = {}
        for shot in ("shot", "deep/er/shot"):
            images = [f"{shot} {number}".encode() for number in range(8, 12)]
            shots[f"{shot}.mov"] = header(b"png ", [len(image) for image in images], Fraction(24)) + b"".join(images)
        return {**FILES, **shots}

    @pytest.fixture
    def backend(self, place: Path) -> DataBackend:
        return FRAMES.build(FRAMES.options(path=str(place), fps=24.0))

    @pytest.fixture
    def rewrite(self, place: Path) -> Callable[[str, bytes], None]:
        def replace(name: str, data: bytes) -> None:
            (place / name.removesuffix(".mov") / "9.png").write_bytes(b"another ")

        return replace

    @pytest.fixture
    def remove(self, place: Path) -> Callable[[str], None]:
        return lambda name: [image.unlink() for image in (place / name.removesuffix(".mov")).iterdir()] and None

    @pytest.fixture
    def missing(self, tmp_path: Path) -> DataBackend:
        return FRAMES.build(FRAMES.options(path=str(tmp_path / "nowhere"), fps=24.0))


class TestFolderInMemory(DataBackendTests):
    """fsspec's own storage in memory."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Iterator[str]:
        import fsspec

        root = f"/{tmp_path.name}"
        yield root
        memory = fsspec.filesystem("memory")
        if memory.exists(root):
            memory.rm(root, recursive=True)

    @pytest.fixture
    def backend(self, root: str, files: Mapping[str, bytes]) -> DataBackend:
        import fsspec

        fsspec.filesystem("memory").pipe({f"{root}/{name}": data for name, data in files.items()})
        return FOLDER.build(FOLDER.options(path=f"memory:/{root}"))

    @pytest.fixture
    def rewrite(self, root: str) -> Callable[[str, bytes], None]:
        import fsspec

        return lambda name, data: fsspec.filesystem("memory").pipe(f"{root}/{name}", data)

    @pytest.fixture
    def remove(self, root: str) -> Callable[[str], None]:
        import fsspec

        return lambda name: fsspec.filesystem("memory").rm(f"{root}/{name}")

    @pytest.fixture
    def missing(self, root: str) -> DataBackend:
        return FOLDER.build(FOLDER.options(path=f"memory:/{root}/nowhere"))


class TestFolderOnS3(DataBackendTests):
    """A server that speaks S3, on loopback."""

    secrets = ("a-test",)

    @pytest.fixture
    def backend(self, bucket: Any, files: Mapping[str, bytes]) -> DataBackend:
        bucket.put(
            {f"clips/{name}": data for name, data in files.items()} | {"clips.txt": b"no", "clipsx/a.txt": b"no"}
        )
        return self.on(bucket, "clips")

    @pytest.fixture
    def rewrite(self, bucket: Any) -> Callable[[str, bytes], None]:
        return lambda name, data: bucket.put({f"clips/{name}": data})

    @pytest.fixture
    def missing(self, bucket: Any) -> DataBackend:
        return self.on(bucket, "nowhere")

    @staticmethod
    def on(bucket: Any, prefix: str) -> DataBackend:
        options = FOLDER.options(path=f"s3://{bucket.name}/{prefix}", storage_options={"endpoint_url": bucket.endpoint})
        return FOLDER.build(options)


def in_shards(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Tar files, by the first part of each id."""
    made: dict[str, io.BytesIO] = {}
    tars: dict[str, tarfile.TarFile] = {}
    for name, data in sorted(files.items(), reverse=True):
        shard, _, member = name.partition("/")
        if shard not in tars:
            made[shard] = io.BytesIO()
            tars[shard] = tarfile.open(fileobj=made[shard], mode="w")  # noqa: SIM115 (closed below)
        info = tarfile.TarInfo(member)
        info.size = len(data)
        tars[shard].addfile(info, io.BytesIO(data))
    for tar in tars.values():
        tar.close()
    return {shard: target.getvalue() for shard, target in made.items()}


class Sharded(DataBackendTests):
    """Files in two tar files."""

    rewritten = "two.tar/deep/er/clip.mp4"

    @pytest.fixture
    def files(self) -> Mapping[str, bytes]:
        return {f"{'two' if 'deep' in name else 'one'}.tar/{name}": data for name, data in FILES.items()}


class TestTar(Sharded):
    expects = frozenset({"SupportsShards"})

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path / "shards"

    @pytest.fixture
    def backend(self, place: Path, files: Mapping[str, bytes]) -> DataBackend:
        place.mkdir()
        for name, data in in_shards(files).items():
            (place / name).write_bytes(data)
        return TAR.build(TAR.options(path=str(place)))

    @pytest.fixture
    def rewrite(self, place: Path, files: Mapping[str, bytes]) -> Callable[[str, bytes], None]:
        def replace(name: str, data: bytes) -> None:
            shard = name.partition("/")[0]
            (place / shard).write_bytes(in_shards({**files, name: data})[shard])

        return replace

    @pytest.fixture
    def remove(self, place: Path, files: Mapping[str, bytes]) -> Callable[[str], None]:
        def leave(name: str) -> None:
            left = {other: data for other, data in files.items() if other != name}
            shard = name.partition("/")[0]
            (place / shard).write_bytes(in_shards(left)[shard])

        return leave

    @pytest.fixture
    def missing(self, tmp_path: Path) -> DataBackend:
        return TAR.build(TAR.options(path=str(tmp_path / "nowhere" / "shard-{000..011}.tar")))


class TestTarOnS3(Sharded):
    @pytest.fixture
    def backend(self, bucket: Any, files: Mapping[str, bytes]) -> DataBackend:
        bucket.put({f"shards/{name}": data for name, data in in_shards(files).items()})
        return self.on(bucket, "shards/*.tar")

    @pytest.fixture
    def rewrite(self, bucket: Any, files: Mapping[str, bytes]) -> Callable[[str, bytes], None]:
        def replace(name: str, data: bytes) -> None:
            shard = name.partition("/")[0]
            bucket.put({f"shards/{shard}": in_shards({**files, name: data})[shard]})

        return replace

    @pytest.fixture
    def missing(self, bucket: Any) -> DataBackend:
        return self.on(bucket, "nowhere/*.tar")

    @staticmethod
    def on(bucket: Any, path: str) -> DataBackend:
        options = TAR.options(path=f"s3://{bucket.name}/{path}", storage_options={"endpoint_url": bucket.endpoint})
        return TAR.build(options)


CAPTIONS: Mapping[str, Words] = {
    "b.mp4": Words(("a red ball", "a ball, that is red")),
    "deep/er/clip.mp4": Words(('a "blue" ball',)),
}


def table(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """A row for each file, and for each of its captions; in another order than that of ids."""
    made = []
    for name, data in sorted(files.items(), reverse=True):
        words = CAPTIONS.get(name.removeprefix("one.parquet/").removeprefix("two.parquet/"), Words(()))
        for text in words.texts or (None,):
            made.append({"path": name, "video": data, "caption": text, **words.extras})
    return made


def as_csv(files: Mapping[str, bytes]) -> str:
    target = io.StringIO(newline="")
    writer = csv.DictWriter(target, ["path", "caption"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(table(files))
    return target.getvalue()


def as_json_lines(files: Mapping[str, bytes]) -> str:
    return "".join(json.dumps({**row, "video": None}) + "\n" for row in table(files))


class Told(DataBackendTests):
    """With captions in a manifest."""

    @pytest.fixture
    def words(self) -> Mapping[str, Words]:
        return CAPTIONS


class TestManifest(Told):
    """Local paths in CSV."""

    expects = frozenset({"SupportsCaptions"})

    @pytest.fixture
    def backend(self, tmp_path: Path, files: Mapping[str, bytes]) -> DataBackend:
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        (tmp_path / "clips.csv").write_text(as_csv(files), encoding="utf-8")
        return MANIFEST.build(MANIFEST.options(path=str(tmp_path / "clips.csv")))

    @pytest.fixture
    def rewrite(self, tmp_path: Path) -> Callable[[str, bytes], None]:
        return lambda name, data: (tmp_path / name).write_bytes(data) and None

    @pytest.fixture
    def remove(self, tmp_path: Path) -> Callable[[str], None]:
        return lambda name: (tmp_path / name).unlink()

    @pytest.fixture
    def missing(self, tmp_path: Path) -> DataBackend:
        return MANIFEST.build(MANIFEST.options(path=str(tmp_path / "nowhere.csv")))


class TestManifestOnS3(Told):
    """JSON lines beside the clips, behind a URL."""

    @pytest.fixture
    def backend(self, bucket: Any, files: Mapping[str, bytes]) -> DataBackend:
        bucket.put({f"clips/{name}": data for name, data in files.items()})
        bucket.put({"clips/table.jsonl": as_json_lines(files).encode()})
        return self.on(bucket, "clips/table.jsonl")

    @pytest.fixture
    def rewrite(self, bucket: Any) -> Callable[[str, bytes], None]:
        return lambda name, data: bucket.put({f"clips/{name}": data})

    @pytest.fixture
    def missing(self, bucket: Any) -> DataBackend:
        return self.on(bucket, "clips/nowhere.jsonl")

    @staticmethod
    def on(bucket: Any, path: str) -> DataBackend:
        table = {"path": f"s3://{bucket.name}/{path}", "storage_options": {"endpoint_url": bucket.endpoint}}
        return MANIFEST.build(MANIFEST.options.model_validate(table))


def as_parquet(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Parquet files of two rows a group, by the first part of each id; a list of captions in each row."""
    made = {}
    for shard in sorted({name.partition("/")[0] for name in files}):
        own = {name: data for name, data in sorted(files.items(), reverse=True) if name.startswith(shard)}
        words = [CAPTIONS.get(name.partition("/")[2], Words(())) for name in own]
        columns = {
            "name": [name.partition("/")[2] for name in own],
            "video": list(own.values()),
            "caption": [list(said.texts) or None for said in words],
        }
        target = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), target, row_group_size=2)
        made[shard] = target.getvalue()
    return made


class TestManifestOfBytes(Told):
    """Parquet files that hold the clips themselves."""

    rewritten = "two.parquet/deep/er/clip.mp4"

    @pytest.fixture
    def files(self) -> Mapping[str, bytes]:
        videos = {name: data for name, data in FILES.items() if name.endswith(".mp4")}
        return {f"{'two' if 'deep' in name else 'one'}.parquet/{name}": data for name, data in videos.items()}

    @pytest.fixture
    def words(self) -> Mapping[str, Words]:
        return {f"{'two' if 'deep' in name else 'one'}.parquet/{name}": said for name, said in CAPTIONS.items()}

    @pytest.fixture
    def backend(self, tmp_path: Path, files: Mapping[str, bytes]) -> DataBackend:
        for name, data in as_parquet(files).items():
            (tmp_path / name).write_bytes(data)
        return self.at(tmp_path)

    @pytest.fixture
    def rewrite(self, tmp_path: Path, files: Mapping[str, bytes]) -> Callable[[str, bytes], None]:
        def replace(name: str, data: bytes) -> None:
            shard = name.partition("/")[0]
            (tmp_path / shard).write_bytes(as_parquet({**files, name: data})[shard])

        return replace

    @pytest.fixture
    def remove(self, tmp_path: Path) -> Callable[[str], None]:
        return lambda name: (tmp_path / name.partition("/")[0]).unlink()

    @pytest.fixture
    def missing(self, tmp_path: Path) -> DataBackend:
        return self.at(tmp_path / "nowhere")

    @staticmethod
    def at(place: Path) -> DataBackend:
        columns = {"bytes": "video", "id": "name"}
        return MANIFEST.build(MANIFEST.options.model_validate({"path": str(place), "columns": columns}))
