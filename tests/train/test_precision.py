"""A quantised base under LoRA, in whole runs and against bf16; bf16 weights that are trained; autocast."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtrain.config.tables import LoraTable
from vtrain.contract import Device, OptimizerSpec, ParameterGroup
from vtrain.contract.precision import STORAGE, StorageName
from vtrain.registry import discover
from vtrain.train import model
from vtrain.train.parameters import add_lora, lora_state, trained
from vtrain.train.precision import held_bytes, quantise, quantise_block, unpacked

Run = Callable[..., subprocess.CompletedProcess[str]]
QUANTISED = [name for name, storage in STORAGE.items() if storage.quantised]


def based(folder: Any, base: str, mixed: str = "bf16", **values: Any) -> Path:
    """A LoRA run of the toy family with that base."""
    file: Path = folder.write(train="lora", **values)
    text = file.read_text(encoding="utf-8").replace('mixed = "no"', f'mixed = "{mixed}"\nbase = "{base}"')
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def bf16(toy: Any) -> Any:
    return toy.load_denoiser("cpu", "bf16")


def predicted(denoiser: Any, given: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = denoiser.predict(given.clean, given.level, given.condition)
    return out.float()


@pytest.mark.parametrize("base", QUANTISED)
def test_a_run_on_a_quantised_base_learns_saves_its_adapter_alone_and_resumes_bit_for_bit(
    folder: Any, another: Callable[[], Any], within: Run, base: str
) -> None:
    within("run", based(folder, base, lr=1e-2, save=3))
    resumed_in = another()
    shutil.copytree(folder.output / "checkpoints" / "step-000003", resumed_in.output / "checkpoints" / "step-000003")
    printed = within("run", based(resumed_in, base, lr=1e-2, save=3)).stdout
    assert "(step 3)" in printed
    whole, resumed = folder.tensors(6), resumed_in.tensors(6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert folder.rows()[3:] == resumed_in.rows()
    assert whole.keys() == resumed.keys()
    assert all("lora" in name or "optimizer" in name for name in whole)
    assert all(value.isfinite().all() for value in whole.values())
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)


@pytest.mark.parametrize("base", QUANTISED)
def test_predictions_are_near_those_of_bf16_and_never_the_same(
    toy: Any, bf16: Any, given: Callable[[int], Any], base: StorageName
) -> None:
    """Three times the error that the table has of a larger model, at most: fewer blocks, shorter rows."""
    quantised = toy.load_denoiser("cpu", "bf16")
    assert quantise(quantised, STORAGE[base], quantised.lora_targets, "cpu", there=False) == ""
    wanted, got = predicted(bf16, given(2)), predicted(quantised, given(2))
    error = float((got - wanted).norm() / wanted.norm())
    assert 0 < error < 3 * (STORAGE[base].error or 0)


@pytest.mark.parametrize("there", [False, True])
def test_where_a_block_is_quantised_changes_nothing_on_a_cpu(
    toy: Any, given: Callable[[int], Any], there: bool
) -> None:
    one, other = (toy.load_denoiser("cpu", "bf16") for _ in range(2))
    quantise(one, STORAGE["int8"], one.lora_targets, "cpu", there=False)
    quantise(other, STORAGE["int8"], one.lora_targets, "cpu", there=there)
    assert torch.equal(predicted(one, given(1)), predicted(other, given(1)))


@pytest.mark.parametrize("place", ["cpu", "accelerator"])
def test_blocks_are_quantised_where_the_file_says(
    plan_of: Callable[..., Any], bf16: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    plan = plan_of(model='use = "toy"\ntrain = "lora"', precision=f'base = "int8"\nquantize_on = "{place}"')
    asked: list[bool] = []
    monkeypatch.setattr(model, "quantise", lambda *args, there: asked.append(there) or "")
    model.quantised_base(plan, bf16, "cpu")
    assert asked == [place == "accelerator"]


def test_norms_biases_and_what_lies_outside_of_blocks_stay_bf16(bf16: Any) -> None:
    quantise(bf16, STORAGE["int8"], bf16.lora_targets, "cpu", there=False)
    for name, weight in bf16.module.named_parameters():
        inside = name.startswith("blocks.") and name.endswith(".weight")
        assert hasattr(weight, "_scale") == inside, name
        assert weight.dtype is torch.bfloat16
        assert weight.data_ptr() % 16 == 0 or inside
        if inside:
            assert weight._data.data_ptr() % 16 == 0, "torch's int8 product reads 16 bytes at once"
            assert held_bytes(weight) < 2 * weight.numel()


def test_the_mark_of_the_base_names_the_weights_before_they_are_quantised(
    folder: Any, another: Any, within: Run
) -> None:
    """So that another storage type is refused by its own rule, not as another model."""
    within("run", based(folder, "bf16", steps=3))
    done = within("run", based(folder, "int8", steps=6), check=2)
    assert "precision.base" in done.stderr
    assert 'was "bf16" and is now "int8"' in done.stderr
    assert "other weights" not in done.stderr


def test_only_the_adapter_learns_and_every_gradient_is_there(toy: Any, given: Callable[[int], Any]) -> None:
    denoiser = toy.load_denoiser("cpu", "bf16")
    quantise(denoiser, STORAGE["int8"], denoiser.lora_targets, "cpu", there=False)
    add_lora(denoiser, LoraTable(rank=4), 0, "")
    denoiser.gradient_checkpointing(True)
    step = given(2)
    with Device().autocast("bf16"):
        denoiser.predict(step.clean, step.level, step.condition).float().square().mean().backward()
    found = trained(denoiser.module)
    assert {name.rsplit(".", 3)[-3] for name, _ in found} == {"lora_A", "lora_B"}
    assert all(weight.grad is not None and weight.grad.isfinite().all() for _, weight in found)
    assert lora_state(denoiser.module)


@pytest.mark.parametrize("row", [4, 8, 36, 50, 100, 48])
def test_torchs_int8_product_is_not_given_rows_past_whose_end_it_reads(
    monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    """It reads 16 numbers at once, and ends the process. What such a layer gives is what its numbers stand for, in float64."""
    product = torch._weight_int8pack_mm
    given: list[int] = []

    def watched(value: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        given.append(weight.shape[1])
        assert weight.shape[1] % 16 == 0, "the process would end"
        return product(value, weight, scales)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", watched)
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(row, 24)).bfloat16()
    quantise_block(block, "block", STORAGE["int8"], (), {})
    layer: Any = block[0]
    value = torch.randn(2, 3, row, dtype=torch.bfloat16, requires_grad=True)
    numbers = layer.weight._data.double() * layer.weight._scale.double()
    with Device().autocast("bf16"):
        out = block(value)
    wanted = value.detach().double() @ numbers.T + layer.bias.detach().double()
    assert float((out.detach().double() - wanted).norm() / wanted.norm()) < 0.01
    assert bool(given) is (row == 48)
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert value.grad is not None
    assert float((value.grad.double() - numbers.sum(0)).norm() / numbers.sum(0).norm()) < 0.02


def test_fp8_weights_keep_quantos_plain_form_on_a_card_whose_kernel_forgets_biases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choice is quanto's own, of tensors on a card that torch only makes believe."""
    from optimum.quanto import WeightQBytesTensor, qtypes
    from optimum.quanto.library.extensions import extension
    from torch._subclasses.fake_tensor import FakeTensorMode

    known = {"quanto_cuda": extension.Extension("quanto_cuda", "nowhere", [])}
    monkeypatch.setattr(extension, "_extensions", extension._extensions | known)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    def moved() -> type:
        with FakeTensorMode():
            numbers = torch.empty(64, 128, dtype=torch.float8_e4m3fn, device="cuda")
            scales = torch.empty(64, 1, dtype=torch.bfloat16, device="cuda")
            kind = qtypes["qfloat8_e4m3fn"]
            return type(WeightQBytesTensor.create(kind, 0, numbers.size(), numbers.stride(), numbers, scales))

    # Else quanto has changed, and this test shows nothing: its other form packs on a real card.
    with pytest.raises(RuntimeError, match="cuda"):
        moved()
    quantise_block(nn.Sequential(nn.Linear(128, 64)).bfloat16(), "block", STORAGE["fp8"], (), {})
    assert moved() is WeightQBytesTensor


