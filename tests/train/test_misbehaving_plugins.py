"""What a user sees of a plugin that does what the contract forbids: which part of which version, where, and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vtrain
from vtrain import api
from vtrain.run import listeners

pytestmark = pytest.mark.usefixtures("one_decoder")

Run = Callable[..., Any]
Odd = Callable[..., Path]
Install = Callable[..., Path]
SOURCE = (Path(__file__).parents[1] / "fixtures" / "misbehaving" / "odd_plugin.py").read_text(encoding="utf-8")
TABLES = {
    "family": ('[model]\nuse = "toy"', '[model]\nuse = "odd"\n{}'),
    "optimizer": ('use = "adamw"', 'use = "odd"\n{}'),
    "data_backend": ('use = "folder"\npath = "clips"', 'use = "odd"\n{}'),
    "regularizer": ("", '\n[[regularizer]]\nuse = "odd"\nneeded = 1\n{}\n'),
    "sampler": ("", '\n[sampler]\nuse = "odd"\n{}\n'),
    "tracker": ("", '\n[[tracker]]\nuse = "odd"\n{}\n'),
}


@pytest.fixture
def odd(folder: Any, install_plugin: Install) -> Odd:
    """odd("family", 'fault = "shape"'): a file whose part of that kind is the misbehaving plugin's, with these options."""
    install_plugin("odd", SOURCE, version="1.5")

    def write(kind: str, options: str, **values: Any) -> Path:
        text = folder.write(**{"steps": 4, "save": 2, "log_every": 1} | values).read_text(encoding="utf-8")
        before, after = TABLES[kind]
        text = text.replace(before, after.format(options)) if before else text + after.format(options)
        folder.config.write_text(text, encoding="utf-8")
        return Path(folder.config)

    return write


def test_a_part_that_is_none_is_an_error_of_the_plan_with_the_members_that_it_lacks(odd: Odd, within: Run) -> None:
    lacks = {
        "family": 'SimpleNamespace, which lacks "block_count", "block_width", ',
        "sampler": 'SimpleNamespace, which lacks "corrupt", "describe", "draw", "solve", "warnings".',
        "regularizer": 'SimpleNamespace, which lacks "describe", "load", "needs".',
        "data_backend": 'SimpleNamespace, which lacks "location", "open", "refs".',
    }
    for kind, words in lacks.items():
        for fault, gave in (("none", "None."), ("class", "the class "), ("empty", words)):
            done = within("plan", odd(kind, f'fault = "{fault}"'), check=2)
            whose = f'the {kind.replace("_", " ")} "odd" of odd 1.5'
            assert re.search(rf"config\.toml:\d+: {whose}: its build gave {re.escape(gave)}", done.stderr), done.stderr
            assert "Report it to its author, or use another version of odd." in done.stderr
            assert "Traceback" not in done.stderr


