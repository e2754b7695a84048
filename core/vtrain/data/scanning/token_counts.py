"""Captions and prompts that are longer than the text encoder takes: counted by the tokenizers alone, each text once."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from vtrain.contract import Caption, Family, ModelError, Role, SupportsTokenCounts, TokenCount
from vtrain.data.scanning.database import HASHES, DatabaseTables, FileHashes, database_faults, open_database
from vtrain.data.scanning.ledger import Ledger, marks
from vtrain.plan.records import ValidationPlan
from vtrain.registry.blame import PartFault

TOKENS = "tokens.sqlite"

_LAYOUT = DatabaseTables(
    application_id=0x76745431,  # "vtT1"
    version=1,
    tables="CREATE TABLE count (key BLOB PRIMARY KEY, counts TEXT NOT NULL) WITHOUT ROWID;",
)
"""key: of a text under a family's fingerprint; counts: its TokenCounts as JSON."""

_AT_ONCE = 500
_WORST = 3

Counts = tuple[TokenCount, ...]
"""Of one text, one for each text encoder."""


def cut_of(counts: Counts) -> Counts:
    """Those of encoders that do not read the text to its end."""
    return tuple(count for count in counts if count.lost)


class TokenCounts:
    """What a family's tokenizers make of texts, remembered in a cache folder. For a with block, which opens nothing yet.

    why_not: why nothing can be counted, once that was found out; "" while it can. message: what became of a damaged file that
    lay in its place. Raises DataError if the file cannot be written.
    """

    def __init__(self, folder: Path, family: SupportsTokenCounts) -> None:
        self._folder, self._family = folder, family
        self.fingerprint = family.token_fingerprint(FileHashes(folder / HASHES))
        self.why_not = ""
        self.message: str | None = None
        self._open = ExitStack()
        self._db: sqlite3.Connection | None = None
        self._counter: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def of(self, texts: Sequence[tuple[Caption, Role]]) -> list[Counts] | None:
        """In order; only what is new is cut into tokens. None if nothing can be counted: `why_not`."""
        keys = [self._key(*text) for text in texts]
        known = self._known(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        for role in dict.fromkeys(role for _, role in missing.values()):
            wanted = [key for key, text in missing.items() if text[1] == role]
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                if (counts := self._count([missing[key][0] for key in some], role)) is None:
                    return None
                known |= dict(zip(some, counts, strict=True))
                self._keep(zip(some, counts, strict=True))
        return [known[key] for key in keys]

    def _key(self, caption: Caption, role: Role) -> bytes:
        parts = [self.fingerprint, role, caption.text, sorted(caption.extras.items())]
        return blake2b(json.dumps(parts).encode(), digest_size=16).digest()

    def _database(self) -> sqlite3.Connection:
        if self._db is None:
            self._db, self.message = open_database(self._folder / TOKENS, _LAYOUT)
            self._open.callback(self._db.close)
        return self._db

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, Counts]:
        found: dict[bytes, Counts] = {}
        database = self._database()
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            with database_faults(self._folder / TOKENS):
                rows = database.execute(f"SELECT key, counts FROM count WHERE key IN ({marks(some)})", some)
                found |= {key: _counts(json.loads(packed)) for key, packed in rows}
        return found

    def _keep(self, counts: Any) -> None:
        rows = [(key, json.dumps([_packed(count) for count in each], ensure_ascii=False)) for key, each in counts]
        database = self._database()
        with database_faults(self._folder / TOKENS), database:
            database.executemany("INSERT OR REPLACE INTO count VALUES (?, ?)", rows)

    def _count(self, captions: Sequence[Caption], role: Role) -> list[Counts] | None:
        if self._counter is None and not self.why_not:
            try:
                self._counter = self._open.enter_context(self._family.open_token_counter())
            except ModelError as error:
                self.why_not = " ".join(f"{each.where}: {each.what} {each.remedy}".strip() for each in error.problems)
        if self._counter is None:
            return None
        counts = [tuple(each) for each in self._counter.count(captions, role)]
        if len(counts) != len(captions):
            raise PartFault("family", "", f"its token counter gave {len(counts)} counts for {len(captions)} captions")
        return counts


def _packed(count: TokenCount) -> list[object]:
    return [count.encoder, count.tokens, count.limit, count.lost, count.cut]


def _counts(packed: Sequence[Any]) -> Counts:
    return tuple(TokenCount(encoder, tokens, limit, tuple(lost), cut) for encoder, tokens, limit, lost, cut in packed)


