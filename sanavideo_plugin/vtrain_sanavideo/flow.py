"""`sanavideo-flow`: the schedule SANA-Video was trained with, and the checkpoint's own scheduler for sampling.

Training (NVlabs/Sana, Sana_2000M_480px_AdamW_fsdp.yaml, and for the 720p model Sana_2000M_720px_ltx2vae_AdamW_fsdp.yaml, which has
the same schedule): x_s = (1 - s) x0 + s e, target v = e - x0, where
u = sigmoid(N(0, 1)), s = floor(1000 u) / 1000, shifted to s' = 3 s / (1 + 2 s); the denoiser is given int(1000 s').
Sampling: the scheduler of the model folder, with its own shift (8), as SanaVideoPipeline loops over it. The two shifts differ on
purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from vtrain.contract import ModelError, NoiseLevel, Predict, Problem
from vtrain_sanavideo.options import SanaVideoFlowOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEVELS = 1000
"""Noise levels of the training grid, and timesteps of the denoiser."""

TRAINING_SHIFT = 3

SOLVERS = ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
"""Schedulers of diffusers that follow a flow from noise to clean in as many predictions as steps. DEISMultistepScheduler does
not get there: its last step ends where it starts, at 14% noise with 50 steps and shift 8."""

_OTHER_LEVELS: Mapping[str, tuple[str, ...]] = {
    "DPMSolverMultistepScheduler": (
        "use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas",
    ),
    "UniPCMultistepScheduler": ("use_exponential_sigmas", "use_beta_sigmas"),
}  # fmt: skip
"""Settings that these schedulers of diffusers look at before use_flow_sigmas."""

SchedulerConfig = Mapping[str, object]


class Solver(Protocol):
    """What is used of a diffusers scheduler. timesteps (steps,), sigmas (steps + 1,)."""

    timesteps: Tensor
    sigmas: Tensor

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None: ...

    def set_begin_index(self, begin_index: int) -> None: ...

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]: ...


def scheduler_fault(config: SchedulerConfig) -> str | None:
    """Why a scheduler config cannot be sampled with, or None."""
    name = config.get("_class_name")
    if name not in SOLVERS:
        return f"the scheduler is {name or 'not named'}, and sampling works with {', '.join(SOLVERS)}."
    if config.get("use_dynamic_shifting"):
        return "use_dynamic_shifting asks for a shift that depends on the size, which SANA-Video does not have."
    if name != "FlowMatchEulerDiscreteScheduler" and not (
        config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    ):
        return f"{name} follows a flow only with prediction_type flow_prediction and use_flow_sigmas."
    if str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling"):
        return "the scheduler adds noise of its own at each step, so that a seed would not give the same video again."
    if config.get("final_sigmas_type", "zero") != "zero" or config.get("invert_sigmas"):
        return "the scheduler does not end at a clean video: final_sigmas_type must be zero, and invert_sigmas off."
    if other := [key for key in _OTHER_LEVELS.get(str(name), ()) if config.get(key)]:
        return f"{name} takes other noise levels than a flow's with {', '.join(other)}."
    return None


def _spread(sigma: Tensor) -> Tensor:
    """(B,) or, per latent frame, (B, f) -> a shape that multiplies (B, C, f, h, w)."""
    return sigma[:, None, None, None, None] if sigma.ndim == 1 else sigma[:, None, :, None, None]


class SanaVideoFlow:
    """The sampler. scheduler: the model folder's scheduler config."""

    def __init__(self, options: SanaVideoFlowOptions, scheduler: SchedulerConfig) -> None:
        self._options = options
        self._config = dict(scheduler)

    def describe(self) -> Sequence[tuple[str, str]]:
        shift = self._config.get("flow_shift", self._config.get("shift", "of its class"))
        return (
            ("training levels", f"logit-normal(0, 1) on {LEVELS} levels, shift {TRAINING_SHIFT} (official)"),
            ("sampling", f"{self._config.get('_class_name')}, shift {shift} (the checkpoint's own)"),
        )

    def warnings(self) -> Sequence[str]:
        shift = self._config.get("flow_shift", self._config.get("shift"))
        return tuple(
            f"[sampler] {name} has no effect: SANA-Video trains with its official shift {TRAINING_SHIFT} and samples with "
            f"the checkpoint's own scheduler (shift {shift}); another schedule would not match the pretrained weights."
            for name in ("shift", "auto_shift")
            if name in self._options.model_fields_set
        )

    def draw(self, n: int, generator: torch.Generator) -> NoiseLevel:
        """Levels for n clips: sigma and timestep (n,), float32 on the CPU; timesteps are whole."""
        import torch

        normal = torch.randn(n, generator=generator, dtype=torch.float64)
        level = (torch.sigmoid(normal) * LEVELS).floor().long()
        # s' = 3 s / (1 + 2 s) with s = level / 1000, in whole numbers: int(1000 s') has no rounding error then.
        above, below = TRAINING_SHIFT * level, LEVELS + (TRAINING_SHIFT - 1) * level
        timestep = (LEVELS * above) // below
        return NoiseLevel(sigma=(above.double() / below).float(), timestep=timestep.float())

    def corrupt(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """(noisy, target), computed in fp32 and returned in the type of `clean`."""
        spread = _spread(level.sigma.to(clean.device).float())
        first, last = clean.float(), noise.float()
        noisy = (1 - spread) * first + spread * last
        return noisy.to(clean.dtype), (last - first).to(clean.dtype)

    def advance(self, noisy: Tensor, prediction: Tensor, level: NoiseLevel, to: NoiseLevel) -> Tensor:
        """SupportsRollout: x_t = x_s + (t - s) v."""
        moved = _spread((to.sigma - level.sigma).to(noisy.device).float())
        return noisy.float() + moved * prediction.float()

    def target_at(self, noisy: Tensor, clean: Tensor, level: NoiseLevel) -> Tensor:
        """SupportsRollout: (x_s - x0) / s, the velocity of the straight path from clean to here; 0 where s is."""
        sigma = _spread(level.sigma.to(noisy.device).float())
        return (noisy.float() - clean.float()) / sigma.where(sigma > 0, 1)

    def solve(
        self, predict: Predict, noise: Tensor, steps: int, on_step: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """As SanaVideoPipeline: the state is fp32, and so is what the scheduler gets. Raises ModelError, ValueError."""
        state = noise
        for number, state in enumerate(self.solving(predict, noise, steps), start=1):
            if on_step is not None:
                on_step(number, state)
        return state

    def solving(self, predict: Predict, noise: Tensor, steps: int) -> Iterator[Tensor]:
        """SupportsStepwise."""
        if steps < 1:
            raise ValueError(f"a solver takes at least 1 step, not {steps}")
        solver = self._solver()
        solver.set_timesteps(steps, device=noise.device)
        # Else the first step's number is looked up by its timestep, which fails where rounding makes two of them equal: DPM++
        # at 150, 200 and 300 steps.
        solver.set_begin_index(0)
        state = noise.float()
        for number, timestep in enumerate(solver.timesteps):
            sigma = solver.sigmas[number].to(state.device).float()
            level = NoiseLevel(sigma=sigma.expand(len(state)), timestep=timestep.float().expand(len(state)))
            state = solver.step(predict(state, level).float(), timestep, state, return_dict=False)[0]
            yield state

    def _solver(self) -> Solver:
        """A fresh scheduler: it remembers earlier predictions."""
        fault = scheduler_fault(self._config)
        if fault is not None:
            raise ModelError(Problem("scheduler/scheduler_config.json", fault, "Take the checkpoint's own scheduler."))
        from diffusers import schedulers

        kind = getattr(schedulers, str(self._config["_class_name"]))
        return cast("Solver", kind.from_config(self._config))
