# diffusers is untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, no-any-return, unused-ignore"
"""The 720p checkpoint: the LTX-2 video VAE, its sizes, and what is not one of its own files."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from diffusers.pipelines.sana_video.pipeline_sana_video import ASPECT_RATIO_720_BIN
from safetensors.torch import load_file, save_file

from vtrain.contract import (
    ClipShape,
    Condition,
    FrameRule,
    LatentGeometry,
    LatentShape,
    ModelError,
    NoiseLevel,
    NormalizedCodec,
    Size,
    Text,
    default_arguments,
)
from vtrain_sanavideo import tiny
from vtrain_sanavideo.check import LTX2, VAE_SOURCES, read_vae
from vtrain_sanavideo.codec import ltx2_statistics
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.geometry import Ltx2CodecConfig
from vtrain_sanavideo.options import SanaVideoOptions

Families = Callable[..., SanaVideoFamily]
WEIGHTS = Path("vae", "diffusion_pytorch_model.safetensors")
REAL_VAE = {
    "_class_name": "AutoencoderKLLTX2Video", "in_channels": 3, "out_channels": 3, "latent_channels": 128,
    "block_out_channels": [256, 512, 1024, 2048], "decoder_block_out_channels": [256, 512, 1024],
    "layers_per_block": [4, 6, 6, 2, 2], "decoder_layers_per_block": [5, 5, 5, 5], "patch_size": 4, "patch_size_t": 1,
    "spatio_temporal_scaling": [True, True, True, True], "decoder_spatio_temporal_scaling": [True, True, True],
    "decoder_inject_noise": [False, False, False, False], "upsample_residual": [True, True, True],
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"], "upsample_factor": [2, 2, 2],
    "timestep_conditioning": False, "encoder_causal": True, "decoder_causal": False,
    "encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "reflect",
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip
"""What diffusers' scripts/convert_ltx2_to_diffusers.py writes for LTX-2."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def said(family: SanaVideoFamily) -> str:
    return "\n".join(map(str, family.check()))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the VAE's weights."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


@pytest.fixture
def own(checkpoint_720p: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint_720p, tmp_path / "model"))


@pytest.fixture
def large(checkpoint_720p: Path, family_of: Families) -> SanaVideoFamily:
    return family_of(checkpoint_720p)


@pytest.fixture(scope="module")
def codec(checkpoint_720p: Path) -> Iterator[NormalizedCodec]:
    """In fp32, not to be closed: to open one costs more than most of what is asked of it."""
    with SanaVideoFamily(SanaVideoOptions(path=str(checkpoint_720p))).open_video_codec("cpu") as codec:
        yield codec


@pytest.fixture(scope="module")
def tiled(checkpoint_720p: Path) -> Iterator[NormalizedCodec]:
    """The same in tiles."""
    with SanaVideoFamily(SanaVideoOptions(path=str(checkpoint_720p), vae_tiling=True)).open_video_codec("cpu") as codec:
        yield codec


@pytest.fixture(scope="module")
def vae(checkpoint_720p: Path) -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video.from_pretrained(checkpoint_720p, subfolder="vae").eval()


def test_sizes_frames_and_channels_are_those_of_the_720p_checkpoint(large: SanaVideoFamily) -> None:
    assert large.check() == []
    assert (large.default_size, large.default_frames, large.default_fps) == (Size(1280, 704), 81, 16)
    assert (large.frame_rule, large.pixel_stride) == (FrameRule(8, 1), 32)
    latents = large.latent_shape(ClipShape(81, 704, 1280))
    assert latents == LatentShape(128, 11, 22, 40)
    assert math.prod(large.token_grid(latents)) == 9680
    assert [list(large.pixel_frames(number)) for number in range(2)] == [[0], [*range(1, 9)]]
    assert ("video codec", "LTX-2 VAE in fp32, x32 space, x8 time, 128 channels") in large.describe()


def test_its_buckets_are_those_of_the_pipeline(large: SanaVideoFamily) -> None:
    assert list(large.resolutions()) == ["720p"]
    official = {Size(width=int(width), height=int(height)) for height, width in ASPECT_RATIO_720_BIN.values()}
    assert set(large.resolutions()["720p"]) == official
    assert len(large.resolutions()["720p"]) == 11
    assert large.resolutions()["720p"][0] == large.default_size


