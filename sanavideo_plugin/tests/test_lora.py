"""[model.lora] on SANA-Video: targets that can have no adapter, files to start from that are none, DoRA on a base of bf16."""

# diffusers and peft are untyped.
# mypy: disable-error-code="no-untyped-call, attr-defined, unused-ignore"
from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from vtrain.config.tables import LoraTable
from vtrain.contract import ConfigError, Denoiser, ModelError
from vtrain.contract.adapters import adapter_path, misfits_of, read_adapter
from vtrain.plan.records import Plan
from vtrain.run.prepare import planned
from vtrain.train import parameters
from vtrain.train.adapter import adapter_state, start_adapter
from vtrain.train.model import load_model
from vtrain.train.resume import RunState, Start
from vtrain.train.settings import settings

CONFIG = """
[run]
output_dir = "run"
[model]
use = "sanavideo"
path = "{model}"
train = "lora"
[model.lora]
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


@pytest.fixture
def plan(tmp_path: Path, checkpoint: Path) -> Callable[[str], Plan]:
    """The plan of these lines of [model.lora]."""
    (tmp_path / "clips").mkdir()

    def make(lora: str) -> Plan:
        file = tmp_path / "config.toml"
        file.write_text(CONFIG.format(model=checkpoint, lora=lora), encoding="utf-8")
        return planned(file)

    return make


def loaded(plan: Plan) -> Denoiser:
    """The denoiser of a new run, with its adapter."""
    values = {key: setting.value for key, setting in settings(plan).items()}
    return load_model(plan, Start(None, RunState(0, 0, values, "", ""), ()), "cpu")[0]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["conv_depth"], "conv_depth is a convolution in groups of channels, which can have no adapter"),
        (["0"], r'"0" is also transformer_blocks\.0, which is no layer'),
        (["attn1.to_q", "norm_q"], 'no layer of the model is called "norm_q"'),
    ],
)
def test_targets_that_can_have_no_adapter_are_refused_by_the_plan(
    plan: Callable[[str], Plan], targets: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(f"targets = {json.dumps(targets)}")


def test_a_rank_beyond_the_layers_width_is_warned_of(plan: Callable[[str], Plan]) -> None:
    assert any("model.lora.rank is 500, more than" in each for each in plan("rank = 500").warnings)
    assert not any("model.lora.rank" in each for each in plan("rank = 64").warnings)


class Layers(nn.Module):
    """What a loaded family may have: a Linear, one that is a container elsewhere, and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(4, 4), "0": nn.Linear(4, 4)})])
        self.conv = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)


@pytest.mark.parametrize(
    ("target", "message"),
    [("0", "is also blocks.0, a ModuleDict"), ("grouped", "in groups of channels"), ("nothing", 'called "nothing"')],
)
def test_a_family_that_names_no_weights_has_its_targets_looked_at_when_it_is_loaded(target: str, message: str) -> None:
    (problem,) = parameters.target_faults(Layers(), [target], "here")
    assert message in problem.what
    assert not list(parameters.target_faults(Layers(), ["to_q", "conv", "blocks.0.0"], "here"))


def test_all_targets_that_cannot_be_are_named_at_once_when_it_is_loaded(plan: Callable[[str], Plan]) -> None:
    made = plan("rank = 4")
    denoiser = made.family.load_denoiser("cpu", "fp32")
    with pytest.raises(ConfigError) as caught:
        parameters.add_lora(denoiser, LoraTable.model_validate({"targets": ["nothing", "nowhere"]}), 0, "here")
    first, second = caught.value.problems
    assert '"nothing"' in first.what
    assert '"nowhere"' in second.what


def test_dora_on_a_base_of_bf16_predicts_at_first_what_the_base_does(plan: Callable[[str], Plan]) -> None:
    """peft's own magnitudes, in bf16, are up to 0.4% off the lengths of the weights."""
    made = plan("rank = 4\ndora = true")
    module = loaded(made).module
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_magnitude_vector"):
            weight = layer.base_layer.weight
            assert weight.dtype == torch.bfloat16, name
            own = layer.lora_magnitude_vector[parameters.ADAPTER].weight
            exact = weight.double().flatten(1).norm(dim=1)
            torch.testing.assert_close(own.double().flatten(), exact, rtol=1e-5, atol=0)


def test_orthogonal_weights_of_an_odd_rank_are_nobodys_matter_where_a_file_gives_them(
    tmp_path: Path, plan: Callable[[str], Plan]
) -> None:
    weights = dict(lora("transformer_blocks.0.attn1.to_q", 5, 96, 96))
    save_file(weights, tmp_path / "start.safetensors")
    targets = '["transformer_blocks.0.attn1.to_q"]'
    made = plan(f'rank = 5\ntargets = {targets}\ninit = "orthogonal"\nstart = "{tmp_path}/start.safetensors"')
    assert start_adapter(made, loaded(made)).endswith("start.safetensors")