RUNS = {
    ("family", "shape"): "step 3: {}: its predict gave float32 (2, 1, 3, 8, 8) where (2, 12, 3, 8, 8) of fp32,",
    ("family", "float64"): "step 3: {}: its predict gave float64 (2, 12, 3, 8, 8) where",
    ("family", "integer"): "step 3: {}: its predict gave int64 (2, 12, 3, 8, 8) where",
    ("family", "graph"): "step 3: {}: its predict gave a tensor outside the graph, from which no weight learns.",
    ("family", "tuple"): "step 3: {}: its predict gave a tuple where",
    (
        "family",
        "text",
    ): '{}: the text encoder "words": the part "text" is (1, 1, 23) where (1, 1 to 16, 24) is promised.',
    ("family", "text tuple"): '{}: the text encoder "words": encode gave a tuple, not a Text.',
    ("family", "latents"): "{}: the video codec made latents of (1, 12, 3, 7, 8) where (1, 12, 3, 8, 8) were promised.",
    ("family", "latents tensor"): "{}: its video codec's encode gave a Tensor, not Latents.",
    ("family", "codec"): '{}: its open_video_codec gave object, which lacks "decode", "encode".',
    ("family", "denoiser"): '{}: its load_denoiser gave ToyTransformer, which lacks "fold", ',
    ("regularizer", "number"): "step 3: {}: its loss module gave a float, not a LossTerm.",
    ("regularizer", "per clip"): "step 3: {}: its loss is float32 (2,), not a tensor of a single number in fp32,",
    ("regularizer", "detached"): "step 3: {}: its loss is outside the graph, so that nothing learns from it;",
    ("regularizer", "metric"): 'step 3: {}: its metric "size" is float32 () in the graph, not a detached',
    ("regularizer", "nan"): 'step 3: the loss of the regularizer "odd" is not finite; samples: clips/clip_',
    ("regularizer", "module"): '{}: its load gave function, which lacks "forward", ',
    ("regularizer", "features"): "{}: it asks for features and has no encoder that makes them (SupportsFeatures).",
    ("sampler", "high"): "step 1: {}: its draw gave the level [1.",
    ("sampler", "two"): "step 1: {}: its draw gave levels float32 (2,) for one clip, not float32 (1,) or (1, 3).",
    ("sampler", "double"): "step 1: {}: its draw gave levels float64 (1,) for one clip,",
    ("sampler", "unit"): "step 1: {}: its draw gave timesteps, and its spec names no family (timesteps_of).",
    ("sampler", "tensor"): "step 1: {}: its draw gave a Tensor, not a NoiseLevel.",
    ("sampler", "corrupt"): "step 1: {}: its corrupt gave (float32 (2, 12, 3, 8, 8), float32 (2, 12, 1, 8, 8)) where",
    ("optimizer", "none"): "{}: its build gave None, not a torch.optim.Optimizer.",
    (
        "optimizer",
        "some",
    ): "{}: its build was given 1 parameter that no group of it has (denoiser_module.patch_in.weight).",
    ("optimizer", "group"): '{}: it keeps what no checkpoint brings back: "seen" of a group, a list that changes.',
    ("optimizer", "beside"): '{}: it keeps what no checkpoint brings back: "moments" of its state_dict.',
    (
        "optimizer",
        "nothing",
    ): 'step 1: {}: it keeps what no checkpoint brings back: "moments", an attribute with tensors that',
    ("optimizer", "shared"): "step 1: {}: it keeps what no checkpoint brings back: optimizer.state of all.",
    ("optimizer", "object"): 'step 1: {}: it keeps what no checkpoint brings back: "kept" of a parameter, a set.',
    ("data_backend", "no list"): "{}: it lists None, not files.",
    ("data_backend", "twice"): '{}: it lists "b.mp4" twice.',
    ("data_backend", "unsorted"): '{}: the files are not listed in order of their ids: "a.mp4" comes after "b.mp4".',
    ("data_backend", "path"): "{}: it lists PosixPath('c.mp4'), which is no SourceRef.",
}
QUICK = {
    ("family", "shape"),
    ("family", "graph"),
    ("regularizer", "detached"),
    ("regularizer", "nan"),
    ("sampler", "high"),
}
QUICK |= {("optimizer", "object"), ("data_backend", "twice"), ("family", "latents")}
"""One of each place where a run looks; the others take a second each, and a second in `nox -s slow` is cheaper."""


@pytest.mark.parametrize(
    ("kind", "fault"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in RUNS]
)
def test_what_breaks_the_contract_in_a_run_names_step_part_distribution_and_version(
    odd: Odd, within: Run, folder: Any, kind: str, fault: str
) -> None:
    at = "\nat = 3" if kind in ("family", "regularizer") else ""
    done = within("run", odd(kind, f'fault = "{fault}"{at}'), check=2)
    assert RUNS[kind, fault].format(f'the {kind.replace("_", " ")} "odd" of odd 1.5') in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((folder.output / "checkpoints").glob("step-000004")), "it ended there"
    if fault != "nan":
        assert "use another" in done.stderr


@pytest.mark.slow
def test_an_optimizer_without_a_state_trains_and_is_resumed_whatever_its_state_bytes_are(
    odd: Odd, within: Run, folder: Any
) -> None:
    """Plain SGD, whose spec has the default of 8 bytes: nothing is lost, so that nothing is refused."""
    within("run", odd("optimizer", 'fault = "stateless"'), check=0)
    within("run", odd("optimizer", 'fault = "stateless"', steps=6), check=0)
    assert not [name for name in folder.tensors(6) if "::" in name]
    assert list((folder.output / "checkpoints").glob("step-000006"))