def test_the_480p_checkpoints_caches_stay_valid(family: SanaVideoFamily) -> None:
    """Computed before the family knew a second VAE; hashes of files are their names here."""
    names: Callable[[Path], str] = lambda path: path.name  # noqa: E731
    assert family.video_fingerprint(names) == "69a2b08d21b6605eee1ee5c6419aca65faefffc925cda0d372cb9838f441f384"


def test_latents_are_the_posterior_mode_normalised_by_the_modules_numbers(
    large: SanaVideoFamily, codec: NormalizedCodec, vae: AutoencoderKLLTX2Video
) -> None:
    """As SanaImageToVideoPipeline.prepare_latents and NVlabs/Sana's vae_encode (LTX2VAE_diffusers)."""
    pixels = video(2, 3, 9, 64, 96)
    mean, std = (numbers.view(1, -1, 1, 1, 1) for numbers in (vae.latents_mean, vae.latents_std))
    assert mean.std() > 0.1, "else the check below proves nothing"
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    latents = codec.encode(pixels, std=True)
    assert torch.equal(latents.mean, (posterior.mode() - mean) / std)
    assert latents.std is not None
    assert torch.equal(latents.std, posterior.std / std)
    assert tuple(latents.mean.shape[1:]) == large.latent_shape(ClipShape(9, 64, 96))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_decode_is_bit_for_bit_what_the_pipeline_shows(
    checkpoint_720p: Path, family_of: Families, precision: str
) -> None:
    """The pipeline cuts pixels to [-1, 1] when it makes pictures of them."""
    latents, dtype = normal(1, 128, 2, 2, 3), torch.float32 if precision == "fp32" else torch.bfloat16
    vae = AutoencoderKLLTX2Video.from_pretrained(checkpoint_720p, subfolder="vae", torch_dtype=dtype)
    mean, std = (numbers.view(1, -1, 1, 1, 1) for numbers in (vae.latents_mean, vae.latents_std))
    with torch.no_grad():
        wanted = vae.decode(latents.to(dtype) / (1.0 / std) + mean, return_dict=False)[0].float()
    with family_of(checkpoint_720p, vae_precision=precision).open_video_codec("cpu") as codec:
        decoded = codec.decode(latents)
        codec.drop_encoder()
        assert torch.equal(codec.decode(latents), decoded)
        with pytest.raises(RuntimeError, match="let go"):
            codec.encode(video(1, 3, 1, 64, 64))
    assert torch.equal(decoded, wanted.clamp(-1, 1))
    assert not torch.equal(decoded, wanted), "one pixel is beyond the range, so the check can fail"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_statistics_are_read_in_every_storage_type(own: Path, family_of: Families, dtype: torch.dtype) -> None:
    names = ("latents_mean", "latents_std")
    rewrite(own, lambda state: state.update({name: state[name].to(dtype) for name in names}))
    assert said(family_of(own)) == ""
    stored, config = load_file(own / WEIGHTS), read_vae(own / "vae")
    assert isinstance(config, Ltx2CodecConfig)
    assert [stored[name].dtype for name in names] == [dtype, dtype]
    assert ltx2_statistics(own / "vae", config) == tuple(tuple(stored[name].tolist()) for name in names)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"downsample_type": ["spatial", "spatial", "spatial", "temporal"], "upsample_type": ["spatial"] * 3},
        {"downsample_type": ["conv", "spatiotemporal", "temporal", "spatial"], "patch_size": 2},
        {"spatio_temporal_scaling": [True, False, True, False]},
        {
            "decoder_spatio_temporal_scaling": [False, True, True],
            "upsample_type": ["spatial", "temporal", "spatial"],
            "upsample_factor": [1, 2, 2],
        },
    ],
)
def test_factors_are_those_of_a_real_encode_and_decode(tmp_path: Path, values: dict[str, object]) -> None:
    """Where encoder and decoder agree and the config names it, it is taken; else the config's faults tell."""
    small: dict[str, object] = {
        "block_out_channels": [32, 32, 64, 64], "decoder_block_out_channels": [16, 32, 64], "latent_channels": 32,
        "layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 4,
    }  # fmt: skip
    config = REAL_VAE | small | values
    module = AutoencoderKLLTX2Video.from_config(config).eval()
    with torch.no_grad():
        latents = module.encode(video(1, 3, 9, 64, 64)).latent_dist.mode()
        pixels = module.decode(latents).sample
    space, time = 64 // latents.shape[3], 8 // (latents.shape[2] - 1)
    good = tuple(pixels.shape[2:]) == (9, 64, 64)
    config |= {"spatial_compression_ratio": space, "temporal_compression_ratio": time}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if good:
        codec = read_vae(tmp_path)
        assert (codec.space_factor, codec.time_factor) == (space, time)
    else:
        with pytest.raises(ModelError, match="the decoder's stages give"):
            read_vae(tmp_path)


