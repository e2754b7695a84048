"""Folders behind URLs, for the tests of web servers and of other file systems."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vtrain.contract import DataError
from vtrain_builtin.folder import FOLDER, RemoteFolder


def folder_at(url: str, **options: object) -> RemoteFolder:
    built = FOLDER.build(FOLDER.options.model_validate({"path": url, **options}))
    assert isinstance(built, RemoteFolder)
    return built


def content_of(place: RemoteFolder) -> dict[str, bytes]:
    found = {}
    for ref in place.refs():
        with place.open(ref) as file:
            found[ref.id] = file.read()
    return found


def problem_of(place: RemoteFolder) -> str:
    with pytest.raises(DataError) as caught:
        list(place.refs())
    return str(caught.value)


@pytest.fixture
def folder() -> Callable[..., RemoteFolder]:
    return folder_at


@pytest.fixture
def content() -> Callable[..., dict[str, bytes]]:
    return content_of


@pytest.fixture
def problem() -> Callable[..., str]:
    return problem_of
