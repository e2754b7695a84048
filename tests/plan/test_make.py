"""What a plan resolves, and what it refuses before anything heavy is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vtrain.config import Config
from vtrain.contract import ClipShape, ConfigError, FamilySpec, Moved, OptimizerSpec, Problem, Size
from vtrain.plan.make import make_plan
from vtrain.plan.places import resume_path
from vtrain.plan.records import Plan
from vtrain_builtin.flow import Flow

PlanOf = Callable[..., Plan]
VALIDATION = 'every = "5 steps"\nprompts = { a = "b" }\n'


def test_what_the_file_leaves_open_is_the_familys(plan_of: PlanOf) -> None:
    plan = plan_of(validation=VALIDATION)
    (dataset,) = plan.datasets
    assert (dataset.frames, dataset.min_frames, dataset.fps) == (9, 9, 8)
    assert dataset.sizes == (Size(64, 64), Size(96, 64), Size(64, 96))
    assert dataset.id == "clips"
    assert plan.base == "fp32"
    assert plan.validation is not None
    assert plan.validation.shape == ClipShape(9, plan.family.default_size.height, plan.family.default_size.width)
    assert plan.validation.fps == 8


def test_an_adapter_trains_on_a_base_in_bf16_unless_told_otherwise(plan_of: PlanOf) -> None:
    assert plan_of(model='use = "toy"\ntrain = "lora"').base == "bf16"
    assert plan_of(model='use = "toy"\ntrain = "lora"', precision='base = "fp32"').base == "fp32"


def test_a_size_is_width_by_height(plan_of: PlanOf) -> None:
    plan = plan_of(
        data='use = "folder"\npath = "clips"\nresolution = "96x64"', validation=VALIDATION + 'size = "96x64"'
    )
    assert plan.datasets[0].sizes == (Size(width=96, height=64),)
    assert plan.validation is not None
    assert (plan.validation.shape.width, plan.validation.shape.height) == (96, 64)


@pytest.mark.parametrize(
    ("size", "generated"),
    [("96x64", "96x64"), ("100x64", "96x64"), ("70x62", "64x64"), ("640x960", "640x960"), ("62x200", "64x96")],
)
def test_a_size_of_videos_off_the_stride_is_generated_at_the_nearest_bucket(
    plan_of: PlanOf, size: str, generated: str
) -> None:
    made = plan_of(validation=VALIDATION + f'size = "{size}"').validation
    assert made is not None
    assert (str(made.size), str(made.shape.size)) == (size, generated)


def refused(plan_of: PlanOf, **tables: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(**tables)
    return str(caught.value)


def test_a_number_of_steps_that_the_sampler_cannot_solve_is_a_problem_with_its_line(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_steps(_: Flow, steps: int) -> list[Problem]:
        return [Problem("", "its levels are 8.", "Set 8 or less.")] if steps > 8 else []

    monkeypatch.setattr(Flow, "check_steps", check_steps, raising=False)
    text = refused(plan_of, validation=VALIDATION + "steps = 9")
    assert text.endswith("config.toml:17: flow cannot solve 9 steps: its levels are 8. Set 8 or less.")
    assert "cannot solve 50 steps" in refused(plan_of, validation=VALIDATION)
    assert plan_of(validation=VALIDATION + "steps = 8").validation is not None


def with_recipe(plan: Plan, **recipe: object) -> Config:
    """The plan's configuration, as if the toy's plugin gave its family a recipe."""
    model = plan.config.model
    assert isinstance(model.registered.spec, FamilySpec)
    spec = replace(model.registered.spec, sampler_options=recipe)
    return replace(plan.config, model=replace(model, registered=replace(model.registered, spec=spec)))


def test_what_is_against_the_familys_recipe_is_a_warning_with_both_values(plan_of: PlanOf) -> None:
    plan = plan_of(sampler="shift = 1.5")
    (warning,) = make_plan(with_recipe(plan, shift=3.0, std=1)).warnings
    assert warning == ('sampler.shift = 1.5: the recipe of the family "toy" is shift = 3.0')
    assert not make_plan(with_recipe(plan, shift=1.5)).warnings
    assert not plan.warnings


def test_another_sampler_than_the_familys_is_a_warning_with_both_names(plan_of: PlanOf) -> None:
    config = with_recipe(plan_of(), shift=3.0)
    spec = config.model.registered.spec
    assert isinstance(spec, FamilySpec)
    other = replace(config.model.registered, spec=replace(spec, sampler="curve"))
    (warning,) = make_plan(replace(config, model=replace(config.model, registered=other))).warnings
    assert warning == ('sampler.use = "flow": the recipe of the family "toy" is "curve" with shift = 3.0')


def test_a_sampler_with_timesteps_of_one_family_is_refused_for_another(plan_of: PlanOf) -> None:
    text = refused(plan_of, sampler='use = "sanavideo-flow"')
    assert (
        'the sampler "sanavideo-flow" gives timesteps in the unit of the family "sanavideo", and trains no other.'
        in text
    )
    assert text.endswith('The sampler of "toy" is "flow".')
    assert "config.toml:" in text


def test_a_misspelt_ability_of_any_part_is_a_problem_before_anything_is_loaded(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtrain_toy.family import ToyFamily
    from vtrain_toy.smooth import Smooth

    from vtrain_builtin.folder import LocalFolder
    from vtrain_builtin.tensorboard import TensorBoard

    for part, name in (
        (ToyFamily, "wordings"),
        (Flow, "check_step"),
        (LocalFolder, "shard"),
        (Smooth, "feature_shapes"),
        (TensorBoard, "warnigs"),
    ):
        monkeypatch.setattr(part, name, lambda self: None, raising=False)
    monkeypatch.delattr(TensorBoard, "warnings")
    text = refused(plan_of, more='[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n[[tracker]]\nuse = "tensorboard"')
    for words in (
        'the family ToyFamily of vtrain-toy 0.1.0 has "wordings", which nothing asks for, and no "wording" (SupportsWording).',
        'has "check_step"',
        'has "shard"',
        'has "feature_shapes"',
        'has "warnigs"',
    ):
        assert words in text
    assert all("config.toml:" in line for line in text.splitlines())


def test_all_problems_between_tables_come_at_once_each_with_its_line(plan_of: PlanOf) -> None:
    text = refused(
        plan_of,
        data='use = "folder"\npath = "clips"\nresolution = ["65x64", "96x60"]\n[data.video]\nframes = 10\nmin_frames = 13',
        validation=VALIDATION + 'size = "101x64"\nframes = 8',
        precision='base = "bf16"',
        lr_schedule='warmup = "5 min"',
        more='[[regularizer]]\nuse = "toy-smooth"\nblock = 3',
    )
    lines = text.splitlines()
    expected = [
        "config.toml:9: 65x64: width and height must be multiples of",
        "config.toml:9: 96x60: width and height must be multiples of",
        "config.toml:11: frames = 10: the family takes 4k+1 frames. Use 9 or 13.",
        "config.toml:12: min_frames = 13 is more than frames = 10.",
        'config.toml:21: 101x64: width and height of a video are even. For example "100x64".',
        "config.toml:22: frames = 8: the family takes 4k+1 frames. Use 5 or 9.",
        'config.toml:24: full training of bf16 weights with optimizer "adamw"',
        'config.toml:26: lr_schedule.warmup needs "steps" or "epochs"',
        "config.toml:27: toy-smooth: it reads block 3; the model has blocks 0 to 2.",
    ]
    for words in expected:
        assert any(words in line for line in lines), (words, text)
    assert len(lines) == len(expected)


def moving(plan: Plan, *moves: Moved) -> Config:
    """The plan's configuration, as if its optimizer said that it moves these weights."""
    part = plan.config.optimizer
    assert isinstance(part.registered.spec, OptimizerSpec)
    spec = replace(part.registered.spec, moves=frozenset(moves))
    return replace(plan.config, optimizer=replace(part, registered=replace(part.registered, spec=spec)))


