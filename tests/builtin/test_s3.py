"""The folder backend on a server that speaks S3, through a network that drops, stalls and answers "busy"."""

from __future__ import annotations

import io
import random
import re
import time
import tracemalloc
from typing import Any

import pytest

from vtrain.contract import DataError, SourceRef
from vtrain_builtin import place as attempts
from vtrain_builtin.folder import FOLDER, RemoteFolder
from vtrain_builtin.seekable import LARGEST_BLOCK, RemoteFile

RANGE = re.compile(rb"bytes=(\d+)-(\d+)")
CLIP = random.Random(1).randbytes(6_000_000)


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_FIRST_WAIT", 0.01)


def place(bucket: Any, prefix: str = "clips", *, endpoint: str | None = None, **options: object) -> RemoteFolder:
    path = f"s3://{bucket.name}/{prefix}" if prefix else f"s3://{bucket.name}"
    table = {"path": path, "storage_options": {"endpoint_url": endpoint or bucket.endpoint}, **options}
    return FOLDER.build(FOLDER.options.model_validate(table))


def listed(folder: RemoteFolder) -> list[str]:
    return [ref.id for ref in folder.refs()]


def problem(folder: RemoteFolder) -> str:
    with pytest.raises(DataError) as caught:
        listed(folder)
    return str(caught.value)


@pytest.fixture
def clip(bucket: Any) -> SourceRef:
    bucket.put({"clips/long.mp4": CLIP})
    return next(place(bucket).refs())


def test_more_files_than_a_page_holds_are_listed_in_order(bucket: Any) -> None:
    names = {f"{n % 7}/{n:05}.mp4" for n in range(1003)}
    for name in {*names, "0/"}:
        bucket.put_fast(f"clips/{name}")
    assert listed(place(bucket)) == sorted(names)


def test_a_whole_bucket_is_a_dataset(bucket: Any) -> None:
    bucket.put({"a.mp4": b"a", "b/c.mp4": b"c"})
    assert listed(place(bucket, "")) == ["a.mp4", "b/c.mp4"]


def test_the_version_is_the_storages_own_tag(bucket: Any, clip: SourceRef) -> None:
    assert clip.version == f"ETag {bucket.client.head_object(Bucket=bucket.name, Key='clips/long.mp4')['ETag']}"


def test_a_place_is_named_with_the_server_it_is_on(bucket: Any) -> None:
    assert place(bucket).location == f"s3+{bucket.endpoint}/{bucket.name}/clips"


def test_a_connection_that_drops_in_the_middle_of_a_file_is_made_again(
    bucket: Any, clip: SourceRef, proxy: Any, fault: Any
) -> None:
    proxy.match = b"long.mp4"
    proxy.faults.extend([fault("drop", 100_000), fault("drop", 1_000), fault("drop", 0)])
    with place(bucket, endpoint=proxy.url).open(clip) as file:
        assert file.read() == CLIP
    assert not proxy.faults


def test_a_connection_that_drops_again_and_again_is_an_os_error_that_says_so(
    bucket: Any, clip: SourceRef, proxy: Any, fault: Any
) -> None:
    proxy.match = b"long.mp4"
    folder = place(bucket, endpoint=proxy.url, retries=2)
    with folder.open(clip) as file:
        file.read(1000)
        proxy.faults.extend([fault("drop", 1000)] * 3)
        with pytest.raises(OSError, match=r"3 times") as caught:
            file.read()
    assert isinstance(caught.value, attempts.StorageError)
    assert not proxy.faults


@pytest.mark.parametrize("status", ["500", "503"])
def test_a_server_that_is_busy_is_asked_again(
    bucket: Any, clip: SourceRef, proxy: Any, fault: Any, status: str
) -> None:
    folder = place(bucket, endpoint=proxy.url)
    proxy.match = b"list-type=2"
    proxy.faults.extend([fault(status)] * 3)
    assert listed(folder) == ["long.mp4"]
    assert len(proxy.requests) == 4
    proxy.match = b"long.mp4"
    proxy.faults.append(fault(status))
    with folder.open(clip) as file:
        assert file.read(100) == CLIP[:100]
    assert not proxy.faults


def test_a_server_that_stays_busy_is_an_error_that_counts_the_tries(bucket: Any, proxy: Any, fault: Any) -> None:
    proxy.match = b"list-type=2"
    proxy.faults.extend([fault("503")] * 9)
    text = problem(place(bucket, endpoint=proxy.url, retries=3))
    assert "4 times" in text
    assert len(proxy.requests) == 4