def test_the_real_checkpoints_vae_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(REAL_VAE))
    codec = read_vae(tmp_path)
    assert codec.geometry((1, 1, 1)) == LatentGeometry(128, FrameRule(8, 1), 32)


def test_the_vaes_defaults_are_those_of_its_class() -> None:
    read = default_arguments("diffusers", VAE_SOURCES[LTX2], LTX2)
    signature = inspect.signature(AutoencoderKLLTX2Video.__init__).parameters
    assert read == {name: value.default for name, value in signature.items() if value.default is not value.empty}


def test_one_prediction_and_one_with_a_clean_first_frame_are_the_modules(large: SanaVideoFamily) -> None:
    denoiser = large.load_denoiser("cpu", "fp32")
    noisy, embeds, mask = normal(2, 128, 3, 2, 3), normal(2, 12, 64, seed=1), torch.ones(2, 12, dtype=torch.bool)
    condition = Condition(Text.of(embeds, mask))
    for timestep in (torch.tensor([300.0, 800.0]), torch.tensor([[0.0, 300.0, 300.0], [0.0, 800.0, 800.0]])):
        given = timestep if timestep.ndim == 1 else timestep[:, None, :, None, None].expand(2, 1, 3, 2, 3)
        with torch.no_grad():
            ours = denoiser.predict(noisy, NoiseLevel(timestep / 1000, timestep), condition)
            (theirs,) = denoiser.module(
                noisy,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask.long(),
                timestep=given,
                return_dict=False,
            )
        assert torch.equal(ours, theirs)
        assert ours.shape == noisy.shape


@pytest.mark.parametrize(
    ("clip", "tiling", "words"),
    [
        (ClipShape(9, 32, 64), False, "32 pixels are one latent of its decoder, which takes two"),
        (ClipShape(9, 64, 928), True, "the last tile of 928 pixels is one latent"),
        (ClipShape(9, 928, 64), True, "the last tile of 928 pixels is one latent"),
        (ClipShape(9, 480, 832), True, "the last tile of 480 pixels is one latent"),
    ],
)
def test_sizes_that_the_decoder_cannot_take_are_told_before(
    checkpoint_720p: Path,
    family_of: Families,
    codec: NormalizedCodec,
    tiled: NormalizedCodec,
    clip: ClipShape,
    tiling: bool,
    words: str,
) -> None:
    """Its convolutions reflect the edge, which torch refuses for a single row."""
    family = family_of(checkpoint_720p, vae_tiling=tiling)
    with pytest.raises(ModelError, match=words):
        family.latent_shape(clip)
    shape = (1, 128, 1, clip.height // 32, clip.width // 32)
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        (tiled if tiling else codec).decode(normal(*shape))


@pytest.mark.parametrize(("height", "width"), [(64, 512), (64, 544), (64, 896), (64, 960), (480, 512)])
def test_tiles_of_the_sizes_that_are_taken_can_be_decoded(
    checkpoint_720p: Path, family_of: Families, tiled: NormalizedCodec, height: int, width: int
) -> None:
    latents = family_of(checkpoint_720p, vae_tiling=True).latent_shape(ClipShape(1, height, width))
    assert tiled.decode(normal(1, *latents)).shape == (1, 3, 1, height, width)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (video(1, 3, 5, 64, 64), r"5 frames: the LTX-2 VAE takes 8k\+1"),
        (video(1, 3, 9, 64, 80), "80x64: the LTX-2 VAE takes multiples of 32"),
    ],
)
def test_pixels_that_the_vae_would_cut_are_refused(codec: NormalizedCodec, pixels: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        codec.encode(pixels)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"latent_channels": 64}, "64 latent channels, and the transformer takes 128"),
        ({"spatial_compression_ratio": None}, "spatial_compression_ratio: None, but the encoder's stages give 32"),
        ({"temporal_compression_ratio": 4}, "temporal_compression_ratio: 4, but the encoder's stages give 8"),
        ({"patch_size": 2}, "spatial_compression_ratio: 32, but the encoder's stages give 16"),
        ({"spatio_temporal_scaling": [True]}, "spatio_temporal_scaling: 1, but block_out_channels asks for 4"),
        ({"upsample_type": ["spatial"]}, "upsample_type: 1, but decoder_block_out_channels asks for 3"),
        ({"timestep_conditioning": True}, "timestep_conditioning"),
        ({"encoder_causal": False}, "encoder_causal"),
        ({"decoder_inject_noise": [False, True, False, False]}, "decoder_inject_noise: the decoder adds noise"),
        ({"scaling_factor": 0.5}, "scaling_factor: 0.5, but SanaVideoPipeline works with 1"),
        ({"_class_name": "AutoencoderKLLTXVideo"}, "this VAE is a AutoencoderKLLTXVideo"),
        (
            {"_class_name": "AutoencoderKLWan"},
            "the VAE is listed as a AutoencoderKLLTX2Video, and vae/config.json is of a AutoencoderKLWan",
        ),
    ],
)
def test_a_vae_config_that_cannot_be_is_told_of(
    own: Path, family_of: Families, values: dict[str, object], words: str
) -> None:
    change(own / "vae" / "config.json", **values)
    assert words in said(family_of(own))