def test_the_optimizer_moves_what_is_trained(plan_of: PlanOf) -> None:
    full, lora = plan_of(), plan_of(model='use = "toy"\ntrain = "lora"')
    for plan in (full, lora):
        assert make_plan(moving(plan, "fp32"))
        with pytest.raises(ConfigError, match='the optimizer "adamw" moves "bf16" weights, and fp32 is trained'):
            make_plan(moving(plan, "bf16"))
    in_bf16 = replace(full.config, precision=full.config.precision.model_copy(update={"base": "bf16"}))
    assert make_plan(moving(replace(full, config=in_bf16), "bf16"))
    with pytest.raises(ConfigError, match="updates are smaller than bf16 can hold"):
        make_plan(moving(replace(full, config=in_bf16), "fp32"))


def test_an_unknown_bucket_set_names_those_there_are(plan_of: PlanOf) -> None:
    assert '"480p" is neither a bucket set of this family ("tiny")' in refused(
        plan_of, data='use = "folder"\npath = "clips"\nresolution = "480p"'
    )


def test_two_datasets_of_one_name_are_refused(plan_of: PlanOf, tmp_path: Path) -> None:
    more = '[[data]]\nuse = "folder"\npath = "other/clips"'
    with pytest.raises(ConfigError, match='two datasets are called "clips"'):
        plan_of(more=more)
    assert len(plan_of(more=more + '\nid = "others"').datasets) == 2


