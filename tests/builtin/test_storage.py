"""Folders behind URLs: web servers, and file systems that fail in their own ways."""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import quote, unquote, urlsplit

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vtrain.contract import DataError, SourceRef
from vtrain_builtin import attempts
from vtrain_builtin.folder import FOLDER, RemoteFolder
from vtrain_builtin.manifest import MANIFEST
from vtrain_builtin.place import Redaction
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

    busy: path -> how many more requests are answered with 503.
    """

    token: ClassVar[str] = ""
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


def folder(url: str, **options: object) -> RemoteFolder:
    built = FOLDER.build(FOLDER.options.model_validate({"path": url, **options}))
    assert isinstance(built, RemoteFolder)
    return built


def content(place: RemoteFolder) -> dict[str, bytes]:
    found = {}
    for ref in place.refs():
        with place.open(ref) as file:
            found[ref.id] = file.read()
    return found


def problem(place: RemoteFolder) -> str:
    with pytest.raises(DataError) as caught:
        list(place.refs())
    return str(caught.value)


def test_the_index_pages_of_a_web_server_are_a_folder(site: str) -> None:
    place = folder(f"{site}/clips")
    assert content(place) == FILES
    refs = list(place.refs())
    assert [ref.id for ref in refs] == sorted(FILES)
    assert {ref.id: ref.size for ref in refs} == {name: len(data) for name, data in FILES.items()}
    assert all(ref.version.startswith("ETag") for ref in refs)


def test_a_web_server_without_such_a_folder_is_an_error(site: str) -> None:
    assert "does not exist" in problem(folder(f"{site}/other"))


def test_a_busy_web_server_is_asked_again_for_details_too(site: str) -> None:
    Site.busy.update({"/clips/": 2, "/clips/sub.mp4": 6, "/clips/b.mp4": 3})
    assert content(folder(f"{site}/clips")) == FILES
    assert not Site.busy.total()


def test_a_file_whose_details_cannot_be_had_is_told_with_the_reason(site: str) -> None:
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


def test_a_query_goes_with_every_request_and_is_never_shown(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_server_without_ranges_is_told_and_not_misread(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("https://me:secret@host/clips/?token=abc#x", "https://host/clips"),
        ("s3://bucket/clips/", "s3://bucket/clips"),
        ("zip://::https://me:secret@host/a.zip?sig=abc", "zip://::https://host/a.zip"),
        ("sftp://user:pa%2Fss@host:22/clips", "sftp://host:22/clips"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, location: str) -> None:
    redaction = Redaction(url)
    assert redaction.location == location
    shown = redaction(f"cannot open {url}")
    assert not [secret for secret in ("secret", "abc", "pa/ss", "pa%2Fss") if secret in shown]


class Flaky(MemoryFileSystem):
    """Fails as `faults` says: (method, exception) is raised once, in this order."""

    protocol = "flaky"
    faults: ClassVar[list[tuple[str, Exception]]] = []
    calls: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def _maybe(self, method: str) -> None:
        self.calls[method] += 1
        if self.faults and self.faults[0][0] == method:
            raise self.faults.pop(0)[1]

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._maybe("ls")
        return super().ls(path, detail, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._maybe("open")
        opened = super()._open(path, mode, **kwargs)
        return opened if mode != "rb" else Dropping(self, opened)


class Dropping:
    """An open file of the flaky file system."""

    def __init__(self, system: Flaky, opened: Any) -> None:
        self._system, self._opened = system, opened

    def seek(self, place: int) -> int:
        return int(self._opened.seek(place))

    def read(self, size: int) -> bytes:
        self._system._maybe("read")
        return bytes(self._opened.read(size))


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    monkeypatch.setattr(attempts, "_FIRST_WAIT", 0.001)
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.faults.clear()
    Flaky.calls.clear()
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/flaky-place/{name}": data for name, data in FILES.items()})
    yield Flaky
    memory.rm("/flaky-place", recursive=True)


class StatusError(Exception):
    """As aiohttp and huggingface_hub raise them."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server said {status}")
        self.status = status


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("reset"), TimeoutError(), OSError(5, "Input/output error"), StatusError(503), StatusError(429),
     EOFError("short"), RuntimeError("session is closed")],
    ids=str,
)  # fmt: skip
def test_what_passes_is_tried_again(flaky: type[Flaky], error: Exception) -> None:
    flaky.faults[:] = [("ls", error), ("ls", error), ("open", error), ("read", error)]
    assert content(folder("flaky://flaky-place")) == FILES
    assert not flaky.faults


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "Check the credentials"),
        (StatusError(401), "Check the credentials"),
        (StatusError(404), "the server said 404"),
        (ImportError("Install it to use it"), "Install the package"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), "Check the credentials"),
        (ValueError("no such option"), "no such option"),
    ],
    ids=str,
)
def test_what_lasts_is_told_at_once(flaky: type[Flaky], error: Exception, words: str) -> None:
    flaky.faults[:] = [("ls", error)]
    assert words in problem(folder("flaky://flaky-place"))
    assert flaky.calls["ls"] == 1


