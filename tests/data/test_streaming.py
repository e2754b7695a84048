"""The ledger kept up to date: what changed is scanned, what hangs on it is decided again, and nothing else."""

import io
import pickle
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from vtrain.contract import PluginError, SourceRef
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import fill_caches
from vtrain.data.sample import Skipped
from vtrain.data.scanning import decisions as file_decisions
from vtrain.data.scanning.ledger import FILE, Ledger
from vtrain.data.scanning.scan import scan


@pytest.fixture
def decided(monkeypatch) -> list[str]:
    """Ids of the clips whose place in the dataset was worked out."""
    seen: list[str] = []
    real = file_decisions.fit

    def fit(source, dataset, rule, ref_id):
        seen.append(ref_id)
        return real(source, dataset, rule, ref_id)

    monkeypatch.setattr(file_decisions, "fit", fit)
    return seen


@pytest.fixture
def three(setup, make_video):
    for name in "abc":
        setup.add(f"{name}.mp4", make_video(), f"clip {name}")
    return setup


def samples(setup, **table):
    return list(scan(setup.plan(setup.dataset(**table))).samples)


def skipped(setup, **table):
    return dict(scan(setup.plan(setup.dataset(**table))).survey.datasets[0].skipped)


def fill(plan):
    return fill_caches(plan, scan(plan).samples, [], "cpu", lambda *_: None)


def test_only_what_changed_is_decided_again(three, make_video, decided) -> None:
    assert [s.ref_id for s in samples(three)] == ["a.mp4", "b.mp4", "c.mp4"]
    assert decided == ["a.mp4", "b.mp4", "c.mp4"]
    decided.clear()
    samples(three)
    assert decided == []
    (three.folder / "b.txt").write_text("other words")
    assert samples(three)[1].captions[0].text == "other words"
    assert decided == ["b.mp4"]
    decided.clear()
    (three.folder / "a.txt").unlink()
    assert [s.ref_id for s in samples(three)] == ["b.mp4", "c.mp4"]
    assert decided == ["a.mp4"]
    decided.clear()
    three.add("d.mp4", make_video(), "clip d")
    (three.folder / "c.mp4").unlink()
    assert [s.ref_id for s in samples(three)] == ["b.mp4", "d.mp4"]
    assert decided == ["d.mp4"]


def test_settings_that_were_away_for_a_while_are_decided_by_what_changed_since(three, decided) -> None:
    samples(three)
    samples(three, upscale=True)
    (three.folder / "b.txt").write_text("other words")
    samples(three, upscale=True)
    decided.clear()
    assert samples(three)[1].captions[0].text == "other words"
    assert decided == ["b.mp4"]


def test_a_scan_that_is_cut_off_loses_nothing_and_hides_nothing(three, make_video, decided, monkeypatch) -> None:
    samples(three)
    decided.clear()
    for name in "def":
        three.add(f"{name}.mp4", make_video(), f"clip {name}")
    real = file_decisions.decide

    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vtrain.data.scanning.scan.decide", cut)
    with pytest.raises(KeyboardInterrupt):
        samples(three)
    monkeypatch.setattr("vtrain.data.scanning.scan.decide", real)
    dataset = three.dataset()
    found = list(scan(three.plan(dataset)).samples)
    assert [s.ref_id for s in found] == [f"{name}.mp4" for name in "abcdef"]
    assert dataset.backend.opened == []
    assert decided == ["d.mp4", "e.mp4", "f.mp4"]


def test_two_caption_files_of_one_clip_leave_it_out_and_name_both(three) -> None:
    (three.folder / "b.TXT").write_text("which of them")
    assert skipped(three) == {"it has two caption files, b.TXT and b.txt: keep one": (1, "b.mp4")}
    (three.folder / "b.txt").unlink()
    assert samples(three)[1].captions[0].text == "which of them"


def test_names_that_differ_in_case_only_are_two_clips_each_with_its_own_caption(setup, make_video) -> None:
    setup.add("a.mp4", make_video(), "small")
    setup.add("A.mp4", make_video(), "large")
    assert [(s.id, s.captions[0].text) for s in samples(setup)] == [("clips/A.mp4", "large"), ("clips/a.mp4", "small")]


def test_two_clips_beside_one_caption_file_both_have_it(setup, make_video) -> None:
    setup.add("a.mp4", make_video(), "shared")
    setup.add("a.mov", make_video(), None)
    assert [(s.ref_id, s.captions[0].text) for s in samples(setup)] == [("a.mov", "shared"), ("a.mp4", "shared")]


