"""Misspelt abilities: found by names, of parts that are there and of classes whose source alone is read."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtrain import contract
from vtrain.contract import DataBackendSpec, Options, PluginError, Registered
from vtrain.contract.abilities import ABILITIES, members, misspelt, names_of
from vtrain.registry import discover
from vtrain.registry.spelling import check_part, declared_faults, faults

WHOSE = Registered(DataBackendSpec("odd", "odd", Options, SimpleNamespace), "odd", "vtrain-odd", "1.0")  # type: ignore[arg-type]


def test_every_ability_of_the_contract_is_one_of_one_sort_of_part() -> None:
    listed = [ability for each in ABILITIES.values() for ability in each.can]
    assert len(listed) == len(set(listed))
    abilities = {value for name, value in vars(contract).items() if name.startswith("Supports")}
    # A text encoder has no other ability, and no other name to misspell.
    assert abilities <= set(listed)
    for each in ABILITIES.values():
        for ability in each.can:
            assert members(ability) - members(each.must), f"{ability.__name__} asks for nothing"


@pytest.mark.parametrize(
    ("sort", "name", "meant"),
    [
        ("denoiser", "load_loras", "load_lora"),
        ("denoiser", "loadLora", "load_lora"),
        ("denoiser", "lora_target", "lora_targets"),
        ("family", "token_grids", "token_grid"),
        ("family", "token_gird", "token_grid"),
        ("family", "frames_levels", "frame_levels"),
        ("sampler", "check_step", "check_steps"),
        ("data backend", "shard", "shards"),
        ("video codec", "drop_encode", "drop_encoder"),
        ("tracker", "warning", "warnings"),
    ],
)
def test_a_name_that_is_almost_an_abilitys_is_found(sort: str, name: str, meant: str) -> None:
    assert [each.meant for each in misspelt(sort, {name})] == [meant]


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        ("data backend", {"files"}),
        ("denoiser", {"load_lora", "load_loras"}),
        ("denoiser", {"reload", "loaded", "lora", "target_names"}),
        ("family", {"token_count", "grid", "words", "levels", "resolution_of"}),
        ("regularizer", {"features", "feature_size", "checked"}),
        ("sampler", set(members(contract.Sampler))),
    ],
)
def test_a_parts_own_names_are_its_own(sort: str, names: set[str]) -> None:
    assert not list(misspelt(sort, names))


def test_names_of_torchs_own_are_no_authors() -> None:
    from torch import nn

    class Term(nn.Module):
        observed = 1

        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(1, 1)

    assert names_of(Term()) == {"observed", "projection"}
    with pytest.raises(PluginError, match=r'the loss module Term has "observed", .* no "observe" \(SupportsFeedback\)'):
        check_part("loss module", Term())


def test_a_fault_says_whose_it_is_and_what_was_meant() -> None:
    class Odd:
        def shardes(self) -> None: ...

    (problem,) = faults("data backend", Odd(), WHOSE, "config.toml:3")
    assert str(problem) == (
        'config.toml:3: the data backend Odd of vtrain-odd 1.0 has "shardes", which nothing asks for, and no "shards" '
        '(SupportsShards). The author of the plugin should rename it; what is its own may be "_shardes".'
    )


LAZY = """
from __future__ import annotations
from contextlib import contextmanager
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from lazy_plugin.heavy import LazyDenoiser as Net, Codec
class Family:
    def load_denoiser(self, device) -> Net: ...
    @contextmanager
    def open_video_codec(self, device) -> Iterator[Codec]: ...
    def unsaid(self): ...
    def elsewhere(self) -> nowhere.Thing: ...
    def proxied(self):
        from lazy_plugin.heavy import Proxy
        return Proxy()
    def load(self, widths) -> nn.Module:
        from lazy_plugin.heavy import Loss
        if widths:
            return Loss(widths)
        raise ValueError
"""
HEAVY = """
from torch import nn
raise AssertionError("read, and not imported")
class Base:
    def load_loras(self): ...
    def __init__(self):
        self.module, self.blocks = None, ()
class LazyDenoiser(Base):
    @property
    def lora_targets(self): ...
    def save_lora(self): ...
class Codec(nn.Module):
    def __init__(self):
        self.drop_encoders = None
class Proxy:
    def __getattr__(self, name): ...