@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Linear(256, 48), nn.Linear(192, 7), nn.Conv2d(4, 9, 3)])
def test_int4_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, layer: nn.Module) -> None:
    """Also in the backward pass, where weights of another form are unpacked."""
    from optimum.quanto.library.extensions import extension

    def load(**_: Any) -> None:
        raise AssertionError("a kernel is compiled")

    monkeypatch.setattr(extension, "load", load)
    for each in extension._extensions.values():
        monkeypatch.setattr(each, "_lib", None)
    block = nn.Sequential(copy.deepcopy(layer)).bfloat16()
    value = torch.randn(2, 4, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(3, layer.in_features)
    value = value.bfloat16().requires_grad_()
    wanted = block(value)
    quantise_block(block, "block", STORAGE["int4"], (), kept := {})
    assert not kept
    out = block(value)
    assert 0 < float((out - wanted).detach().float().norm() / wanted.detach().float().norm()) < 0.15
    out.float().sum().backward()
    assert value.grad is not None
    assert bool(value.grad.any())


@pytest.mark.parametrize(("row", "outputs"), [(256, 24), (384, 17)])
def test_int4_layers_whose_outputs_torchs_product_does_not_take_stay_bf16(row: int, outputs: int) -> None:
    kept: dict[str, str] = {}
    block = nn.Sequential(nn.Linear(row, outputs)).bfloat16()
    quantise_block(block, "block", STORAGE["int4"], (), kept)
    assert kept == {"block.0": f"its {outputs} outputs are not divisible by 16"}
    assert type(block[0]) is nn.Linear


@pytest.mark.parametrize(("bits", "rows"), [(4, 6), (4, 7), (2, 8), (2, 9)])
def test_numbers_come_out_of_bytes_as_quanto_put_them_in(bits: int, rows: int) -> None:
    from optimum.quanto.tensor.packed import PackedTensor

    numbers = torch.randint(0, 2**bits, (rows, 5), dtype=torch.uint8)
    packed = PackedTensor.pack(numbers, bits)
    assert torch.equal(unpacked(packed._data, bits)[:rows], numbers)


def test_a_transposed_input_is_what_a_contiguous_one_is(bf16: Any) -> None:
    """torch's int8 product on a CPU takes no other; attention hands one to its last projection."""
    quantise(bf16, STORAGE["int8"], bf16.lora_targets, "cpu", there=False)
    layer = bf16.blocks[0].self_attention.to_out
    value = torch.randn(32, 16, 1, dtype=torch.bfloat16).permute(2, 1, 0)
    assert not value.is_contiguous()
    with torch.no_grad():
        assert torch.equal(layer(value), layer(value.contiguous()))
        assert layer(value.float()).dtype is torch.bfloat16


def test_what_quanto_cannot_do_is_loud_still(bf16: Any) -> None:
    """Where one of these begins to work, or to be silent, what is said of it has to be looked at again."""
    quantise(bf16, STORAGE["int8"], bf16.lora_targets, "cpu", there=False)
    with pytest.raises(ValueError, match="dtype of a weights Tensor cannot be changed"):
        bf16.module.to(torch.float32)
    with pytest.raises(RuntimeError):
        copy.deepcopy(bf16.module)


def test_weights_that_are_frozen_by_quanto_do_not_move_which_is_why_full_training_is_refused(
    bf16: Any, given: Callable[[int], Any]
) -> None:
    quantise(bf16, STORAGE["int8"], bf16.lora_targets, "cpu", there=False)
    weight = bf16.blocks[0].widen.weight.requires_grad_(True)
    before = weight._data.clone(), weight._scale.clone()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    step = given(1)
    bf16.predict(step.clean, step.level, step.condition).float().square().mean().backward()
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):
        return  # louder is as good
    assert torch.equal(weight._data, before[0])
    assert torch.equal(weight._scale, before[1])