def test_copies_share_an_entry_are_used_each_and_counted(three) -> None:
    (three.folder / "copy.mp4").write_bytes((three.folder / "b.mp4").read_bytes())
    (three.folder / "copy.txt").write_text("a copy")
    (three.folder / "a.mp4").write_bytes(b"".join([(three.folder / "a.mp4").read_bytes(), b"\0" * 8]))
    plan = three.plan(caption_dropout=0.0)
    filled = fill(plan)
    assert len(filled.index) == 4
    assert filled.index.copies() == (2, ("clips/b.mp4", "clips/c.mp4"))
    assert len(list((three.cache / "video").rglob("*.safetensors"))) == 2
    batches = Batches(plan, filled.caches, filled.index)
    assert Counter(batches[m].sample_ids[0] for m in range(4)) == dict.fromkeys(
        ["clips/a.mp4", "clips/b.mp4", "clips/c.mp4", "clips/copy.mp4"], 1
    )


def test_a_dataset_without_copies_says_so(setup, make_video) -> None:
    for n in range(3):
        setup.add(f"{n}.mp4", make_video(frames=27 + n))
    assert fill(setup.plan()).index.copies() == (0, None)


def test_a_file_that_changes_under_the_run_is_trained_as_it_was_and_noticed_by_the_next_scan(setup, make_video) -> None:
    for n in range(2):
        setup.add(f"{n}.mp4", make_video(frames=27 + n), f"words {n}")
    plan = setup.plan(caption_dropout=0.0)
    filled = fill(plan)
    batches = Batches(plan, filled.caches, filled.index)
    before = [batches[m].latents.mean.clone() for m in range(2)]
    setup.add("0.mp4", make_video(frames=27, size=(160, 80)), "new words")
    (setup.folder / "1.mp4").unlink()
    # Another run scans and fills meanwhile: this run's index still stands.
    assert [s.id for s in scan(setup.plan()).samples] == ["clips/0.mp4"]
    assert len(fill(setup.plan()).index) == 1
    assert setup.family.clips == 3
    again = Batches(plan, filled.caches, pickle.loads(pickle.dumps(filled.index)))  # noqa: S301 (our own bytes)
    for m in range(2):
        assert again[m].latents.mean.equal(before[m])


def test_a_run_goes_on_without_ledger_and_dataset(three) -> None:
    plan = three.plan()
    filled = fill(plan)
    for path in [*three.cache.glob(f"{FILE}*"), *three.folder.iterdir()]:
        path.unlink()
    batches = Batches(plan, filled.caches, filled.index)
    assert {batches[m].sample_ids[0] for m in range(3)} == {"clips/a.mp4", "clips/b.mp4", "clips/c.mp4"}


def test_a_file_that_changes_between_scan_and_end_of_filling_is_left_out_of_this_run(three, make_video) -> None:
    plan = three.plan()
    found = scan(plan).samples

    def meddle() -> None:
        if three.family.clips == 0:
            three.add("c.mp4", make_video(frames=40), "clip c")
            list(scan(three.plan(three.dataset(name="other"))).samples)

    three.family.on_encode = meddle
    filled = fill_caches(plan, list(found), [], "cpu", lambda *_: None)
    # It may have been read before, after, or while it changed: another process decodes ahead.
    reasons = ("its file changed while the caches were filled", "changed while it was read")
    assert filled.skipped in ({}, *({"clips/c.mp4": reason} for reason in reasons))
    assert {"clips/a.mp4", "clips/b.mp4"} <= {filled.index.id(n) for n in range(len(filled.index))}
    three.family.on_encode = None
    assert len(fill(three.plan()).index) == 3


def test_samples_are_read_as_they_are_asked_for_again_and_again_and_in_any_process(three) -> None:
    found = scan(three.plan()).samples
    assert len(found) == 3
    assert list(found) == list(found) == list(pickle.loads(pickle.dumps(found)))  # noqa: S301 (our own bytes)
    assert len(pickle.dumps(found)) < 1000
    assert next(iter(found)).content == ""
    fill(three.plan())
    assert all(sample.content for sample in found)


def test_samples_of_several_datasets_come_in_order_of_their_ids(three) -> None:
    plan = three.plan(*(three.dataset(name=name) for name in ("z", "a", "a-b")))
    ids = [sample.id for sample in scan(plan).samples]
    assert ids == sorted(ids)
    assert len(ids) == 9


def test_the_index_knows_a_million_samples_in_about_140_bytes_each(three) -> None:
    index = fill(three.plan()).index
    many = replace(index)
    assert len(pickle.dumps(many)) / 3 < 1000  # mostly overhead at three
    per_sample = [len(rows.data) / 3 for rows in (index.names, index.video, index.text)]
    assert per_sample == [len("clips/a.mp4"), 32, 32]


