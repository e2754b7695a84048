"""What a plan says of captions and prompts that are longer than the text encoder takes. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vtrain.contract import TokenCount
from vtrain.data.scanning.surveys import DatasetSurvey, Survey
from vtrain.data.scanning.token_counts import CutCaptions, LongText
from vtrain.plan.records import Plan

_END = 60
"""Letters of what is not read that are shown."""


def token_rows(found: DatasetSurvey) -> Iterator[tuple[str, str]]:
    """(label, text) of one dataset's captions."""
    tokens = found.tokens
    if tokens is None:
        yield (
            "tokens",
            "not counted: the model family needs its text encoder for it; what is longer than that takes is cut",
        )
    elif tokens.why_not:
        yield "tokens", f"not counted: {tokens.why_not}"
    elif tokens.cut:
        worst = ", ".join(f"{each.name} {of_limit(each.count)}" for each in tokens.worst)
        yield "cut off", f"{_cut(tokens)}; the longest: {worst}"
        yield "all of them", "`vtrain data list CONFIG --truncated`"
    elif tokens.longest:
        yield (
            "tokens",
            f"the longest caption has {', '.join(_named(count, tokens.longest) for count in tokens.longest)}",
        )


def _cut(tokens: CutCaptions) -> str:
    """ "3 of 120 captions are not read to their end: 2 in text, 3 in pace"."""
    are = "caption is" if tokens.captions == 1 else "captions are"
    lost = ", ".join(f"{count} in {name}" for name, count in sorted(tokens.lost.items(), key=lambda each: -each[1]))
    return f"{tokens.cut} of {tokens.captions} {are} not read to the end: {lost}"


def _named(count: TokenCount, several: Sequence[TokenCount]) -> str:
    return f"{of_limit(count)}{f' ({count.encoder})' if len(several) > 1 else ''}"


def of_limit(count: TokenCount) -> str:
    """ "412 tokens of 300"."""
    return f"{count.tokens} token{'s' if count.tokens != 1 else ''} of {count.limit}"


def cut_text(count: TokenCount) -> str:
    """What is lost, with how it begins; "" if nothing is."""
    if not count.lost:
        return ""
    words = " ".join(count.cut.split())
    shown = words if len(words) <= _END else f"{words[:_END].rstrip()}..."
    return f'{" and ".join(count.lost)} ("{shown}")' if shown else " and ".join(count.lost)


def prompt_rows(survey: Survey) -> Iterator[tuple[str, str]]:
    """A row for each of validation's prompts that is cut."""
    for each in survey.prompts:
        yield "cut off", f"{each.name}: {of_limit(each.count)}; not read: {cut_text(each.count)}"


def token_warnings(plan: Plan, survey: Survey) -> Iterator[str]:
    """Prompts that are cut, captions that lose an extra by it, whose place is at the end, and that none could be counted."""
    for why_not in dict.fromkeys(found.tokens.why_not for found in survey.datasets if found.tokens is not None):
        if why_not:
            yield f"captions that are too long are cut, and which is not known: {why_not}"
    for dataset, found in zip(plan.datasets, survey.datasets, strict=True):
        if found.tokens is None:
            continue
        name = f"{dataset.id}: " if len(plan.datasets) > 1 else ""
        limits = ", ".join(str(count.limit) for count in found.tokens.longest)
        for extra, count in found.tokens.lost.items():
            if extra != "text":
                many = f"caption{'s lose' if count != 1 else ' loses'}"
                yield (
                    f"{name}{count} {many} {extra} by being longer than the text encoder takes ({limits} tokens): shorten "
                    "what `vtrain data list --truncated` names"
                )
    for each in survey.prompts:
        yield f"validation.{each.name} has {of_limit(each.count)}, and loses {cut_text(each.count)}: shorten it"


def tokens_json(tokens: CutCaptions | None) -> dict[str, object] | None:
    """The same for programs."""
    if tokens is None:
        return None
    return {
        "captions": tokens.captions,
        "cut": tokens.cut,
        "lost": dict(tokens.lost),
        "longest": [count_json(count) for count in tokens.longest],
        "worst": [long_json(each) for each in tokens.worst],
        "not_counted": tokens.why_not or None,
    }


def long_json(each: LongText) -> dict[str, object]:
    return {"name": each.name, **count_json(each.count)}


def count_json(count: TokenCount) -> dict[str, object]:
    """encoder, tokens, limit, lost, cut."""
    return {
        "encoder": count.encoder,
        "tokens": count.tokens,
        "limit": count.limit,
        "lost": list(count.lost),
        "cut": count.cut,
    }
