"""How many tokens Gemma-2's tokenizer makes of captions, and what is cut of them, without transformers or torch."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from vtrain.contract import Caption, Role, TokenizerCounter
from vtrain_sanavideo.options import MOTION_SCORE, SanaVideoOptions
from vtrain_sanavideo.text import TEXT_TOKENS, room, scored, wording

ENCODER = "gemma"
"""The name of the text encoder, of which there is one."""


class SanaVideoTokens(TokenizerCounter):
    """A vtrain.contract.TokenCounter. folder: of the tokenizer. Raises ModelError."""

    def __init__(self, folder: Path, options: SanaVideoOptions, instruction: str) -> None:
        super().__init__(folder, ENCODER, TEXT_TOKENS, partial(wording, options=options, instruction=instruction))
        self._options = options
        # As GemmaTokenizer does it: what tokenizer_config.json asks for, and where it asks for none, the tokenizer's own.
        file = folder / "tokenizer_config.json"
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._specials = sum(bool(said.get(name)) for name in ("add_bos_token", "add_eos_token")) or self._specials
        own = len(self._tokenizer.encode(instruction, add_special_tokens=False).ids) + self._specials
        self._instruction_tokens = own if instruction else 0

    def room(self, role: Role) -> int:
        """With what the instruction takes, whose last tokens are among those that the denoiser is given."""
        return room(role, self._instruction_tokens)

    def ending(self, caption: Caption, role: Role) -> tuple[str, str]:
        """The motion score of a prompt."""
        said = scored(caption, role, self._options).strip()
        return (MOTION_SCORE.name if said else "", said)
