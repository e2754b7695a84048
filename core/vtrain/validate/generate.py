"""Videos from the model being trained, by its own sampler with classifier-free guidance (arXiv 2207.12598), and their files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vtrain.contract import (
    Caption,
    Condition,
    Denoiser,
    Device,
    DeviceError,
    Event,
    Family,
    Generating,
    NoiseLevel,
    Predict,
    Role,
    Sampler,
    Size,
    SupportsStepwise,
    Text,
    Validated,
    Validating,
    timed,
    timesteps,
    with_clean,
)
from vtrain.data.batches import pad
from vtrain.data.caching.caches import Caches
from vtrain.data.caching.sharing import Peers
from vtrain.plan.records import ValidationPlan
from vtrain.validate.videos import Strip, read_frames, spread, write_mp4, write_sheet

_COLUMNS = 6
_CELL = 192
"""Frames of a video that its contact sheet shows; pixels of their width."""
_LONGEST_PROMPT = 100


def to_frames(pixels: Tensor) -> Tensor:
    """pixels (3, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3), rounded as diffusers' VideoProcessor does."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def fitted(pixels: Tensor, size: Size) -> Tensor:
    """pixels (3, F, H, W), scaled to cover `size` and cut to it around the middle: (3, F, h, w).

    As diffusers' VideoProcessor.resize_and_crop_tensor, by which its pipelines leave their buckets, but antialiased where
    it makes smaller.
    """
    height, width = pixels.shape[2:]
    if (width, height) == size:
        return pixels
    scale = max(size.height / height, size.width / width)
    covering = max(size.height, round(height * scale)), max(size.width, round(width * scale))
    frames = functional.interpolate(pixels.transpose(0, 1).float(), covering, mode="bilinear", antialias=True)
    top, left = (covering[0] - size.height) // 2, (covering[1] - size.width) // 2
    return frames[:, :, top : top + size.height, left : left + size.width].transpose(0, 1)


class Interrupted(Exception):
    """The user asked to stop while a video was being generated."""


def texts(plan: ValidationPlan) -> list[tuple[Caption, Role]]:
    """What has to be in the text cache before validation."""
    negative: list[tuple[Caption, Role]] = [(Caption(plan.negative_prompt), "negative")] if plan.guidance > 1 else []
    return [(Caption(prompt), "prompt") for prompt in plan.prompts.values()] + negative


def guided(denoiser: Denoiser, text: Text, guidance: float) -> Predict:
    """The prediction with guidance: u + g (c - u), c with the prompt, u with the negative one; both in one batch.

    text: of the negative prompts, then the prompts; with guidance at 1 or below, of the prompts alone.
    """
    if guidance <= 1:
        return lambda noisy, level: denoiser.predict(noisy, level, Condition(text)).float()

    def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
        doubled = NoiseLevel(torch.cat([level.sigma] * 2), torch.cat([timesteps(level)] * 2))
        prediction = denoiser.predict(torch.cat([noisy] * 2), doubled, Condition(text)).float()
        without, with_prompt = prediction.chunk(2)
        return without + guidance * (with_prompt - without)

    return predict


def after(family: Family, first: Tensor, predict: Predict) -> Predict:
    """The prediction for the frames after the first, which is clean and stays so: image-to-video.

    first: (B, C, 1, h, w). The model is given all frames, with level 0 at the first; what it predicts there is dropped.
    """

    def following(noisy: Tensor, level: NoiseLevel) -> Tensor:
        whole = torch.cat([first, noisy], 2)
        clean = torch.zeros(len(whole), whole.shape[2], dtype=torch.bool, device=whole.device)
        clean[:, 0] = True
        return predict(whole, with_clean(family, level, clean))[:, :, 1:]

    return following


