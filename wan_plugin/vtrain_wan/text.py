"""Captions to UMT5 embeddings, token for token and bit for bit as WanPipeline.encode_prompt."""

# mypy: allow-untyped-calls
from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftfy

from vtrain.contract import (
    Caption,
    DataError,
    Device,
    DType,
    ModelError,
    Problem,
    Role,
    Text,
    misfit_problem,
    torch_type,
    weight_problems,
)

if TYPE_CHECKING:
    from transformers import T5TokenizerFast, UMT5EncoderModel

TEXT_TOKENS = 512
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

    def __init__(self, tokenizer: T5TokenizerFast, model: UMT5EncoderModel) -> None:
        self._tokenizer = tokenizer
        self._model: UMT5EncoderModel | None = model

    def encode(self, captions: Sequence[Caption], role: Role) -> Text:
        """embeds (B, L, D) on the CPU in the storage type, zeros behind the mask; L = tokens of the longest, at most 512."""
        import torch

        if self._model is None:
            raise RuntimeError("this text encoder is closed")
        tokens = self._tokenizer(
            [wording(caption, role) for caption in captions],
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.inference_mode():
            # Padding is encoded too: shorter inputs would change the last bits.
            embeds = self._model(ids.to(self._model.device), mask.to(self._model.device)).last_hidden_state
        real, longest = mask.bool(), int(mask.sum(dim=1).max())
        # Multiplied outside inference mode, so that they are tensors like any other.
        embeds = embeds.cpu().clone().masked_fill(~real[..., None], 0)
        return Text(embeds=embeds[:, :longest].contiguous(), mask=real[:, :longest].contiguous())

    def close(self) -> None:
        self._model = None


@contextmanager
def open_text(encoder: Path, tokenizer: Path, dtype: DType, device: str) -> Iterator[WanText]:
    """Load tokenizer and encoder for the length of a with block. Raises ModelError."""
    from transformers import T5TokenizerFast

    text = WanText(T5TokenizerFast.from_pretrained(tokenizer), _load(encoder, dtype, device))
    try:
        yield text
    finally:
        text.close()
        Device.of(device).release()


def _load(folder: Path, dtype: DType, device: str) -> UMT5EncoderModel:
    from transformers import UMT5EncoderModel

    if problems := weight_problems(folder, "model"):
        raise ModelError(problems)
    try:
        loaded: tuple[UMT5EncoderModel, dict[str, Any]] = UMT5EncoderModel.from_pretrained(
            folder,
            dtype=torch_type(dtype),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # type: ignore[assignment]  # a pair, because of output_loading_info
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(Problem(str(folder), f"the text encoder cannot be loaded: {error}")) from error
    model, report = loaded
    lines = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    lines += [f"{name} is {list(found)} instead of {list(shape)}" for name, found, shape in report["mismatched_keys"]]
    lines += [f"{name} is unexpected" for name in sorted(report["unexpected_keys"])]
    if lines:
        raise ModelError(misfit_problem(folder, lines))
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides self
    model.eval().requires_grad_(False)
    return model
