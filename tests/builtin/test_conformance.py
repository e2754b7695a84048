"""The built-in parts on the conformance kit, like anyone's."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import DataBackend, Sampler, Spec
from vtrain.testing import DataBackendTests, PluginTests, SamplerTests, SpecTests
from vtrain.testing.data_backend import FILES
from vtrain_builtin.plugin import ADAMW, FLOW, FOLDER, FRAMES, TAR, TENSORBOARD
from vtrain_builtin.quicktime import header


class TestPlugin(PluginTests):
    entry_module = "vtrain_builtin.plugin"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {
        ("data_backend", "folder"): {"path": "clips"},
        ("data_backend", "frames"): {"path": "shots", "fps": 24.0},
        ("data_backend", "tar"): {"path": "shards/clips-{000..011}.tar"},
    }


class TestFlowSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FLOW


class TestAdamWSpec(SpecTests):
    table: Mapping[str, object] = {"lr": 1e-4}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return ADAMW


class TestTensorBoardSpec(SpecTests):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return TENSORBOARD


class TestFolderSpec(SpecTests):
    table: Mapping[str, object] = {"path": "clips"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FOLDER


class TestFramesSpec(SpecTests):
    table: Mapping[str, object] = {"path": "shots", "fps": 24.0}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return FRAMES


class TestTarSpec(SpecTests):
    table: Mapping[str, object] = {"path": "shards"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> Spec:
        return TAR


class TestFlow(SamplerTests):
    tolerance = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return FLOW.build(FLOW.options(), {})


class TestUniformShiftedFlow(SamplerTests):
    tolerance = 1e-5

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls) -> Sampler:
        return FLOW.build(FLOW.options(distribution="uniform", shift=3.0, sampling_shift=8.0), {})


class TestFolder(DataBackendTests):
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