class Loss(nn.Module):
    def observed(self): ...
class Foreign(nn.Linear):
    def load_loras(self): ...
"""


@pytest.fixture
def lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    package = tmp_path / "lazy_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "family.py").write_text(LAZY)
    (package / "heavy.py").write_text(HEAVY)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    yield importlib.import_module("lazy_plugin.family").Family()
    for name in [name for name in sys.modules if name.startswith("lazy_plugin")]:
        del sys.modules[name]


def test_what_is_loaded_later_is_read_in_its_source_and_not_imported(lazy: Any) -> None:
    absent, denoiser = declared_faults("denoiser", lazy.load_denoiser, WHOSE, "")
    assert (
        absent.what == 'the denoiser Net of vtrain-odd 1.0 lacks "fold", "gradient_checkpointing", "predict", "save".'
    )
    assert 'the denoiser Net of vtrain-odd 1.0 has "load_loras"' in denoiser.what
    absent, codec = declared_faults("video codec", lazy.open_video_codec, WHOSE, "")
    assert absent.what.endswith('lacks "decode", "encode".')
    assert 'has "drop_encoders"' in codec.what
    (loss,) = declared_faults("loss module", lazy.load, WHOSE, "")
    assert 'the loss module Loss of vtrain-odd 1.0 has "observed"' in loss.what
    assert "lazy_plugin.heavy" not in sys.modules


def test_most_of_an_ability_is_not_the_ability() -> None:
    """And of one with two members, one may be a part's own."""

    class Adapted:
        def save_lora(self) -> None: ...
        def read_adapter(self) -> None: ...

        lora_targets = ()

    class Listed:
        def members(self) -> None: ...

    (problem,) = faults("denoiser", Adapted(), WHOSE, "")
    assert 'has "lora_targets", "save_lora" and no "load_lora": it is no SupportsLora.' in problem.what
    assert not list(faults("data backend", Listed(), WHOSE, ""))


def test_a_class_that_makes_its_members_up_is_not_judged_by_its_source(lazy: Any) -> None:
    assert not list(declared_faults("denoiser", lazy.proxied, WHOSE, ""))


def test_where_the_source_does_not_tell_nothing_is_said(lazy: Any) -> None:
    for maker in (lazy.unsaid, lazy.elsewhere, SimpleNamespace(), len, inspect.getsource):
        assert not list(declared_faults("denoiser", maker, WHOSE, ""))  # type: ignore[arg-type]


def test_the_denoisers_of_this_repository_are_read_without_torch() -> None:
    """Else the plan would find no misspelt `load_lora` of theirs."""
    code = """
import sys
from types import SimpleNamespace
from vtrain.contract import CheckpointOptions
from vtrain.contract.abilities import misspelt
from vtrain.registry import spelling
from vtrain_builtin.layersync import LayerSync
from vtrain_sanavideo.crepa import Crepa
from vtrain_sanavideo.family import SanaVideoFamily
from vtrain_sanavideo.options import SanaVideoOptions
from vtrain_toy.family import TOY
from vtrain_wan.family import Wan21Family
seen, whose = [], SimpleNamespace(distribution="vtrain", version="1")
spelling.misspelt = lambda sort, names: (seen.append((sort, names)), misspelt(sort, names))[1]
families = (TOY.build(TOY.options()), SanaVideoFamily(SanaVideoOptions(path="a/b")), Wan21Family(CheckpointOptions(path="a/b")))
for family in families:
    for sort, maker in spelling.makers("family", family):
        assert not list(spelling.declared_faults(sort, maker, whose, "")), maker
for regularizer in (Crepa, LayerSync):
    assert not list(spelling.declared_faults("loss module", regularizer.load, whose, "")), regularizer
assert [sort for sort, _ in seen] == ["denoiser", "video codec"] * 3 + ["loss module"] * 2, seen
assert all({"denoiser": "load_lora", "video codec": "decode", "loss module": "forward"}[sort] in names for sort, names in seen)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_part_that_is_installed_has_a_name_that_looks_misspelt() -> None:
    for (kind, _), part in discover().parts.items():
        build: Any = getattr(part.spec, "build")  # noqa: B009 - a Spec has none
        if kind not in ("optimizer", "family"):
            sort = kind.replace("_", " ")
            assert not list(declared_faults(sort, build, part, "")), part.spec.name
