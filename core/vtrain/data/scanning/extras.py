"""Caption extras: what of a place's values the model family reads, and what nobody does. Core knows no extra by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from vtrain.contract import CaptionExtra, Problem, SourceRef, Words
from vtrain.contract.specs import did_you_mean
from vtrain.data.decoding.video import FileFault, faults
from vtrain.plan.records import DatasetPlan

_SHOWN = 5
"""Keys that one warning names."""


def declared(dataset: DatasetPlan) -> list[object]:
    """What of the family's extras decides over captions, as JSON knows it."""
    return [[extra.name, extra.type, extra.minimum, extra.maximum] for extra in dataset.extras]


def asked_for(dataset: DatasetPlan) -> tuple[str, ...]:
    """Names that are looked for in tables: the family's own extras, and those of other families, which are errors."""
    return tuple(dict.fromkeys((*(extra.name for extra in dataset.extras), *dataset.foreign_extras)))


def own_extras(words: Words, dataset: DatasetPlan) -> Words | FileFault:
    """With the family's extras alone, each of its type; nothing of an absent one. Or why the clip cannot be used."""
    if not words.extras:
        return words
    values: dict[str, object] = {}
    for extra in dataset.extras:
        if not is_absent(given := words.extras.get(extra.name)):
            try:
                values[extra.name] = value_of(extra, given, words.where)
            except FileFault as fault:
                return fault
    return Words(words.texts, values)


