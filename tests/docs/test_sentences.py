"""Those of the sentences that no layer's own tests hold."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path

from vtrain.config.record import Config, Part
from vtrain.contract import Condition, Latents, LossTerm, NoiseLevel, StepView, Text
from vtrain.data.scanning.surveys import DatasetSurvey, Survey
from vtrain.estimate.estimate import Estimate
from vtrain.plan.records import DatasetPlan, Plan, ValidationPlan

Run = Callable[..., subprocess.CompletedProcess[str]]
PROBE = """
import json, sys
sys.argv = ["vtrain", "plan", sys.argv[1]]
from vtrain.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_registry_calls_hooks_and_only_the_command_line_discovers(root: Path) -> None:
    pluggy, discover = set(), set()
    for file in (root / "core" / "vtrain").rglob("*.py"):
        layer = file.relative_to(root / "core" / "vtrain").parts[0]
        names = set(imported(ast.parse(file.read_text(encoding="utf-8"))))
        pluggy |= {layer} if any(name.split(".")[0] == "pluggy" for name in names) else set()
        discover |= {layer} if any(name.endswith(".discover") for name in names) else set()
    assert pluggy == {"contract", "registry"}
    assert discover == {"registry", "run", "cli"}


def test_what_stages_hand_on_is_frozen() -> None:
    from vtrain.contract.events import EVENTS, StepMetrics
    from vtrain.data.batches import Batch
    from vtrain.data.caching.caches import FilledCaches
    from vtrain.data.sample import Sample
    from vtrain.data.scanning.scan import Scan

    records = [Config, Part, Plan, DatasetPlan, ValidationPlan, Survey, DatasetSurvey, Estimate]
    records += [Scan, Sample, FilledCaches, Batch, Text, Latents, NoiseLevel, Condition, StepView, LossTerm]
    records += [StepMetrics, *EVENTS.values()]
    loose = [each.__name__ for each in records if not (is_dataclass(each) and each.__dataclass_params__.frozen)]  # type: ignore[attr-defined]
    assert loose == []


def test_planning_a_real_checkpoint_imports_nothing_heavy(prepared: Path, run_python: Run) -> None:
    done = run_python("-c", PROBE, prepared / "demo-output" / "demo.toml", folder=prepared)
    assert done.returncode == 0, done.stderr
    assert "7 used" in done.stdout
    packages = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"vtrain", "vtrain_sanavideo"} <= packages
    assert not packages & {"torch", "diffusers", "transformers", "accelerate"}
