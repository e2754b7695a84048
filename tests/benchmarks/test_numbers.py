"""What the benchmarks make of what they measure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vtrain_sanavideo.geometry import SanaVideoConfig

Load = Callable[[str], ModuleType]


def test_a_ratio_is_the_median_of_pairs_with_an_interval_around_it(module: Load) -> None:
    below = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = module("report").ratio([1.1 * value for value in below], below, 1.02)
    assert found.median == pytest.approx(1.1)
    assert (found.low, found.high) == pytest.approx((1.1, 1.1))
    assert not found.met
    assert "MISSED" in str(found)


def test_a_limit_is_met_when_the_lower_end_of_the_interval_reaches_it(module: Load) -> None:
    noisy = module("report").ratio([0.9, 1.0, 1.1, 1.2, 1.3], [1.0] * 5, 1.02)
    assert noisy.low < 1.02 < noisy.median
    assert noisy.met
    assert str(noisy).endswith("limit 1.02: met")


def test_the_same_numbers_give_the_same_interval(module: Load) -> None:
    ratio = module("report").ratio
    assert ratio([1.0, 1.2, 1.1], [1.0] * 3, None) == ratio([1.0, 1.2, 1.1], [1.0] * 3, None)


@pytest.mark.parametrize(
    ("origin", "kind"),
    [
        ('{"dir_info": {"editable": true}, "url": "file:///src"}', "editable"),
        ('{"dir_info": {}, "url": "file:///src"}', "normal"),
        ('{"archive_info": {}, "url": "file:///drum.whl"}', "normal"),
        (None, "normal"),
    ],
)
def test_the_kind_of_an_install_is_what_its_direct_url_says(
    module: Load, install_plugin: Callable[..., Path], origin: str | None, kind: str
) -> None:
    folder = install_plugin("drum", "", version="1.5")
    if origin is not None:
        (folder / "drum-1.5.dist-info" / "direct_url.json").write_text(origin)
    assert module("report").install("drum") == f"1.5, {kind} install"


def test_what_the_startup_benchmark_starts_may_keep_its_bytecode(module: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    startup = module("startup")
    startup.whole([sys.executable, "-c", "import sys; sys.exit(sys.dont_write_bytecode)"])


def test_crepa_adds_little_to_the_peak_of_a_step(module: Load) -> None:
    """Counted on fake tensors, in the real width and few blocks. Whole alignments kept for the backward pass were 1.065."""
    memory = module("crepa_memory")
    few = memory.REAL | {"num_layers": 3}
    setup = memory.Setup("lora", memory.Clip(480, 256, 49), few, torch.device("meta"), 1, False)
    processes = memory.Processes("bf16")
    processes.accelerator.device_placement = False
    without, beside = (memory.count(setup, processes, crepa=crepa)[0] for crepa in (False, True))
    assert without > 4 << 30
    assert 1 < beside / without < 1.05


def test_the_2b_model_has_the_parameters_of_the_real_one(module: Load) -> None:
    gpu = module("gpu_sides")
    config = SanaVideoConfig.model_validate(gpu.REAL)
    with torch.device("meta"):
        model = gpu.SanaVideoTransformer3DModel(**gpu.REAL)
    assert sum(weight.numel() for weight in model.parameters()) == 2_056_862_144
    assert {name: tuple(weight.shape) for name, weight in model.named_parameters()} == config.shapes()


@pytest.mark.parametrize(
    ("mode", "frames", "tflop"), [("full", 81, 484), ("lora", 81, 363), ("lora", 49, 363 * 13 / 21)]
)
def test_the_work_of_a_step_is_counted_in_forwards_and_tokens(
    module: Load, mode: str, frames: int, tflop: float
) -> None:
    gpu = module("gpu_sides")
    setup = gpu.Setup(mode, gpu.Clip(832, 480, frames), gpu.REAL, torch.device("cpu"), 4)
    assert setup.clip.latents == (16, (frames - 1) // 4 + 1, 60, 104)
    assert setup.tflop() == pytest.approx(tflop)


def test_a_built_model_has_whole_rotary_tables_and_finite_weights(module: Load) -> None:
    gpu = module("gpu_sides")
    model = gpu.build(gpu.Setup("lora", gpu.Clip(64, 64, 9), gpu.TINY, torch.device("cpu"), 1))
    fresh = gpu.SanaVideoTransformer3DModel(**gpu.TINY)
    buffers = dict(fresh.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(weight.isfinite().all() and weight.dtype == torch.bfloat16 for weight in model.parameters())


def test_too_little_memory_is_a_row_and_not_the_end(module: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = module("gpu_sana2b")

    @contextmanager
    def enough(_setup: object, _processes: object) -> Iterator[Callable[[], None]]:
        yield lambda: None

    @contextmanager
    def too_little(_setup: object, _processes: object) -> Iterator[Callable[[], None]]:
        def block() -> None:
            raise torch.OutOfMemoryError("planted")

        yield block

    for name in ("SIDES", "ALL"):
        monkeypatch.setattr(gpu, name, {"bare": too_little, "vtrain": enough})
    setup = gpu.Setup("lora", gpu.Clip(64, 64, 9), gpu.TINY, torch.device("cpu"), 1)
    found = gpu.measure(setup, None, 2)
    assert gpu.row(found["bare"])[-1].startswith("out of memory")
    assert gpu.row(found["bare"])[3] == "-"
    assert gpu.ratios(found) == {}


def test_models_that_do_not_fit_together_are_timed_one_after_the_other(
    module: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = module("gpu_sana2b")
    held: list[object] = []

    @contextmanager
    def alone(_setup: object, _processes: object) -> Iterator[Callable[[], None]]:
        if held:
            raise torch.OutOfMemoryError("planted")
        held.append(_setup)
        try:
            yield lambda: None
        finally:
            held.clear()

    monkeypatch.setattr(gpu, "ALL", {"bare": alone, "EMA": alone})
    setup = gpu.Setup("lora", gpu.Clip(64, 64, 9), gpu.TINY, torch.device("cpu"), 1)
    found = gpu.measure(setup, None, 2, ("bare", "EMA"))
    assert [(len(each.seconds), each.in_turn, each.note) for each in found.values()] == [(2, False, "")] * 2
    assert {gpu.row(each)[-1] for each in found.values()} == {"one after the other"}