@dataclass(frozen=True)
class Validator:
    """Generates the plan's prompts with a denoiser. autocast: as in training. stopping: asked after each solver step.

    pictures: nickname -> clean first latent frame (1, C, 1, h, w) of the prompts that go on from one.
    """

    plan: ValidationPlan
    family: Family
    sampler: Sampler
    caches: Caches
    denoiser: Denoiser
    device: Device
    autocast: Callable[[], AbstractContextManager[Any]]
    stopping: Callable[[], bool]
    pictures: Mapping[str, Tensor] = field(default_factory=dict)

    def start(self) -> Tensor:
        """The starting noise (1, C, f, h, w), fp32 from a CPU generator: the same on every device and at every step."""
        shape = self.family.latent_shape(self.plan.shape)
        return torch.randn((1, *shape), generator=torch.Generator().manual_seed(self.plan.seed))

    def text(self, prompts: Sequence[str]) -> Text:
        """As guided() takes it, on the device."""
        texts = [self.caches.text(Caption(prompt), "prompt") for prompt in prompts]
        if self.plan.guidance > 1:
            # The negative ones first: so does diffusers, and so guided() cuts the prediction in two.
            texts = [self.caches.text(Caption(self.plan.negative_prompt), "negative")] * len(texts) + texts
        return pad(texts, self.family.text_encoders()).map(self.device.move)

    def latents(self, *prompts: str, first: Tensor | None = None) -> Tensor:
        """Clean latents (B, C, f, h, w) of B prompts, in one batch and from the same noise, on the CPU. Raises Interrupted.

        first: (B, C, 1, h, w), the clean first frame of each; what is solved then is the others.
        """
        ((_, made),) = deque(self.solving(prompts, first), maxlen=1)
        return made.cpu()

    def solving(self, prompts: Sequence[str], first: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """`latents`, on the device, as they are after each solver step, with the steps done; after the last alone where the
        sampler is no SupportsStepwise. Raises Interrupted."""
        guess = guided(self.denoiser, self.text(prompts), self.plan.guidance)
        noise = self.device.move(self.start()).repeat(len(prompts), 1, 1, 1, 1)
        if first is not None:
            first, noise = self.device.move(first), noise[:, :, 1:]
            guess = after(self.family, first, guess)

        def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
            """In training's autocast; the solver's own arithmetic stays fp32."""
            with self.autocast():
                return guess(noisy, timed(self.family, level))

        states = self._states(predict, noise)
        while True:
            with torch.no_grad():  # not across a yield, where it would hold for whoever takes the next step
                found = next(states, None)
            if found is None:
                return
            done, solved = found
            yield done, solved if first is None else torch.cat([first, solved], 2)
            self._stop_if_asked()

    def _states(self, predict: Predict, noise: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Solver steps done, and the latents then."""
        if isinstance(self.sampler, SupportsStepwise):
            yield from enumerate(self.sampler.solving(predict, noise, self.plan.steps), start=1)
        else:
            steps = self.plan.steps
            yield steps, self.sampler.solve(predict, noise, steps, lambda _done, _latents: self._stop_if_asked())

    def _stop_if_asked(self) -> None:
        if self.stopping():
            raise Interrupted

    def videos(self, folder: Path, nicknames: list[str], together: int = 1) -> dict[str, Path]:
        """Generate and write `folder`/<nickname>.mp4 for some of the prompts. The module is as before afterwards.

        together: prompts in one batch. More is faster with a small model, and changes the last bits.
        """
        work = self.generating(folder, nicknames, together)
        try:
            while True:
                next(work)
        except StopIteration as end:
            made: dict[str, Path] = end.value
            return made

    def generating(
        self, folder: Path, nicknames: list[str], together: int = 1, step: int = 0
    ) -> Generator[Generating, None, dict[str, Path]]:
        """`videos`, and how far they are. step: of the events."""
        if not nicknames:
            return {}
        steps, count = self.plan.steps, len(nicknames)
        folder.mkdir(parents=True, exist_ok=True)
        module = self.denoiser.module
        training = module.training
        module.eval()
        try:
            latents: dict[str, Tensor] = {}
            for names in self._batches(nicknames, together):
                number = len(latents) + 1
                yield Generating(step, "solving", number, count, 0, steps)
                given = [self.pictures[name] for name in names if name in self.pictures]
                prompts = [self.plan.prompts[name] for name in names]
                made: list[Tensor] = []
                for done, latest in self.solving(prompts, torch.cat(given) if given else None):
                    made = [latest]
                    yield Generating(step, "solving", number, count, done, steps)
                latents |= dict(zip(names, made[0].cpu().chunk(len(names)), strict=True))
        finally:
            module.train(training)
        # After all latents are solved: the codec is opened once for all of them.
        files = {}
        with self.family.open_video_codec(str(self.device)) as codec:
            for number, nickname in enumerate(nicknames, start=1):
                yield Generating(step, "decoding", number, count, steps, steps)
                files[nickname] = folder / f"{nickname}.mp4"
                with torch.no_grad():
                    pixels = codec.decode(self.device.move(latents[nickname]))
                write_mp4(files[nickname], to_frames(fitted(pixels[0], self.plan.size)), self.plan.fps)
        return files

    def _batches(self, nicknames: list[str], together: int) -> Iterator[list[str]]:
        """In batches of at most `together`; those that go on from a picture are apart from those that do not."""
        for with_picture in (False, True):
            names = [name for name in nicknames if (name in self.pictures) is with_picture]
            yield from (names[start : start + together] for start in range(0, len(names), together))


@dataclass(frozen=True)
class Validation:
    """Validations of a run, each as events. It never ends the run: what fails is in the event.

    folder: of all samples. peers: each generates its share. explained: a full device's error, in words that help.
    """

    validator: Validator
    folder: Path
    peers: Peers
    explained: Callable[[], AbstractContextManager[None]]

    def __call__(self, step: int) -> Iterator[Event]:
        """Generate all prompts after `step` optimizer steps."""
        prompts = self.validator.plan.prompts
        folder = self.folder / f"step-{step:06d}"
        yield Validating(step, len(prompts))
        own = yield from self._share(step, folder, list(prompts)[self.peers.rank :: self.peers.count])
        shares = self.peers.gathered([own])
        everything = {name: path for files, _, _ in shares for name, path in files.items()}
        files = {name: everything[name] for name in prompts if name in everything}
        sheet, fault = None, ""
        if files and not self.peers.rank:
            try:
                sheet = folder / "sheet.png"
                write_sheet(sheet, (), [self._strip(name, file) for name, file in files.items()], _COLUMNS)
            except Exception as error:  # noqa: BLE001 - validation never ends a run
                sheet, fault = None, f"no contact sheet: {type(error).__name__}: {error}"
        # All have the same failures, of which the exit code tells.
        failures = {words for words in (*(words for _, words, _ in shares), *self.peers.gathered([fault])) if words}
        interrupted = any(stopped for _, _, stopped in shares)
        if interrupted and not self.peers.rank:
            with suppress(OSError):
                folder.rmdir()  # if it is empty
        yield Validated(step, files, sheet, tuple(sorted(failures)), interrupted)

    def _strip(self, nickname: str, file: Path) -> Strip:
        plan, frames = self.validator.plan, read_frames(file)
        picks = spread(len(frames), _COLUMNS)
        height, width = frames[0].shape[:2]
        small = [Image.fromarray(frames[pick]).resize((_CELL, height * _CELL // width)) for pick in picks]
        label = f"{nickname}: {plan.prompts[nickname][:_LONGEST_PROMPT]}"
        return Strip(
            label, np.stack([np.asarray(each) for each in small]), [f"{pick / plan.fps:.2f} s" for pick in picks]
        )

    def _share(
        self, step: int, folder: Path, nicknames: list[str]
    ) -> Generator[Event, None, tuple[dict[str, Path], str, bool]]:
        """(files, why there are no others, whether the run was asked to stop before they were made)."""
        try:
            with self.explained():
                return (yield from self.validator.generating(folder, nicknames, step=step)), "", False
        except Interrupted:
            return {}, "", True
        except DeviceError as error:
            return {}, str(error), False
        except Exception as error:  # noqa: BLE001 - validation never ends a run
            return {}, f"{type(error).__name__}: {error}", False
