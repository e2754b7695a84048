"""What agrees with itself and not with the original model: every rule that takes a reference, or a model folder, finds it.

The original is the sound toy family.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from vtrain_toy import geometry
from vtrain_toy.codec import ToyCodec
from vtrain_toy.denoiser import ADAPTER, ADAPTER_SETTINGS, ToyDenoiser, build_denoiser
from vtrain_toy.family import ToyFamily, ToyOptions
from vtrain_toy.pictures import ToyPicturesFamily, ToyPicturesOptions
from vtrain_toy.text import ToyTextEncoder

from vtrain.contract import Caption, ClipShape, Condition, Family, HashFile, Latents, NoiseLevel, Text, TextPart, timed
from vtrain.testing import FamilyTests
from vtrain.testing.family_files import FileTests
from vtrain.testing.references import Original, ReferenceTests

CLIP = ClipShape(9, 32, 48)
SOUND = ToyFamily(ToyOptions())
counter = itertools.count()
Subject = dict[str, Any]


def family(**members: object) -> ToyFamily:
    """A toy family with members of its class replaced."""
    made: ToyFamily = type("BrokenFamily", (ToyFamily,), members)(ToyOptions())
    return made


def with_denoiser(kind: type[ToyDenoiser]) -> ToyFamily:
    def load(self: ToyFamily, device: str, dtype: str, weights: Path | None = None) -> ToyDenoiser:
        return kind(build_denoiser(32, 3, 0, None).module)  # type: ignore[arg-type]

    return family(load_denoiser=load)


def original(denoiser: ToyDenoiser) -> Original:
    def predict(noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return denoiser.predict(noisy, timed(SOUND, NoiseLevel(sigma)), condition)

    return predict


def predicting(made: ToyFamily) -> Subject:
    example = FamilyTests.example_of(made, CLIP)
    return {"family": made, "example": example, "reference_predict": original(build_denoiser(32, 3, 0, None))}


class Negative(ToyDenoiser):
    def predict(self, *inputs: Any) -> Tensor:
        return -super().predict(*inputs)


class Shorter(ToyDenoiser):
    """It gives its network the text without its first token."""

    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        text = condition.text.only
        shorter = Text.of(text.embeds[:, 1:], text.masked[1][:, 1:])
        return super().predict(noisy, level, Condition(shorter, condition.extras))


class Codec(ToyCodec):
    """A codec whose pixels, latents or decoded pixels pass through a change."""

    def __init__(self, **changes: Callable[[Tensor], Tensor]) -> None:
        self._changes = changes

    def _through(self, what: str, tensor: Tensor) -> Tensor:
        return self._changes.get(what, lambda same: same)(tensor)

    def encode(self, pixels: Tensor, *, std: bool = False) -> Latents:
        latents = super().encode(self._through("pixels", pixels), std=std)
        return replace(latents, mean=self._through("latents", latents.mean))

    def decode(self, latents: Tensor) -> Tensor:
        return self._through("decoded", super().decode(self._through("given", latents)))


def coding(codec: ToyCodec, *, decoded: bool = False) -> Subject:
    sound = ToyCodec()
    subject = {"codec": codec, "example": FamilyTests.example_of(SOUND, CLIP)}
    subject["reference_latents"] = (lambda pixels: sound.encode(pixels).mean, sound.decode)
    return subject if decoded else {**subject, "family": SOUND}


class Wording(ToyTextEncoder):
    """It words a caption otherwise before it is encoded."""

    def __init__(self, change: Callable[[str], str]) -> None:
        super().__init__()
        self._change = change

    def encode(self, captions: Sequence[Caption], role: Any) -> Text:
        return super().encode([Caption(self._change(caption.text)) for caption in captions], role)


def wording(change: Callable[[str], str], theirs: Callable[[TextPart], TextPart] = lambda part: part) -> Subject:
    def encode(captions: Sequence[str], role: Any) -> Text:
        text = ToyTextEncoder().encode([Caption(caption) for caption in captions], role)
        return Text({"text": theirs(text.only)})

    return {"family": SOUND, "text_encoders": {"words": Wording(change)}, "reference_text": encode, "role": "prompt"}


class Prefixed(ToyDenoiser):
    """Its files have names that it alone knows."""

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        super().save_lora(folder, {f"toy.{name}": value for name, value in state.items()}, settings)

    def load_lora(self, folder: Path) -> dict[str, Tensor]:
        return {name.removeprefix("toy."): value for name, value in super().load_lora(folder).items()}


class Unscaled(ToyDenoiser):
    """It forgets alpha."""

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        super().save_lora(folder, state, {**settings, "lora_alpha": settings["r"]})


def adapting(kind: type[ToyDenoiser], folder: Path) -> Subject:
    def load(adapter: Path) -> Original:
        denoiser = build_denoiser(32, 3, 0, None)
        inject_adapter_in_model(LoraConfig(**json.loads((adapter / ADAPTER_SETTINGS).read_text())), denoiser.module)
        set_peft_model_state_dict(denoiser.module, load_file(adapter / ADAPTER))
        return original(denoiser)

    example = FamilyTests.example_of(SOUND, CLIP)
    return {"family": with_denoiser(kind), "example": example, "reference_lora": load, "tmp_path": folder}


def on_folder(folder: Path, needs_clip: bool = True, **members: object) -> Subject:
    """`toy-pictures` with members replaced, on a folder with weights of its denoiser and of its encoder of pictures."""
    model = folder / "model"
    build_denoiser(32, 3, 0, None, pictures=True).save(model, build_denoiser(32, 3, 0, None, True).module.state_dict())
    save_file({"palette": torch.eye(3)}, model / "palette.safetensors")
    kind = type("BrokenFamily", (ToyPicturesFamily,), members)

    def build(path: Path) -> Family:
        made: Family = kind(ToyPicturesOptions(path=path, palette=path / "palette.safetensors"))
        return made

    subject = {"model_folder": (model, build), "tmp_path": folder}
    return subject | {"clip": CLIP, "family": build(model)} if needs_clip else subject


def by_name(self: ToyPicturesFamily, hash_file: HashFile) -> str:
    return f"palette {self._options.init_seed}"


def with_denoiser_weights(self: ToyFamily, hash_file: HashFile) -> str:
    assert self._options.path is not None
    return f"codec {hash_file(self._options.path / 'denoiser.safetensors')}"


def with_the_path(self: ToyFamily, hash_file: HashFile) -> str:
    return f"codec of {self._options.path}"


def unread(self: ToyFamily, hash_file: Callable[[Path], str]) -> str:
    hash_file(Path(geometry.__file__))
    return "always the same"


FILES = "test_fingerprints_change_with_weights_and_only_then"
PLANTED: tuple[tuple[str, str, str, Callable[[Path], Subject]], ...] = (
    (
        "a timestep divided by 1000",
        "test_predictions_are_the_originals",
        "with timesteps times 1000 it is the same: Family.timestep gives another unit",
        lambda _: predicting(family(timestep=lambda self, sigma: sigma)),
    ),
    (
        "a timestep that runs the other way",
        "test_predictions_are_the_originals",
        "the prediction: it differs from the original's",
        lambda _: predicting(family(timestep=lambda self, sigma: 1000 * (1 - sigma))),
    ),
    (
        "a flipped sign of the prediction",
        "test_predictions_are_the_originals",
        "the prediction: it is the original's with the sign flipped",
        lambda _: predicting(with_denoiser(Negative)),
    ),
    (
        "a first token of text that is dropped",
        "test_predictions_are_the_originals",
        "the prediction: it differs from the original's",
        lambda _: predicting(with_denoiser(Shorter)),
    ),
    (
        "latents that are not normalised",
        "test_latents_are_the_originals",
        "normalisation differs (mean, std, scaling factor)",
        lambda _: coding(Codec(latents=lambda latents: latents / 2 + 0.1)),
    ),
    (
        "pixels in [0, 1] for a codec that takes [-1, 1]",
        "test_latents_are_the_originals",
        "normalisation differs",
        lambda _: coding(Codec(pixels=lambda pixels: (pixels + 1) / 2)),
    ),
    (
        "colours in the order BGR",
        "test_latents_are_the_originals",
        "the latents: it differs from the original's",
        lambda _: coding(Codec(pixels=lambda pixels: pixels.flip(1))),
    ),
    (
        "a decode that does not undo normalisation",
        "test_decoded_pixels_are_the_originals",
        "the pixels: it differs from the original's",
        lambda _: coding(Codec(given=lambda latents: 2 * latents), decoded=True),
    ),
    (
        "a decode with height and width mirrored",
        "test_decoded_pixels_are_the_originals",
        "the pixels: it differs from the original's",
        lambda _: coding(Codec(decoded=lambda pixels: pixels.flip(3, 4)), decoded=True),
    ),
    (
        "an instruction that the pipeline does not have",
        "test_embeddings_are_the_originals",
        "12 tokens, and the original has 9",
        lambda _: wording(lambda text: f"describe this video: {text}"),
    ),
    (
        "HTML that is cleaned here alone",
        "test_embeddings_are_the_originals",
        "of '  Tom &amp; Jerry",
        lambda _: wording(lambda text: text.replace("&amp;", "&")),
    ),
    (
        "text with a mask that the original does not have",
        "test_embeddings_are_the_originals",
        'the part\'s padding is "full"',
        lambda _: wording(str, lambda part: TextPart(part.embeds)),
    ),
    (
        "a LoRA under names that no other tool reads",
        "test_adapters_do_the_same_in_the_original",
        "it takes none of its keys",
        lambda folder: adapting(Prefixed, folder),
    ),
    (
        "a LoRA without its alpha",
        "test_adapters_do_the_same_in_the_original",
        "the prediction with the adapter: it differs",
        lambda folder: adapting(Unscaled, folder),
    ),
    (
        "a fingerprint that no weight changes",
        FILES,
        "with other weights in palette.safetensors, the encoder of picture gives something else and has the same fingerprint",
        lambda folder: on_folder(folder, _fingerprint=by_name),
    ),
    (
        "a codec's fingerprint with the denoiser's weights in it",
        FILES,
        "with other weights in denoiser.safetensors, the video codec gives the same and has another fingerprint",
        lambda folder: on_folder(folder, video_fingerprint=with_denoiser_weights),
    ),
    (
        "partly_used that names a file which is not there",
        FILES,
        "partly_used names what is no safetensors file of the model folder: vision.safetensors",
        lambda folder: on_folder(folder) | {"attributes": {"partly_used": frozenset({"vision.safetensors"})}},
    ),
    (
        "a fingerprint with the folder's path in it",
        "test_a_copied_model_folder_has_the_same_fingerprints",
        "the video codec",
        lambda folder: on_folder(folder, needs_clip=False, video_fingerprint=with_the_path),
    ),
    (
        "a fingerprint that is another one each time",
        "test_fingerprints_are_stable_and_differ_from_each_other",
        "asked twice, they are not the same",
        lambda _: {"family": family(video_fingerprint=lambda self, hash_file: str(next(counter)))},
    ),
    (
        "a fingerprint that hashes a file and forgets the hash",
        "test_fingerprints_follow_the_files_they_hash",
        "the video codec ignores the contents of",
        lambda _: {"family": family(video_fingerprint=unread)},
    ),
)
"""(the mistake, the rule that finds it, a piece of its message, the arguments with the mistake in them)."""


@pytest.mark.parametrize(("rule", "says", "subject"), [each[1:] for each in PLANTED], ids=[each[0] for each in PLANTED])
def test_the_rule_fails_for_a_family_that_is_not_the_original(
    rule: str, says: str, subject: Callable[..., Subject], tmp_path: Path, breaks: Callable[..., None]
) -> None:
    breaks(FamilyTests(), rule, subject(tmp_path), says)


def test_every_rule_with_a_reference_has_a_mutant(rules_of: Callable[[type], set[str]]) -> None:
    assert rules_of(ReferenceTests) | rules_of(FileTests) == {rule for _, rule, _, _ in PLANTED}


class Sharing(FamilyTests):
    """Of a family whose codec's fingerprint covers a file that the codec does not use, by design."""

    partly_used = frozenset({"denoiser.safetensors"})


def test_a_file_that_is_partly_used_may_change_a_fingerprint_in_vain(tmp_path: Path) -> None:
    Sharing().test_fingerprints_change_with_weights_and_only_then(
        **on_folder(tmp_path, video_fingerprint=with_denoiser_weights)
    )


@pytest.mark.parametrize("kept", [True, False], ids=["beside safetensors", "alone"])
def test_weights_that_the_kit_does_not_change_are_skipped_with_what_is_not_proved(tmp_path: Path, kept: bool) -> None:
    subject = on_folder(tmp_path)
    folder, build = subject["model_folder"]
    if kept:
        (folder / "vae.pth").write_bytes(b"weights")
    else:
        (tmp_path / "none").mkdir()
        subject["model_folder"] = (tmp_path / "none", lambda _: build(folder))
    said = "in vae.pth" if kept else "weights. There is no"
    with pytest.raises(pytest.skip.Exception, match=f"NOT PROVED: that fingerprints change with .*{said}"):
        FamilyTests().test_fingerprints_change_with_weights_and_only_then(**subject)
