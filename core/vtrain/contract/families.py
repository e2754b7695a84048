"""What a `Family` on a model in the layout of diffusers does alike, whatever the model. torch comes when something is opened."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from vtrain.contract.checkpoints import (
    DIFFUSERS_STEM,
    CheckpointSource,
    Component,
    JsonObject,
    PartConfig,
    Positive,
    digest,
    meaning,
    read_json,
    tokenizer_hashes,
)
from vtrain.contract.codecs import (
    CausalCodecConfig,
    CodecConfig,
    NormalizedCodec,
    load_autoencoder,
    read_codec,
)
from vtrain.contract.errors import ModelError, Problem
from vtrain.contract.geometry import ClipShape, FrameRule, LatentGeometry, LatentShape, Size, TokenGrid
from vtrain.contract.loading import DiffusersDenoiser, opened
from vtrain.contract.measured import dtype_bytes, measured_blocks, measured_work
from vtrain.contract.options import ModelSource, Options, fixed
from vtrain.contract.pipelines import ExportFormat, pipeline_parts, write_pipeline
from vtrain.contract.protocols import Denoiser, DType, HashFile
from vtrain.contract.records import BlockMemory, EncoderMemory
from vtrain.contract.weights import Shape, misfit_problems, stored_shapes, weight_hashes

if TYPE_CHECKING:
    from torch import nn


class CheckpointOptions(Options):
    """What every family on such a model takes in [model]."""

    path: ModelSource = fixed(description="the checkpoint: a folder in diffusers layout, or a hub id")
    revision: str | None = fixed(
        None, min_length=1, description="branch, tag or commit of a hub id; absent: its main branch"
    )
    text_precision: DType = fixed("bf16", description="storage type of the text encoder and of encoded text")
    vae_precision: DType = fixed("fp32", description="storage type of the VAE; it was trained and used in fp32")
    vae_tiling: bool = fixed(
        False, description="encode and decode large videos in tiles: less memory, slightly other latents"
    )


class TransformerConfig(PartConfig):
    """config.json of a video transformer of diffusers, over its class's own defaults. A family's own adds keys and `shapes`."""

    num_attention_heads: Positive
    attention_head_dim: Positive
    num_layers: Positive
    in_channels: Positive
    out_channels: Positive | None
    patch_size: tuple[Literal[1], Positive, Positive]

    @property
    def width(self) -> int:
        """D of a block's output."""
        return self.num_attention_heads * self.attention_head_dim

    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Name and shape of every weight."""

    @property
    def latent_channels(self) -> int:
        """Of what it predicts; what it is given may have more, such as a picture's beside them."""
        return self.out_channels or self.in_channels

    @property
    def parameters(self) -> int:
        """How many numbers these are."""
        return sum(math.prod(shape) for shape in self.shapes().values())


def layer(name: str, *weight: int, bias: bool = True) -> dict[str, Shape]:
    """Shapes of a layer with weights (out, in, ...), by name."""
    return {f"{name}.weight": weight, **({f"{name}.bias": weight[:1]} if bias else {})}


def official_sizes(
    first: Size, stride: int, aspects: Sequence[float] = (1, 4 / 3, 3 / 4, 3 / 2, 2 / 3)
) -> tuple[Size, ...]:
    """A bucket set of an official size: that, its upright one, and other aspects (width : height) of at most its area.

    Each side is round(sqrt(area x aspect)) pixels, down to a multiple of the stride, as diffusers' guide to Wan rounds.
    """

    def side(aspect: float) -> int:
        return round(math.sqrt(first.area * aspect)) // stride * stride

    return (first, Size(first.height, first.width), *(Size(side(each), side(1 / each)) for each in aspects))


def unlike_parts(
    folder: Path,
    transformer: TransformerConfig,
    codec: CodecConfig,
    width: str,
    taken: int,
    *more: tuple[Path, str, int, int | None],
) -> list[Problem]:
    """What of a checkpoint's VAE, text encoder and other parts is not its transformer's, for `Family.check`.

    width: the key of the text encoder's config that has the width of its embeddings; taken: what the transformer takes. more:
    folder of another part, what there is of what ("the image encoder's width is 1280"), how many, and how many are taken.
    """
    vae, text = folder / "vae", folder / "text_encoder"
    problems = misfit_problems(vae, DIFFUSERS_STEM, codec.shapes(), some=True)
    channels = codec.geometry().channels
    pairs = (
        (vae, f"the VAE has {channels} latent channels", channels, transformer.latent_channels),
        (text, f"the text encoder's width is {(found := read_json(text / 'config.json').get(width))}", found, taken),
        *more,
    )
    return [*problems, *(problem for pair in pairs for problem in unlike(*pair))]


def unlike(
    part: Path, what: str, has: object, taken: object, remedy: str = "Take this checkpoint's own."
) -> list[Problem]:
    """A part whose config has another number than the transformer takes. what: such as "the VAE has 16 latent channels"."""
    if has == taken:
        return []
    return [Problem(str(part / "config.json"), f"{what}, and the transformer takes {taken}.", remedy)]


