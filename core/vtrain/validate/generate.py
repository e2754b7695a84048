"""Videos from the model being trained, by the sampler it is trained with and classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtrain.contract import Caption, Condition, Denoiser, Family, NoiseLevel, Predict, Role, Sampler, Text
from vtrain.data.batches import pad
from vtrain.data.caching.caches import Caches
from vtrain.plan.records import ValidationPlan
from vtrain.validate.video import to_frames, write_mp4


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
        doubled = NoiseLevel(torch.cat([level.sigma] * 2), torch.cat([level.timestep] * 2))
        prediction = denoiser.predict(torch.cat([noisy] * 2), doubled, Condition(text)).float()
        without, with_prompt = prediction.chunk(2)
        return without + guidance * (with_prompt - without)

    return predict


@dataclass(frozen=True)
class Validator:
    """Generates the plan's prompts with a denoiser. autocast: as in training. stopping: asked after each solver step."""

    plan: ValidationPlan
    family: Family
    sampler: Sampler
    caches: Caches
    denoiser: Denoiser
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    stopping: Callable[[], bool]

    def start(self) -> Tensor:
        """The starting noise (1, C, f, h, w), fp32 from a CPU generator: the same on every device and at every step."""
        shape = self.family.latent_shape(self.plan.shape)
        return torch.randn((1, *shape), generator=torch.Generator().manual_seed(self.plan.seed))

    def text(self, prompts: Sequence[str]) -> Text:
        """As guided() takes it, on the device."""
        texts = [self.caches.text(Caption(prompt), "prompt") for prompt in prompts]
        if self.plan.guidance > 1:
            texts = [self.caches.text(Caption(self.plan.negative_prompt), "negative")] * len(texts) + texts
        text = pad(texts, self.family.text_tokens)
        return Text(text.embeds.to(self.device), text.mask.to(self.device))

    def latents(self, *prompts: str) -> Tensor:
        """Clean latents (B, C, f, h, w) of B prompts, in one batch and from the same noise, on the CPU. Raises Interrupted."""
        count = len(prompts)
        guess = guided(self.denoiser, self.text(prompts), self.plan.guidance)
        noise = self.start().to(self.device).repeat(count, 1, 1, 1, 1)

        def predict(noisy: Tensor, level: NoiseLevel) -> Tensor:
            """In training's autocast; the solver's own arithmetic stays fp32."""
            with self.autocast():
                return guess(noisy, level)

        def on_step(_done: int, _latents: Tensor) -> None:
            if self.stopping():
                raise Interrupted

        with torch.no_grad():
            return self.sampler.solve(predict, noise, self.plan.steps, on_step).cpu()

    def videos(self, folder: Path, nicknames: list[str], together: int = 1) -> dict[str, Path]:
        """Generate and write `folder`/<nickname>.mp4 for some of the prompts. The module is as before afterwards.

        together: prompts in one batch. More is faster with a small model, and changes the last bits.
        """
        if not nicknames:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        module = self.denoiser.module
        training = module.training
        module.eval()
        try:
            latents: dict[str, Tensor] = {}
            for first in range(0, len(nicknames), together):
                names = nicknames[first : first + together]
                made = self.latents(*(self.plan.prompts[name] for name in names))
                latents |= dict(zip(names, made.chunk(len(names)), strict=True))
        finally:
            module.train(training)
        files = {}
        with self.family.open_video_codec(str(self.device)) as codec, torch.no_grad():
            for nickname, clean in latents.items():
                files[nickname] = folder / f"{nickname}.mp4"
                pixels = codec.decode(clean.to(self.device))
                write_mp4(files[nickname], to_frames(pixels[0]), self.plan.fps)
        return files
