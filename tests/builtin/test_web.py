"""Folders, shards and manifests behind the index pages of a web server."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote, urlsplit

import pytest
from fsspec import config

from vtrain.contract import SourceRef
from vtrain_builtin import place as attempts
from vtrain_builtin.manifest import MANIFEST
from vtrain_builtin.tar import TAR

FILES: dict[str, bytes] = {
    "b.mp4": bytes(range(256)) * 4000,
    "a clip, é #1.mp4": b"first",
    "sub/deep/c.mp4": b"c",
    "sub.mp4": b"beside",
}


TOKEN = "tok3n-value"


class Site(BaseHTTPRequestHandler):
    """An index page for each folder, files with ETags and ranges. token: asked for in the query, if set.

    login: "user:password", asked for, if set. busy: path -> how many more requests are answered with 503.
    """

    token: ClassVar[str] = ""
    login: ClassVar[str] = ""
    ranges: ClassVar[bool] = True
    busy: ClassVar[Counter[str]] = Counter()
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        parts = urlsplit(self.path)
        if self.busy[parts.path] > 0:
            self.busy[parts.path] -= 1
            self._answer(503, b"", {})
            return
        if self.token and f"token={self.token}" not in parts.query:
            self._answer(403, b"", {})
            return
        if self.login and self.headers.get("Authorization") != f"Basic {b64encode(self.login.encode()).decode()}":
            self._answer(401, b"", {})
            return
        name = unquote(parts.path).removeprefix("/clips").lstrip("/")
        data = FILES.get(name)
        if data is not None:
            self._file(data)
            return
        own = [file for file in FILES if file.startswith(name)] if name.endswith("/") or not name else []
        if not own or not parts.path.startswith("/clips"):
            self._answer(404, b"", {})
            return
        links = {file[len(name) :].partition("/")[0] + ("/" if "/" in file[len(name) :] else "") for file in own}
        page = '<a href="../">up</a><a href="?C=N;O=D">Name</a><a href="https://elsewhere.example/x.mp4">x</a>'
        page += "".join(f'<a href="{quote(link)}">{link}</a>' for link in links)
        self._answer(200, page.encode(), {"Content-Type": "text/html"})

    def _file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hash(data):x}"', "Content-Type": "video/mp4", "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.ranges:
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._answer(206, data[first : last + 1], headers)
        else:
            self._answer(200, data, headers)

    def _answer(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logging.getLogger("site").debug(format, *args)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(attempts, "_FIRST_WAIT", 0.01)
    Site.asked.clear()
    Site.busy.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_index_pages_of_a_web_server_are_a_folder(site: str, folder, content) -> None:
    place = folder(f"{site}/clips")
    assert content(place) == FILES
    refs = list(place.refs())
    assert [ref.id for ref in refs] == sorted(FILES)
    assert {ref.id: ref.size for ref in refs} == {name: len(data) for name, data in FILES.items()}
    assert all(ref.version.startswith("ETag") for ref in refs)


def test_a_web_server_without_such_a_folder_is_an_error(site: str, folder, problem) -> None:
    assert "does not exist" in problem(folder(f"{site}/other"))


def test_a_busy_web_server_is_asked_again_for_details_too(site: str, folder, content) -> None:
    Site.busy.update({"/clips/": 2, "/clips/sub.mp4": 6, "/clips/b.mp4": 3})
    assert content(folder(f"{site}/clips")) == FILES
    assert not Site.busy.total()


def test_a_file_whose_details_cannot_be_had_is_told_with_the_reason(site: str, folder) -> None:
    place = folder(f"{site}/clips", retries=1)
    Site.busy.update({"/clips/sub.mp4": 1000})
    refs = {ref.id: ref for ref in place.refs()}
    assert len(refs) == len(FILES)
    assert refs["sub.mp4"].size > 0, "a file of no bytes would be told to be empty"
    with pytest.raises(OSError, match=r"503.*2 times"):
        place.open(refs["sub.mp4"])
    Site.busy.clear()
    with place.open(refs["sub.mp4"]) as file:
        assert file.read() == b"beside"


def test_a_query_goes_with_every_request_and_is_never_shown(
    site: str, monkeypatch: pytest.MonkeyPatch, folder, content, problem
) -> None:
    monkeypatch.setattr(Site, "token", TOKEN)
    place = folder(f"{site}/clips/?token={TOKEN}")
    assert place.location == f"{site}/clips"
    assert content(place) == FILES
    for wrong in (folder(f"{site}/clips?token=wr0ng-value"), folder(f"{site}/clips?token=wr0ng-value", retries=0)):
        text = problem(wrong)
        assert "wr0ng-value" not in text
        assert "403" in text
    with pytest.raises(OSError, match=r"403|not found|Forbidden") as caught:
        folder(f"{site}/clips?token=wr0ng-value").open(SourceRef("b.mp4", 10, ""))
    assert "wr0ng-value" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_password_comes_from_netrc_where_the_environment_is_trusted(
    site: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder, content, problem
) -> None:
    monkeypatch.setattr(Site, "login", "me:s3cret")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert content(folder(f"{site}/clips", storage_options={"client_kwargs": {"trust_env": True}})) == FILES
    assert "401" in problem(folder(f"{site}/clips"))


def test_a_password_comes_from_the_environment_of_fsspec(
    site: str, monkeypatch: pytest.MonkeyPatch, folder, content
) -> None:
    monkeypatch.setattr(Site, "login", "me:s3cret")
    header = f"Basic {b64encode(b'me:s3cret').decode()}"
    environment = {"FSSPEC_HTTP": json.dumps({"headers": {"Authorization": header}})}
    found: dict[str, Any] = {}
    config.set_conf_env(found, environment)  # as fsspec does when it is imported
    monkeypatch.setattr(config, "conf", found)
    assert content(folder(f"{site}/clips")) == FILES


def test_a_server_without_ranges_is_told_and_not_misread(site: str, monkeypatch: pytest.MonkeyPatch, folder) -> None:
    monkeypatch.setattr(Site, "ranges", False)
    place = folder(f"{site}/clips")
    refs = {ref.id: ref for ref in place.refs()}
    with place.open(refs["sub.mp4"]) as file:
        assert file.read() == b"beside"
    with pytest.raises(OSError, match="knows no ranges"):
        place.open(refs["b.mp4"])


def test_a_list_of_urls_is_a_manifest(site: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Site, "token", TOKEN)
    urls = [f"{site}/clips/b.mp4?token={TOKEN}", f"{site}/clips/sub.mp4?token={TOKEN}"]
    (tmp_path / "urls.jsonl").write_text("".join(json.dumps({"path": url}) + "\n" for url in urls))
    place = MANIFEST.build(MANIFEST.options(path=str(tmp_path / "urls.jsonl")))
    refs = list(place.refs())
    assert TOKEN not in repr(refs)
    for ref, data in zip(refs, (FILES["b.mp4"], FILES["sub.mp4"]), strict=True):
        assert ref.id.startswith(f"{site}/clips/")
        with place.open(ref) as file:
            assert file.read() == data


def test_shards_and_manifests_of_a_web_server_are_read_with_its_query(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        info = tarfile.TarInfo("x.mp4")
        info.size = 700_000
        tar.addfile(info, io.BytesIO(FILES["b.mp4"]))
    table = b"path,caption\nsub.mp4,beside\nsub/deep/c.mp4,deep\n"
    monkeypatch.setitem(FILES, "shards/s-1.tar", target.getvalue())
    monkeypatch.setitem(FILES, "t.csv", table)
    monkeypatch.setattr(Site, "token", TOKEN)
    shards = TAR.build(TAR.options(path=f"{site}/clips/shards/s-{{1..2}}.tar?token={TOKEN}"))
    assert shards.location == f"{site}/clips/shards/s-{{1..2}}.tar"
    present, missing = shards.shards()
    assert missing.version == "missing"
    (member,) = shards.members(present)
    with shards.open(member) as file:
        assert file.read() == FILES["b.mp4"][:700_000]
    rows = MANIFEST.build(MANIFEST.options(path=f"{site}/clips/t.csv?token={TOKEN}"))
    refs = list(rows.refs())
    assert [ref.id for ref in refs] == ["sub.mp4", "sub/deep/c.mp4"]
    assert TOKEN not in repr((refs, member, shards.location, rows.location))
    with rows.open(refs[1]) as file:
        assert file.read() == b"c"
    assert dict(rows.captions())["sub.mp4"].texts == ("beside",)