def opened(folder: Path, family: Family) -> TokenCounts | None:
    """None for a family whose tokens can be counted by its text encoder alone."""
    return TokenCounts(folder, family) if isinstance(family, SupportsTokenCounts) else None


@dataclass(frozen=True)
class LongText:
    """A text that is cut. name: of its file, or its key in the configuration file."""

    name: str
    count: TokenCount


@dataclass(frozen=True)
class CutCaptions:
    """Of one dataset's used files. captions: counted. cut: that an encoder does not read to their end; lost: what of them, "text"
    or the name of an extra -> how many. longest: of those that are read, by encoder. worst: the longest that are cut.

    why_not: why none could be counted, or "".
    """

    captions: int = 0
    cut: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    longest: tuple[TokenCount, ...] = ()
    worst: tuple[LongText, ...] = ()
    why_not: str = ""


_USED = """SELECT ref, captions FROM file_decision WHERE decision = :decision AND status = 'used' AND ref > :after
    ORDER BY ref LIMIT :limit"""


def count_captions(ledger: Ledger, decision: int, counts: TokenCounts) -> CutCaptions:
    """Of a decision that is up to date; counted again only where something changed since."""
    values = {"decision": decision, "fingerprint": counts.fingerprint}
    query = """SELECT summary FROM token_survey JOIN decision ON number = decision AND token_survey.generation = decision.generation
        WHERE decision = :decision AND fingerprint = :fingerprint"""
    if kept := ledger.rows(query, values):
        return _summary(json.loads(kept[0][0]))
    tally = _Tally()
    page: list[tuple[str, Caption]] = []
    for ref, packed in ledger.pages(_USED, values):
        page += [(ref, Caption(text, extras)) for text, extras in json.loads(packed)]
        if len(page) >= _AT_ONCE and not tally.take(page, counts):
            break
    if not tally.take(page, counts):
        return CutCaptions(why_not=counts.why_not)
    with ledger.transaction() as db:
        db.execute(
            "INSERT OR REPLACE INTO token_survey SELECT number, ?, generation, ? FROM decision WHERE number = ?",
            (counts.fingerprint, json.dumps(tally.packed(), ensure_ascii=False), decision),
        )
    return _summary(tally.packed())


class _Tally:
    """What is counted of one dataset, page by page."""

    def __init__(self) -> None:
        self.captions = self.cut = 0
        self.lost: Counter[str] = Counter()
        self.longest: dict[str, TokenCount] = {}
        self.worst: list[tuple[str, TokenCount]] = []

    def take(self, page: list[tuple[str, Caption]], counts: TokenCounts) -> bool:
        """Empties the page. False if nothing can be counted."""
        found = counts.of([(caption, "prompt") for _, caption in page])
        if found is None:
            return False
        for (ref, _), each in zip(page, found, strict=True):
            self._add(ref, each)
        page.clear()
        return True

    def _add(self, ref: str, counts: Counts) -> None:
        self.captions += 1
        long = cut_of(counts)
        self.cut += bool(long)
        self.lost.update(dict.fromkeys((name for count in long for name in count.lost), 1))
        for count in counts:
            if count.encoder not in self.longest or count.tokens > self.longest[count.encoder].tokens:
                self.longest[count.encoder] = count
        if long:
            self.worst.append((ref, max(long, key=lambda count: count.tokens - count.limit)))
            self.worst = sorted(self.worst, key=lambda each: (each[1].limit - each[1].tokens, each[0]))[:_WORST]

    def packed(self) -> list[Any]:
        """What `_summary` reads, as JSON knows it."""
        longest = [_packed(count) for count in self.longest.values()]
        return [self.captions, self.cut, dict(self.lost), longest, [(ref, _packed(count)) for ref, count in self.worst]]


def _summary(packed: Sequence[Any]) -> CutCaptions:
    captions, cut, lost, longest, worst = packed
    long = tuple(LongText(ref, _counts([count])[0]) for ref, count in worst)
    return CutCaptions(captions, cut, lost, _counts(longest), long)


def cut_prompts(made: ValidationPlan | None, counts: TokenCounts) -> tuple[LongText, ...]:
    """Of validation's prompts, those that are cut, the negative one among them; none if nothing can be counted."""
    if made is None:
        return ()
    found = counts.of([(caption, role) for _, caption, role in made.texts]) or ()
    names = [name for name, _, _ in made.texts]
    return tuple(LongText(name, long) for name, each in zip(names, found, strict=False) for long in cut_of(each))
