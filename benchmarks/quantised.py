"""What a quantised base costs in exactness: error of the whole model's prediction against bf16, and bytes, by storage type.

    python benchmarks/quantised.py [FOLDER]

Random weights in the shapes of benchmarks/workload.py, three seeds of latents, noise and text, noise levels 0.2, 0.5 and 0.9;
error is the 2-norm of the difference over the 2-norm of the prediction in bf16, mean over all, no autocast.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from workload import MODELS

from vtrain.contract import Condition, Denoiser, LatentShape, NoiseLevel, Text, TextPart, timed
from vtrain.contract.precision import STORAGE, StorageType
from vtrain.train.precision import held_bytes, quantise
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions

LATENTS = LatentShape(16, 5, 16, 8)
LEVELS = (0.2, 0.5, 0.9)
TOKENS = 300


def predictions(family: SanaVideoFamily, denoiser: Denoiser) -> Tensor:
    """(seeds x levels, ...) of fixed inputs, fp32."""
    found = []
    (encoder,) = family.text_encoders().values()
    (text,) = encoder.parts.values()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        noisy = torch.randn(1, *LATENTS, generator=generator)
        part = TextPart(
            torch.randn(1, TOKENS, text.width, generator=generator), torch.ones(1, TOKENS, dtype=torch.bool)
        )
        for level in LEVELS:
            at = timed(family, NoiseLevel(torch.tensor([level])))
            with torch.no_grad():
                found.append(denoiser.predict(noisy, at, Condition(Text({"text": part}))).float())
    return torch.cat(found)


def measured(family: SanaVideoFamily, storage: StorageType) -> tuple[Tensor, int]:
    """Predictions, and bytes of the weights."""
    denoiser = family.load_denoiser("cpu", "fp32" if storage.name == "fp32" else "bf16")
    if storage.quantised:
        quantise(denoiser, storage, denoiser.lora_targets, "cpu", there=False)
    return predictions(family, denoiser), sum(map(held_bytes, denoiser.module.parameters()))


def main(folder: Path) -> None:
    for name in ("tiny", "small"):
        family = SanaVideoFamily(SanaVideoOptions(path=str(MODELS[name].build(folder))))
        reference, _ = measured(family, STORAGE["bf16"])
        for storage in STORAGE.values():
            got, size = measured(family, storage)
            error = (got - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
            print(
                f"{name:6} {storage.name:5} error {100 * error.mean():6.2f}% (largest {100 * error.max():.2f}%)  "
                f"{size / family.parameters:.3f} bytes a weight"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
