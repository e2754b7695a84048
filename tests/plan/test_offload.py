"""[offload] and gradient checkpointing in a plan: what cannot work is refused with its reason, what has no effect is a warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtrain.contract import ConfigError
from vtrain.estimate.estimate import remedies
from vtrain.estimate.estimate import section as memory_section
from vtrain.plan.offload import checkpointing_text, device_notices, offload_problems
from vtrain.plan.rollout import rollout_rows
from vtrain.run.prepare import planned

FILE = """
[run]
output_dir = "out"
[model]
use = "toy"
train = "{train}"
[precision]
mixed = "bf16"
{precision}
[offload]
{offload}
[[data]]
use = "folder"
path = "clips"
[train]
steps = 10
accumulate = {accumulate}
[optimizer]
use = "adamw"
lr = 1e-3
{more}
"""
VALIDATION = '[validation]\nevery = "5 steps"\nsize = "64x64"\nframes = 9\nprompts = { one = "a" }\n'


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "clips").mkdir()

    def make(offload: str = "", precision: str = "", train: str = "lora", more: str = "", accumulate: int = 1) -> Any:
        path = tmp_path / "config.toml"
        given = {"offload": offload, "precision": precision, "train": train, "more": more, "accumulate": accumulate}
        path.write_text(FILE.format(**given))
        return planned(path)

    return make


BLOCK = 'group = "block"'


@pytest.mark.parametrize(
    ("values", "line", "said"),
    [
        ({"offload": f"{BLOCK}\nmodel_cpu = true"}, 12, "offload.model_cpu and offload.group both move the denoiser"),
        ({"offload": 'disk = "away"'}, 11, "offload.group is absent: nothing would go there"),
        ({"offload": BLOCK, "train": "full"}, 11, "full training has none: read again at each use, what the optimizer changed"),
        ({"offload": f'{BLOCK}\ndisk = "away"', "train": "full"}, 11, "offload.group and offload.disk move frozen weights"),
        ({"offload": f"{BLOCK}\noptimizer = true", "train": "full"}, 11, "offload.optimizer = true in its place"),
        ({"offload": BLOCK, "precision": "gradient_checkpointing = false"}, 9, "needs every block to be recomputed"),
        ({"offload": BLOCK, "precision": 'gradient_checkpointing = "feed_forward"'}, 9, "needs every block"),
        ({"offload": BLOCK, "precision": "gradient_checkpointing_interval = 2"}, 9, "needs every block"),
        ({"offload": f"{BLOCK}\nblocks_per_group = 4"}, 12, "blocks_per_group = 4, and this model has 3 blocks. Give 1 to 2"),
        ({"offload": 'group = "layer"'}, 11, "offload.group"),
        ({"precision": "gradient_checkpointing_interval = 0"}, 9, "gradient_checkpointing_interval"),
        ({"precision": 'gradient_checkpointing = "blocks"'}, 9, "gradient_checkpointing"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_line_and_a_remedy(
    plan: Callable[..., Any], values: dict[str, str], line: int, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan(**values)
    (problem,) = error.value.problems
    assert said in f"{problem.what} {problem.remedy}"
    assert problem.where.endswith(f"config.toml:{line}")
    assert problem.remedy or ", got " in problem.what


def test_several_processes_keep_their_weights_on_their_cards(plan: Callable[..., Any]) -> None:
    made = plan(BLOCK)
    (problem,) = offload_problems(made.config, made.family, 2)
    assert "2 train together" in problem.what


def test_a_disk_folder_that_is_a_file_is_refused(plan: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "away").write_text("a file")
    with pytest.raises(ConfigError, match="away is a file where a folder has to be"):
        plan(f'{BLOCK}\ndisk = "away"')


def test_quantised_weights_are_not_offloaded_in_groups(plan: Callable[..., Any]) -> None:
    made = plan(BLOCK)
    precision = made.config.precision.model_copy(update={"base": "int8"})
    config = type(made.config)(**{**vars(made.config), "precision": precision})
    (problem,) = offload_problems(config, made.family, 1)
    assert "those in int8" in problem.what


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"offload": "blocks_per_group = 2"}, "offload.blocks_per_group has no effect: no group is offloaded"),
        ({"offload": 'group = "leaf"\nstream = true'}, 'offload.stream has no effect: it is for group = "block"'),
        ({"offload": f"{BLOCK}\nblocks_per_group = 3"}, "all blocks are on the card at once"),
        ({"offload": "model_cpu = true"}, "offload.model_cpu has no effect: without [validation]"),
        ({"precision": "gradient_checkpointing_interval = 3"}, "this model has 3 blocks: the first alone"),
        ({"precision": "gradient_checkpointing = false\ngradient_checkpointing_interval = 2"}, "interval has no effect"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_a_warning(plan: Callable[..., Any], values: dict[str, str], said: str) -> None:
    assert sum(said in warning for warning in plan(**values).warnings) == 1


def test_what_a_device_cannot_do_is_said_when_it_is_known(plan: Callable[..., Any]) -> None:
    table = plan(f"{BLOCK}\nstream = true\noptimizer = true").config.offload
    (on_cpu,) = device_notices(table, accelerated=False, streams=False)
    assert on_cpu.startswith("offload.group and offload.optimizer change nothing on a CPU")
    (without,) = device_notices(table, accelerated=True, streams=False)
    assert "offload.stream has no effect" in without
    assert list(device_notices(table, accelerated=True, streams=True)) == []
    assert list(device_notices(plan().config.offload, accelerated=False, streams=False)) == []


@pytest.mark.parametrize(
    ("values", "label", "said"),
    [
        ({}, "activations", "the input of each block, and those of one block at a time"),
        ({"precision": "gradient_checkpointing = false"}, "activations", "all of 3 blocks"),
        (
            {"precision": 'gradient_checkpointing = "feed_forward"'},
            "activations",
            "all but those of feed-forward layers",
        ),
        ({"precision": "gradient_checkpointing_interval = 2"}, "activations", "the input of 2 of 3 blocks"),
        ({"offload": BLOCK}, "offloaded", "one block of 3 on the card at a time"),
        ({"offload": f"{BLOCK}\nstream = true"}, "offloaded", "stream: on CUDA; elsewhere groups are waited for"),
        (
            {"offload": 'group = "leaf"\ndisk = "away"'},
            "offloaded",
            "away; one layer is on the card at a time, in the backward pass nearly a block; each is read twice a step",
        ),
        ({"offload": BLOCK, "accumulate": 3}, "offloaded", "each is brought 6 times a step, twice a micro-batch"),
        (
            {"offload": BLOCK, "more": "[train.rollout]\nprobability = 0.5\nsteps = 3"},
            "offloaded",
            "twice a step, forward and backward, and 3 times more where a micro-batch has a clip that is rolled out",
        ),
        ({"offload": "optimizer = true"}, "optimizer", "in the machine's memory"),
        ({"offload": "model_cpu = true", "more": VALIDATION}, "denoiser while videos are decoded", "there and back"),
    ],
)
def test_the_plan_says_what_each_setting_keeps_and_costs(
    plan: Callable[..., Any], values: dict[str, Any], label: str, said: str
) -> None:
    rows = dict(memory_section(plan(**values)).rows)
    assert said in rows[label]


def test_checkpointing_is_named_beside_the_precision(plan: Callable[..., Any]) -> None:
    assert checkpointing_text(plan()) == "with gradient checkpointing"
    assert checkpointing_text(plan(precision="gradient_checkpointing_interval = 3")).endswith("of every 3rd block")
    assert checkpointing_text(plan(precision="gradient_checkpointing = false")).startswith("without")


def test_what_lowers_memory_is_named_in_the_order_of_its_price(plan: Callable[..., Any]) -> None:
    lora = list(remedies(plan(precision='gradient_checkpointing = "feed_forward"'), "training"))
    assert lora[:2] == ["precision.gradient_checkpointing = true", 'offload.group = "block"']
    interval = list(remedies(plan(precision="gradient_checkpointing_interval = 2"), "training"))
    assert interval[0] == "precision.gradient_checkpointing_interval = 1 (it is 2)"
    full = list(remedies(plan(train="full"), "training"))
    assert full.index("offload.optimizer = true") < full.index('model.train = "lora"')
    assert not any("offload.group" in each for each in full), "what the plan would refuse"
    grouped = list(remedies(plan(f"{BLOCK}\nblocks_per_group = 2\nstream = true"), "training"))
    assert grouped[:3] == ["offload.blocks_per_group (it is 2)", "offload.stream = false", 'offload.group = "leaf"']
    assert remedies(plan(more=VALIDATION), "validating")[2] == "offload.model_cpu = true"
    assert not any("offload" in each for each in remedies(plan('group = "leaf"'), "loading the model"))


@pytest.mark.parametrize(
    ("precision", "share"),
    [
        ("", "67"),
        ("gradient_checkpointing_interval = 2", "80"),
        ('gradient_checkpointing = "feed_forward"', "80"),
        ("gradient_checkpointing = false", "100"),
    ],
)
def test_what_is_recomputed_counts_in_the_price_of_rollout(
    plan: Callable[..., Any], precision: str, share: str
) -> None:
    """Two forward passes beside a step of two under LoRA, and of what is recomputed."""
    config = plan(precision=precision, more="[train.rollout]\nprobability = 1.0\n").config
    assert f"about {share}% of a step" in dict(rollout_rows(config, 10, 5.0))["rollout costs"]
