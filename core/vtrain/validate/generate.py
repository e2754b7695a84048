"""Videos from the model being trained, by its own sampler with classifier-free guidance (arXiv 2207.12598), and their files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vtrain.config.tables import EmaTable
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
    PluginError,
    Predict,
    Registered,
    Sampler,
    Size,
    SupportsStepwise,
    Text,
    Validated,
    Validating,
    conditions_of,
    timed,
    timesteps,
    with_clean,
)
from vtrain.data.batches import pad
from vtrain.data.caching.caches import Caches
from vtrain.data.caching.pictures import Given, absent
from vtrain.data.caching.sharing import Peers
from vtrain.plan.averages import ENDING
from vtrain.plan.records import ValidationPlan
from vtrain.registry.blame import PartFault, blame
from vtrain.validate.videos import Strip, read_frames, spread, write_mp4, write_sheet

_COLUMNS = 6
_CELL = 192
"""Frames of a video that its contact sheet shows; pixels of their width."""
_LONGEST_PROMPT = 100

RAW, EMA = "", ENDING
"""What follows a nickname in the name of a video's file: of the weights in training, of their average."""


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


Weights = Callable[[], AbstractContextManager[None]]
"""Opens a context in which the denoiser has these weights."""


def weight_sets(table: EmaTable | None, averaged: Weights | None) -> dict[str, Weights]:
    """`Validator.weights`, as ema.validation asks for them. averaged: None where there is no average."""
    if table is None or averaged is None:
        return {RAW: nullcontext}
    sets: dict[str, Weights] = {RAW: nullcontext, EMA: averaged}
    wanted = {"raw": (RAW,), "ema": (EMA,), "both": (RAW, EMA)}[table.validation]
    return {ending: sets[ending] for ending in wanted}


class Interrupted(Exception):
    """The user asked to stop while a video was being generated."""


def guided(denoiser: Denoiser, condition: Condition, guidance: float) -> Predict:
    """The prediction with guidance: u + g (c - u), c with the prompt, u with the negative one; both in one batch.

    condition: text of the negative prompts, then the prompts, with guidance at 1 or below of the prompts alone; extras of the
    prompts: both sides have the same.
    """
    if guidance <= 1:
        return lambda noisy, level: denoiser.predict(noisy, level, condition).float()
    both = Condition(condition.text, {name: torch.cat([each] * 2) for name, each in condition.extras.items()})

    def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
        doubled = NoiseLevel(torch.cat([level.sigma] * 2), torch.cat([timesteps(level)] * 2))
        prediction = denoiser.predict(torch.cat([noisy] * 2), doubled, both).float()
        without, with_prompt = prediction.chunk(2)
        return without + guidance * (with_prompt - without)

    return predict


def after(family: Family, clean: Tensor, predict: Predict) -> Predict:
    """The prediction for the frames after the first ones, which are clean and stay so: image-to-video.

    clean: (B, C, n, h, w). The model is given all frames, with level 0 at the first n; what it predicts there is dropped.
    """
    given = clean.shape[2]

    def following(noisy: Tensor, level: NoiseLevel) -> Tensor:
        whole = torch.cat([clean, noisy], 2)
        stay = torch.zeros(len(whole), whole.shape[2], dtype=torch.bool, device=whole.device)
        stay[:, :given] = True
        return predict(whole, with_clean(family, level, stay))[:, :, given:]

    return following


