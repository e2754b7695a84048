"""The rules of a text encoder and of a video codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from vtrain.contract import (
    Caption,
    ClipShape,
    Device,
    Family,
    Role,
    TextEncoder,
    TextEncoderSpec,
    TextPart,
    VideoCodec,
    VtrainError,
)
from vtrain.testing.memory import survivors
from vtrain.testing.sampler import check_names, gap, moving_picture, unproved
from vtrain.testing.subject import CAPTIONS, FamilySubject


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (found - wanted).double().square().mean().clamp(min=1e-12)))


class VideoCodecTests(FamilySubject):
    """Pixels to latents and back.

    codec_tolerance: largest difference, relative to the largest value, between a clip encoded alone and in a batch.
    least_psnr: of decode(encode(x)) to x, in dB, on a smooth clip in [-1, 1]; a trained codec has 30 and more. None where the model
    folder's codec has random weights, which give back nothing.
    """

    codec_tolerance: float = 1e-4
    least_psnr: float | None = None

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
        assert latents.dtype is torch.float32, f"latents are {latents.dtype}"
        assert latents.isfinite().all(), "a latent is not finite"
        assert not latents.requires_grad, "latents are in a graph"

    def test_the_spread_is_given_when_asked(self, codec: VideoCodec, clip: ClipShape) -> None:
        """With std=True a std like the mean, not negative; the mean is the same. Without, none."""
        pixels = moving_picture(clip)
        plain, asked = codec.encode(pixels), codec.encode(pixels, std=True)
        assert plain.std is None, "a spread that nobody asked for"
        assert asked.std is not None, "std=True gives no spread"
        assert asked.std.shape == asked.mean.shape
        assert (asked.std >= 0).all()
        assert torch.equal(plain.mean, asked.mean)

    def test_encoding_a_clip_is_deterministic(self, codec: VideoCodec, clip: ClipShape) -> None:
        """The same clip gives the same latents, bit for bit, with clips of another shape in between."""
        pixels = moving_picture(clip)
        first = codec.encode(pixels).mean
        codec.encode(moving_picture(clip._replace(height=clip.width, width=clip.height), seed=1))
        assert torch.equal(first, codec.encode(pixels).mean), "the same clip has other latents the second time"

    def test_encoding_sees_the_pixels(self, codec: VideoCodec, clip: ClipShape) -> None:
        """Different clips have different latents."""
        one, other = (codec.encode(moving_picture(clip, seed=seed)).mean for seed in (0, 1))
        assert not torch.equal(one, other), "two clips have the same latents"

    def test_encoded_clips_in_a_batch_do_not_see_each_other(self, codec: VideoCodec, clip: ClipShape) -> None:
        """A clip encoded in a batch has the latents that it has alone (within codec_tolerance)."""
        pixels = moving_picture(clip, batch=2)
        together = codec.encode(pixels).mean
        for row in range(2):
            off = gap(together[row : row + 1], codec.encode(pixels[row : row + 1]).mean)
            assert off <= self.codec_tolerance, f"latents of a clip in a batch differ by {off:.1e}"

    def test_decoding_gives_back_the_pixel_shape(self, codec: VideoCodec, clip: ClipShape) -> None:
        """decode(encode(x)) is fp32 (B, 3, F, H, W) in [-1, 1]."""
        pixels = moving_picture(clip, batch=2)
        decoded = codec.decode(codec.encode(pixels).mean)
        assert decoded.shape == pixels.shape, f"pixels {tuple(pixels.shape)} come back as {tuple(decoded.shape)}"
        assert decoded.dtype is torch.float32
        assert decoded.isfinite().all()
        assert decoded.abs().max() <= 1, "pixels are in [-1, 1]"

    def test_decoding_undoes_encoding(self, codec: VideoCodec, clip: ClipShape) -> None:
        """decode(encode(x)) is x but for what compression loses (least_psnr)."""
        if self.least_psnr is None:
            unproved(
                "that decode undoes encode", "least_psnr", "it as a class attribute, in dB, if the codec is trained"
            )
        pixels = moving_picture(clip)
        decoded = codec.decode(codec.encode(pixels).mean)
        found = psnr(decoded, pixels)
        assert found >= self.least_psnr, f"{found:.1f} dB where {self.least_psnr:g} are asked for"

    def test_decoded_clips_in_a_batch_do_not_see_each_other(self, codec: VideoCodec, clip: ClipShape) -> None:
        """A clip decoded in a batch has the pixels that it has alone (within codec_tolerance)."""
        latents = codec.encode(moving_picture(clip, batch=2)).mean
        together = codec.decode(latents)
        for row in range(2):
            off = gap(together[row : row + 1], codec.decode(latents[row : row + 1]))
            assert off <= self.codec_tolerance, f"pixels of a clip in a batch differ by {off:.1e}"

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


Encoders = Mapping[str, TextEncoder]


def encoders_of(family: Family, opened: Encoders) -> Iterator[tuple[str, TextEncoderSpec, TextEncoder]]:
    """Each by name, with what it promises."""
    for name, spec in family.text_encoders().items():
        yield name, spec, opened[name]


def real(part: TextPart, row: int) -> Tensor:
    """What a part has of one caption: the real tokens (L, D), or the pooled vector (D,)."""
    return part.embeds[row] if part.mask is None else part.embeds[row][part.mask[row]]


ROLES: tuple[Role, ...] = ("prompt", "negative", "dropped")


class TextEncoderTests(FamilySubject):
    """Captions to embeddings.

    text_tolerance: largest difference, relative to the largest value, between a caption encoded alone and in a batch.
    """

    text_tolerance: float = 1e-4

    @pytest.mark.parametrize("role", ROLES)
    def test_each_encoder_gives_the_parts_that_it_promises(
        self, family: Family, text_encoders: Encoders, role: Role
    ) -> None:
        """Every role gives all parts, and no other, on the CPU and finite, each of its shape and storage type."""
        for name, spec, encoder in encoders_of(family, text_encoders):
            text = encoder.encode(CAPTIONS, role)
            faults = list(spec.faults(text, len(CAPTIONS)))
            assert not faults, f"{name}: {'; '.join(faults)}"
            for part, found in text.parts.items():
                assert found.embeds.isfinite().all(), f"{name}: {part} is not finite"
                assert Device.of(found.embeds) == Device(), f"{name}: {part} is not on the CPU"
                assert found.mask is None or Device.of(found.mask) == Device(), (
                    f"{name}: {part}'s mask is not on the CPU"
                )

    @pytest.mark.parametrize("role", ROLES)
    def test_masks_are_prefixes(self, family: Family, text_encoders: Encoders, role: Role) -> None:
        """Real tokens come first: a mask is True, then False. Each caption, the empty one too, has a real token."""
        for name, _, encoder in encoders_of(family, text_encoders):
            for part, found in encoder.encode((*CAPTIONS, Caption("")), role).parts.items():
                if found.mask is not None:
                    mask = found.mask.int()
                    assert (mask.diff(dim=1) <= 0).all(), f"{name}: a real token of {part} after padding"
                    assert mask[:, 0].all(), f"{name}: a caption without a real token of {part}"

    def test_a_long_caption_keeps_to_the_token_limit(self, family: Family, text_encoders: Encoders) -> None:
        """A caption longer than an encoder takes gives as many tokens as its parts have, not more and not an error."""
        for name, spec, encoder in encoders_of(family, text_encoders):
            most = max(part.tokens or 0 for part in spec.parts.values())
            words = " ".join(f"word{number}" for number in range(2 * max(most, 100)))
            text = encoder.encode((Caption(words),), "prompt")
            for part, promised in spec.parts.items():
                mask = text.parts[part].mask
                if mask is not None:
                    assert mask.sum() == promised.tokens, f"{name}: {mask.sum()} tokens of {part}"

    def test_encoding_a_caption_is_deterministic(self, family: Family, text_encoders: Encoders) -> None:
        """The same captions give the same embeddings, bit for bit, whatever was encoded in between."""
        for name, _, encoder in encoders_of(family, text_encoders):
            first = encoder.encode(CAPTIONS, "prompt")
            encoder.encode((Caption("something else"),), "negative")
            again = encoder.encode(CAPTIONS, "prompt")
            for part in first.parts:
                for row in range(len(CAPTIONS)):
                    same = torch.equal(real(first.parts[part], row), real(again.parts[part], row))
                    assert same, f"{name}: {part} is another the second time"

    def test_a_caption_does_not_depend_on_its_batch(self, family: Family, text_encoders: Encoders) -> None:
        """A caption encoded alone has the embeddings that it has beside a longer one (within text_tolerance)."""
        for name, _, encoder in encoders_of(family, text_encoders):
            together = encoder.encode(CAPTIONS, "prompt")
            for row, caption in enumerate(CAPTIONS):
                alone = encoder.encode((caption,), "prompt")
                for part in together.parts:
                    found, wanted = real(together.parts[part], row), real(alone.parts[part], 0)
                    assert len(found) == len(wanted), (
                        f"{name}: {len(found)} of {part} in the batch, {len(wanted)} alone"
                    )
                    assert gap(found, wanted) <= self.text_tolerance, (
                        f"{name}: {part} differs by {gap(found, wanted):.1e}"
                    )

    def test_different_captions_give_different_embeddings(self, family: Family, text_encoders: Encoders) -> None:
        """Two captions differ in each part, in its embeddings or in its length."""
        for name, _, encoder in encoders_of(family, text_encoders):
            first, second = (encoder.encode((Caption(text),), "prompt") for text in ("a cat", "a dog"))
            for part in first.parts:
                assert not torch.equal(real(first.parts[part], 0), real(second.parts[part], 0)), (
                    f"{name}: {part} is the same for two captions"
                )

    def test_no_embedding_is_in_a_graph(self, family: Family, text_encoders: Encoders) -> None:
        """Embeddings carry no gradient: text encoders are not trained."""
        for name, _, encoder in encoders_of(family, text_encoders):
            with torch.enable_grad():
                found = encoder.encode(CAPTIONS, "prompt")
            assert not any(part.embeds.requires_grad for part in found.parts.values()), f"{name}: in a graph"

    def test_the_text_encoders_are_released(self, family: Family) -> None:
        """Nothing of an encoder is in memory after its with block."""
        for name, spec in family.text_encoders().items():
            left = survivors(lambda spec=spec: spec.open("cpu"), lambda encoder: encoder.encode(CAPTIONS, "prompt"))  # type: ignore[misc]
            assert not left, f"of {name} still in memory: {', '.join(left)}"
