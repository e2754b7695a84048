"""[memory] on the real 2B model: what a plan chooses for a limit, why, and what it refuses. Headers alone, no weight."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtrain.config import load
from vtrain.contract import ConfigError
from vtrain.contract.rooms import Room
from vtrain.estimate.memory import memory_json, memory_sections
from vtrain.plan import optimizer
from vtrain.plan.choices import Options
from vtrain.plan.make import make_plan
from vtrain.plan.memory import MemoryEstimate
from vtrain.plan.records import Plan
from vtrain.plan.savings import ALL, SAVINGS
from vtrain.plan.workload import memory_estimate, workload
from vtrain.registry import discover

GIB = 1 << 30
CARD = Room(80 * GIB, name="a card", host=200 * GIB)
EXAMPLE = Path(__file__).parents[2] / "examples" / "sanavideo-2b-lora.toml"
PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
PlanFor = Callable[..., Plan]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's folder, of headers."""
    spec = importlib.util.spec_from_file_location("real_headers", Path(__file__).with_name("real_headers.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.real_folder(tmp_path_factory.mktemp("real") / "2b")
    return folder


@pytest.fixture
def plan_for(real: Path, tmp_path: Path) -> PlanFor:
    """The plan of examples/sanavideo-2b-lora.toml with a table [memory], for a card.

    full: full training of it. without: lines that are left out of the file, by how they begin. changed: beginnings of lines -> what
    stands there instead. more: goes to its end.
    """

    def make(
        memory: str = "",
        room: Room = CARD,
        *,
        full: bool = False,
        without: tuple[str, ...] = (),
        changed: Mapping[str, str] = {},
        more: str = "",
    ) -> Plan:
        text = EXAMPLE.read_text(encoding="utf-8")
        text = re.sub(r'^path = "Efficient.*$', f'path = "{real.as_posix()}"', text, flags=re.MULTILINE)
        if full:
            text = re.sub(r"\[model\.lora\].*?(?=^\[precision\])", "", text, flags=re.DOTALL | re.MULTILINE)
            text = text.replace('train = "lora"', 'train = "full"').replace("lr = 1e-4", "lr = 1e-5")
            without = (*without, "base = ")
        for start, line in {**dict.fromkeys(("gradient_checkpointing = ", *without), ""), **changed}.items():
            text = re.sub(rf"^{re.escape(start)}.*$", line, text, flags=re.MULTILINE)
        (tmp_path / "datasets" / "my-clips").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "config.toml"
        file.write_text(text + (f"\n[memory]\n{memory}\n" if memory else "") + more, encoding="utf-8")
        catalog = discover()
        return make_plan(load(file, catalog), 1, catalog, room)

    return make


def chosen(plan: Plan) -> tuple[str, ...]:
    assert plan.memory is not None
    return plan.memory.words


def words(plan: Plan) -> dict[str, str]:
    (section,) = (each for each in memory_sections(plan) if each.title == "memory: how")
    return {row[0]: row[1] for row in section.rows}


def size(estimate: MemoryEstimate) -> float:
    return estimate.on_device / GIB


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (200, ()),
        (100, ('precision.gradient_checkpointing = "feed_forward"',)),
        (24, ("precision.gradient_checkpointing = true",)),
        (15, ("precision.gradient_checkpointing = true", 'offload.group = "block", offload.stream = true')),
    ],
)
def test_a_smaller_limit_costs_more_time(plan_for: PlanFor, limit: int, expected: tuple[str, ...]) -> None:
    plan = plan_for(f'limit = "{limit} GiB"', Room(300 * GIB, name="a card", host=200 * GIB))
    assert chosen(plan) == expected
    assert plan.memory is not None
    assert plan.memory.time >= 1
    assert (plan.memory.time == 1) == (not expected)
    assert size(memory_estimate(plan)) <= limit, "of the plan that was made, reckoned anew"
    if expected:
        assert words(plan)["chosen"].startswith(", ".join(expected))


