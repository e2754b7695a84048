# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vtrain.contract import Caption, DataError, ModelError
from vtrain_sanavideo.family import SanaVideoFamily

LONG = "a small dog runs along the beach while waves roll in behind it, " * 40
Families = Callable[..., SanaVideoFamily]
Encode = Callable[..., tuple[torch.Tensor, ...]]


@pytest.fixture(scope="module")
def pipelines(checkpoint: Path, text_pipeline: Callable[..., Any]) -> dict[str, Any]:
    """In both storage types."""
    return {
        name: text_pipeline(checkpoint, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


@pytest.mark.parametrize(("precision", "score"), [("fp32", 30), ("bf16", 30), ("fp32", "none")])
@pytest.mark.parametrize(
    "caption",
    ["a cat", LONG, "  A Cat\tWALKS over the GRASS ", "走る猫 — ÜBER 🐈", "", "a cat\nin two lines "],
    ids=["short", "truncated", "upper case and spaces", "unicode", "empty", "newline"],
)
def test_prompts_are_encoded_bit_for_bit_as_the_pipeline_does(
    checkpoint: Path,
    family_of: Families,
    pipelines: dict[str, Any],
    encode_prompt: Encode,
    caption: str,
    precision: str,
    score: object,
) -> None:
    ending = "" if score == "none" else f" motion score: {score}."
    embeds, mask, *_ = encode_prompt(pipelines[precision], caption + ending)
    family = family_of(checkpoint, text_precision=precision, motion_score=score)
    with family.text_encoders()["gemma"].open("cpu") as encoder:
        text = encoder.encode([Caption(caption)], "prompt")
    real = int(mask.sum())
    assert text.only.embeds.dtype == embeds.dtype
    assert text.only.mask.dtype == torch.bool
    assert text.only.mask[0].tolist() == [True] * real
    assert mask[:real].all()
    assert torch.equal(text.only.embeds[0], embeds[:real])


@pytest.mark.parametrize("negative", ["", "A blurry video, Distorted.", LONG])
def test_negative_prompts_and_dropped_captions_are_the_pipelines(
    checkpoint: Path, family_of: Families, pipelines: dict[str, Any], encode_prompt: Encode, negative: str
) -> None:
    *_, embeds, mask = encode_prompt(pipelines["fp32"], "a cat", negative_prompt=negative)
    with family_of(checkpoint).text_encoders()["gemma"].open("cpu") as encoder:
        text = encoder.encode([Caption(negative)], "negative")
        dropped = encoder.encode([Caption("a dog")], "dropped")
    assert torch.equal(text.only.embeds[0], embeds[: int(mask.sum())])
    if not negative:
        assert torch.equal(dropped.only.embeds, text.only.embeds)
        assert dropped.only.mask.tolist() == [[True]]


@pytest.mark.parametrize("instruction", ["", "Describe a video of this: "])
def test_an_instruction_of_the_users_own_replaces_the_pipelines(
    checkpoint: Path, family_of: Families, pipelines: dict[str, Any], encode_prompt: Encode, instruction: str
) -> None:
    own = [instruction] if instruction else None
    embeds, mask, *_ = encode_prompt(pipelines["fp32"], "a cat motion score: 7.", complex_human_instruction=own)
    family = family_of(checkpoint, instruction=instruction)
    with family.text_encoders()["gemma"].open("cpu") as encoder:
        text = encoder.encode([Caption("a cat", {"motion_score": 7})], "prompt")
    assert torch.equal(text.only.embeds[0], embeds[: int(mask.sum())])


def test_a_batch_is_as_long_as_its_longest_caption_and_real_tokens_come_first(family: SanaVideoFamily) -> None:
    captions = [Caption("a cat"), Caption("a cat walks slowly over the wet grass")]
    with family.text_encoders()["gemma"].open("cpu") as encoder:
        both = encoder.encode(captions, "prompt")
        alone = [encoder.encode([caption], "prompt") for caption in captions]
    assert both.only.embeds.shape[:2] == both.only.mask.shape == (2, alone[1].only.mask.shape[1])
    for row, single in enumerate(alone):
        real = single.only.mask.shape[1]
        assert both.only.mask[row].tolist() == [True] * real + [False] * (both.only.mask.shape[1] - real)
        torch.testing.assert_close(both.only.embeds[row, :real], single.only.embeds[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "extras", [{"motion_score": 12.5}, {"motion_score": "fast"}, {"motion_score": float("inf")}, {"mood": "calm"}]
)
def test_an_extra_that_cannot_be_used_is_an_error(
    family: SanaVideoFamily, extras: dict[str, float | int | str]
) -> None:
    with family.text_encoders()["gemma"].open("cpu") as encoder, pytest.raises(DataError):
        encoder.encode([Caption("a cat", extras)], "prompt")


def test_after_the_with_block_the_encoder_is_gone(family: SanaVideoFamily) -> None:
    with family.text_encoders()["gemma"].open("cpu") as encoder:
        model = encoder._model
        assert model is not None
        seen = weakref.ref(model)
        del model
    gc.collect()
    assert seen() is None
    with pytest.raises(RuntimeError, match="closed"):
        encoder.encode([Caption("a cat")], "prompt")


def test_a_text_encoder_whose_weights_do_not_fit_is_an_error(own_checkpoint: Path, family_of: Families) -> None:
    from safetensors.torch import load_file, save_file

    path = own_checkpoint / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["norm.weight"] = torch.ones(7)
    state.pop("layers.0.mlp.up_proj.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught, family_of(own_checkpoint).text_encoders()["gemma"].open("cpu"):
        pass
    assert "layers.0.mlp.up_proj.weight is missing" in str(caught.value)
    assert "norm.weight is [7] instead of [64]" in str(caught.value)


def test_the_wording_is_what_is_cut_into_tokens(checkpoint: Path, family_of: Families) -> None:
    from transformers import GemmaTokenizer

    caption = Caption(" A Cat ", {"motion_score": 7})
    family = family_of(checkpoint, instruction="Describe: ")
    assert family.wording(caption, "prompt") == "Describe: a cat  motion score: 7."
    assert family.wording(caption, "negative") == "a cat"
    assert family.wording(caption, "dropped") == ""
    with pytest.raises(DataError):
        family.wording(Caption("", {"mood": "calm"}), "prompt")
    tokens = GemmaTokenizer.from_pretrained(checkpoint / "tokenizer")
    with family.text_encoders()["gemma"].open("cpu") as encoder:
        for role in ("negative", "dropped"):
            length = encoder.encode([caption], role).only.embeds.shape[1]
            assert length == len(tokens.encode(family.wording(caption, role)))
