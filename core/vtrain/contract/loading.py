"""Models of diffusers and transformers in memory: loaded as their files are, lent for a while, saved as their tools load them.

The classes come from the plugin, and are used unmodified. Importing this module imports none of them, nor torch.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vtrain.contract.checkpoints import DIFFUSERS_STEM, TRANSFORMERS_STEM
from vtrain.contract.device import Device
from vtrain.contract.errors import ModelError, Problem
from vtrain.contract.geometry import LatentGeometry, LatentShape
from vtrain.contract.lora_files import load_lora_file, save_lora_file
from vtrain.contract.protocols import DType
from vtrain.contract.records import Condition, NoiseLevel
from vtrain.contract.weights import fill_module, is_ignored, misfit_problem, torch_type, weight_problems

if TYPE_CHECKING:
    from torch import Tensor, nn


class Closes(Protocol):
    """What lets go of its weights."""

    def close(self) -> None: ...


ClosesT = TypeVar("ClosesT", bound=Closes)
ModuleT = TypeVar("ModuleT", bound="nn.Module")


@contextmanager
def opened(load: Callable[[], ClosesT], device: str) -> Iterator[ClosesT]:
    """What `load` gives, for the length of a with block: closed afterwards, and its memory on the device free."""
    part = load()
    try:
        yield part
    finally:
        part.close()
        Device.of(device).release()


def load_module(
    kind: type[ModuleT], folder: Path, dtype: DType, device: str, unsqueezed: Collection[str] = ()
) -> ModuleT:
    """A model of diffusers, of class `kind`, from a folder with its config and safetensors; in evaluation mode.

    Weights are stored as `dtype`; buffers that are in no file, such as rotary tables, stay as the class makes them, in fp32.
    unsqueezed: as `misfits` takes it. Raises ModelError for missing, unexpected, misshapen or truncated weights.
    """
    from accelerate import init_empty_weights

    typeless: Any = kind
    # Buffers for real: those that are in no file would be lost on the meta device.
    with init_empty_weights(include_buffers=False):
        module: ModuleT = typeless.from_config(typeless.load_config(folder))
    fill_module(module, folder, DIFFUSERS_STEM, dtype, device, unsqueezed)
    return module.to(device).eval()


def save_module(module: nn.Module, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write `state` as `type(module).from_pretrained(folder)` reads it, `module` being one of diffusers.

    By diffusers itself, so that files, shards and index are its own, from a second module without memory of its own that only
    holds the tensors of `state`. Raises RuntimeError for a state with other names or shapes.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        holder: Any = type(module).from_config(module.config)  # type: ignore[attr-defined]  # diffusers'
    holder.load_state_dict(dict(state), strict=True, assign=True)  # assign: nothing is copied
    holder.save_pretrained(folder)


def load_pretrained(
    kind: type[ModuleT],
    folder: Path,
    dtype: DType,
    device: str,
    title: str,
    ignored: Collection[str] = (),
    **settings: Any,
) -> ModuleT:
    """A model of transformers, of class `kind`, from a folder with its config and safetensors; frozen, in evaluation mode.

    title: what it is, for messages ("text encoder"). ignored: as `misfits` takes it, beside what the class itself reads over.
    settings: more arguments of from_pretrained. Raises ModelError for missing, unexpected, misshapen or truncated weights.
    """
    if "state_dict" not in settings and (problems := weight_problems(folder, TRANSFORMERS_STEM)):
        raise ModelError(problems)
    # What does not fit is then in the report, and reported below with what is missing; else transformers raises.
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    settings |= {"dtype": torch_type(dtype), "use_safetensors": True, "local_files_only": True}
    typeless: Any = kind
    try:
        with quiet():
            model, report = typeless.from_pretrained(None if "state_dict" in settings else folder, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(Problem(str(folder), f"the {title} cannot be loaded: {error}")) from error
    lines = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    lines += [f"{name} is {list(found)} instead of {list(shape)}" for name, found, shape in report["mismatched_keys"]]
    unexpected = sorted(name for name in report["unexpected_keys"] if not is_ignored(name, ignored))
    lines += [f"{name} is unexpected" for name in unexpected]
    if lines:
        raise ModelError(misfit_problem(folder, lines))
    loaded: ModuleT = model.to(device).eval().requires_grad_(False)
    return loaded


def load_tokenizer(kind: type[Any], folder: Path) -> Any:
    """A tokenizer of transformers, of class `kind`. Raises ModelError."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(Problem(str(folder), f"no tokenizer can be read: {error}", "Download it again.")) from error


def reference_module(kind: type[ModuleT], folder: Path) -> ModuleT:
    """A model of diffusers as its own from_pretrained reads it: fp32, on the CPU. Raises ModelError where it refuses."""
    import torch

    typeless: Any = kind
    with _told("the original loader", folder):
        module, report = typeless.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    lines = [f"{word.removesuffix('_keys')}: {name}" for word, names in report.items() for name in sorted(names)]
    if lines:
        raise ModelError(misfit_problem(folder, lines))
    loaded: ModuleT = module.eval()
    return loaded