def test_another_sample_size_is_told_of(own: Path, family_of: Families) -> None:
    change(own / "transformer" / "config.json", sample_size=32)
    assert "sample_size: Input should be 30 or 22" in said(family_of(own))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("latents_mean"), "latents_mean is missing"),
        (lambda state: state.update(latents_std=torch.ones(16)), "latents_std has 16 numbers"),
        (lambda state: state["latents_std"].__setitem__(3, 0.0), "latents_std more than 0"),
        (lambda state: state["latents_mean"].__setitem__(3, math.nan), "must be finite"),
        (lambda state: state.update(latents_std=torch.ones(128, dtype=torch.int64)), "latents_std is stored as I64"),
    ],
)
def test_statistics_that_cannot_be_are_told_of_without_loading(
    own: Path, family_of: Families, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    rewrite(own, change)
    assert words in said(family_of(own))
    with pytest.raises(ModelError), family_of(own).open_video_codec("cpu"):
        pass


@pytest.mark.parametrize("name", ["encoder.conv_in", "encoder.conv_out", "decoder.conv_in"])
def test_weights_that_do_not_fit_the_vaes_config_are_told_of_without_loading(
    own: Path, family_of: Families, name: str
) -> None:
    weight = f"{name}.conv.weight"
    rewrite(own, lambda state: state.update({weight: state[weight][1:].clone()}))
    assert f"{own / 'vae'}: the weights do not fit the config: {weight} is [" in said(family_of(own))


def test_the_other_checkpoints_vae_is_named(checkpoint: Path, checkpoint_720p: Path, family_of: Families) -> None:
    wan, ltx2 = "AutoencoderKLWan", "AutoencoderKLLTX2Video"
    for path, other, theirs, own in (
        (checkpoint_720p, checkpoint, wan, ltx2),
        (checkpoint, checkpoint_720p, ltx2, wan),
    ):
        (problem,) = family_of(path, vae_path=str(other)).check()
        assert problem.where == str(other / "vae" / "config.json")
        assert problem.what == f"vae_path is a {theirs}, and the VAE of [model] path is a {own}."


def test_a_copy_of_the_vae_is_taken_and_one_with_other_statistics_is_not(
    own: Path, checkpoint_720p: Path, family_of: Families
) -> None:
    rewrite(own, lambda state: state.update({name: value.bfloat16() for name, value in state.items()}))
    assert said(family_of(checkpoint_720p, vae_path=str(own / "vae"))) == ""
    rewrite(own, lambda state: state["latents_std"].mul_(1.1))
    assert "latents_std among the weights differ" in said(family_of(checkpoint_720p, vae_path=str(own)))


def test_other_statistics_make_another_fingerprint(
    own: Path, family_of: Families, sha256: Callable[[Path], str]
) -> None:
    before = family_of(own).video_fingerprint(sha256)
    rewrite(own, lambda state: state["latents_mean"].add_(0.1))
    assert family_of(own).video_fingerprint(sha256) != before


def test_weights_of_the_other_checkpoint_are_refused(checkpoint: Path, large: SanaVideoFamily) -> None:
    with pytest.raises(ModelError, match="their config differs"):
        large.load_denoiser("cpu", "fp32", checkpoint)


def test_the_tiny_checkpoint_is_the_same_bytes_again(checkpoint_720p: Path, tmp_path: Path) -> None:
    again = tiny.build(tmp_path / "again", resolution="720p")
    files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert len(files) > 8
    assert all((again / name).read_bytes() == (checkpoint_720p / name).read_bytes() for name in files)
