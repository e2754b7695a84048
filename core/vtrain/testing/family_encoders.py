"""The rules of a text encoder and of a video codec."""

from __future__ import annotations

import pytest
import torch

from vtrain.contract import Caption, ClipShape, Device, Family, Role, TextEncoder, VideoCodec, VtrainError
from vtrain.testing.memory import survivors
from vtrain.testing.sampler import check_names, gap, moving_picture
from vtrain.testing.subject import CAPTIONS, FamilySubject


class VideoCodecTests(FamilySubject):
    """Pixels to latents and back.

    codec_tolerance: largest difference, relative to the largest value, between a clip encoded alone and in a batch.
    """

    codec_tolerance: float = 1e-4

    def test_latent_arithmetic_equals_a_real_encode(self, family: Family, codec: VideoCodec) -> None:
        """latent_shape gives the shape of what encode returns, for wide and high clips, one frame and several."""
        rule, stride = family.frame_rule, family.pixel_stride
        sizes = ((2 * stride, 3 * stride), (3 * stride, 2 * stride), (2 * stride, 2 * stride))
        for steps, (height, width) in enumerate(sizes):
            clip = ClipShape(max(1, rule.offset) + steps * rule.stride, height, width)
            found = tuple(codec.encode(moving_picture(clip)).mean.shape)
            assert found == (1, *family.latent_shape(clip)), f"{clip}: encode gave {found}"

    def test_abilities_of_the_codec_are_spelt_right(self, codec: VideoCodec) -> None:
        """No public name of the codec is almost that of an ability which it lacks."""
        check_names("video codec", codec)

    def test_latents_are_finite_fp32_without_a_graph(self, codec: VideoCodec, clip: ClipShape) -> None:
        """Latents are fp32, finite and carry no gradient."""
        latents = codec.encode(moving_picture(clip)).mean
        assert latents.dtype is torch.float32
        assert latents.isfinite().all()
        assert not latents.requires_grad

    def test_the_spread_is_given_when_asked(self, codec: VideoCodec, clip: ClipShape) -> None:
        """With std=True a std like the mean, not negative; the mean is the same. Without, none."""
        pixels = moving_picture(clip)
        plain, asked = codec.encode(pixels), codec.encode(pixels, std=True)
        assert plain.std is None
        assert asked.std is not None
        assert asked.std.shape == asked.mean.shape
        assert (asked.std >= 0).all()
        assert torch.equal(plain.mean, asked.mean)

    def test_encoding_a_clip_is_deterministic(self, codec: VideoCodec, clip: ClipShape) -> None:
        """The same clip gives the same latents, bit for bit, with clips of another shape in between."""
        pixels = moving_picture(clip)
        first = codec.encode(pixels).mean
        codec.encode(moving_picture(clip._replace(height=clip.width, width=clip.height), seed=1))
        assert torch.equal(first, codec.encode(pixels).mean)

    def test_encoding_sees_the_pixels(self, codec: VideoCodec, clip: ClipShape) -> None:
        """Different clips have different latents."""
        assert not torch.equal(*(codec.encode(moving_picture(clip, seed=seed)).mean for seed in (0, 1)))

    def test_encoded_clips_in_a_batch_do_not_see_each_other(self, codec: VideoCodec, clip: ClipShape) -> None:
        """A clip encoded in a batch has the latents that it has alone (within codec_tolerance)."""
        pixels = moving_picture(clip, batch=2)
        together = codec.encode(pixels).mean
        for row in range(2):
            assert gap(together[row : row + 1], codec.encode(pixels[row : row + 1]).mean) <= self.codec_tolerance

    def test_decoding_gives_back_the_pixel_shape(self, codec: VideoCodec, clip: ClipShape) -> None:
        """decode(encode(x)) is fp32 (B, 3, F, H, W) in [-1, 1]."""
        pixels = moving_picture(clip, batch=2)
        decoded = codec.decode(codec.encode(pixels).mean)
        assert decoded.shape == pixels.shape
        assert decoded.dtype is torch.float32
        assert decoded.isfinite().all()
        assert decoded.abs().max() <= 1, "pixels are in [-1, 1]"

    def test_decoded_clips_in_a_batch_do_not_see_each_other(self, codec: VideoCodec, clip: ClipShape) -> None:
        """A clip decoded in a batch has the pixels that it has alone (within codec_tolerance)."""
        latents = codec.encode(moving_picture(clip, batch=2)).mean
        together = codec.decode(latents)
        for row in range(2):
            assert gap(together[row : row + 1], codec.decode(latents[row : row + 1])) <= self.codec_tolerance

    def test_a_clip_off_the_rules_is_refused(self, family: Family, codec: VideoCodec, clip: ClipShape) -> None:
        """Frames off the frame rule, or a height or width off the stride, raise: nothing is cropped in silence."""
        wrong = [clip._replace(height=clip.height + 1), clip._replace(width=clip.width + 1)]
        if family.frame_rule.stride > 1:
            wrong.append(clip._replace(frames=clip.frames + 1))
        for shape in wrong:
            with pytest.raises((ValueError, VtrainError)):
                pytest.fail(f"{shape} gave latents {tuple(codec.encode(moving_picture(shape)).mean.shape)}")

    def test_the_codec_is_released(self, family: Family, clip: ClipShape) -> None:
        """Nothing of the codec is in memory after its with block."""
        pixels = moving_picture(clip)
        left = survivors(lambda: family.open_video_codec("cpu"), lambda codec: codec.encode(pixels))
        assert not left, f"still in memory: {', '.join(left)}"


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
