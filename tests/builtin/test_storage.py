"""Folders behind URLs: file systems that fail in their own ways, and secrets."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import quote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vtrain.contract import SourceRef
from vtrain_builtin import place as attempts
from vtrain_builtin.folder import FOLDER
from vtrain_builtin.place import Redaction
from vtrain_builtin.tar import TAR

FILES: dict[str, bytes] = {
    "b.mp4": bytes(range(256)) * 4000,
    "a clip, é #1.mp4": b"first",
    "sub/deep/c.mp4": b"c",
    "sub.mp4": b"beside",
}


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
def test_what_passes_is_tried_again(flaky: type[Flaky], error: Exception, folder, content) -> None:
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
def test_what_lasts_is_told_at_once(flaky: type[Flaky], error: Exception, words: str, folder, problem) -> None:
    flaky.faults[:] = [("ls", error)]
    assert words in problem(folder("flaky://flaky-place"))
    assert flaky.calls["ls"] == 1


def test_a_drop_in_the_middle_of_a_file_goes_on_where_it_broke_off(flaky: type[Flaky], folder) -> None:
    place = folder("flaky://flaky-place")
    ref = next(ref for ref in place.refs() if ref.id == "b.mp4")
    with place.open(ref) as file:
        start = file.read(300_000)
        flaky.faults[:] = [("read", ConnectionResetError("reset")), ("open", TimeoutError())]
        assert start + file.read() == FILES["b.mp4"]
    assert not flaky.faults


def test_a_file_that_ends_before_its_listed_size_is_an_os_error(flaky: type[Flaky], folder) -> None:
    place = folder("flaky://flaky-place", retries=1)
    with pytest.raises(OSError, match="ends at byte 6, before its listed size"):
        place.open(SourceRef("sub.mp4", 600, "")).read()


def test_an_interrupt_ends_the_waiting(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch, folder) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attempts.time, "sleep", interrupted)
    flaky.faults[:] = [("ls", ConnectionResetError("reset"))]
    with pytest.raises(KeyboardInterrupt):
        list(folder("flaky://flaky-place").refs())


def test_waits_between_tries_double_up_to_a_limit(
    flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch, folder, problem
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(attempts.time, "sleep", waits.append)
    monkeypatch.setattr(attempts, "_FIRST_WAIT", 0.25)
    flaky.faults[:] = [("ls", ConnectionResetError("reset"))] * 8
    assert "8 times" in problem(folder("flaky://flaky-place", retries=7))
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 8]


def test_a_place_that_is_a_file_is_an_error(flaky: type[Flaky], folder, problem) -> None:
    assert "it is a file, not a folder" in problem(folder("flaky://flaky-place/b.mp4"))


def test_only_one_folder_is_listed_before_the_first_file_comes(flaky: type[Flaky], folder) -> None:
    refs = folder("flaky://flaky-place").refs()
    assert next(refs).id == "a clip, é #1.mp4"
    assert flaky.calls["ls"] == 1
    assert [ref.id for ref in refs] == sorted(FILES)[1:]
    assert flaky.calls["ls"] == 3


def test_a_backend_goes_to_another_process(flaky: type[Flaky], folder) -> None:
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


def test_folders_that_lead_back_end(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch, folder, problem) -> None:
    def endless(self: Flaky, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return [{"name": f"{self._strip_protocol(path).rstrip('/')}/again", "type": "directory", "size": 0}]

    monkeypatch.setattr(Flaky, "ls", endless)
    assert "does a link lead back?" in problem(folder("flaky://flaky-place"))


def test_patterns_of_one_folder_are_different_places() -> None:
    places = {TAR.build(TAR.options(path=f"s3://b/s-{rest}.tar")).location for rest in ("?", "?a", "{1..2}", "*")}
    assert places == {"s3://b/s-?.tar", "s3://b/s-?a.tar", "s3://b/s-{1..2}.tar", "s3://b/s-*.tar"}


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("https://me:s3cret@host/clips", "~/.netrc, with storage_options = { client_kwargs = { trust_env = true } }"),
        ("zip://a::https://me:s3cret@host/a.zip", "~/.netrc"),
        ("s3://me:s3cret@bucket/clips", "AWS_PROFILE"),
        ("sftp://me:s3cret@host:22/clips", "FSSPEC_SFTP_PASSWORD"),
        ("https://me:s3cret/3@host/clips", "not a URL"),
    ],
)
def test_a_password_in_a_url_is_refused_with_the_place_where_it_goes(url: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(remedy)):
        FOLDER.options(path=url)


def test_storage_options_may_hold_no_password_within_a_url() -> None:
    for options in ({"endpoint_url": "https://me:s3cret@host"}, {"client_kwargs": {"proxies": ["http://a:b@host"]}}):
        with pytest.raises(ValueError, match=r"endpoint_url|proxies"):
            FOLDER.options(path="s3://b/c", storage_options=options)


def test_a_repository_behind_a_scheme_is_no_password() -> None:
    assert FOLDER.options(path="github://owner:name@main/clips").path == "github://owner:name@main/clips"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://host/clips?token=abc#part", "https://host/clips?***#***"),
        ("zip://::https://me@host/a.zip?sig=abc", "zip://::https://***@host/a.zip?***"),
        ("abfs://box@account.dfs.core.windows.net/a?sv=1&sig=abc", "abfs://***@account.dfs.core.windows.net/a?***"),
        ("s3://bucket/s-?{1..2}#*.tar", "s3://bucket/s-?{1..2}#*.tar"),
        ("github://owner:name@main/clips", "github://owner:name@main/clips"),
    ],
)
def test_what_is_shown_and_kept_of_a_url_has_no_secrets_and_what_is_used_has_all(url: str, told: str) -> None:
    options = TAR.options(path=url, storage_options={"endpoint_url": "https://host?token=abc"})
    plain = options.model_dump(mode="json")
    assert options.path == url
    assert plain["path"] == told
    assert plain["storage_options"] == {"endpoint_url": "https://host?***"}