def test_mixed_bf16_with_an_fp32_base_is_bf16_products_and_fp32_weights(toy: Any, given: Callable[[int], Any]) -> None:
    """Against torch alone: a Step of vtrain under Processes' autocast has the gradients of a bare loop's own autocast, in fp32,
    within bf16's error of those in float64."""
    step, denoiser = given(2), toy.load_denoiser("cpu", "fp32")
    exact = toy.load_denoiser("cpu", "fp32").module.double()
    assert all(weight.dtype is torch.float32 for weight in denoiser.module.parameters())
    with Device().autocast("bf16"):
        loss = denoiser.predict(step.clean, step.level, step.condition).float().square().mean()
    loss.backward()
    embeds, mask = step.condition.text.only.masked
    level = step.level.timestep[:, None].expand(-1, step.clean.shape[2])
    wanted = exact(step.clean.double(), level.double(), embeds.double(), mask).square().mean()
    wanted.backward()
    assert abs(loss.item() - wanted.item()) < 0.05 * wanted.item()
    for (name, weight), reference in zip(denoiser.module.named_parameters(), exact.parameters(), strict=True):
        assert weight.grad is not None
        assert weight.grad.dtype is torch.float32
        assert reference.grad is not None
        if reference.grad.norm() > 1e-6:
            error = (weight.grad - reference.grad).norm() / reference.grad.norm()
            assert error < 0.2, name


def test_an_optimizer_that_says_it_moves_bf16_weights_moves_them_at_a_rate_of_1e_4() -> None:
    """Weights from 0.1 to 1, between which bf16 has steps of 0.0005 to 0.004: torch's AdamW moves none of them."""
    catalog = discover()
    for name in catalog.names("optimizer"):
        spec = catalog.parts["optimizer", name].spec
        assert isinstance(spec, OptimizerSpec)
        assert name != "adamw" or "bf16" not in spec.moves
        if "bf16" in spec.moves or name == "adamw":
            share = moved(spec)
            assert (share > 0.2) == ("bf16" in spec.moves), f"{name}: {share}"


def moved(spec: OptimizerSpec) -> float:
    """The share of weights that are others after 100 steps of the same gradient, which an exact optimizer moves by 0.01."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.1 + 0.9 * torch.rand(64, 64)).bfloat16())
    before, gradient = weight.detach().clone(), torch.randn(64, 64).bfloat16()
    options = spec.options.model_validate({"lr": 1e-4})
    optimizer = spec.build(options, [ParameterGroup((("weight", weight),), decay=False)])
    for _ in range(100):
        weight.grad = gradient.clone()
        optimizer.step()
    return float((weight != before).float().mean())
