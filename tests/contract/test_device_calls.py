"""Nobody but the Device object talks to an accelerator."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("core", "plugins", "sanavideo_plugin/vtrain_sanavideo", "wan_plugin/vtrain_wan")
HOME = ROOT / "core" / "vtrain" / "contract" / "device.py"
BESIDE = HOME.with_name("transfers.py")
"""The Device object, and its second stream."""
ROOMS = HOME.with_name("rooms.py")
"""What a plan asks of a card before torch is there: NVML alone."""
MODULES = {
    "cuda",
    "xpu",
    "mps",
    "mtia",
    "accelerator",
    "autocast",
    "amp",
    "backends",
    "manual_seed",
    "get_device_module",
}
"""Of torch: what only an accelerator answers, or answers otherwise."""
METHODS = {
    "pin_memory", "synchronize", "set_device", "empty_cache", "mem_get_info", "memory_allocated", "max_memory_allocated",
    "reset_peak_memory_stats", "is_autocast_enabled", "use_deterministic_algorithms", "record_stream", "default_generator",
}  # fmt: skip
FOREIGN = {"pynvml", "nvidia_smi"}


def device_calls(source: str) -> Iterator[str]:
    """What of a module's source belongs into the Device object: torch's device modules, methods of theirs, copies that do not
    wait, comparisons with a device's type, NVML."""
    for node in ast.walk(ast.parse(source)):
        line = f"{getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Attribute):
            if node.attr in ("cuda", "is_cuda") and not (isinstance(node.value, ast.Name) and node.value.id == "torch"):
                yield f"{line}.{node.attr}"
            elif isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in MODULES:
                yield f"{line}torch.{node.attr}"
            elif node.attr in METHODS:
                yield f"{line}{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in ("non_blocking", "pin_memory"):
            yield f"{line}{node.arg}"
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides):
                values = {each.value for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)}
                if values & {"cpu", "cuda", "mps", "xpu"}:
                    yield f"{line}a comparison of a device's type"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            if any(isinstance(each, ast.Constant) and each.value in ("cuda", "cpu") for each in node.args):
                yield f"{line}a comparison of a device's name"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"{line}import of {name}" for name in names if name.split(".")[0] in FOREIGN)
            yield from (
                f"{line}{name}" for name in names if name.startswith("torch.") and name.split(".")[1] in MODULES
            )
            if getattr(node, "module", None) == "torch":
                yield from (f"{line}torch.{alias.name}" for alias in node.names if alias.name in MODULES)


SOURCES = sorted(
    path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py") if path not in (HOME, BESIDE, ROOMS)
)


def test_no_other_module_of_core_or_plugins_talks_to_an_accelerator() -> None:
    assert len(SOURCES) > 100
    found = {str(path.relative_to(ROOT)): list(device_calls(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_the_device_object_itself_does_so_that_the_check_can_see_it() -> None:
    assert len(list(device_calls(HOME.read_text(encoding="utf-8")))) > 8
    (asked,) = device_calls(ROOMS.read_text(encoding="utf-8"))
    assert asked.endswith("import of pynvml")


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.synchronize()",
        "x.pin_memory()",
        "x.to(device, non_blocking=True)",
        "if device.type == 'cuda': pass",
        "if 'cpu' != x.device.type: pass",
        "device.startswith('cuda')",
        "with torch.autocast('cpu'): pass",
        "torch.manual_seed(1)",
        "torch.default_generator.manual_seed(1)",
        "if device.type in ('cuda', 'xpu'): pass",
        "x.cuda()",
        "if x.is_cuda: pass",
        "import torch.cuda as card",
        "from torch.cuda import synchronize",
        "from torch.amp import autocast",
        "import pynvml",
        "from pynvml import nvmlInit",
        "from torch import cuda",
        "torch.accelerator.is_available()",
        "torch.backends.cudnn.benchmark = True",
        "DataLoader(data, pin_memory=True)",
    ],
)
def test_a_planted_call_is_caught(source: str) -> None:
    assert list(device_calls(source))


@pytest.mark.parametrize(
    "source",
    ["torch.Generator().manual_seed(3)", "Device.of(x).autocast(None)", "x.to(device)", "name.startswith('cud')"],
)
def test_an_allowed_call_is_not(source: str) -> None:
    assert list(device_calls(source)) == []
