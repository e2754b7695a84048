"""Captions to Gemma-2 embeddings, bit for bit as SanaVideoPipeline.encode_prompt, and how many tokens they are."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import (
    Caption,
    DataError,
    PluginError,
    Problem,
    Role,
    Text,
    TokenizerCounter,
    default_arguments,
    load_pretrained,
    load_tokenizer,
)
from vtrain_sanavideo.options import MOTION_SCORE, SanaVideoOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Gemma2Model, GemmaTokenizer

ENCODER = "gemma"
"""The name of the text encoder, of which there is one."""

TEXT_TOKENS = 300
"""Tokens that the denoiser is given: SanaVideoPipeline's max_sequence_length."""


class SanaVideoText:
    """The text encoder at work."""

    def __init__(
        self, tokenizer: GemmaTokenizer, model: Gemma2Model, options: SanaVideoOptions, instruction: str
    ) -> None:
        self._model: Gemma2Model | None = model
        self._tokenizer = tokenizer
        self._tokenizer.padding_side = "right"  # as encode_prompt sets it
        self._options = options
        self._instruction = instruction
        self._instruction_tokens = len(tokenizer.encode(instruction)) if instruction else 0

    def encode(self, captions: Sequence[Caption], role: Role) -> Text:
        """embeds (B, L, D) on the CPU in the storage type, L = tokens of the longest caption; at most TEXT_TOKENS.

        Raises DataError for extras that are not known or no motion score; ValueError for no captions.
        """
        if not captions:
            raise ValueError("no captions to encode")
        words = [wording(caption, role, self._options, self._instruction) for caption in captions]
        embeds, mask = self._embed(words, room(role, self._instruction_tokens))
        # <bos> and the last 299, as encode_prompt selects them: the instruction is read with them and then left out.
        keep = [0, *range(mask.shape[1] - TEXT_TOKENS + 1, mask.shape[1])]
        embeds, mask = embeds[:, keep], mask[:, keep]
        longest = int(mask.sum(dim=1).max())
        return Text.of(embeds[:, :longest].contiguous(), mask[:, :longest].contiguous())

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None

    def _embed(self, words: list[str], room: int) -> tuple[Tensor, Tensor]:
        """(B, room, D) and bool (B, room). Padding is encoded too: shorter inputs would change the last bits."""
        import torch

        if self._model is None:
            raise RuntimeError("this text encoder is closed")
        tokens = self._tokenizer(words, padding="max_length", max_length=room, truncation=True, return_tensors="pt")
        device = self._model.device
        mask = tokens["attention_mask"]
        with torch.inference_mode():
            embeds = self._model(tokens["input_ids"].to(device), attention_mask=mask.to(device))[0]
        # Copied outside inference mode, so that they are tensors like any other.
        return embeds.cpu().clone(), mask.bool()


def room(role: Role, instruction_tokens: int) -> int:
    """Tokens for instruction and caption. instruction_tokens: of the instruction alone, 0 for none.

    Two more than the instruction needs: its <bos> and its last stay among the TEXT_TOKENS that the denoiser is given.
    """
    return TEXT_TOKENS + (max(0, instruction_tokens - 2) if role == "prompt" else 0)


def wording(caption: Caption, role: Role, options: SanaVideoOptions, instruction: str) -> str:
    """What is cut into tokens: "dropped" is the empty text; only "prompt" is instructed and scored.

    Raises DataError for extras that are not known or no motion score.
    """
    if unknown := sorted(set(caption.extras) - {MOTION_SCORE.name}):
        raise DataError(
            Problem("", f"SANA-Video takes no {', '.join(unknown)} with a caption.", "It takes motion_score.")
        )
    if role == "dropped":
        return ""
    ending = scored(caption, role, options)
    if role == "negative":
        return caption.text.lower().strip()
    # As encode_prompt: the caption is made small, the instruction is not.
    return instruction + f"{caption.text}{ending}".lower().strip()


def scored(caption: Caption, role: Role, options: SanaVideoOptions) -> str:
    """How the wording of a prompt ends; "" where it bears no motion score. Raises DataError for a score that is none."""
    score = _whole(caption.extras.get(MOTION_SCORE.name, options.motion_score))
    return f" motion score: {score}." if role == "prompt" and score is not None else ""


def _whole(score: float | int | str | None) -> int | None:
    """A motion score. Raises DataError unless it is a whole number or "none"."""
    if score is None or score == "none":
        return None
    try:
        if float(score) == int(float(score)):
            return int(float(score))
    except (ValueError, OverflowError):
        pass
    raise DataError(Problem("", f"the motion score {score!r} is no whole number.", "Write a number such as 30."))


def default_instruction() -> str:
    """What SanaVideoPipeline of the installed diffusers puts before a prompt. Raises PluginError."""
    file = "pipelines/sana_video/pipeline_sana_video.py"
    lines = default_arguments("diffusers", file, "SanaVideoPipeline", "__call__").get("complex_human_instruction")
    if not isinstance(lines, list):
        remedy = "Install the version that vtrain-sanavideo asks for: diffusers 0.42."
        raise PluginError(Problem("diffusers", "SanaVideoPipeline has no default instruction.", remedy))
    return "\n".join(str(line) for line in lines)


def load(encoder: Path, tokenizer: Path, options: SanaVideoOptions, instruction: str, device: str) -> SanaVideoText:
    """Tokenizer and encoder. Raises ModelError."""
    from transformers import Gemma2Model, GemmaTokenizer

    model = load_pretrained(
        Gemma2Model,
        encoder,
        options.text_precision,
        device,
        "text encoder",
        attn_implementation="eager",  # "sdpa" does not do Gemma-2's capped logits
    )
    return SanaVideoText(load_tokenizer(GemmaTokenizer, tokenizer), model, options, instruction)


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