def test_an_exception_of_a_plugins_own_keeps_its_traceback_and_names_step_part_distribution_and_version(
    odd: Odd,
) -> None:
    with (
        pytest.raises(ZeroDivisionError, match="inside") as caught,
        api.run(odd("family", 'fault = "raises"\nat = 3')) as run,
    ):
        list(run)
    assert caught.value.__notes__ == ["at step 3", "in odd 1.5 (family odd), module odd_plugin"]


def test_a_listing_that_fails_halfway_names_the_data_backend_and_loses_no_file(odd: Odd) -> None:
    with pytest.raises(ConnectionResetError, match="the storage went away") as caught:
        api.plan(odd("data_backend", 'fault = "raises"'))
    assert caught.value.__notes__ == ["in odd 1.5 (data_backend odd), module odd_plugin"]


def test_an_option_without_a_default_is_asked_for_with_the_part_that_needs_it(odd: Odd, within: Run) -> None:
    file = odd("regularizer", "")
    file.write_text(file.read_text(encoding="utf-8").replace("needed = 1\n", ""), encoding="utf-8")
    done = within("plan", file, check=2)
    assert "the key regularizer[0].needed is missing." in done.stderr
    assert 'The regularizer "odd" of odd 1.5 needs it. Add, for example: needed = 1' in done.stderr


