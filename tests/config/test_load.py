"""A good file becomes a Config; a bad one an error that lists every problem with its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vtrain.config import Config, load
from vtrain.config.load import minimal
from vtrain.config.record import TABLES
from vtrain.config.tables import LoraTable
from vtrain.contract import RESERVED_KEYS, Catalog, ConfigError, Duration, Failure, Problem, Size

Read = Callable[..., Config]
Problems = Callable[..., list[Problem]]
Tables = dict[str, str]


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


def test_the_least_file_reads_and_defaults_stand_for_the_rest(read: Read, good: Tables, tmp_path: Path) -> None:
    config = read(good)
    assert config.run.output_dir == tmp_path / "out"
    assert (config.run.seed, config.precision.mixed, config.checkpoint.keep) == (42, "bf16", 3)
    assert config.checkpoint.every == Duration(500, "steps")
    assert config.model.registered.spec.name == "tiny"
    assert config.model.options.path == str(tmp_path / "model")  # type: ignore[attr-defined]
    assert config.model.table.lora == LoraTable()
    assert config.sampler.registered.spec.name == "flow"
    assert config.optimizer.registered.spec.name == "adamw"
    assert config.optimizer.options.lr == 1e-4  # type: ignore[attr-defined]
    assert [part.registered.spec.name for part in config.trackers] == ["tensorboard"]
    assert config.validation is None
    assert config.regularizers == ()
    assert config.text == (tmp_path / "config.toml").read_text()


def test_relative_paths_start_at_the_files_folder_wherever_it_is_read_from(
    good: Tables, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.toml").write_text("\n".join(good.values()))
    monkeypatch.chdir(tmp_path)
    config = load(Path("sub/config.toml"), catalog)
    assert config.run.output_dir == tmp_path / "sub" / "out"
    assert config.cache.dir == tmp_path / "sub" / "cache"
    assert config.where("train", "steps").startswith("sub/config.toml:")


def test_every_table_of_the_grammar_reads(read: Read, good: Tables) -> None:
    good["model"] = '[model]\nuse = "tiny"\npath = "a/b"\ntrain = "lora"\nmotion_score = 30\n[model.lora]\nrank = 4\n'
    good["data"] += (
        'resolution = ["16x32", "32x16"]\n[data.video]\nframes = 9\n[[data]]\nuse = "folder"\npath = "more"\n'
    )
    good["rest"] = """
        [sampler]
        shift = 2
        [lr_schedule]
        use = "cosine"
        warmup = "2 epochs"
        end = 0.1
        [validation]
        every = "10 min"
        prompts = { "a cat" = "a cat walks" }
        size = "832x480"
        [[regularizer]]
        use = "pull"
        stages = [{ until = "5 steps" }, { until = "9 steps", weight = 0 }]
        [[tracker]]
        use = "paper"
        [[tracker]]
        use = "tensorboard"
    """
    config = read(good)
    assert config.model.table.lora is not None
    assert config.model.table.lora.rank == 4
    assert config.data[0].table.resolution == (Size(16, 32), Size(32, 16))
    assert config.data[0].table.video.frames == 9
    assert len(config.data) == 2
    assert config.validation is not None
    assert config.validation.every == Duration(600, "seconds")
    assert [part.registered.spec.name for part in config.trackers] == ["paper", "tensorboard"]
    assert config.regularizers[0].options.stages[1].weight == 0  # type: ignore[attr-defined]


def test_an_empty_list_of_trackers_means_none(read: Read, good: Tables) -> None:
    assert read({"top": "tracker = []", **good}).trackers == ()


def test_without_the_default_tracker_installed_there_is_none(
    write: Callable[..., Path], good: Tables, catalog: Catalog
) -> None:
    parts = {key: part for key, part in catalog.parts.items() if key != ("tracker", "tensorboard")}
    assert load(write(good), replace(catalog, parts=parts)).trackers == ()


def test_a_byte_order_mark_is_accepted(read: Read, good: Tables) -> None:
    assert read({"mark": "\ufeff", **good}).train.steps == 10


def test_windows_line_ends_keep_the_lines(problems: Problems, good: Tables) -> None:
    good["train"] = "[train]\r\n# a comment\r\nsteps = 0\r\n"
    assert only(problems({"train": good.pop("train"), **good})).where == "config.toml:3"


@pytest.mark.parametrize(
    ("content", "where", "told"),
    [
        (b"", "config.toml", "the file has no tables"),
        (b"# only a comment\n", "config.toml", "the file has no tables"),
        (b"[run]\nname = \n", "config.toml:2", 'not TOML: Invalid value at "name"'),
        (b'[run]\nname = "a\nseed = 1\n', "config.toml:2", 'does not end on its line at "name" (column 10)'),
        (b"[run]\nname = 'a'\nname = 'b'\n", "config.toml:3", '"run.name" is already on line 2'),
        (b"[a]\nb.c = 1\nb = [\n2]\n", "config.toml:4", '"a.b" is already on line 2'),
        (b"[[data]]\na = 1\n[[data]]\na = 1\na = 2\n", "config.toml:5", '"data.a" is already on line 4'),
        (b"[[data]]\na = 1\n[data]\n", "config.toml:3", '"data" is already on line 1'),
        (b"[run]\n[run]\n", "config.toml:2", '"run" is already on line 1'),
        (b"[run]\n\nname = '\xff'\n", "config.toml:3", "not UTF-8"),
        ("name = 'a'".encode("utf-16"), "config.toml:1", "not UTF-8"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "config.toml", "nested too deeply"),
    ],
)
def test_a_file_that_is_no_toml_is_an_error_with_its_line(
    content: bytes, where: str, told: str, tmp_path: Path, catalog: Catalog
) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path, catalog)
    assert caught.value.problems[0].where == str(tmp_path / where)
    assert told in caught.value.problems[0].what


@pytest.mark.parametrize(
    ("line", "literal"),
    [
        (r'path = "C:\users\me"', r"path = 'C:\users\me'"),
        (r'path = "C:\Users\\me" # a comment', r"path = 'C:\Users\me'"),
        (r'path = "D:\clips\"', r"path = 'D:\clips\'"),
        (r'path = "D:\temp\"', r"path = 'D:\temp\'"),
        (r'path = "\\server\me"', r"path = '\\server\me'"),
        (r'path = "clips\me"', r"path = 'clips\me'"),
        (r'files = ["C:\a", "C:\b"]', r"'C:\a'"),
    ],
)
def test_a_windows_path_in_double_quotes_is_told_with_single_quotes_to_copy(
    problems: Problems, line: str, literal: str
) -> None:
    found = only(problems(f"[run]\n{line}\n"))
    assert found.where == "config.toml:2"
    key = line.split(" ")[0]
    assert found.what.startswith(f'not TOML: a backslash in double quotes begins an escape at "{key}" (column ')
    assert found.remedy == f"Single quotes keep backslashes: {literal}"


@pytest.mark.parametrize("line", [r'token = "ab\dc"', r"""path = "C:\it's" """])
def test_a_backslash_in_what_is_no_path_is_told_without_the_value(problems: Problems, line: str) -> None:
    found = only(problems(f"[run]\n{line}\n"))
    assert found.remedy == "Write the text in single quotes, which keep backslashes, or each backslash twice."


@pytest.mark.parametrize(
    ("typed", "what", "literal"),
    [
        (r'"C:\temp\new"', r'a tab, which "\t" in double quotes is', r"'C:\temp\new'"),
        (r'"C:\\x\new"', r'a line break, which "\n" in double quotes is', r"'C:\x\new'"),
        (r'"C:\runs"', r'a carriage return, which "\r" in double quotes is', r"'C:\runs'"),
        (r'"clips\best"', r'a backspace, which "\b" in double quotes is', r"'clips\best'"),
        (r'"\\server\fast"', r'a form feed, which "\f" in double quotes is', r"'\\server\fast'"),
        (r'"a\u0000b"', r'a control character, which "\u0000" in double quotes is', r"'a\u0000b'"),
    ],
)
def test_a_path_with_a_control_character_is_an_error(
    problems: Problems, good: Tables, typed: str, what: str, literal: str
) -> None:
    """It is valid TOML, in which a Windows path has become another."""
    good["run"] = f"[run]\noutput_dir = {typed}\nresume = {typed}\n"
    good["model"] = good["model"].replace('"model"', typed)
    good["data"] += f"captions_file = {typed}\nmasks = {{ folder = {typed} }}\n"
    good["validation"] = f'[validation]\nevery = "1 steps"\nprompts = {{ a = "a" }}\nimages = {{ a = {typed} }}\n'
    found = problems(good)
    keys = ["run.output_dir", "run.resume", "model.path", "data[0].captions_file", "data[0].masks.folder"]
    assert [each.what for each in found] == [f"{key}: no path holds {what}." for key in (*keys, "validation.images.a")]
    names = ["output_dir", "resume", "path", "captions_file", "folder", "a"]
    assert [each.remedy for each in found] == [f"Single quotes keep backslashes: {name} = {literal}" for name in names]


def test_a_path_with_a_quote_too_is_told_with_each_backslash_twice(problems: Problems, good: Tables) -> None:
    good["data"] += r'''captions_file = "C:\temp's"''' + "\n"
    assert only(problems(good)).remedy == r'''Write each backslash twice: captions_file = "C:\\temp's"'''


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "none.toml", catalog)
    with pytest.raises(ConfigError, match="this is a folder"):
        load(tmp_path, catalog)


@pytest.mark.parametrize(
    ("table", "text", "where", "what", "remedy"),
    [
        (
            "x",
            "[validation]\nevery = '5 steps'\nprompts = { a = 'b' }\nclip_score = true",
            4,
            "there is no validation.clip_score.",
            "CLIP compares single pictures with their captions: it sees no motion",
        ),
        ("train", "[train]\nsteps = 1\nstesp = 1", 3, "unknown key train.stesp.", 'Did you mean "steps"?'),
        (
            "run",
            '[run]\noutput_dir = "o"\nzzz = 1',
            3,
            "unknown key run.zzz.",
            'It takes "deterministic", "name"',
        ),
        ("train", '[train]\nsteps = "ten"', 2, 'train.steps: expected a whole number, got "ten"', ""),
        ("train", "[train]\nsteps = 1.5", 2, "train.steps: expected a whole number, got 1.5", ""),
        ("train", "[train]\nsteps = true", 2, "train.steps: expected a whole number, got true", ""),
        ("train", "[train]\nsteps = 0", 2, "train.steps: must be at least 1, got 0", ""),
        ("train", "[train]\nepochs = nan", 2, "train.epochs: must be a finite number, got nan", ""),
        ("train", "[train]\nepochs = 0", 2, "train.epochs: must be greater than 0, got 0", ""),
        ("train", "[train]\nsteps = 1\nepochs = 1", 3, "has both steps and epochs", "Keep one"),
        ("train", "[train]\nbatch_size = 1", 1, "says neither steps nor epochs", "steps = 1000"),
        (
            "train",
            "[train]\nsteps = 1\n[train.gradient_clip]\nmaxx = 1",
            4,
            "unknown key train.gradient_clip.maxx.",
            '"max"',
        ),
        ("train", "[train]\nsteps = 1\ngradient_clip = 3", 3, "train.gradient_clip: expected a table, got 3", ""),
        (
            "train",
            "[train]\nsteps = 1\ngradient_clip = {}",
            3,
            "the key train.gradient_clip.max is missing.",
            "max = 1",
        ),
        ("train", "train = 3", 1, "train: expected a table, got 3", "[train]"),
        ("train", "[[train]]\nsteps = 1", 1, "may stand only once", "single brackets"),
        ("run", "[run]\nseed = 1", 1, "the key run.output_dir is missing.", 'output_dir = "..."'),
        ("run", "[run]\noutput_dir = 3", 2, "a path is a text that is not empty; got 3", ""),
        ("run", '[run]\noutput_dir = "o"\nname = ""', 3, "run.name: must not be empty", ""),
        ("x", "[lr_schedule]\nuse = 'cosin'", 2, '"cosine_with_restarts" or "polynomial", got "cosin"', '"cosine"?'),
        ("x", "[lr_schedule]\nend = 0.5", 2, "lr_schedule.end has no meaning", "linear"),
        ("x", "[lr_schedule]\nwarmup = 5", 2, "a duration is a number and a unit in quotes", ""),
        ("x", "[precission]\nmixed = 'no'", 1, "unknown key precission.", 'Did you mean "precision"?'),
        ("x", "[checkpoint]\nevery = '0 steps'", 2, 'a duration is greater than 0; got "0 steps"', ""),
        ("x", "[sampler]\nuse = 'flwo'", 2, 'no sampler is called "flwo"', 'Did you mean "flow"?'),
        ("x", "[sampler]\nshft = 1", 2, "unknown key sampler.shft.", 'Did you mean "shift"?'),
        ("x", "[sampler]\nkind = 'normal'", 2, 'expected "logit-normal" or "uniform", got "normal"', ""),
        ("x", "[[tracker]]\nuse = 'pepper'", 2, 'no tracker is called "pepper"', 'Did you mean "paper"?'),
        ("x", "[[tracker]]\nuse = 3", 2, "expected a text in quotes, got 3", '"paper"'),
        ("x", "[[tracker]]", 1, "the key tracker[0].use is missing.", '"tensorboard"'),
        ("x", "[tracker]\nuse = 'paper'", 1, "may stand several times", "[[tracker]]"),
        (
            "x",
            "[[regularizer]]\nuse = 'pull'\nstages = [{ until = '1 steps', wait = 1 }]",
            3,
            "unknown key regularizer[0].stages[0].wait.",
            "weight",
        ),
        ("x", "[validation]\nevery = '1 steps'\nprompts = {}", 3, "validation.prompts: must not be empty", ""),
        ("x", "[validation]\nevery = '1 steps'\nprompts.a = 3", 3, "expected a text in quotes, got 3", ""),
        ("x", "[validation]\nevery = '1 steps'\nprompts.'a/b' = ''", 3, 'nickname "a/b" cannot be a file name', ""),
        ("x", "[validation]\nevery = '1 steps'\nprompts.a = ''\nprompts.A = ''", 4, "differ only in case", ""),
        ("x", "[validation]\nevery = '1 steps'\nprompts.a = ''\nsize = 'big'", 4, "width x height", ""),
        (
            "model",
            "[model]\nuse = 'tiny'\npath = 'm'\ntrain = 'ful'",
            4,
            'expected "full" or "lora", got "ful"',
            "full",
        ),
        ("model", "[model]\nuse = 'tiny'\ntrain = 'full'", 1, "the key model.path is missing.", 'path = "..."'),
        (
            "model",
            "[model]\nuse = 'tiny'\npath = 'm'\ntrain = 'full'\nmotionscore = 1",
            5,
            "unknown key model.motionscore.",
            '"motion_score"?',
        ),
        (
            "model",
            "[model]\nuse = 'tiny'\npath = 'm'\ntran = 'full'",
            4,
            "unknown key model.tran.",
            'Did you mean "train"?',
        ),
        (
            "model",
            "[model]\nuse = 'tiny'\npath = 'm'\ntrain = 'full'\nlora.rank = 3",
            5,
            "describes an adapter",
            "Remove",
        ),
        (
            "data",
            "[[data]]\nuse = 'folder'\npath = 'c'\nenabled = false",
            1,
            "every [[data]] table has enabled",
            "Enable",
        ),
        ("data", "[data]\nuse = 'folder'\npath = 'c'", 1, "[data] may stand several times", "[[data]]"),
        (
            "data",
            "[[data]]\nuse = 'folder'\npath = 'c'\nresolution = true",
            4,
            "expected a text in quotes or a whole number or a list, got true",
            "",
        ),
        (
            "data",
            "[[data]]\nuse = 'folder'\npath = 'c'\nresolution = [\n'8x8',\n480]",
            6,
            "data[0].resolution[1]: ",
            "",
        ),
        ("optimizer", "[optimizer]\nuse = 'adamw'", 1, "the key optimizer.lr is missing.", "lr = "),
        ("optimizer", "[optimizer]\nlr = 1\nbetas = [0.9]", 3, "betas", ""),
    ],
)
def test_one_mistake_is_one_problem_with_its_line(
    problems: Problems, good: Tables, table: str, text: str, where: int, what: str, remedy: str
) -> None:
    others = {name: other for name, other in good.items() if name != table}
    found = problems({table: text + "\n", **others})
    wrong = [each for each in found if what in each.what]
    assert len(wrong) == 1, found
    assert wrong[0].where == f"config.toml:{where}"
    assert remedy in wrong[0].remedy
    # A key written wrongly is also a required key that is missing; nothing else may be reported beside the mistake.
    assert all(each is wrong[0] or each.what.endswith("is missing.") for each in found), found


def test_an_absent_optimizer_still_needs_its_learning_rate(problems: Problems, good: Tables) -> None:
    del good["optimizer"]
    problem = only(problems(good))
    assert (problem.where, problem.what) == ("config.toml", "the key optimizer.lr is missing.")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(problems: Problems, good: Tables) -> None:
    good["run"] += "seed = -1\nsed = 2\n"
    good["model"] += "motion_score = 200\n"
    good["data"] += 'use2 = 1\n[data.video]\nframes = "a"\n'
    good["train"] = "[train]\nsteps = 0\naccumulate = 0\n"
    good["optimizer"] += "beta = 3\n"
    found = problems(good)
    lines = [int(each.where.split(":")[1]) for each in found]
    assert len(found) == 8
    assert lines == sorted(lines)


@pytest.mark.parametrize("name", [table.name for table in TABLES.values() if table.required])
def test_a_missing_table_is_a_problem_with_an_example_that_works(
    problems: Problems, read: Read, good: Tables, name: str
) -> None:
    del good[name]
    missing = [each for each in problems(good) if "is missing" in each.what]
    example = only(missing).remedy.split("\n", 1)[1]
    assert read({**good, name: example + "\n"}).train is not None


def test_the_example_of_a_table_without_an_installed_part_still_has_its_shape() -> None:
    assert minimal(Catalog({}, ()), TABLES["data"]) == '[[data]]\nuse = "..."'


def test_a_family_with_a_fixed_schedule_takes_no_other_and_says_why(
    problems: Problems, read: Read, good: Tables
) -> None:
    good["model"] = good["model"].replace("tiny", "strict")
    assert read(good).sampler.registered.spec.name == "own"
    assert read({**good, "sampler": '[sampler]\nuse = "own"\n'}).sampler.registered.spec.name == "own"
    problem = only(problems({"sampler": '[sampler]\nuse = "flow"\n', **good}))
    assert problem.where == "config.toml:2"
    assert 'trained and sampled with its own schedule, "own", and with no other' in problem.what


def test_a_familys_sampler_that_is_not_installed_is_reported_where_the_family_is_named(
    write: Callable[..., Path], good: Tables, catalog: Catalog
) -> None:
    parts = {key: part for key, part in catalog.parts.items() if key != ("sampler", "flow")}
    with pytest.raises(ConfigError) as caught:
        load(write({"model": good.pop("model"), **good}), replace(catalog, parts=parts))
    problem = only(list(caught.value.problems))
    assert problem.where.endswith("config.toml:2")
    assert 'no sampler is called "flow"' in problem.what


def test_two_datasets_with_one_id_are_a_problem(problems: Problems, good: Tables) -> None:
    good["data"] = 2 * '[[data]]\nuse = "folder"\npath = "clips"\nid = "cats"\n'
    problem = only(problems({"data": good.pop("data"), **good}))
    assert problem.where == "config.toml:8"
    assert 'the id "cats" is that of data[0] already' in problem.what


def test_a_broken_plugin_is_an_error_only_for_the_file_that_names_it(
    write: Callable[..., Path], good: Tables, catalog: Catalog
) -> None:
    broken = replace(catalog, failures=(Failure("zap", "vtrain-zap", "9", "ImportError: no zap", "tracker", "zap"),))
    assert load(write(good), broken).train.steps == 10
    with pytest.raises(ConfigError, match="ImportError: no zap"):
        load(write({**good, "tracker": '[[tracker]]\nuse = "zap"\n'}), broken)


def test_installed_parts_that_the_file_does_not_name_are_not_in_the_configuration(read: Read, good: Tables) -> None:
    config = read(good)
    assert config.regularizers == ()
    assert "paper" not in [part.registered.spec.name for part in config.trackers]


def test_a_value_that_is_shown_is_cut(problems: Problems, good: Tables) -> None:
    good["train"] = f'[train]\nsteps = "{"x" * 500}"\n'
    assert len(only(problems(good)).what) < 120


def test_reserved_keys_of_the_contract_are_those_of_the_tables() -> None:
    parts = [table for table in TABLES.values() if table.kind]
    assert {table.kind: {*table.model.model_fields, "use"} for table in parts} == RESERVED_KEYS


def test_key_places_fall_back_to_the_nearest_table(read: Read, good: Tables) -> None:
    config = read({"data": good.pop("data"), **good})
    assert config.where("data", 0, "path").endswith("config.toml:3")
    assert config.where("data", 0, "video", "frames").endswith("config.toml:1")
    assert config.where("checkpoint", "keep") == str(config.path)