@pytest.mark.parametrize("full", [False, True])
def test_what_is_chosen_is_needed(plan_for: PlanFor, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """At every limit that anything fits in: the plan fits by its own estimate, and without any one setting it would not."""
    monkeypatch.setattr(optimizer, "find_spec", lambda name: True)  # bitsandbytes, which a plan does not import
    memory = 'limit = "250 GiB"\nmay = ["checkpointing", "offload", "states", "int8", "adamw8bit"]'
    plan = plan_for(
        memory, Room(300 * GIB, name="a card", host=400 * GIB), full=full, without=("base = ", 'use = "adamw"')
    )
    options = Options(plan, workload(plan), discover(), on_cpu=False)
    found = options.choices(ALL)
    seen = set()
    for limit in sorted({round(size(each.estimate), 2) for each in found}):
        fitting = [each for each in found if size(each.estimate) <= limit]
        if not fitting:
            continue
        best = fitting[0]
        seen |= {saving.may for saving in best.savings}
        assert size(memory_estimate(best.plan)) == pytest.approx(size(best.estimate)), "as its configuration says it"
        assert best.time == min(each.time for each in fitting)
        for saving in best.savings:
            rest = {each.words for each in best.savings} - {saving.words}
            less = [each for each in found if {s.words for s in each.savings} == rest]
            assert all(size(each.estimate) > limit for each in less), (limit, best.words, saving.words)
    assert seen >= ({"checkpointing", "states", "adamw8bit"} if full else {"checkpointing", "offload", "int8"})


def test_what_the_file_sets_stays(plan_for: PlanFor) -> None:
    plan = plan_for('limit = "20 GiB"', more='[offload]\ngroup = "leaf"\n')
    assert plan.config.offload.group == "leaf"
    assert chosen(plan) == ("precision.gradient_checkpointing = true",)
    assert "offload.group" not in " ".join(chosen(plan))


def test_what_changes_a_result_is_chosen_only_when_it_is_allowed(plan_for: PlanFor) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_for('limit = "14 GiB"\nmay = ["checkpointing"]', without=("base = ",))
    (problem,) = refused.value.problems
    assert "training: forward takes" in problem.what
    assert "with precision.gradient_checkpointing = true" in problem.what
    assert 'memory.may with "offload"' in problem.remedy
    plan = plan_for('limit = "15 GiB"\nmay = ["checkpointing", "int8"]', without=("base = ",))
    assert plan.base == "int8"
    assert chosen(plan)[-1] == 'precision.base = "int8"'
    assert plan.storage.quantised


@pytest.mark.parametrize(
    ("limit", "remedy"),
    [
        (10, "data.video.frames and validation.frames = "),
        (8, "data.resolution and validation.size three quarters as wide and high"),
        (
            6,
            "Smaller clips do not help: encoding captions takes 6.27 GiB, whatever clips there are. What would fit: a limit of",
        ),
    ],
)
def test_a_limit_that_nothing_fits_in_is_refused_with_what_would(plan_for: PlanFor, limit: int, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_for(f'limit = "{limit} GiB"')
    (problem,) = refused.value.problems
    assert problem.what.startswith(
        f"nothing that is allowed fits in {limit}.00 GiB (memory.limit): training: forward takes "
    )
    assert remedy in problem.remedy
    least = re.search(r"a limit of ([\d.]+ GiB)\.$", problem.remedy)
    assert least is not None
    assert len(chosen(plan_for(f'limit = "{least[1]}"'))) >= 2, "as it is said, not rounded down"


def test_the_frames_that_a_refusal_names_fit(plan_for: PlanFor) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_for('limit = "10 GiB"')
    frames = re.search(r"data\.video\.frames and validation\.frames = (\d+)", str(refused.value))
    assert frames is not None
    plan = plan_for('limit = "10 GiB"', changed={"frames = ": f"frames = {frames[1]}"})
    assert size(memory_estimate(plan)) <= 10
    more = int(frames[1]) + 4
    with pytest.raises(ConfigError, match="nothing that is allowed fits"):
        plan_for('limit = "10 GiB"', changed={"frames = ": f"frames = {more}"})


def test_a_key_that_is_in_the_way_is_named(plan_for: PlanFor) -> None:
    """What the file sets stays; and the refusal says that it could be left to the plan."""
    with pytest.raises(ConfigError) as refused:
        plan_for('limit = "24 GiB"', changed={"gradient_checkpointing = ": "gradient_checkpointing = false"})
    assert "without precision.gradient_checkpointing in the file: precision.gradient_checkpointing = true" in str(
        refused.value
    )


def test_main_memory_counts_too(plan_for: PlanFor) -> None:
    """What leaves the card is somewhere."""
    room = replace(CARD, host=24 * GIB)
    assert chosen(plan_for('limit = "64 GiB"', room, full=True)) == ("precision.gradient_checkpointing = true",)
    with pytest.raises(ConfigError, match=r"what fits in 48.00 GiB of the card takes .* of the machine's memory"):
        plan_for('limit = "48 GiB"', room, full=True)


def test_where_the_cpu_trains_nothing_is_moved(plan_for: PlanFor) -> None:
    """The limit is of the machine's memory, where all is."""
    plan = plan_for('limit = "auto"', Room(24 * GIB, host=24 * GIB))
    assert chosen(plan) == ("precision.gradient_checkpointing = true",)
    assert "this machine's memory" in words(plan)["limit"]
    with pytest.raises(ConfigError) as refused:
        plan_for('limit = "auto"', Room(14 * GIB, host=14 * GIB))
    assert "offload" not in refused.value.problems[0].what
    assert re.search(r"or a machine with [\d.]+ GiB free\.$", refused.value.problems[0].remedy), "no limit would help"


def test_auto_is_what_the_card_has_less_what_others_hold(plan_for: PlanFor) -> None:
    plan = plan_for('limit = "auto"', Room(24 * GIB, 2 * GIB, "RTX 4090", 64 * GIB))
    assert words(plan)["limit"] == "22.00 GiB (RTX 4090, 24.00 GiB, less 2.00 GiB that others hold)"
    with pytest.raises(ConfigError, match="does not say how much memory it has"):
        plan_for('limit = "auto"', Room())


def test_a_limit_above_what_is_free_is_not_promised(plan_for: PlanFor) -> None:
    plan = plan_for('limit = "40 GiB"', Room(24 * GIB, 2 * GIB, "RTX 4090", 64 * GIB))
    assert words(plan)["limit"].startswith(
        "22.00 GiB (RTX 4090, 24.00 GiB, less 2.00 GiB that others hold, and memory.limit is 40"
    )


def test_without_the_table_nothing_is_chosen(plan_for: PlanFor) -> None:
    """A room that is given, as by --device-memory, is compared with what the run takes, and the plan stays as it is."""
    plan = plan_for(room=CARD)
    assert (plan.config.precision.gradient_checkpointing, plan.warnings) == (True, plan_for(room=CARD).warnings)
    assert words(plan)["chosen"].startswith("nothing: the run fits as it is: 16.0")
    small = plan_for(room=Room(14 * GIB, name="--device-memory"))
    assert small.config.offload.group is None
    assert "the run takes 16.0" in small.warnings[-1]
    assert 'with a table [memory], limit = "14.00 GiB", the plan would choose ' in small.warnings[-1]
    smaller = plan_for(room=Room(6 * GIB, name="--device-memory"))
    assert "[memory] would find nothing that fits. Smaller clips do not help: encoding captions" in smaller.warnings[-1]


def test_what_may_allows_without_effect_is_said(plan_for: PlanFor) -> None:
    plan = plan_for('limit = "40 GiB"\nmay = ["checkpointing", "int8", "adamw8bit"]')
    assert 'memory.may: "int8" has no effect: the file sets precision.base' in plan.warnings
    assert 'memory.may: "adamw8bit" has no effect: the file sets optimizer.use' in plan.warnings
    assert not [text for text in plan_for('limit = "40 GiB"').warnings if "memory.may" in text]


def test_a_resumed_run_keeps_what_may_not_change(plan_for: PlanFor, tmp_path: Path) -> None:
    """On a larger card a run that was begun with an int8 base stays so, and one that was not does not get it on a smaller."""
    memory = 'limit = "{} GiB"\nmay = ["checkpointing", "int8"]'
    output = tmp_path / "output" / "sanavideo-2b-lora"
    (output / "checkpoints" / "step-000010").mkdir(parents=True)
    for begun, limit, base in (("int8", 40, "int8"), ("bf16", 40, "bf16")):
        (output / "plan.json").write_text(json.dumps({"settings": {"precision.base": begun, "optimizer.use": "adamw"}}))
        plan = plan_for(memory.format(limit), without=("base = ",))
        assert plan.base == base
    with pytest.raises(ConfigError) as refused:
        plan_for(memory.format(15), without=("base = ",))
    assert "int8" not in refused.value.problems[0].what
    assert plan_for('limit = "15 GiB"').config.offload.group == "block", "what is free to change may"


def test_a_resumed_run_keeps_what_was_chosen_while_it_fits(plan_for: PlanFor, tmp_path: Path) -> None:
    """What others hold on the card differs from day to day; another card or another limit chooses anew."""
    output = tmp_path / "output" / "sanavideo-2b-lora"
    (output / "checkpoints" / "step-000010").mkdir(parents=True)
    card = Room(24 * GIB, 0, "RTX 4090", 64 * GIB)
    held = replace(card, held=9 * GIB)
    begun = plan_for('limit = "auto"', held)
    assert len(chosen(begun)) == 2
    settings = {"memory.limit": "auto", "precision.base": "bf16", "optimizer.use": "adamw"}
    (output / "plan.json").write_text(json.dumps({"settings": settings, "memory": memory_json(begun)}))
    resumed = plan_for('limit = "auto"', card)
    assert chosen(resumed) == chosen(begun)
    assert resumed.config.offload.group == "block"
    assert words(resumed)["chosen"].endswith("the run was begun with it, and it still fits")
    assert not words(plan_for('limit = "auto"', held))["chosen"].endswith("fits"), "as it would be chosen anyway"
    assert len(chosen(plan_for('limit = "auto"', replace(card, held=int(11.85 * GIB))))) > 2, "where it does not fit"
    assert len(chosen(plan_for('limit = "auto"', replace(card, name="RTX 5090")))) == 1
    assert len(chosen(plan_for('limit = "24 GiB"', card))) == 1
    (output / "plan.json").write_text("[]")
    assert len(chosen(plan_for('limit = "auto"', card))) == 1


def test_programs_get_the_same_in_bytes(plan_for: PlanFor) -> None:
    plan = plan_for('limit = "15 GiB"')
    found: Any = json.loads(json.dumps(memory_json(plan)))
    assert found["promise"]["chosen"] == list(chosen(plan))
    assert found["promise"]["takes"] == found["on_device"] <= found["promise"]["limit"] == 15 * GIB
    assert [each["phase"] for each in found["phases"]][2] == "training: forward"


def test_every_saving_is_a_key_that_the_file_may_have(plan_for: PlanFor) -> None:
    config = plan_for(changed={"gradient_checkpointing = ": "gradient_checkpointing = false"}).config
    for saving in SAVINGS:
        assert saving.set(config, discover()) != config, saving.words


def test_the_page_has_these_plans(plan_for: PlanFor) -> None:
    """docs/memory.md shows the plan's own text for LoRA and for full training."""
    page = PAGE.read_text(encoding="utf-8")
    for full, limit in (
        (False, 24),
        (False, 16),
        (False, 12),
        (False, 6),
        (True, 48),
        (True, 24),
        (True, 16),
        (True, 12),
    ):
        text = f'`limit = "{limit} GiB"`:\n\n```\n{promise_text(plan_for, limit, full=full)}\n```\n'
        assert text in page, text


def test_full_training_that_does_not_fit_is_told_of_an_adapter(plan_for: PlanFor) -> None:
    """With what the plan of that adapter then says, but for its number of weights, which differs by its layers."""
    with pytest.raises(ConfigError) as refused:
        plan_for('limit = "24 GiB"', full=True)
    told = re.search(r'model\.train = "lora" \(([\d.]+) GiB\)', str(refused.value))
    assert told is not None
    plan = plan_for('limit = "24 GiB"', more="[offload]\noptimizer = true\n", changed={"validation = ": 'on = "cpu"'})
    assert float(told[1]) == pytest.approx(size(memory_estimate(plan)), rel=0.01)
    with pytest.raises(ConfigError) as refused:
        plan_for('limit = "12 GiB"', full=True)
    assert "lora" not in str(refused.value)


def promise_text(plan_for: PlanFor, limit: int, *, full: bool = False) -> str:
    """As `vtrain plan` prints it, without the file's place."""
    try:
        plan = plan_for(f'limit = "{limit} GiB"', full=full)
    except ConfigError as refused:
        (problem,) = refused.problems
        return f"{problem.what}\n{problem.remedy}"
    table, how = memory_sections(plan)
    widths = [max(len(row[column]) for row in table.rows) for column in range(len(table.rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table.rows
    ]
    return "\n".join([*lines, *(f"{key.ljust(12)}  {value}" for key, value in how.rows)])
