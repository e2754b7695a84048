"""Captions to UMT5 embeddings, token for token and bit for bit as WanPipeline.encode_prompt."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy

from vtrain.contract import Caption, DataError, DType, Problem, Role, Text, load_pretrained, load_tokenizer

TOKENS = 512
"""Tokens that the denoiser is given: WanPipeline's max_sequence_length."""


def wording(caption: Caption, role: Role) -> str:
    """What is cut into tokens: cleaned as the pipeline's prompt_clean does. "dropped" is the empty text.

    Raises DataError for extras: Wan takes none.
    """
    if caption.extras:
        raise DataError(Problem("", f"Wan takes no {', '.join(sorted(caption.extras))} with a caption.", "Remove it."))
    text = "" if role == "dropped" else html.unescape(html.unescape(ftfy.fix_text(caption.text)))
    return " ".join(text.split())


class WanText:
    """The text encoder at work."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer, self._model = tokenizer, model

    def encode(self, captions: Sequence[Caption], role: Role) -> Text:
        """The part "text": embeds (B, L, D) on the CPU in the storage type, L = tokens of the longest caption, at most TOKENS.

        Raises ValueError for no captions, DataError for extras.
        """
        import torch

        if not captions:
            raise ValueError("no captions to encode")
        if self._model is None:
            raise RuntimeError("this text encoder is closed")
        words = [wording(caption, role) for caption in captions]
        # Padding is encoded too: shorter inputs would change the last bits.
        settings = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens = self._tokenizer(words, **settings).to(self._model.device)
        with torch.inference_mode():
            embeds = self._model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.cpu().bool()
        longest = int(mask.sum(dim=1).max())
        # Copied outside inference mode, so that they are tensors like any other.
        return Text.of(embeds[:, :longest].cpu().clone(), mask[:, :longest].contiguous())

    def close(self) -> None:
        self._model = None


def load(encoder: Path, tokenizer: Path, dtype: DType, device: str) -> WanText:
    """Tokenizer and encoder. Raises ModelError."""
    from transformers import T5Tokenizer, UMT5EncoderModel

    model = load_pretrained(UMT5EncoderModel, encoder, dtype, device, "text encoder")
    return WanText(load_tokenizer(T5Tokenizer, tokenizer), model)