@dataclass(frozen=True)
class Validator:
    """Generates the plan's prompts with a denoiser. autocast: as in training. stopping: asked after each solver step.

    pictures: nickname -> what is given beside the prompt, of those that have a picture. weights: with which weights each prompt
    is generated: what follows a nickname in the name of its file -> a context in which the denoiser has them. resting: in its
    with block the denoiser may be off the device. asked: `stopping` for this process alone, between the videos that it decodes.
    """

    plan: ValidationPlan
    family: Family
    sampler: Sampler
    caches: Caches
    denoiser: Denoiser
    device: Device
    autocast: Callable[[], AbstractContextManager[Any]]
    stopping: Callable[[], bool]
    pictures: Mapping[str, Given] = field(default_factory=dict)
    weights: Mapping[str, Weights] = field(default_factory=lambda: {RAW: nullcontext})
    resting: Callable[[], AbstractContextManager[None]] = nullcontext
    asked: Callable[[], bool] = lambda: False

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

    def without(self, count: int) -> Given:
        """What so many prompts without a picture are given: zeros for every condition."""
        return Given(extras=absent(conditions_of(self.family), self.plan.shape, count))

    def latents(self, *prompts: str, given: Given | None = None) -> Tensor:
        """Clean latents (B, C, f, h, w) of B prompts, in one batch and from the same noise, on the CPU. Raises Interrupted.

        given: beside the prompts, None: nothing. Of clean first frames what is solved then is the others.
        """
        ((_, made),) = deque(self.solving(prompts, given), maxlen=1)
        return made.cpu()

    def solving(self, prompts: Sequence[str], given: Given | None = None) -> Iterator[tuple[int, Tensor]]:
        """`latents`, on the device, as they are after each solver step, with the steps done; after the last alone where the
        sampler is no SupportsStepwise. Raises Interrupted."""
        given = given or self.without(len(prompts))
        extras = {name: self.device.move(each) for name, each in given.extras.items()}
        guess = guided(self.denoiser, Condition(self.text(prompts), extras), self.plan.guidance)
        noise = self.device.move(self.start()).repeat(len(prompts), 1, 1, 1, 1)
        clean = given.clean
        if clean is not None:
            clean, noise = self.device.move(clean), noise[:, :, clean.shape[2] :]
            guess = after(self.family, clean, guess)

        def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
            """In training's autocast; the solver's own arithmetic stays fp32."""
            with self.autocast():
                found = guess(noisy, timed(self.family, level))
            if found.shape != noisy.shape:
                what = f"its predict gave {tuple(found.shape)} where {tuple(noisy.shape)} was asked for"
                raise PartFault("family", "", what)
            return found

        states = self._states(predict, noise)
        while True:
            with torch.no_grad():  # not across a yield, where it would hold for whoever takes the next step
                found = next(states, None)
            if found is None:
                return
            done, solved = found
            yield done, solved if clean is None else torch.cat([clean, solved], 2)
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
        """Generate and write `folder`/<nickname>.mp4 for some of the prompts, or as `weights` has it. Gives the files by their
        names. The module is as before afterwards.

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
        self, folder: Path, nicknames: list[str], together: int = 1, step: int = 0, spare: int = 0
    ) -> Generator[Generating, None, dict[str, Path]]:
        """`videos`, and how far they are. step: of the events. spare: how many of the last are solved and not kept: processes that
        share a denoiser run it together."""
        if not nicknames:
            return {}
        kept = nicknames[: len(nicknames) - spare]
        steps, count = self.plan.steps, len(nicknames) * len(self.weights)
        folder.mkdir(parents=True, exist_ok=True)
        module = self.denoiser.module
        training = module.training
        module.eval()
        latents: dict[str, Tensor] = {}
        try:
            for ending, placed in self.weights.items():
                with placed():
                    for names in self._batches(nicknames, together):
                        number = len(latents) + 1
                        yield Generating(step, "solving", number, count, 0, steps)
                        given = [self.pictures[name] for name in names if name in self.pictures]
                        prompts = [self.plan.prompts[name] for name in names]
                        made: list[Tensor] = []
                        for done, latest in self.solving(prompts, Given.of(given) if given else None):
                            made = [latest]
                            yield Generating(step, "solving", number, count, done, steps)
                        own = (name + ending for name in names)
                        latents |= dict(zip(own, made[0].cpu().chunk(len(names)), strict=True))
        finally:
            module.train(training)
        # After all latents are solved: the codec is opened once for all of them.
        files = {}
        with self.resting(), self.family.open_video_codec(str(self.device)) as codec:
            for number, name in enumerate((name + end for end in self.weights for name in kept), start=1):
                if self.asked():
                    raise Interrupted
                yield Generating(step, "decoding", number, count, steps, steps)
                files[name] = folder / f"{name}.mp4"
                with torch.no_grad():
                    pixels = codec.decode(self.device.move(latents[name]))
                if pixels.shape != (1, 3, *self.plan.shape):
                    what = (
                        f"its video codec decoded {tuple(pixels.shape)} where {(1, 3, *self.plan.shape)} was asked for"
                    )
                    raise PartFault("family", "", what)
                write_mp4(files[name], to_frames(fitted(pixels[0], self.plan.size)), self.plan.fps)
        return files

    def _batches(self, nicknames: list[str], together: int) -> Iterator[list[str]]:
        """In batches of at most `together`; those that go on from a picture are apart from those that do not."""
        for with_picture in (False, True):
            names = [name for name in nicknames if (name in self.pictures) is with_picture]
            yield from (names[start : start + together] for start in range(0, len(names), together))


@dataclass(frozen=True)
class Validation:
    """Validations of a run, each as events. It never ends the run: what fails is in the event.

    folder: of all samples. peers: each generates its share. together: they share a denoiser, so that each solves as many.
    explained: a full device's error, in words that help. parts: of the run, of which one is named by what its plugin raises.
    """

    validator: Validator
    folder: Path
    peers: Peers
    explained: Callable[[], AbstractContextManager[None]]
    parts: Sequence[Registered]
    together: bool = False

    def __call__(self, step: int) -> Iterator[Event]:
        """Generate all prompts after `step` optimizer steps."""
        prompts, endings = self.validator.plan.prompts, list(self.validator.weights)
        folder = self.folder / f"step-{step:06d}"
        yield Validating(step, len(prompts) * len(endings))
        own = yield from self._share(step, folder, *self._nicknames())
        shares = self.peers.gathered([own])
        everything = {name: path for files, _, _ in shares for name, path in files.items()}
        # By prompt: what one prompt gave with either weights is side by side.
        names = {name + ending: name for name in prompts for ending in endings if name + ending in everything}
        files = {name: everything[name] for name in names}
        sheet, fault = None, ""
        if files and not self.peers.rank:
            try:
                sheet = folder / "sheet.png"
                strips = [self._strip(name, prompts[names[name]], file) for name, file in files.items()]
                write_sheet(sheet, (), strips, _COLUMNS)
            except Exception as error:  # noqa: BLE001 - validation never ends a run
                sheet, fault = None, f"no contact sheet: {type(error).__name__}: {error}"
        # All have the same failures, of which the exit code tells.
        failures = {words for words in (*(words for _, words, _ in shares), *self.peers.gathered([fault])) if words}
        interrupted = any(stopped for _, _, stopped in shares)
        if interrupted and not self.peers.rank:
            with suppress(OSError):
                folder.rmdir()  # if it is empty
        averaged = tuple(name for name, nickname in names.items() if name == nickname + EMA)
        yield Validated(step, files, sheet, tuple(sorted(failures)), interrupted, averaged)

    def _nicknames(self) -> tuple[list[str], int]:
        """Of this process's share; how many of the last are another's."""
        nicknames, count = list(self.validator.plan.prompts), self.peers.count
        own = nicknames[self.peers.rank :: count]
        spare = -(-len(nicknames) // count) - len(own) if self.together else 0
        return own + nicknames[:spare], spare

    def _strip(self, name: str, prompt: str, file: Path) -> Strip:
        plan, frames = self.validator.plan, read_frames(file)
        picks = spread(len(frames), _COLUMNS)
        height, width = frames[0].shape[:2]
        small = [Image.fromarray(frames[pick]).resize((_CELL, height * _CELL // width)) for pick in picks]
        label = f"{name}: {prompt[:_LONGEST_PROMPT]}"
        return Strip(
            label, np.stack([np.asarray(each) for each in small]), [f"{pick / plan.fps:.2f} s" for pick in picks]
        )

    def _share(
        self, step: int, folder: Path, nicknames: list[str], spare: int
    ) -> Generator[Event, None, tuple[dict[str, Path], str, bool]]:
        """(files, why there are no others, whether the run was asked to stop before they were made)."""
        try:
            with self.explained(), blame(self.parts):
                return (yield from self.validator.generating(folder, nicknames, step=step, spare=spare)), "", False
        except Interrupted:
            return {}, "", True
        except (DeviceError, PluginError) as error:
            return {}, str(error), False
        except Exception as error:  # noqa: BLE001 - validation never ends a run
            whose = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            return {}, f"{type(error).__name__}: {error}{whose}", False