def reference_pipeline(folder: Path) -> nn.Module:
    """The transformer of a pipeline folder as diffusers' own from_pretrained reads the whole, whose other parts are not loaded."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, entry in index.items() if isinstance(entry, list) and name != "transformer"]
    with _told("the original pipeline", folder):
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **dict.fromkeys(parts))
    module: nn.Module = pipeline.transformer
    return module.float().eval()


def reference_lora(module: nn.Module, adapter: Path, loader: Any) -> None:
    """Load a LoRA file on `module` by a pipeline's own load_lora_weights. loader: its LoraLoaderMixin.

    Raises ModelError where it is refused, or where the loader says that it takes a part of it alone.
    """
    # What load_lora_weights asks of the pipeline that it is a method of.
    pipeline = type("Pipeline", (loader,), {"components": {}, "hf_device_map": None})()
    pipeline.transformer = module
    with _told("the original load_lora_weights", adapter) as said:
        pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name, local_files_only=True)
    if said:
        raise ModelError(Problem(str(adapter), f"the original load_lora_weights: {said[0]}"))


@contextmanager
def _told(who: str, what: Path) -> Iterator[list[str]]:
    """What diffusers warns of meanwhile; what it raises becomes a ModelError."""
    from diffusers.utils import logging as diffusers_logging

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    library, shown = diffusers_logging.get_logger("diffusers"), diffusers_logging._tqdm_active
    library.addHandler(handler)
    diffusers_logging.disable_progress_bar()
    try:
        yield said
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ModelError(Problem(str(what), f"{who} refuses it: {str(error).strip().splitlines()[0]}")) from error
    finally:
        library.removeHandler(handler)
        if shown:
            diffusers_logging.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar or report of transformers' own: they would tear the run's display, and what is wrong with weights is an
    error here. Its settings are as before afterwards."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


class DiffusersDenoiser(ABC):
    """What a `Denoiser` with adapters around a transformer of diffusers does alike in every family: a family's own adds the rest.

    blocks: name of the module's list of blocks. part: of the pipeline that the module is.
    """

    def __init__(
        self, module: Any, geometry: LatentGeometry, *, blocks: str = "transformer_blocks", part: str = "transformer"
    ) -> None:
        self._module = module
        self._geometry = geometry
        self._blocks = blocks
        self._part = part

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._module
        return module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return tuple(getattr(self._module, self._blocks))

    def fold(self, tap: Tensor, latents: LatentShape) -> Tensor:
        """(B, f * h * w, D) in the tokens' grid -> (B, f, h, w, D)."""
        folded: Tensor = tap.unflatten(1, self._geometry.token_grid(latents))
        return folded

    def check_latents(self, noisy: Tensor) -> None:
        """Raises ValueError for latents that the patches would not cover: such modules cut them in silence."""
        channels, (time, high, wide) = self._geometry.channels, self._geometry.patch
        if noisy.ndim != 5 or noisy.shape[1] != channels:
            raise ValueError(f"latents are (B, {channels}, f, h, w), not {tuple(noisy.shape)}")
        if noisy.shape[2] % time or noisy.shape[3] % high or noisy.shape[4] % wide:
            raise ValueError(f"latents of {tuple(noisy.shape[2:])} cannot be cut into patches of {(time, high, wide)}")

    def gradient_checkpointing(self, on: bool) -> None:
        if on:
            self._module.enable_gradient_checkpointing()
        else:
            self._module.disable_gradient_checkpointing()

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write folder/<part>, as the module's class reads it. Raises RuntimeError for a state with other names or shapes."""
        save_module(self._module, folder / self._part, state)

    @abstractmethod
    def predict(self, noisy: Tensor, level: NoiseLevel, condition: Condition) -> Tensor:
        """As `Denoiser.predict`."""

    @property
    @abstractmethod
    def lora_targets(self) -> tuple[str, ...]:
        """As `SupportsLora.lora_targets`."""

    @abstractmethod
    def lora_loader(self) -> Any:
        """The class of diffusers whose `save_lora_weights` writes adapters of this model."""

    def reference(self, base: Path, adapter: Path | None = None) -> DiffusersDenoiser:
        """The same around what diffusers' own loaders read: weights of `base`, a pipeline folder or the module's own, and a LoRA.

        Raises ModelError.
        """
        whole = (base / "model_index.json").is_file()
        module = reference_pipeline(base) if whole else reference_module(type(self._module), base)
        if adapter is not None:
            reference_lora(module, adapter, self.lora_loader())
        original = copy(self)
        original._module = module
        return original

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
        """As `save_lora_file`."""
        save_lora_file(folder, state, settings, self.lora_loader(), self._part)

    def load_lora(self, folder: Path) -> dict[str, Tensor]:
        """As `load_lora_file`."""
        return load_lora_file(folder, type(self._module).__name__, self._part)
