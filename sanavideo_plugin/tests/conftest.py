from __future__ import annotations

import hashlib
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vtrain_sanavideo import tiny
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions

EXPORTED = """
[run]
output_dir = "{output}"
[model]
use = "sanavideo"
path = "{model}"
train = "{train}"
{lora}
[[data]]
use = "folder"
path = "clips"
[train]
steps = 2
[optimizer]
use = "adamw"
lr = 1e-4
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow of the kit (1 to 3 s each): graphs of blocks, and weights of other bytes."""
    slow = ("a_block_is_one_graph", "fingerprints_change_with_weights")
    for item in items:
        if item.path.parent == Path(__file__).parent and any(name in item.name for name in slow):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def checkpoint_720p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of the 720p model's format. Not to be written to."""
    return tiny.build(tmp_path_factory.mktemp("tiny-720p") / "checkpoint", resolution="720p")


@pytest.fixture(scope="session")
def text_pipeline() -> Callable[[Path, torch.dtype], Any]:
    """SanaVideoPipeline of a folder with its text encoder alone, in a storage type."""
    from diffusers import SanaVideoPipeline
    from transformers import Gemma2Model

    def build(folder: Path, dtype: torch.dtype) -> Any:
        encoder = Gemma2Model.from_pretrained(folder / "text_encoder", dtype=dtype, attn_implementation="eager")
        return SanaVideoPipeline.from_pretrained(folder, text_encoder=encoder, transformer=None, vae=None)

    return build


@pytest.fixture(scope="session")
def encode_prompt() -> Callable[..., tuple[torch.Tensor, ...]]:
    """encode_prompt as SanaVideoPipeline.__call__ calls it: embeds (300, D) and mask, of prompt and of negative prompt."""

    def encode(pipeline: Any, prompt: str, **settings: object) -> tuple[torch.Tensor, ...]:
        defaults = inspect.signature(type(pipeline).__call__).parameters
        settings.setdefault("complex_human_instruction", defaults["complex_human_instruction"].default)
        with torch.no_grad():
            return tuple(part[0] for part in pipeline.encode_prompt(prompt, device=torch.device("cpu"), **settings))

    return encode


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def family_of() -> Callable[..., SanaVideoFamily]:
    """Build a family on a folder, in fp32 unless told otherwise."""

    def build(folder: Path, **options: object) -> SanaVideoFamily:
        return SanaVideoFamily(
            SanaVideoOptions.model_validate({"text_precision": "fp32", "path": str(folder)} | options)
        )

    return build


@pytest.fixture
def family(checkpoint: Path, family_of: Callable[..., SanaVideoFamily]) -> SanaVideoFamily:
    return family_of(checkpoint)


@pytest.fixture
def sha256() -> Callable[[Path], str]:
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of random weights in transformers' layout, 64 wide."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino") / "model"
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def config(tmp_path: Path, checkpoint: Path) -> Callable[..., Path]:
    """A configuration file of this checkpoint. lora: the lines of [model.lora], "" for full training."""
    (tmp_path / "clips").mkdir()

    def write(lora: str, output: str = "run") -> Path:
        file = tmp_path / f"{output}.toml"
        train, table = ("lora", f"[model.lora]\n{lora}") if lora else ("full", "")
        file.write_text(EXPORTED.format(output=output, model=checkpoint, train=train, lora=table))
        return file

    return write


@pytest.fixture
def trained(config: Callable[..., Path]) -> Callable[..., tuple[Path, Any, Any]]:
    """(checkpoint of step 2, its denoiser, its plan): weights as training leaves them, all of them moved."""

    def make(lora: str, output: str = "run", *, average: bool = False) -> tuple[Path, Any, Any]:
        from vtrain.config.tables import EmaTable
        from vtrain.contract import Device
        from vtrain.run.prepare import planned
        from vtrain.train import checkpoint, parameters
        from vtrain.train.ema import Average, AveragePiece
        from vtrain.train.model import load_model, weights_piece
        from vtrain.train.piece import Piece
        from vtrain.train.pieces import AdapterPiece, CountersPiece
        from vtrain.train.resume import RunState, Start
        from vtrain.train.settings import settings

        plan = planned(config(lora, output))
        values = {key: setting.value for key, setting in settings(plan).items()}
        denoiser, base, _ = load_model(plan, Start(None, RunState(0, 0, values, "", ""), ()), "cpu")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, weight in denoiser.module.named_parameters():
                if weight.requires_grad:
                    size = 0.2 if lora else 0.02
                    weight += size * torch.randn(weight.shape, generator=generator).to(weight)
        piece = weights_piece(plan, denoiser)
        state = RunState(2, 2, values, "", base)
        pieces: list[Piece] = [piece, CountersPiece(state)]
        if average and isinstance(piece, AdapterPiece):
            kept = Average(parameters.trained(denoiser.module), EmaTable(), Device())
            for value in kept.weights.values():
                value.mul_(2)
            pieces.append(AveragePiece(denoiser, kept, piece.settings, lambda path: denoiser))
        folder = checkpoint.write(plan.config.run.output_dir / "checkpoints", 2, pieces)
        return folder, denoiser, plan

    return make