def test_a_server_that_says_nothing_is_given_up_after_the_time_out(
    bucket: Any, clip: SourceRef, proxy: Any, fault: Any
) -> None:
    proxy.match = b"list-type=2"
    proxy.faults.append(fault("stall"))
    # More tries than stalls: on a busy machine the server's own answer may take longer than that too.
    assert listed(place(bucket, endpoint=proxy.url, timeout=2, retries=8)) == ["long.mp4"]
    proxy.match = b"long.mp4"
    proxy.faults.extend([fault("stall")] * 2)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"no answer within 2 s, 2 times"):
        place(bucket, endpoint=proxy.url, timeout=2, retries=1).open(clip)
    assert time.monotonic() - began < 60  # the proxy would hold it for good


def test_a_server_that_is_not_there_is_an_error(bucket: Any) -> None:
    text = problem(place(bucket, endpoint="http://127.0.0.1:9", retries=1))
    assert "cannot be listed" in text
    assert "127.0.0.1:9" in text


def test_a_missing_bucket_and_a_missing_prefix_are_errors_that_say_so(bucket: Any) -> None:
    bucket.put({"clips/a.mp4": b"a"})
    for missing in (place(bucket, "clip"), place(bucket, "clips/a.mp4")):
        text = problem(missing)
        assert "does not exist" in text
        assert "Set data.path" in text
    other = type(bucket)("no-such-bucket", bucket.endpoint, bucket.client)
    assert "bucket does not exist" in problem(place(other))


def test_without_credentials_the_error_names_the_variables(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    text = problem(place(bucket))
    assert "Unable to locate credentials" in text
    assert "AWS_ACCESS_KEY_ID" in text
    assert "anon = true" in text


def test_wrong_credentials_are_an_error_that_names_the_variables(bucket: Any, proxy: Any) -> None:
    proxy.match = b"list-type=2"
    with bucket.checked_credentials():
        text = problem(place(bucket, endpoint=proxy.url))
    assert "Access Key Id you provided does not exist" in text
    assert "Check the credentials in the environment" in text
    assert len(proxy.requests) == 1, "a refusal is asked once"


def test_a_file_that_is_gone_is_an_os_error_and_asked_for_once(bucket: Any, clip: SourceRef, proxy: Any) -> None:
    bucket.client.delete_object(Bucket=bucket.name, Key="clips/long.mp4")
    proxy.match = b"long.mp4"
    with pytest.raises(OSError, match="key does not exist"):
        place(bucket, endpoint=proxy.url).open(clip)
    assert len(proxy.requests) == 1


def test_reading_the_end_of_a_file_reads_no_more_than_that(bucket: Any, clip: SourceRef, proxy: Any) -> None:
    proxy.match = b"long.mp4"
    with place(bucket, endpoint=proxy.url).open(clip) as file:
        file.seek(-1000, 2)
        assert file.read() == CLIP[-1000:]
    assert [RANGE.findall(head) for head in proxy.requests] == [[(b"0", b"262143")], [(b"5999000", b"5999999")]]


def test_a_long_file_is_read_by_ranges_of_eight_mebibytes_at_most(bucket: Any, proxy: Any) -> None:
    bucket.put({"clips/long.mp4": bytes(40_000_000)})
    folder = place(bucket, endpoint=proxy.url)
    proxy.match = b"long.mp4"
    with folder.open(next(folder.refs())) as file:
        assert sum(len(part) for part in iter(lambda: file.read(1 << 16), b"")) == 40_000_000
    ranges = [tuple(map(int, RANGE.findall(head)[0])) for head in proxy.requests]
    assert [last + 1 for _, last in ranges] == [first for first, _ in ranges[1:]] + [40_000_000]
    assert max(last + 1 - first for first, last in ranges) == LARGEST_BLOCK == 8 << 20


def test_an_open_file_holds_a_block_and_not_the_file() -> None:
    tracemalloc.start()
    file = io.BufferedReader(RemoteFile(lambda start, end: bytes(end - start), 200_000_000))
    while file.read(1 << 16):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * LARGEST_BLOCK, f"{peak:,} bytes for 200,000,000, and what the server's threads still hold"


def test_secrets_do_not_stand_in_the_table(bucket: Any) -> None:
    for options in ({"key": "k", "secret": "s"}, {"client_kwargs": {"aws_secret_access_key": "s"}}, {"token": "t"}):
        with pytest.raises(ValueError, match="secrets come from the environment"):
            FOLDER.options.model_validate({"path": "s3://b/c", "storage_options": options})