TransformerT = TypeVar("TransformerT", bound=TransformerConfig)


class DiffusersFamily(ABC, Generic[TransformerT]):
    """The members of a `Family` that follow from the configs of its transformer and of its causal video codec.

    A family's own adds the rest, the methods that here are abstract, and: mark, its name in fingerprints; title, its
    name in messages; sizes, its official bucket sets, the default first; default_frames and default_fps. One whose video codec
    has another config than CausalCodecConfig has read_codec and load_codec of its own. block_list: name of the transformer's
    list of blocks. components: of a checkpoint, with "transformer", "vae" and "scheduler" among them. lora_targets and
    original_names: its denoiser's, which a plan asks for.

    measured: what `vtrain.testing.memory` measured of its models (contract/measured.py says how it is laid out).
    """

    mark: str
    title: str
    sizes: Mapping[str, tuple[Size, ...]]
    default_frames: int
    default_fps: float
    block_list: str = "transformer_blocks"
    original_names: Mapping[str, str] = {}
    measured: Mapping[str, Mapping[str, Sequence[float]]] = {}

    def __init__(self, options: CheckpointOptions, components: Mapping[str, Component]) -> None:
        self._options = options
        self._source = CheckpointSource(options.path, options.revision, components)

    @abstractmethod
    def read_transformer(self, folder: Path) -> TransformerT:
        """The config of a transformer in `folder`. Raises ModelError."""

    def read_codec(self, folder: Path) -> CodecConfig:
        """The config of a video codec in `folder`. Raises ModelError."""
        return read_codec(folder, self.codec_defaults())

    @abstractmethod
    def codec_defaults(self) -> JsonObject:
        """The defaults of its class's arguments: a config that spells one out is the same model. Raises ModelError."""

    @abstractmethod
    def codec_class(self) -> type[nn.Module]:
        """*torch* The class of the video codec."""

    @property
    def codec_title(self) -> str:
        """What the video codec is called in a plan and in messages."""
        return "VAE"

    @abstractmethod
    def denoiser_of(self, folder: Path, device: str, dtype: DType) -> Denoiser:
        """*torch* The denoiser of a folder whose config is the checkpoint's. Raises ModelError."""

    @cached_property
    def _transformer(self) -> TransformerT:
        return self.read_transformer(self._source.place("transformer"))

    def source_of(self, component: str) -> CheckpointSource:
        """Where a component is: the checkpoint itself, if a family's own does not know better."""
        return self._source

    @cached_property
    def _codec(self) -> CodecConfig:
        return self.read_codec(self.source_of("vae").place("vae"))

    @cached_property
    def _geometry(self) -> LatentGeometry:
        return self._codec.geometry(self._transformer.patch_size)

    @property
    def default_size(self) -> Size:
        return next(iter(self.resolutions().values()))[0]

    @property
    def frame_rule(self) -> FrameRule:
        return self._geometry.frame_rule

    @property
    def pixel_stride(self) -> int:
        return self._geometry.pixel_stride

    @property
    def block_count(self) -> int:
        return self._transformer.num_layers

    @property
    def block_width(self) -> int:
        return self._transformer.width

    @property
    def parameters(self) -> int:
        return self._transformer.parameters

    def block_weights(self) -> Mapping[str, Shape]:
        """SupportsBlockWeights."""
        start = f"{self.block_list}."
        return {name: shape for name, shape in self._transformer.shapes().items() if name.startswith(start)}

    def resolutions(self) -> Mapping[str, tuple[Size, ...]]:
        return self.sizes

    def latent_shape(self, clip: ClipShape) -> LatentShape:
        """Raises ValueError for a clip that the codec or the patches would cut."""
        return self._geometry.latent_shape(clip, self.title)

    def pixel_frames(self, latent_frame: int) -> range:
        return self._geometry.pixel_frames(latent_frame)

    def token_grid(self, latents: LatentShape) -> TokenGrid:
        return self._geometry.token_grid(latents)

    @property
    def memory_key(self) -> str:
        """Of a model in `measured`: what in its config decides over what it keeps in memory; "": none is measured."""
        return ""

    def block_memory(self, *, weights: DType, compute: DType, frame_levels: bool) -> BlockMemory | None:
        how = f"{weights} {compute} {'frames' if frame_levels else 'clip'}"
        return measured_blocks(self.measured, self.memory_key, how)

    @property
    def codec_key(self) -> str:
        """Of its video codec in `measured`; "": its work is not measured."""
        codec = self._codec
        return codec.memory_key if isinstance(codec, CausalCodecConfig) and not self._options.vae_tiling else ""

    def encoder_memory(self) -> Mapping[str, EncoderMemory]:
        """SupportsEncoderMemory: of what is in the model folder."""
        stored = {name: self._stored(name) for name in self._source.components}
        precision = self._options.vae_precision
        texts = max((count for name, count in stored.items() if "text_encoder" in name), default=0)
        found = {"text encoder": EncoderMemory(texts * dtype_bytes(self._options.text_precision))} if texts else {}
        if weights := stored.get("vae", 0) * dtype_bytes(precision):
            work = measured_work(self.measured, self.codec_key, precision)
            found["video codec"] = EncoderMemory(weights, *work)
        return found

    def _stored(self, component: str) -> int:
        """Numbers of a component's weights, by their headers; 0 where they are not there yet."""
        source = self.source_of(component)
        try:
            shapes = stored_shapes(source.part(component), source.components[component].stem)
        except ModelError:
            return 0
        return sum(map(math.prod, shapes.values()))

    def scheduler_config(self) -> Mapping[str, object]:
        return read_json(self._source.folder / "scheduler" / "scheduler_config.json")

    def rows(self, text: str, denoiser: str = "") -> Sequence[tuple[str, str]]:
        """For `describe`, of the model, its denoiser, its text encoder and its video codec, with what the configs say.

        text: all of its row. denoiser: what it is called; "" where the model's name says it.
        """
        transformer, vae, options = self._transformer, self._codec, self._options
        named = f"{denoiser}, " if denoiser else ""
        blocks = f"{named}{transformer.num_layers} blocks x {transformer.width}, {self.parameters:,} parameters"
        factors = f"x{vae.space_factor} space, x{vae.time_factor} time, {self._geometry.channels} channels"
        source = self.source_of("vae")
        place = f", from {source.describe()}" if source is not self._source else ""
        tiled = ", tiled" if options.vae_tiling else ""
        return (
            ("model", self._source.describe()),
            ("denoiser", blocks),
            ("text", text),
            ("video codec", f"{self.codec_title} in {options.vae_precision}, {factors}{tiled}{place}"),
        )

    def component_fingerprint(
        self,
        hash_file: HashFile,
        component: str,
        mark: str,
        *settings: object,
        tokenizer: str = "",
        defaults: JsonObject | None = None,
    ) -> str:
        """Of a component's weights and config, of its tokenizer if it has one, and of the settings that change what it gives."""
        source = self.source_of(component)
        folder = source.part(component)
        words = [tokenizer_hashes(self._source.part(tokenizer), hash_file)] if tokenizer else []
        config = meaning(read_json(folder / "config.json"), defaults)
        weights = weight_hashes(folder, source.components[component].stem, hash_file)
        return digest(mark, *words, config, weights, list(settings))

    def video_fingerprint(self, hash_file: HashFile) -> str:
        settings, defaults = (self._options.vae_precision, self._options.vae_tiling), self.codec_defaults()
        return self.component_fingerprint(hash_file, "vae", f"{self.mark} video 1", *settings, defaults=defaults)

    def open_video_codec(self, device: str) -> AbstractContextManager[NormalizedCodec]:
        return opened(lambda: self.load_codec(device), device)

    def load_codec(self, device: str) -> NormalizedCodec:
        """*torch* The video codec of the checkpoint. Raises ModelError."""
        codec, options, folder = self._codec, self._options, self.source_of("vae").part("vae")
        if not isinstance(codec, CausalCodecConfig):
            raise TypeError(f"{type(self).__name__} reads a {type(codec).__name__}, and has no load_codec for it")
        vae = load_autoencoder(self.codec_class(), folder, options.vae_precision, device, tiling=options.vae_tiling)
        return NormalizedCodec(vae, codec.latents_mean, codec.latents_std, codec.geometry(), f"the {self.codec_title}")

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """SupportsAdapterNames."""
        return ()

    def weight_shapes(self) -> Mapping[str, Shape]:
        """SupportsAdapterNames."""
        return self._transformer.shapes()

    def parts_bytes(self) -> int:
        """SupportsReference."""
        folders = [folder for _, folder, _ in pipeline_parts(self._source, self.source_of)]
        return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())

    def save_parts(self, folder: Path) -> None:
        """SupportsReference."""
        write_pipeline(folder, self._source, self.source_of)

    def open_reference(self, like: Denoiser, folder: Path, export: ExportFormat) -> Denoiser:
        """SupportsReference."""
        if not isinstance(like, DiffusersDenoiser):
            raise TypeError(
                f"{type(like).__name__} is no DiffusersDenoiser, and {type(self).__name__} has no open_reference"
            )
        if export in ("lora", "comfyui"):
            return like.reference(self._source.part("transformer"), next(folder.glob("*.safetensors")))
        return like.reference(folder if export == "pipeline" else folder / "transformer")

    def load_denoiser(self, device: str, dtype: DType, weights: Path | None = None) -> Denoiser:
        folder = self._source.part("transformer") if weights is None else weights / "transformer"
        if self.read_transformer(folder) != self._transformer:
            what = f"these weights are not of the model {self._source.name}: their config differs."
            raise ModelError(Problem(str(folder), what, "Name the model that they were trained from."))
        return self.denoiser_of(folder, device, dtype)