def lora(module: str, rank: int, inside: int, outside: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, inside, generator=draw),
        f"{module}.lora_B.weight": torch.randn(outside, rank, generator=draw),
    }


def peft_folder(folder: Path, tensors: dict[str, Tensor], **said: object) -> Path:
    """A LoRA as peft saves it."""
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, **said}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "pattern",
    [{"to_q": 8.0}, {"^blocks.0.to_q": 6.0}, {"o_q": 8.0}, {r"blocks\.\d+\.to_q": 2.0}, {"x": 1.0, "to_q": 3.0}],
)
def test_patterns_of_alpha_are_read_as_peft_reads_them(tmp_path: Path, pattern: dict[str, float]) -> None:
    model = Layers()
    settings = {"lora_alpha": 12, "alpha_pattern": pattern}
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"], **settings), model)  # type: ignore[arg-type]
    layer: Any = model.get_submodule("blocks.0.to_q")
    folder = peft_folder(tmp_path / "peft", lora("blocks.0.to_q", 4, 4, 4), **settings)
    (found,) = read_adapter(adapter_path(folder)).modules.values()
    assert found.scale == layer.scaling["default"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"lora_alpha": "8"}, "lora_alpha of this adapter is '8', and not a number above 0"),
        ({"lora_alpha": 0}, "lora_alpha of this adapter is 0, and not"),
        ({"lora_alpha": math.nan}, "lora_alpha of this adapter is nan, and not"),
        ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern \"to_q\" of this adapter is 'x', and not"),
        (
            {"alpha_pattern": {"to_q": 4.0, "to_k[": 8.0}},
            r'peft/adapter_model.*"to_k\[" of this adapter is no regular .*file\.',
        ),
        (
            {"alpha_pattern": {"(?i)to_q": 4.0}},
            "of this adapter is no regular expression: global flags not at the start",
        ),
        ({"alpha_pattern": [1]}, r"alpha_pattern of this adapter is \[1\], and no table"),
    ],
)
def test_an_alpha_that_is_no_number_above_0_is_refused(tmp_path: Path, said: dict[str, object], message: str) -> None:
    folder = peft_folder(tmp_path / "peft", lora("blocks.0.to_q", 4, 4, 4), **said)
    with pytest.raises(ModelError, match=message):
        read_adapter(adapter_path(folder))


def test_settings_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", lora("blocks.0.to_q", 4, 4, 4))
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelError, match=r"adapter_config\.json: cannot be read"):
        read_adapter(adapter_path(folder))


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor([8.0, 4.0]), r"alpha of this adapter is \[8\.0, 4\.0\]"),
        (torch.tensor(0.0), "alpha of this adapter is 0.0"),
        (torch.tensor(math.inf), "alpha of this adapter is inf"),
    ],
)
def test_a_stored_alpha_is_one_number_above_0(tmp_path: Path, alpha: Tensor, message: str) -> None:
    save_file({**lora("blocks.0.to_q", 4, 4, 4), "blocks.0.to_q.alpha": alpha}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path / "a.safetensors")


def test_quantised_numbers_are_no_weights_of_a_lora(tmp_path: Path) -> None:
    tensors = {name: value.to(torch.int8) for name, value in lora("blocks.0.to_q", 4, 4, 4).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="is stored as I8: these are no weights of a LoRA"):
        read_adapter(tmp_path / "a.safetensors")


def test_a_file_with_numbers_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = lora("blocks.0.to_q", 4, 4, 4)
    tensors["blocks.0.to_q.lora_B.weight"][0, 0] = math.nan
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"lora_B\.weight is not finite"):
        adapter_state(read_adapter(tmp_path / "a.safetensors"), 1.0, {})


def test_a_convolutions_kernel_is_compared_and_a_linears_matrices_may_be_kernels_of_1x1(tmp_path: Path) -> None:
    tensors = {
        "conv.lora_A.weight": torch.zeros(4, 4, 3, 3),
        "conv.lora_B.weight": torch.zeros(4, 4, 1, 1),
        **{name: value[:, :, None, None].contiguous() for name, value in lora("to_q", 4, 4, 4).items()},
    }
    save_file(tensors, tmp_path / "a.safetensors")
    file = read_adapter(tmp_path / "a.safetensors")
    shapes = {"conv.weight": (4, 4, 1, 1), "to_q.weight": (4, 4)}
    assert list(misfits_of(file, shapes)) == ["conv has a kernel of 3x3 instead of 1x1"]
    module = nn.ModuleDict({"to_q": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 3)})
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "conv"]), module, parameters.ADAPTER)
    own = parameters.lora_state(module)
    state = adapter_state(file, 1.0, own)
    assert parameters.load_lora_state(module, state) == []
