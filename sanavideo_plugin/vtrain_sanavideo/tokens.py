"""How many tokens Gemma-2's tokenizer makes of captions, and what is cut of them, without transformers or torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import Caption, ModelError, Problem, Role, TokenCount
from vtrain_sanavideo.options import MOTION_SCORE, SanaVideoOptions
from vtrain_sanavideo.text import TEXT_TOKENS, room, scored, wording

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ENCODER = "gemma"
"""The name of the text encoder, of which there is one."""


class SanaVideoTokens:
    """A vtrain.contract.TokenCounter.

    specials: tokens that are put around every text (<bos>).
    """

    def __init__(self, tokenizer: Tokenizer, specials: int, options: SanaVideoOptions, instruction: str) -> None:
        self._tokenizer, self._specials = tokenizer, specials
        self._options, self._instruction = options, instruction
        own = len(tokenizer.encode(instruction, add_special_tokens=False).ids) + specials if instruction else 0
        self._instruction_tokens = own

    def count(self, captions: Sequence[Caption], role: Role) -> list[tuple[TokenCount, ...]]:
        """One for each caption: tokens and limit are those that the denoiser is given, the instruction's last among them.

        Raises DataError for extras that are not known or no motion score.
        """
        words = [wording(caption, role, self._options, self._instruction) for caption in captions]
        found = self._tokenizer.encode_batch(words, add_special_tokens=False)
        most = room(role, self._instruction_tokens)
        counts: list[tuple[TokenCount, ...]] = []
        for caption, text, encoding in zip(captions, words, found, strict=True):
            beyond = len(encoding.ids) + self._specials - most
            lost, cut = self._lost(caption, role, text, encoding.offsets[-beyond][0]) if beyond > 0 else ((), "")
            counts.append((TokenCount(ENCODER, TEXT_TOKENS + beyond, TEXT_TOKENS, lost, cut),))
        return counts

    def _lost(self, caption: Caption, role: Role, text: str, start: int) -> tuple[tuple[str, ...], str]:
        """What is cut and the words themselves. start: of the first token that is not read."""
        ending = len(scored(caption, role, self._options).strip())
        words = text[start : len(text) - ending].strip()
        return (*(("text",) if words else ()), *((MOTION_SCORE.name,) if ending else ())), text[start:]


@contextmanager
def open_tokens(folder: Path, options: SanaVideoOptions, instruction: str) -> Iterator[SanaVideoTokens]:
    """folder: of the tokenizer. Raises ModelError."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        what = (
            "there is no tokenizer.json, so tokens cannot be counted without the text encoder; what is too long is cut."
        )
        raise ModelError(Problem(str(folder), what, "Save the tokenizer once with transformers, which writes it."))
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exceptions
        raise ModelError(Problem(str(file), f"no tokenizer can be read: {error}", "Download it again.")) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    yield SanaVideoTokens(tokenizer, _specials(tokenizer, folder), options, instruction)


def _specials(tokenizer: Tokenizer, folder: Path) -> int:
    """As GemmaTokenizer does it: what tokenizer_config.json asks for, and where it asks for none, the tokenizer's own."""
    file = folder / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return sum(bool(said.get(name)) for name in ("add_bos_token", "add_eos_token")) or len(tokenizer.encode("").ids)
