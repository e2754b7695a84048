from collections.abc import Mapping
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from vtrain_zip import ZipOptions, ZipPlace, vtrain_data_backends

from vtrain.contract import DataError
from vtrain.testing import DataBackendTests, PluginTests, SpecTests


def pack(path, files):
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


class TestZipPlugin(PluginTests):
    entry_module = "vtrain_zip"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {("data_backend", "zip"): {"path": "clips.zip"}}


class TestZipSpec(SpecTests):
    table: Mapping[str, object] = {"path": "clips.zip"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls):
        return vtrain_data_backends()[0]


class TestZip(DataBackendTests):
    @pytest.fixture
    def path(self, tmp_path, files):
        pack(tmp_path / "clips.zip", files)
        return tmp_path / "clips.zip"

    @pytest.fixture
    def backend(self, path):
        return ZipPlace(ZipOptions(path=path))

    @pytest.fixture
    def rewrite(self, path, files):
        return lambda name, data: pack(path, {**files, name: data})

    @pytest.fixture
    def remove(self, path, files):
        return lambda name: pack(path, {other: data for other, data in files.items() if other != name})

    @pytest.fixture
    def missing(self, tmp_path):
        return ZipPlace(ZipOptions(path=tmp_path / "nowhere.zip"))

    @pytest.mark.parametrize("name", ["../clip.mp4", "/clip.mp4"])
    def test_a_name_that_leads_out_of_the_archive_is_an_error(self, path, backend, name):
        pack(path, {name: b""})
        with pytest.raises(DataError, match="leads out of the archive"):
            list(backend.refs())

    def test_what_is_no_archive_is_a_data_error_and_a_damaged_file_an_os_error(self, path, backend):
        ref = next(backend.refs())
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataError, match="not a zip file"):
            list(backend.refs())
        with pytest.raises(OSError, match="not a zip file"):
            backend.open(ref)
