"""Captions to Gemma-2 embeddings, token for token and bit for bit as SanaVideoPipeline.encode_prompt."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtrain.contract import (
    Caption,
    DataError,
    PluginError,
    Problem,
    Role,
    Text,
    default_arguments,
    load_pretrained,
    load_tokenizer,
)
from vtrain_sanavideo.options import SanaVideoOptions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Gemma2Model, GemmaTokenizer

TEXT_TOKENS = 300
"""Tokens that the denoiser is given: SanaVideoPipeline's max_sequence_length."""

MOTION_SCORE = "motion_score"
"""The one extra that a caption may have."""


class SanaVideoText:
    """The text encoder at work. truncated: how many captions so far were too long and lost their end, motion score included."""

    def __init__(
        self, tokenizer: GemmaTokenizer, model: Gemma2Model, options: SanaVideoOptions, instruction: str
    ) -> None:
        self.truncated = 0
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
        embeds, mask = self._embed(words, self._room(role))
        # <bos> and the last 299, as encode_prompt selects them: the instruction is read with them and then left out.
        keep = [0, *range(mask.shape[1] - TEXT_TOKENS + 1, mask.shape[1])]
        embeds, mask = embeds[:, keep], mask[:, keep]
        longest = int(mask.sum(dim=1).max())
        return Text.of(embeds[:, :longest].contiguous(), mask[:, :longest].contiguous())

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None

    def _room(self, role: Role) -> int:
        """Tokens for instruction and caption. The instruction's own two more than it needs: its <bos> and its last stay."""
        if role != "prompt" or not self._instruction:
            return TEXT_TOKENS
        return self._instruction_tokens + TEXT_TOKENS - 2

    def _embed(self, words: list[str], room: int) -> tuple[Tensor, Tensor]:
        """(B, room, D) and bool (B, room). Padding is encoded too: shorter inputs would change the last bits."""
        import torch

        if self._model is None:
            raise RuntimeError("this text encoder is closed")
        # Once more without truncation: the call below does not tell what it cut.
        self.truncated += sum(len(ids) > room for ids in self._tokenizer(words)["input_ids"])
        tokens = self._tokenizer(words, padding="max_length", max_length=room, truncation=True, return_tensors="pt")
        device = self._model.device
        mask = tokens["attention_mask"]
        with torch.inference_mode():
            embeds = self._model(tokens["input_ids"].to(device), attention_mask=mask.to(device))[0]
        # Copied outside inference mode, so that they are tensors like any other.
        return embeds.cpu().clone(), mask.bool()


def wording(caption: Caption, role: Role, options: SanaVideoOptions, instruction: str) -> str:
    """What is cut into tokens: "dropped" is the empty text; only "prompt" is instructed and scored.

    Raises DataError for extras that are not known or no motion score.
    """
    if unknown := sorted(set(caption.extras) - {MOTION_SCORE}):
        raise DataError(
            Problem("", f"SANA-Video takes no {', '.join(unknown)} with a caption.", "It takes motion_score.")
        )
    if role == "dropped":
        return ""
    score = _whole(caption.extras.get(MOTION_SCORE, options.motion_score))
    if role == "negative":
        return caption.text.lower().strip()
    scored = caption.text if score is None else f"{caption.text} motion score: {score}."
    # As encode_prompt: the caption is made small, the instruction is not.
    return instruction + scored.lower().strip()


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
