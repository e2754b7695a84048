"""The rules of a text encoder."""

from __future__ import annotations

import pytest
import torch

from vtrain.contract import Caption, Device, Family, Role, TextEncoder
from vtrain.testing.memory import survivors
from vtrain.testing.sampler import gap
from vtrain.testing.subject import CAPTIONS, FamilySubject

ROLES: tuple[Role, ...] = ("prompt", "negative", "dropped")


class TextEncoderTests(FamilySubject):
    """Captions to embeddings.

    text_tolerance: largest difference, relative to the largest value, between a caption encoded alone and in a batch.
    """

    text_tolerance: float = 1e-4

    @pytest.mark.parametrize("role", ROLES)
    def test_embeddings_have_the_familys_shape(self, family: Family, text_encoder: TextEncoder, role: Role) -> None:
        """Every role gives finite embeds (B, L, text_width) and a bool mask (B, L) on the CPU, L at most text_tokens."""
        text = text_encoder.encode(CAPTIONS, role)
        batch, length, width = text.embeds.shape
        assert (batch, width) == (len(CAPTIONS), family.text_width)
        assert 1 <= length <= family.text_tokens
        assert text.embeds.is_floating_point()
        assert text.embeds.isfinite().all()
        assert text.mask.dtype is torch.bool
        assert text.mask.shape == (batch, length)
        assert Device.of(text.embeds) == Device.of(text.mask) == Device()

    @pytest.mark.parametrize("role", ROLES)
    def test_masks_are_prefixes(self, text_encoder: TextEncoder, role: Role) -> None:
        """Real tokens come first: a mask is True, then False. Each caption, the empty one too, has a real token."""
        mask = text_encoder.encode((*CAPTIONS, Caption("")), role).mask.int()
        assert (mask.diff(dim=1) <= 0).all(), "a real token after padding"
        assert mask[:, 0].all(), "a caption without a real token"

    def test_a_long_caption_keeps_to_the_token_limit(self, family: Family, text_encoder: TextEncoder) -> None:
        """A caption longer than the model takes gives text_tokens tokens, not more and not an error."""
        words = " ".join(f"word{number}" for number in range(2 * family.text_tokens))
        assert text_encoder.encode((Caption(words),), "prompt").mask.sum() == family.text_tokens

    def test_encoding_a_caption_is_deterministic(self, text_encoder: TextEncoder) -> None:
        """The same captions give the same embeddings, bit for bit, whatever was encoded in between."""
        first = text_encoder.encode(CAPTIONS, "prompt")
        text_encoder.encode((Caption("something else"),), "negative")
        again = text_encoder.encode(CAPTIONS, "prompt")
        assert torch.equal(first.embeds[first.mask], again.embeds[again.mask])
        assert torch.equal(first.mask, again.mask)

    def test_a_caption_does_not_depend_on_its_batch(self, text_encoder: TextEncoder) -> None:
        """A caption encoded alone has the tokens that it has beside a longer one (within text_tolerance)."""
        together = text_encoder.encode(CAPTIONS, "prompt")
        for row, caption in enumerate(CAPTIONS):
            alone = text_encoder.encode((caption,), "prompt")
            found, wanted = together.embeds[row][together.mask[row]], alone.embeds[0][alone.mask[0]]
            assert len(found) == len(wanted), f"{len(found)} tokens in the batch, {len(wanted)} alone"
            assert gap(found, wanted) <= self.text_tolerance

    def test_different_captions_give_different_embeddings(self, text_encoder: TextEncoder) -> None:
        """Two captions differ in their embeddings or in their length."""
        first, second = (text_encoder.encode((Caption(text),), "prompt") for text in ("a cat", "a dog"))
        assert first.embeds.shape != second.embeds.shape or not torch.equal(first.embeds, second.embeds)

    def test_no_embedding_is_in_a_graph(self, text_encoder: TextEncoder) -> None:
        """Embeddings carry no gradient: text encoders are not trained."""
        with torch.enable_grad():
            assert not text_encoder.encode(CAPTIONS, "prompt").embeds.requires_grad

    def test_the_text_encoder_is_released(self, family: Family) -> None:
        """Nothing of the encoder is in memory after its with block."""
        left = survivors(lambda: family.open_text_encoder("cpu"), lambda encoder: encoder.encode(CAPTIONS, "prompt"))
        assert not left, f"still in memory: {', '.join(left)}"
