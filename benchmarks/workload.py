"""What is trained in the benchmarks: a checkpoint in the real format, clips, and a config file that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from vtrain_sanavideo import tiny as tiny_sanavideo
from vtrain_wan import tiny as tiny_wan

if TYPE_CHECKING:
    import torch

FRAMES, HEIGHT, WIDTH = 17, 128, 64
"""Of a clip, in pixels: latents 16 x 5 x 16 x 8, 160 tokens."""

CLIPS = 4

RANK = 16

CONFIG = """
[run]
output_dir = "{output}"

[model]
use = "{use}"
path = "{checkpoint}"
train = "{train}"
{lora}
[precision]
mixed = "bf16"
base = "{base}"
gradient_checkpointing = false

[[data]]
use = "folder"
path = "{clips}"
resolution = "{width}x{height}"

[data.video]
frames = {frames}

[cache]
dir = "{cache}"

[train]
steps = 1000000
caption_dropout = 0
log_every = {log_every}

[optimizer]
use = "adamw"
lr = 1e-5

[checkpoint]
every = "1000000 steps"
"""


BUILDERS: dict[str, Callable[..., Path]] = {"sanavideo": tiny_sanavideo.build, "wan21": tiny_wan.build}
"""Family -> what writes a checkpoint of it."""


@dataclass(frozen=True)
class Model:
    """A transformer of the family `use`: `layers` blocks of width heads x head_dim."""

    name: str
    use: str
    layers: int
    heads: int
    head_dim: int

    def build(self, folder: Path) -> Path:
        """Write the whole checkpoint (random weights) below `folder`, unless it is there."""
        checkpoint = folder / self.name
        if not (checkpoint / "model_index.json").exists():
            BUILDERS[self.use](checkpoint, layers=self.layers, heads=self.heads, head_dim=self.head_dim)
        return checkpoint


MODELS = {
    model.name: model
    for model in (
        Model("tiny", "sanavideo", 4, 2, 48),
        Model("small", "sanavideo", 6, 8, 112),
        Model("wan-tiny", "wan21", 4, 2, 48),
        Model("wan-small", "wan21", 6, 8, 112),
    )
}
"""0.9 M, 104 M, 0.6 M and 74 M parameters."""

MODES = ("full", "lora")
"""full: fp32 weights, all trained. lora: bf16 weights, an fp32 adapter of rank 16 on them. Both under bf16 autocast."""

BASE = {"full": "fp32", "lora": "bf16"}


def write_clips(folder: Path) -> Path:
    """CLIPS short H.264 files at 16 fps, moving gradients, with captions that fill all text tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = np.indices((HEIGHT, WIDTH)).sum(0)
    for number in range(CLIPS):
        caption = f"number {number}, " + "a gradient that moves, as long as a caption can be, " * 20
        (folder / f"clip_{number}.txt").write_text(caption, encoding="utf-8")
        with av.open(str(folder / f"clip_{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(16))
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for frame in range(FRAMES):
                ramp = (grid * (number + 1) + 8 * frame) % 256
                picture = np.stack([ramp, 255 - ramp, np.full_like(ramp, 60 * number)], -1).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return folder


def write_config(
    folder: Path,
    model: Model,
    mode: str,
    log_every: int,
    name: str = "run",
    more: str = "",
    changes: Mapping[str, str] | None = None,
) -> Path:
    """The config file `folder`/`name`.toml; checkpoint, clips and caches below `folder` are shared by all of them.

    more: tables at its end. changes: text of it -> what stands there instead. Raises ValueError where it has not what is replaced.
    """
    clips = folder / "clips"
    if not clips.exists():
        write_clips(clips)
    text = CONFIG.format(
        output=(folder / name).as_posix(),
        use=model.use,
        checkpoint=model.build(folder).as_posix(),
        train=mode,
        lora=f"\n[model.lora]\nrank = {RANK}\n" if mode == "lora" else "",
        base=BASE[mode],
        clips=clips.as_posix(),
        width=WIDTH,
        height=HEIGHT,
        frames=FRAMES,
        cache=(folder / "cache").as_posix(),
        log_every=log_every,
    )
    for old, new in (changes or {}).items():
        if old not in text:
            raise ValueError(f"the configuration has no {old!r}")
        text = text.replace(old, new)
    config = folder / f"{name}.toml"
    config.write_text(text + more, encoding="utf-8")
    return config


def fill(config: Path, clips: int | None = None) -> None:
    """Make the caches of the run, or of its first `clips`."""
    from vtrain.data.caching.caches import fill_caches
    from vtrain.data.scanning.scan import scan
    from vtrain.run.prepare import planned

    plan = planned(config)
    samples = list(islice(scan(plan).samples, clips))
    fill_caches(plan, samples, [], "cpu", lambda _: None)


def samples_file(folder: Path, model: Model) -> Path:
    """Of all models of a family: their VAE and text encoder are the same."""
    return folder / f"samples-{model.use}.pt"


def read_samples(config: Path, model: Model) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(latents, embeds, mask) of each cached clip, written once to a file, so that reading them needs no vtrain."""
    import torch

    path = samples_file(config.parent, model)
    if not path.exists():
        from vtrain.data.batches import Batches
        from vtrain.data.caching.caches import fill_caches
        from vtrain.data.scanning.scan import scan
        from vtrain.run.prepare import planned

        plan = planned(config)
        filled = fill_caches(plan, scan(plan).samples, [], "cpu", lambda _: None)
        batches = Batches(plan, filled.caches, filled.index)
        found = [batches[number] for number in range(len(filled.index))]
        torch.save([(batch.latents.mean, batch.text.only.embeds, batch.text.only.mask) for batch in found], path)
    loaded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = torch.load(path, weights_only=True)
    return loaded