@dataclass
class Shards:
    """Shards in memory. listed: which shards were opened."""

    files: dict[str, dict[str, bytes]]
    versions: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    listed: list[str] = field(default_factory=list)
    location: str = "memory://shards"

    def shards(self):
        for name in sorted(self.files):
            yield SourceRef(name, sum(map(len, self.files[name].values())), str(self.versions.get(name, 0)))

    def members(self, shard):
        self.listed.append(shard.id)
        if shard.id in self.broken:
            raise OSError(5, "Input/output error")
        for name, data in sorted(self.files[shard.id].items()):
            yield SourceRef(f"{shard.id}/{name}", len(data), f"at {self.versions.get(shard.id, 0)}")

    def refs(self):
        for shard in self.shards():
            yield from self.members(shard)

    def open(self, ref):
        shard, _, name = ref.id.partition("/")
        return io.BytesIO(self.files[shard][name])


def test_shards_that_did_not_change_are_not_listed_again(setup, make_video) -> None:
    video = make_video()
    backend = Shards({f"{n}.tar": {"x.mp4": video, "x.txt": b"words"} for n in range(3)})
    dataset = replace(setup.dataset(), backend=backend)

    def found() -> list[str]:
        backend.listed.clear()
        return [s.ref_id for s in scan(setup.plan(dataset)).samples]

    assert found() == ["0.tar/x.mp4", "1.tar/x.mp4", "2.tar/x.mp4"]
    assert backend.listed == ["0.tar", "1.tar", "2.tar"]
    assert found() == ["0.tar/x.mp4", "1.tar/x.mp4", "2.tar/x.mp4"]
    assert backend.listed == []
    backend.files["1.tar"] = {"y.mp4": video, "y.txt": b"other words"}
    backend.versions["1.tar"] = 1
    del backend.files["0.tar"]
    assert found() == ["1.tar/y.mp4", "2.tar/x.mp4"]
    assert backend.listed == ["1.tar"]
    with Ledger(setup.cache) as ledger:
        assert sorted(ledger.sources(backend.location)) == [
            "1.tar/y.mp4", "1.tar/y.txt", "2.tar/x.mp4", "2.tar/x.txt",
        ]  # fmt: skip


def test_a_shard_that_cannot_be_read_is_named_and_used_once_it_can(setup, make_video) -> None:
    video = make_video()
    backend = Shards({f"{n}.tar": {"x.mp4": video, "x.txt": b"words"} for n in range(2)}, broken={"1.tar"})
    dataset = replace(setup.dataset(), backend=backend)
    (survey,) = scan(setup.plan(dataset)).survey.datasets
    assert survey.skipped == {"the shard cannot be read: Input/output error": (1, "1.tar")}
    backend.broken.clear()
    again = scan(setup.plan(dataset))
    assert again.survey.datasets[0].skipped == {}
    assert len(again.samples) == 2


def test_files_that_a_backend_lists_out_of_order_are_a_fault_of_its_plugin(three) -> None:
    class Reversed:
        location = "memory://reversed"

        def refs(self):
            yield SourceRef("b.mp4", 1, "1")
            yield SourceRef("a.mp4", 1, "1")

    with pytest.raises(PluginError, match=r'"a\.mp4" comes after "b\.mp4"'):
        scan(three.plan(replace(three.dataset(), backend=Reversed())))


def test_an_older_layout_is_made_anew_with_a_message(three) -> None:
    import sqlite3

    samples(three)
    with sqlite3.connect(three.cache / FILE) as database:
        database.execute("PRAGMA user_version = 1")
    database.close()
    found = scan(three.plan())
    assert len(list(found.samples)) == 3
    (message,) = found.messages
    assert "made again" in message


def test_a_name_that_is_not_utf8_is_forgotten_when_it_is_gone(three) -> None:
    import os

    bad = three.folder / os.fsdecode(b"b\xe4d.mp4")
    bad.write_bytes(b"x")
    assert list(skipped(three)) == ["its name is not UTF-8: rename it"]
    bad.unlink()
    assert skipped(three) == {}


def test_a_file_that_failed_is_tried_again_by_another_version_of_the_decoding(three, make_video, monkeypatch) -> None:
    plan = three.plan()
    first = next(iter(scan(plan).samples))
    with Ledger(three.cache) as ledger:
        settings = file_decisions.settings_key(plan.datasets[0], plan.family)
        ledger.record_skipped(settings, first, Skipped("failed", "decoding", "frames are missing"))
    assert skipped(three) == {"frames are missing": (1, "a.mp4")}
    (three.folder / "a.txt").write_text("other words")
    assert skipped(three) == {"frames are missing": (1, "a.mp4")}
    monkeypatch.setattr(file_decisions, "TRANSFORM_VERSION", file_decisions.TRANSFORM_VERSION + 1)
    assert skipped(three) == {}
