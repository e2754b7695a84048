"""Mistakes that trainers of video models have been seen to make, each as a patch of our own code.

A mutant is turned on in a process by `VTRAIN_MUTANT=name python -m pytest -p mutants ...` with this folder on PYTHONPATH;
`run.py` beside this file does so for each and prints which tests notice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Patch = Callable[[], None]


@dataclass(frozen=True)
class Mutant:
    """A mistake. tests: where it is expected to be noticed. patch: makes it, for the life of the process."""

    name: str
    mistake: str
    tests: tuple[str, ...]
    patch: Patch


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace owner.name by around(original, ...)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def pixels_from_zero() -> None:
    from vtrain.data.decoding import decode

    def to_unit(original: Any, pixels: Any) -> Any:
        return (original(pixels) + 1) / 2

    wrap(decode, "unit_range", to_unit)
    from vtrain.data.caching import encoders

    wrap(encoders, "unit_range", to_unit)


def uniform_levels() -> None:
    import torch

    from vtrain.contract import NoiseLevel
    from vtrain_sanavideo.flow import SanaVideoFlow

    def draw(self: Any, n: int, generator: Any) -> NoiseLevel:
        sigma = torch.rand(n, generator=generator)
        return NoiseLevel(sigma, (sigma * 1000).floor())

    SanaVideoFlow.draw = draw  # type: ignore[method-assign]


def velocity_sign() -> None:
    from vtrain_sanavideo.flow import SanaVideoFlow

    def corrupt(original: Any, self: Any, *args: Any) -> Any:
        noisy, target = original(self, *args)
        return noisy, -target

    _method(SanaVideoFlow, "corrupt", corrupt)


def _method(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, method)


def timestep_in_unit() -> None:
    from vtrain.contract import NoiseLevel
    from vtrain_sanavideo.flow import SanaVideoFlow

    def draw(original: Any, self: Any, *args: Any) -> Any:
        level = original(self, *args)
        return NoiseLevel(level.sigma, level.timestep / 1000)

    _method(SanaVideoFlow, "draw", draw)


def no_instruction() -> None:
    from vtrain_sanavideo.text import SanaVideoText

    def encode(original: Any, self: Any, captions: Any, role: Any) -> Any:
        self._instruction, self._instruction_tokens = "", 0
        return original(self, captions, role)

    _method(SanaVideoText, "encode", encode)


def mask_ignored() -> None:
    from dataclasses import replace

    import torch

    from vtrain.contract import Text
    from vtrain_sanavideo.denoiser import SanaVideoDenoiser

    def predict(original: Any, self: Any, noisy: Any, level: Any, condition: Any) -> Any:
        text = Text.of(condition.text.only.embeds, torch.ones_like(condition.text.only.mask))
        return original(self, noisy, level, replace(condition, text=text))

    _method(SanaVideoDenoiser, "predict", predict)


def latents_not_normalised() -> None:
    from vtrain.contract import Latents, NormalizedCodec

    def encode(original: Any, self: Any, pixels: Any, *, std: bool = False) -> Any:
        made = original(self, pixels, std=std)
        return Latents(made.mean * self._std.to(made.mean) + self._mean.to(made.mean), made.std)

    _method(NormalizedCodec, "encode", encode)


def dropout_in_validation() -> None:
    from vtrain.validate.generate import Validator

    def solving(original: Any, self: Any, *given: Any) -> Any:
        self.denoiser.module.train()
        return original(self, *given)

    _method(Validator, "solving", solving)


def guidance_backwards() -> None:
    from vtrain.validate import generate

    def guided(original: Any, denoiser: Any, text: Any, guidance: float) -> Any:
        swapped = text.map(lambda tensor: tensor.roll(len(tensor) // 2, 0)) if guidance > 1 else text
        return original(denoiser, swapped, guidance)

    wrap(generate, "guided", guided)


def listener_in_the_run() -> None:
    from vtrain.run.listeners import Listener

    def show(original: Any, self: Any, event: Any) -> None:
        if isinstance(event, self._wanted):
            self._tracker.show(event)

    _method(Listener, "show", show)


def hanging_listener_unsaid() -> None:
    from vtrain.run.listeners import Listener

    def join(original: Any, self: Any, until: float) -> None:
        self.thread.join(0)

    _method(Listener, "join", join)


def prints_between_json() -> None:
    from contextlib import nullcontext

    from vtrain.cli import run

    wrap(run, "redirect_stdout", lambda original, stream: nullcontext())


MUTANTS = (
    Mutant(
        "pixels-from-zero",
        "pixels in [0, 1] given to the VAE",
        ("tests/data/test_decode.py", "tests/data/test_caches.py"),
        pixels_from_zero,
    ),
    Mutant(
        "uniform-levels",
        "noise levels uniform instead of logit-normal with shift 3",
        ("sanavideo_plugin/tests/test_flow.py",),
        uniform_levels,
    ),
    Mutant(
        "velocity-sign",
        "the target is x0 - e instead of e - x0",
        ("sanavideo_plugin/tests/test_flow.py", "sanavideo_plugin/tests/test_conformance.py"),
        velocity_sign,
    ),
    Mutant(
        "timestep-in-unit",
        "timesteps in 0..1 instead of 0..1000",
        ("sanavideo_plugin/tests/test_flow.py",),
        timestep_in_unit,
    ),
    Mutant(
        "no-instruction",
        "prompts encoded without the pipeline's instruction",
        ("sanavideo_plugin/tests/test_text.py",),
        no_instruction,
    ),
    Mutant(
        "mask-ignored",
        "padding tokens of the text are attended to",
        ("sanavideo_plugin/tests/test_conformance.py", "sanavideo_plugin/tests/test_denoiser.py"),
        mask_ignored,
    ),
    Mutant(
        "latents-not-normalised",
        "latents without the VAE's latents_mean and latents_std",
        ("sanavideo_plugin/tests/test_codec.py",),
        latents_not_normalised,
    ),
    Mutant(
        "dropout-in-validation",
        "the adapter's dropout stays on while videos are generated",
        ("tests/validate/test_parity.py",),
        dropout_in_validation,
    ),
    Mutant(
        "guidance-backwards",
        "guidance pushes away from the prompt",
        ("tests/validate/test_parity.py",),
        guidance_backwards,
    ),
    Mutant(
        "listener-in-the-run",
        "a listener is called by the run itself, so that its failure ends it",
        (
            "tests/run/test_listeners.py",
            "tests/train/test_session.py::test_a_tracker_that_misbehaves_changes_no_bit_and_no_exit_code[fails]",
        ),
        listener_in_the_run,
    ),
    Mutant(
        "hanging-listener-unsaid",
        "a listener that does not finish is not warned of",
        ("tests/run/test_listeners.py",),
        hanging_listener_unsaid,
    ),
    Mutant(
        "prints-between-json",
        "what a listener prints stands between the lines of --json",
        ("tests/train/test_session.py",),
        prints_between_json,
    ),
)


def pytest_configure() -> None:
    """As a pytest plugin: turn on the mutant that VTRAIN_MUTANT names."""
    name = os.environ.get("VTRAIN_MUTANT")
    if name:
        next(mutant for mutant in MUTANTS if mutant.name == name).patch()