OPTIONS = """
    from __future__ import annotations
    from typing import TYPE_CHECKING
    from pydantic import ConfigDict, Field, field_validator
    from vtrain.contract import Options, TrackerSpec, hookimpl
    if TYPE_CHECKING:
        from pathlib import Path

    class Unmade(Options):
        folder: Path = Field(description="a type that is imported for type checkers alone")

    class Thawed(Options):
        model_config = ConfigDict(frozen=False)

    class Loose(Options):
        model_config = ConfigDict(extra="ignore")

    class Breaks(Options):
        level: int = Field(1, description="a number")

        @field_validator("level")
        @classmethod
        def _check(cls, value):
            return 1 / (value - 2)

    @hookimpl
    def vtrain_trackers():
        return [TrackerSpec(each.__name__.lower(), "odd", each, print) for each in (Unmade, Thawed, Loose, Breaks)]
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unmade", "its options Unmade cannot be made: name 'Path' is not defined"),
        ("thawed", "its options Thawed must stay frozen and forbid unknown keys"),
        ("loose", "its options Loose must stay frozen and forbid unknown keys"),
    ],
)
def test_options_that_are_none_are_an_error_for_the_run_that_names_the_part(
    folder: Any, within: Run, install_plugin: Install, name: str, reason: str
) -> None:
    install_plugin("sorts", OPTIONS)
    done = within("plan", folder.write(more=f'\n[[tracker]]\nuse = "{name}"\n'), check=2)
    assert f'the tracker "{name}" of sorts 1.0 cannot be used: {reason}' in done.stderr, done.stderr
    assert "Fix or remove sorts." in done.stderr
    within("plan", folder.write(), check=0)


def test_a_validator_that_fails_itself_is_named(folder: Any, install_plugin: Install) -> None:
    install_plugin("sorts", OPTIONS)
    with pytest.raises(ZeroDivisionError) as caught:
        api.plan(folder.write(more='\n[[tracker]]\nuse = "breaks"\nlevel = 2\n'))
    assert caught.value.__notes__ == ["in sorts 1.0 (tracker breaks), module sorts_plugin"]


def test_a_plugin_that_fails_at_import_or_shares_a_name_is_an_error_with_its_reason(
    odd: Odd, folder: Any, within: Run, install_plugin: Install
) -> None:
    install_plugin("broken", "import a_module_that_is_not_there")
    done = within("plan", folder.write(more='\n[[tracker]]\nuse = "broken"\n'), check=2)
    assert 'the tracker "broken" of broken 1.0 cannot be used: ModuleNotFoundError: No module named' in done.stderr
    assert "broken_plugin.py:1)" in done.stderr
    assert "Fix or remove broken." in done.stderr
    install_plugin("second", SOURCE, version="3.0")
    done = within("plan", odd("regularizer", ""), check=2)
    for one, other in (("odd 1.5", '"second" of second 3.0'), ("second 3.0", '"odd" of odd 1.5')):
        said = f'the regularizer "odd" of {one} cannot be used: the name is registered more than once: also by {other}.'
        assert said in done.stderr


@pytest.mark.parametrize(
    ("fault", "warned"),
    [
        ("hangs", "tracker odd (odd 1.5) did not finish within 0.2 seconds (it is in show(Stepped)); its last"),
        (
            "raises",
            "tracker odd (odd 1.5) failed and is off for the rest of the run: ConnectionError: no route to host",
        ),
        (
            "empty",
            'tracker odd (odd 1.5) could not be built and is off: TypeError: its build gave SimpleNamespace, which lacks "ev',
        ),
    ],
)
def test_a_tracker_that_misbehaves_is_named_and_training_ends_as_it_should(
    odd: Odd, within: Run, folder: Any, monkeypatch: pytest.MonkeyPatch, fault: str, warned: str
) -> None:
    monkeypatch.setattr(listeners, "PATIENCE_S", 0.2)
    done = within("run", odd("tracker", f'fault = "{fault}"'), check=0)
    assert f"WARNING: {warned}" in done.stdout + done.stderr
    assert (folder.output / "checkpoints" / "step-000004").is_dir()


def test_an_optimizer_resumes_by_what_it_keeps_and_its_own_load_is_not_called(
    odd: Odd, within: Run, folder: Any
) -> None:
    within("run", odd("optimizer", ""))
    kept = [name for name in folder.tensors(4) if name.endswith("::kept")]
    assert kept
    within("run", odd("optimizer", "", steps=6))
    assert folder.rows()[-1]["step"] == 6


def test_another_version_of_a_plugin_than_the_checkpoints_is_warned_of(
    odd: Odd, within: Run, folder: Any, tmp_path: Path
) -> None:
    within("run", odd("regularizer", ""))
    metadata = tmp_path / "site" / "odd" / "odd-1.5.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.5", "1.6"))
    state = folder.output / "checkpoints" / "step-000004" / "state.json"
    assert json.loads(state.read_text())["versions"]["core"] == f"vtrain {vtrain.__version__}"
    done = within("run", odd("regularizer", "", steps=6))
    warned = "odd 1.5 became odd 1.6 since the checkpoint (regularizer odd): the run continues with the new code"
    assert f"WARNING: {warned}" in done.stdout + done.stderr
    assert warned in json.loads((folder.output / "plan.json").read_text())["resumed"]["changes"]
    events = [json.loads(line) for line in (folder.output / "events.jsonl").read_text().splitlines()]
    assert [event["text"] for event in events if event["event"] == "warned" and "became" in event["text"]] == [warned]


def test_a_part_that_is_gone_at_a_resume_is_an_error_and_the_checkpoint_stays(
    odd: Odd, within: Run, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = odd("regularizer", "")
    within("run", file)
    monkeypatch.setenv("VTRAIN_PLUGINS", "builtin,toy")
    done = within("run", file, check=2)
    assert 'the regularizer "odd" of odd 1.5 cannot be used: not in VTRAIN_PLUGINS.' in done.stderr
    assert (folder.output / "checkpoints" / "step-000004" / "MANIFEST.json").is_file()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("decode raises", "ZeroDivisionError: inside (in odd 1.5 (family odd), module odd_plugin)"),
        pytest.param(
            "decoded", "its video codec decoded (1, 3, 8, 64, 64) where (1, 3, 9, 64, 64)", marks=pytest.mark.slow
        ),
        pytest.param("shape", "its predict gave (1, 1, 3, 8, 8) where (1, 12, 3, 8, 8)", marks=pytest.mark.slow),
    ],
)
def test_what_breaks_in_validation_ends_no_run_and_names_part_distribution_and_version(
    odd: Odd, within: Run, folder: Any, fault: str, words: str
) -> None:
    """Two steps are trained; the third call of predict is validation's."""
    file = odd("family", f'fault = "{fault}"\nat = 3', steps=2)
    text = (
        '\n[validation]\nevery = "2 steps"\nsteps = 2\nsize = "64x64"\nframes = 9\n[validation.prompts]\na = "a boat"\n'
    )
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")
    done = within("run", file, check=3)
    assert words in done.stdout, done.stdout
    assert "odd 1.5" in done.stdout
    assert (folder.output / "checkpoints" / "step-000002").is_dir()