def test_a_disabled_dataset_is_no_part_of_the_plan(plan_of: PlanOf) -> None:
    assert len(plan_of(more='[[data]]\nuse = "folder"\npath = "more"\nenabled = false').datasets) == 1


def test_an_output_folder_below_a_file_is_refused(plan_of: PlanOf, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    text = refused(plan_of, run='output_dir = "file/out"', cache='dir = "file/cache"')
    assert text.count("is a file, so") == 2


@pytest.mark.parametrize(("output", "inside"), [("clips/out", True), ("clips", True), ("clips-out", False)])
def test_an_output_folder_among_the_clips_is_refused(
    plan_of: PlanOf, tmp_path: Path, output: str, inside: bool
) -> None:
    """Its videos would be clips of the next run."""
    run = f'output_dir = "{output}"'
    if inside:
        text = refused(plan_of, run=run)
        assert f"{tmp_path / output} lies in the dataset {tmp_path / 'clips'}, where its sample videos would be" in text
    else:
        plan_of(run=run)


def test_what_is_in_the_way_of_anything_that_a_run_writes_is_found_before_it_starts(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    for name in ("out/checkpoints", "cache/video", "bad"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "out" / "samples").symlink_to(tmp_path / "nowhere")
    (tmp_path / "out" / "metrics.jsonl").mkdir()
    data = 'use = "folder"\npath = "clips"\non_bad_file = "move"\nquarantine = "bad/files"'
    tables = {"run": 'output_dir = "out"', "cache": 'dir = "cache"', "data": data}
    text = refused(plan_of, **tables, validation=VALIDATION)
    for words in (
        f"{tmp_path}/out/checkpoints is a file where a folder has to be",
        f"{tmp_path}/out/samples is a link to nothing where a folder has to be",
        f"{tmp_path}/out/metrics.jsonl is no file, and the run writes one of that name",
        f"{tmp_path}/cache/video is a file where a folder has to be",
        f"{tmp_path}/bad is a file, so {tmp_path}/bad/files cannot be made",
    ):
        assert words in text
    assert text.count("config.toml:") == 5
    assert "samples" not in refused(plan_of, **tables), "without videos nothing is written there"


@pytest.mark.parametrize(
    ("lr", "refuses", "warns"),
    [("100", True, False), ("1.5", True, False), ("0.5", False, True), ("1e-12", False, True), ("1e-4", False, False)],
)
def test_a_learning_rate_beyond_the_usual_is_warned_of_and_one_beyond_the_sensible_refused(
    plan_of: PlanOf, lr: str, refuses: bool, warns: bool
) -> None:
    optimizer = f'use = "adamw"\nlr = {lr}'
    if refuses:
        text = refused(plan_of, optimizer=optimizer)
        assert (
            f"optimizer.lr = {float(lr):g}: above 1 adamw destroys what the model knows. Usual are 1e-07 to 0.01."
            in text
        )
    else:
        assert any("optimizer.lr" in warning for warning in plan_of(optimizer=optimizer).warnings) is warns


def test_what_nothing_fills_in_is_pointed_out_where_it_stands(plan_of: PlanOf) -> None:
    prompts = 'every = "5 steps"\nprompts = { a = "a <token> cat", b = "2 < 3 > 1 {}", c = "{caption}" }\nnegative_prompt = "<bad>"'
    data = 'use = "folder"\npath = "clips"\ncaption_prefix = "<style>, "'
    found = [text for text in plan_of(validation=prompts, data=data).warnings if "fills in" in text]
    assert [text.split(",")[0] for text in found] == [
        'data[0].caption_prefix holds "<style>"',
        'validation.prompts.a holds "<token>"',
        'validation.prompts.c holds "{caption}"',
        'validation.negative_prompt holds "<bad>"',
    ]


def test_an_output_folder_without_permission_is_refused(plan_of: PlanOf) -> None:
    """Root may write anywhere, so as root the check runs with another effective user."""
    own = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        locked = Path(name) / "locked"
        locked.mkdir()
        Path(name).chmod(0o755)
        tables = {"run": f'output_dir = "{locked.as_posix()}/out"', "cache": f'dir = "{locked.as_posix()}/cache"'}
        config = plan_of(**tables).config
        locked.chmod(0o555)
        os.seteuid(65534 if own == 0 else own)
        try:
            with pytest.raises(ConfigError) as caught:
                make_plan(config)
        finally:
            os.seteuid(own)
    assert str(caught.value).count("no permission to write in") == 2


def test_folders_on_a_read_only_file_system_are_told_as_such_and_what_to_set(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount needs rights that a test has not: what the system says of one stands in for it."""
    real = os.statvfs

    def read_only(path: Path) -> os.statvfs_result:
        flags = list(real(path))
        flags[8] |= os.ST_RDONLY
        return os.statvfs_result(flags)

    config = plan_of().config
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    monkeypatch.setattr("os.statvfs", read_only)
    with pytest.raises(ConfigError) as caught:
        make_plan(config)
    text = str(caught.value)
    assert text.count("lies on a read-only file system.") == 2
    assert "no permission" not in text
    assert "Set run.output_dir to another folder, or" in text
    assert "Set cache.dir to another folder, or" in text


def test_a_tap_on_the_last_block_is_fine(plan_of: PlanOf) -> None:
    plan = plan_of(more='[[regularizer]]\nuse = "toy-smooth"\nblock = 2')
    assert [name for name, _ in plan.regularizers] == ["toy-smooth"]


def test_a_regularizer_given_twice_is_refused(plan_of: PlanOf) -> None:
    one = '[[regularizer]]\nuse = "toy-smooth"\nblock = 1\n'
    with pytest.raises(ConfigError, match="toy-smooth is given twice"):
        plan_of(more=one + one)


def test_a_plugins_own_error_leaves_with_a_note_that_names_it(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    import vtrain_toy.family

    inside = dict(vars(vtrain_toy.family))
    exec("def check(self):\n    return 1 / 0", inside)  # noqa: S102 - a function of the plugin's own module
    monkeypatch.setattr(vtrain_toy.family.ToyFamily, "check", inside["check"])
    with pytest.raises(ZeroDivisionError) as caught:
        plan_of()
    assert caught.value.__notes__ == ["in vtrain-toy 0.1.0 (family toy), module vtrain_toy.family"]


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from vtrain.run.prepare import planned, prepare\n"
        "import vtrain.estimate.render, vtrain.cli.plan\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_is_named_by_a_path_from_the_file_or_as_one_of_the_runs_own(
    plan_of: PlanOf, tmp_path: Path
) -> None:
    own = tmp_path / "out" / "checkpoints"
    for step in (*range(1, 9), 1_000_000):
        (own / f"step-{step:06d}").mkdir(parents=True)
    (own / "step-000010.partial").mkdir()

    def named(resume: str) -> Path:
        return resume_path(plan_of(run=f'output_dir = "out"\nresume = "{resume}"').config)

    assert named("step-000003") == own / "step-000003"
    assert named("step-000003/") == own / "step-000003"
    assert named("out/checkpoints/step-000004") == own / "step-000004"
    (tmp_path / "step-000003").mkdir()
    assert named("step-000003") == tmp_path / "step-000003", "beside the file comes first, as ever"
    text = refused(plan_of, run='output_dir = "out"\nresume = "step-000011"')
    assert f'no checkpoint folder "step-000011", neither in {tmp_path} nor in {own}' in text
    there = "step-000004, step-000005, step-000006, step-000007, step-000008, step-1000000 and 3 earlier."
    assert f"In {own} there are {there}" in text
    nobody = refused(plan_of, run='output_dir = "empty"\nresume = "~nobody-at-all/step"')
    assert f"There is none in {tmp_path / 'empty' / 'checkpoints'}." in nobody