def is_absent(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def value_of(extra: CaptionExtra, given: object, where: str = "") -> float | int | str:
    """As captions have it. where: its place, for the message. Raises FileFault."""
    if extra.type == "text":
        if isinstance(given, str) and encodable(given):
            return " ".join(given.split())
    elif (number := _number(given)) is not None:
        low, high = extra.minimum, extra.maximum
        whole = extra.type == "float" or float(number).is_integer()
        if whole and (low is None or number >= low) and (high is None or number <= high):
            return int(number) if extra.type == "int" else float(number)
    such = f": write one such as {extra.default}" if _is_example(extra) else ""
    at = f" in {where}" if where else ""
    raise FileFault(f"its {_words(extra.name)} {_shown(given)!r}{at} is no {extra.kind}{such}")


def _number(given: object) -> float | int | None:
    """A finite number, as one or in digits."""
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        number = float(given)
    except (ValueError, OverflowError):
        return None
    return (given if isinstance(given, int) else number) if math.isfinite(number) else None


def _is_example(extra: CaptionExtra) -> bool:
    number = _number(extra.default)
    low, high = extra.minimum, extra.maximum
    return number is not None and (low is None or number >= low) and (high is None or number <= high)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(given: object) -> str:
    text = str(given[0] if isinstance(given, list) and len(given) == 1 else given)
    return text[:40].encode(errors="backslashreplace").decode()


def encodable(text: str) -> bool:
    """Whether a text from JSON has whole characters alone, no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def raw(data: Mapping[str, object], known: Iterable[str]) -> dict[str, object]:
    """What a sidecar has beside the keys that are `known`, for the ledger: no family is asked, whichever reads it later.

    Objects and lists are extras of no type: of these a list is kept with how they begin, for messages.
    """
    return {
        key.encode(errors="replace").decode(): _kept(value)
        for key, value in data.items()
        if key not in known and value is not None
    }


def _kept(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # SQLite's JSON has none
    if isinstance(value, dict | list):
        return [str(value)[:40].encode(errors="backslashreplace").decode()]
    return value


class Strangers:
    """Extras of table rows and backends that the family does not read. They are reported at once, each with its first place."""

    def __init__(self, dataset: DatasetPlan) -> None:
        self._dataset = dataset
        self._own = {*(extra.name for extra in dataset.extras), *dataset.table.ignore_extras}
        self._found: dict[str, tuple[str, int]] = {}

    def look(self, words: Words) -> None:
        for name, value in words.extras.items():
            if name not in self._own and not is_absent(value):
                where, count = self._found.get(name, (words.where, 0))
                self._found[name] = where, count + 1

    def problems(self) -> list[Problem]:
        return [
            Problem(
                where, f"{_unread(name, self._dataset)}; {count} clip{'s have' if count != 1 else ' has'} it.", remedy
            )
            for name, (where, count) in self._found.items()
            for remedy in (_remedy(name, self._dataset, "Remove the column"),)
        ]


def _unread(name: str, dataset: DatasetPlan) -> str:
    reader = dataset.foreign_extras.get(name)
    whose = f"{reader} does: an extra of another model family" if reader else "no installed model family does"
    return f'this model family does not read "{name}" ({whose})'


def _remedy(name: str, dataset: DatasetPlan, remove: str) -> str:
    near = did_you_mean(name, [extra.name for extra in dataset.extras])
    return f'{f"{near} " if near else ""}{remove}, or set data.ignore_extras = ["{name}"] to train without it.'


# -- keys of JSON sidecars ------------------------------------------------------------------------------------------------

KEYS = """SELECT key, count(*), min(ref) FROM source, json_each(source.words, '$[1]') WHERE place = :place AND source.kind = 'json'
    AND words IS NOT NULL AND EXISTS (SELECT 1 FROM source clip WHERE clip.place = source.place AND clip.stem = source.stem
    AND clip.kind IN ('video', 'image')) GROUP BY key ORDER BY count(*) DESC, key LIMIT 1000"""
"""(key, how many sidecars of clips have it, one of them): a dataset has few, and the same in all."""

Key = tuple[str, int, str]
"""A row of KEYS."""


def foreign_keys(keys: Sequence[Key], dataset: DatasetPlan) -> list[Key]:
    """Those that another family reads, and this one does not."""
    return [key for key in keys if key[0] in dataset.foreign_extras]


def key_problem(key: Key, place: str, line: int, dataset: DatasetPlan) -> Problem:
    """Of a key that another family reads."""
    name, count, example = key
    where = f"{place}/{example}" + (f":{line}" if line else "")
    what = f"{_unread(name, dataset)}; {count} caption file{'s have' if count != 1 else ' has'} it."
    return Problem(where, what, _remedy(name, dataset, "Remove the key"))


def line_of(name: str, ref: SourceRef, dataset: DatasetPlan) -> int:
    """The line of a sidecar in which a key stands, 0 if it cannot be found."""
    key = re.compile(re.escape(json.dumps(name, ensure_ascii=False)) + r"\s*:")
    try:
        with faults("cannot be read"), dataset.backend.open(ref) as stream:
            text = stream.read().decode(errors="replace")
    except FileFault:
        return 0
    found = key.search(text)
    return text.count("\n", 0, found.start()) + 1 if found else 0


def key_doubt(keys: Sequence[Key], dataset: DatasetPlan) -> str:
    """That sidecars have keys that nobody reads, in words with what to do; "" for none."""
    known = {*asked_for(dataset), *dataset.table.ignore_extras}
    unknown = [key for key in keys if key[0] not in known]
    if not unknown:
        return ""
    own = [extra.name for extra in dataset.extras]
    named = []
    for name, count, example in unknown[:_SHOWN]:
        near = did_you_mean(name, own)
        named.append(f'"{name}" ({count}, such as {example}{f"; {near[0].lower()}{near[1:]}" if near else ""})')
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    listing = json.dumps([name for name, _, _ in unknown[:_SHOWN]], ensure_ascii=False)
    remedy = f"if that is meant, set data.ignore_extras = {listing}"
    return f"keys of caption files that nobody reads: {', '.join(named)}{more}; {remedy}"


def shown_extra(extra: CaptionExtra) -> str:
    """For people: what it is, what stands for an absent one, what it means."""
    absent = f"; absent: {extra.default}" if extra.default else ""
    return f"{extra.kind}{absent}; {extra.summary}"
