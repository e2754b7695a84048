"""Copies beside the computation, on a stand-in for a card with streams: what waits for what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vtrain.contract import Device
from vtrain.contract.transfers import Transfers


class Streams:
    """Of torch's device module: streams, which note what is asked of them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.compute = self.Stream("compute")
        self._current = self.compute

    def Stream(self, name: str = "copies") -> Any:  # noqa: N802 (torch's own name)
        class Made:
            def record_event(made) -> str:  # noqa: N805
                return f"event of {name}"

            def wait_event(made, event: str) -> None:  # noqa: N805
                self.calls.append((f"{name} waits for", event))

            def __str__(made) -> str:  # noqa: N805
                return name

        return Made()

    def current_stream(self) -> Any:
        return self._current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self._current, before = stream, self._current
        yield
        self._current = before

    def set_device(self, index: int) -> None: ...

    def current_device(self) -> int:
        return 0

    def synchronize(self, index: int) -> None:
        self.calls.append(("synchronise", index))


@pytest.fixture
def streams(card: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    card(made)
    monkeypatch.setattr(Device, "torch", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        made.calls.append(("copied on", str(made.current_stream())))
        return plain(tensor, *where, **how)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: made.calls.append(("kept for", str(stream))))
    return made


CARD = Device("cuda", 0)


def test_weights_come_on_a_stream_of_their_own_and_are_waited_for_by_the_card_alone(streams: Streams) -> None:
    transfers = Transfers(CARD, beside=True)
    arriving = transfers.send([torch.ones(2)])
    assert streams.calls == [("copied on", "copies")]
    (found,) = transfers.receive(arriving)
    assert torch.equal(found, torch.ones(2))
    assert streams.calls[1:] == [("compute waits for", "event of copies"), ("kept for", "compute")]


def test_without_it_they_come_on_the_stream_that_computes(streams: Streams) -> None:
    transfers = Transfers(CARD)
    transfers.receive(transfers.send([torch.ones(2)]))
    assert streams.calls == [("copied on", "compute")]


def test_gradients_are_there_when_fetched_and_weights_are_not_waited_for(streams: Streams) -> None:
    source, target = torch.arange(3.0), torch.zeros(3)
    Transfers(CARD).put([(source, target)])
    assert streams.calls == []
    Transfers(CARD).fetch([(target, back := torch.zeros(3))])
    assert streams.calls == [("synchronise", 0)]
    assert torch.equal(back, source)


def test_a_device_without_streams_copies_as_it_can(card: Callable[..., Any]) -> None:
    card()
    assert not Transfers.streams(CARD)
    assert not Transfers.streams(Device())
    (found,) = (cpu := Transfers(Device(), beside=True)).receive(cpu.send([torch.ones(2)]))
    assert torch.equal(found, torch.ones(2))