def test_a_drop_in_the_middle_of_a_file_goes_on_where_it_broke_off(flaky: type[Flaky]) -> None:
    place = folder("flaky://flaky-place")
    ref = next(ref for ref in place.refs() if ref.id == "b.mp4")
    with place.open(ref) as file:
        start = file.read(300_000)
        flaky.faults[:] = [("read", ConnectionResetError("reset")), ("open", TimeoutError())]
        assert start + file.read() == FILES["b.mp4"]
    assert not flaky.faults


def test_a_file_that_ends_before_its_listed_size_is_an_os_error(flaky: type[Flaky]) -> None:
    place = folder("flaky://flaky-place", retries=1)
    with pytest.raises(OSError, match="ends at byte 6, before its listed size"):
        place.open(SourceRef("sub.mp4", 600, "")).read()


def test_an_interrupt_ends_the_waiting(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attempts.time, "sleep", interrupted)
    flaky.faults[:] = [("ls", ConnectionResetError("reset"))]
    with pytest.raises(KeyboardInterrupt):
        list(folder("flaky://flaky-place").refs())


def test_waits_between_tries_double_up_to_a_limit(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(attempts.time, "sleep", waits.append)
    monkeypatch.setattr(attempts, "_FIRST_WAIT", 0.25)
    flaky.faults[:] = [("ls", ConnectionResetError("reset"))] * 8
    assert "8 times" in problem(folder("flaky://flaky-place", retries=7))
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 8]


def test_a_place_that_is_a_file_is_an_error(flaky: type[Flaky]) -> None:
    assert "it is a file, not a folder" in problem(folder("flaky://flaky-place/b.mp4"))


def test_only_one_folder_is_listed_before_the_first_file_comes(flaky: type[Flaky]) -> None:
    refs = folder("flaky://flaky-place").refs()
    assert next(refs).id == "a clip, é #1.mp4"
    assert flaky.calls["ls"] == 1
    assert [ref.id for ref in refs] == sorted(FILES)[1:]
    assert flaky.calls["ls"] == 3


def test_a_backend_goes_to_another_process(flaky: type[Flaky]) -> None:
    place = folder("flaky://flaky-place")
    ref = next(place.refs())
    with pickle.loads(pickle.dumps(place)).open(ref) as file:  # noqa: S301 (our own)
        assert file.read() == FILES[ref.id]


def test_a_file_url_is_a_local_folder(tmp_path: Any) -> None:
    (tmp_path / "a b.mp4").write_bytes(b"x")
    built = FOLDER.build(FOLDER.options(path=f"file://{quote(str(tmp_path))}"))
    assert built.location == str(tmp_path)
    assert [ref.id for ref in built.refs()] == ["a b.mp4"]


def test_storage_options_are_for_urls_and_hold_no_secrets(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="path is a local one"):
        FOLDER.options(path=str(tmp_path), storage_options={"anon": True})
    assert FOLDER.options(path="s3://b/c", storage_options={"anon": True}).storage_options == {"anon": True}


def test_what_says_where_secrets_come_from_is_no_secret() -> None:
    assert FOLDER.options(path="gs://b/c", storage_options={"token": "anon"}).storage_options == {"token": "anon"}
    with pytest.raises(ValueError, match="token: secrets come from the environment"):
        FOLDER.options(path="gs://b/c", storage_options={"token": "ya29.a0"})


def test_folders_that_lead_back_end(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(self: Flaky, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return [{"name": f"{self._strip_protocol(path).rstrip('/')}/again", "type": "directory", "size": 0}]

    monkeypatch.setattr(Flaky, "ls", endless)
    assert "does a link lead back?" in problem(folder("flaky://flaky-place"))


def test_patterns_of_one_folder_are_different_places() -> None:
    places = {TAR.build(TAR.options(path=f"s3://b/s-{rest}.tar")).location for rest in ("?", "?a", "{1..2}", "*")}
    assert places == {"s3://b/s-?.tar", "s3://b/s-?a.tar", "s3://b/s-{1..2}.tar", "s3://b/s-*.tar"}
