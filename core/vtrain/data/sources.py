"""Bringing the ledger's knowledge of a place up to date: only new and changed files are opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from vtrain.contract import DataBackend, SourceRef
from vtrain.data import captions
from vtrain.data.ledger import Ledger, Source
from vtrain.data.probe import probe
from vtrain.data.video import FileFault, faults

_ROWS = 256
"""Rows per transaction: an interrupted scan loses at most these."""


def refresh(
    ledger: Ledger, backend: DataBackend, wanted: Iterable[SourceRef], on_file: Callable[[], None]
) -> dict[str, Source]:
    """Ref id -> what is known, for each wanted file; the ledger forgets the place's other files. Raises DataError."""
    known = ledger.sources(backend.location)
    current: dict[str, Source] = {}
    fresh: dict[str, Source] = {}
    for ref in wanted:
        source = known.get(ref.id)
        if source is None or (source.size, source.version) != (ref.size, ref.version):
            source, lasting = _look_at(backend, ref)
            if lasting:
                fresh[ref.id] = source
        current[ref.id] = source
        if len(fresh) >= _ROWS:
            ledger.record_sources(backend.location, fresh)
            fresh = {}
        on_file()
    ledger.record_sources(backend.location, fresh)
    ledger.forget_sources(backend.location, known.keys() - current.keys())
    return current


def _look_at(backend: DataBackend, ref: SourceRef) -> tuple[Source, bool]:
    """Probe a video or read a caption; and whether the answer holds as long as the file stays as it is."""
    seen = Source(ref.size, ref.version)
    try:
        if ref.id.lower().endswith(captions.SUFFIX):
            with faults("its caption file cannot be read"), backend.open(ref) as stream:
                return replace(seen, words=captions.from_file(stream)), True
        if ref.size == 0:
            raise FileFault("is empty (0 bytes)")
        with faults("cannot be opened"), backend.open(ref) as stream:
            return replace(seen, probe=probe(stream)), True
    except FileFault as fault:
        return replace(seen, fault=fault.reason), fault.lasting
