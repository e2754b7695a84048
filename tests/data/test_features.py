"""Features of regularizers in the caches: what is encoded, of which frames, when again, and what a batch has of them."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from vtrain_toy.colouring import ColourEncoder
from vtrain_toy.colours import Colours, ColoursOptions

from vtrain.contract import ClipShape, Condition, DataError, FeatureShape, NoiseLevel, PluginError, TokenGrid
from vtrain.data.batches import Batches
from vtrain.data.caching.caches import fill_caches
from vtrain.data.caching.inventory import Stores, check_all_read, prunable, wanted
from vtrain.data.decoding.decode import decode, unit_range
from vtrain.data.scanning.scan import scan
from vtrain.plan.datasets import token_frames
from vtrain.train.step import StepInput, Teacher


@dataclass
class Watched:
    """What encoders were asked to do. alive: weak references to all that were opened. spoil: added to what they make."""

    opened: list[str] = field(default_factory=list)
    clips: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    alive: list[weakref.ref[ColourEncoder]] = field(default_factory=list)
    spoil: float = 0.0
    interrupt_at: int | None = None


class WatchedColours(Colours):
    """The toy plugin's regularizer, watched."""

    def __init__(self, watched: Watched, **options: object) -> None:
        super().__init__(ColoursOptions.model_validate({"block": 0, **options}))
        self.watched = watched

    @contextmanager
    def open_feature_encoder(self, device: str) -> Iterator[ColourEncoder]:
        watched = self.watched
        watched.opened.append("features")
        with super().open_feature_encoder(device) as encoder:
            whole = encoder.encode

            def encode(frames: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
                if watched.clips == watched.interrupt_at:
                    raise KeyboardInterrupt
                watched.clips += len(frames)
                watched.shapes.append(tuple(frames.shape))
                return whole(frames, grid) + watched.spoil

            encoder.encode = encode
            watched.alive.append(weakref.ref(encoder))
            yield encoder
        watched.opened.append("features closed")


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def use(setup, watched):
    """Let runs use the regularizer with these options."""

    def choose(**options: object) -> WatchedColours:
        part = WatchedColours(watched, **options)
        setup.regularizers = (("toy-colours", part),)
        return part

    return choose


@pytest.fixture
def three(setup, make_video, use):
    for k, size in enumerate([(128, 64), (136, 64), (128, 72)]):
        setup.add(f"{k}.mp4", make_video(frames=27 + k, fps=24, size=size), f"caption number {k}")
    use()
    return setup


def fill(setup, *datasets, report=lambda _: None, **train):
    plan = setup.plan(*datasets, **train)
    return fill_caches(plan, scan(plan).samples, (), "cpu", report)


def encodes(setup, watched: Watched, *datasets) -> tuple[int, int]:
    """How many clips a run encodes to latents, and to features."""
    video, features = setup.family.clips, watched.clips
    fill(setup, *datasets)
    return setup.family.clips - video, watched.clips - features


def batches_of(setup, filled, *datasets, **train) -> Batches:
    return Batches(setup.plan(*datasets, **train), filled.caches, filled.index)


def given(batch) -> StepInput:
    """What a step gets of a batch, as far as teachers go."""
    clean = batch.latents.mean
    nothing = NoiseLevel(torch.zeros(len(clean)), torch.zeros(len(clean)))
    return StepInput(clean, clean, nothing, Condition(batch.text), 0, features=batch.features, frames=batch.frames)


def test_features_are_the_encoders_own_of_the_frames_that_tokens_stand_for(setup, clips, use, watched) -> None:
    part = use()
    dataset = setup.dataset(folder=clips, sizes=[(160, 96)], fps=10.0, frames=9)
    filled = fill(setup, dataset)
    assert watched.shapes == [(1, 3, 3, 96, 160)] * 7
    stores = Stores(setup.plan(dataset))
    sample = list(scan(stores.plan).samples)[2]
    with (clips / sample.ref_id).open("rb") as stream:
        pixels = decode(stream, sample, sample.starts[0])
    with part.open_feature_encoder("cpu") as encoder:
        expected = encoder.encode(unit_range(pixels[None, :, [0, 4, 8]]), TokenGrid(3, 6, 10))
    key = stores.features["toy-colours"].key(sample, sample.starts[0], stores.known_content(sample))
    assert torch.equal(filled.caches.feature_entries([key]), expected)


@pytest.mark.parametrize("start", [0.0, 0.5, 2.3])
@pytest.mark.parametrize("uneven", [False, True])
def test_some_frames_of_a_window_are_the_same_pictures_as_among_all(setup, make_video, start, uneven) -> None:
    """Also of one that is sought, and of a file of uneven times, with B-frames in both."""
    times = [k / 24 + 0.004 * (k % 3) for k in range(96)] if uneven else None
    setup.add("long.mp4", make_video(frames=96, fps=24, gop=30, times=times))
    (sample,) = scan(setup.plan()).samples
    with (setup.folder / "long.mp4").open("rb") as stream:
        whole = decode(stream, sample, start)
        assert len(whole.unique(dim=1)[0]) > 12
        for frames in ((0, 4, 8, 12, 16), (1, 3), (16,), tuple(range(17))):
            stream.seek(0)
            assert torch.equal(decode(stream, sample.only(frames), start), whole[:, list(frames)])


def test_models_are_opened_one_after_the_other_and_gone_after_filling(three, watched) -> None:
    three.family.opened = watched.opened
    codecs: list[weakref.ref[object]] = []
    opening = three.family.open_video_codec

    @contextmanager
    def seen(device: str) -> Iterator[object]:
        with opening(device) as codec:
            codecs.append(weakref.ref(codec))
            yield codec

    three.family.open_video_codec = seen
    fill(three)
    assert watched.opened == ["text", "text closed", "video", "video closed", "features", "features closed"]
    gc.collect()
    assert [reference() for reference in (*codecs, *watched.alive)] == [None, None]


def test_a_warm_start_opens_no_encoder_and_no_file(three, watched) -> None:
    fill(three)
    watched.opened.clear()
    dataset = three.dataset()
    assert encodes(three, watched, dataset) == (0, 0)
    assert watched.opened == []
    assert dataset.backend.opened == []


def test_a_changed_clip_encodes_its_features_only(three, watched, make_video) -> None:
    fill(three)
    (three.folder / "1.mp4").write_bytes(make_video(frames=30, fps=24))
    assert encodes(three, watched) == (1, 1)


def test_another_encoder_pooling_or_type_encodes_all_features_and_no_latents(three, watched, use) -> None:
    fill(three)
    for options in ({"channels": 7}, {"pool": 2}, {"dtype": "bf16"}):
        use(**options)
        assert encodes(three, watched) == (0, 3), options
    use()
    assert encodes(three, watched) == (0, 0)


def test_another_caption_or_codec_encodes_no_features(three, watched) -> None:
    fill(three)
    (three.folder / "1.txt").write_text("new words")
    weights = three.root / "codec.safetensors"
    weights.write_bytes(b"one")
    three.family.codec_weights = weights
    assert encodes(three, watched) == (3, 0)


def test_features_of_another_width_under_one_name_are_made_again_and_that_is_said(three, watched, use) -> None:
    """An encoder whose fingerprint does not tell its width: the entries' own shape does."""
    fill(three)
    fingerprint = three.regularizers[0][1].feature_fingerprint(hash)
    use(channels=6).feature_fingerprint = lambda hash_file: fingerprint
    told: list[tuple[str, int, int]] = []
    fill(three, report=lambda now: told.append((now.stage, now.done, now.total)))
    features = [each for each in told if each[0] == "features (toy-colours)"]
    assert features == [("features (toy-colours)", done, 3) for done in range(4)]
    assert [each for each in told if each[0] == "video"] == [("video", 3, 3)]


def test_an_interrupted_filling_goes_on_where_it_was(three, watched) -> None:
    watched.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        fill(three)
    assert len(list((three.cache / "features").rglob("*.safetensors"))) == 2
    watched.interrupt_at = None
    assert encodes(three, watched) == (0, 1)
    assert list(three.cache.rglob("*.part")) == []


def test_a_damaged_entry_is_made_again(three, watched) -> None:
    fill(three)
    path = sorted((three.cache / "features").rglob("*.safetensors"))[0]
    sound = path.read_bytes()
    path.write_bytes(sound[:-3])
    assert encodes(three, watched) == (0, 1)
    assert path.read_bytes() == sound


def test_features_that_are_not_finite_leave_their_clips_out_for_this_run(three, watched) -> None:
    watched.spoil = float("inf")
    with pytest.raises(DataError, match=r"encodes to features \(toy-colours\) that are not finite"):
        fill(three)
    assert list((three.cache / "features").rglob("*.safetensors")) == []
    watched.spoil = 0.0
    assert encodes(three, watched) == (0, 3)


def test_features_of_another_shape_than_promised_are_a_fault_of_the_plugin(three, use) -> None:
    use().feature_shape = lambda clip, grid: FeatureShape(*grid, 5)
    with pytest.raises(PluginError, match=r"made features of \(1, 5, 4, 8, 4\) where \(1, 5, 4, 8, 5\) were promised"):
        fill(three)


def test_a_clip_that_cannot_be_decoded_is_left_out_once(three, watched, undecodable) -> None:
    three.add("bad.mp4", undecodable, "bad")
    filled = fill(three)
    assert list(filled.skipped) == ["clips/bad.mp4"]
    assert watched.clips == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_batch_has_the_features_of_its_clips_as_they_are_stored(three, use, dtype) -> None:
    part = use(dtype=dtype)
    filled = fill(three)
    batch = batches_of(three, filled, batch_size=2)[0]
    features = batch.features["toy-colours"]
    assert features.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert features.shape == (2, *part.feature_shape(None, TokenGrid(5, 4, 8)))
    assert batch.frames is None
    assert batch.mask is None


def test_features_follow_the_window_that_is_drawn(setup, make_video, use) -> None:
    use()
    setup.add("long.mp4", make_video(frames=60, fps=24), "a long clip")
    dataset = setup.dataset(video={"window": "random", "windows": 4})
    filled = fill(setup, dataset)
    stores = Stores(setup.plan(dataset))
    by_features = {}
    for sample in scan(stores.plan).samples:
        assert len(sample.starts) == 4
        for start in sample.starts:
            key = stores.features["toy-colours"].key(sample, start, stores.known_content(sample))
            latents = filled.caches.latents(sample, start).mean
            by_features[filled.caches.feature_entries([key]).numpy().tobytes()] = (sample.id, latents)
    assert len(by_features) == 4
    batches, seen = batches_of(setup, filled, dataset), set()
    for number in range(24):
        batch = batches[number]
        features = batch.features["toy-colours"].numpy().tobytes()
        name, latents = by_features[features]
        assert batch.sample_ids == (name,)
        assert torch.equal(batch.latents.mean, latents)
        seen.add(features)
    assert len(seen) == 4


def test_cached_features_are_those_of_a_teacher_that_runs_on_the_source_at_each_step(three, use) -> None:
    use()
    filled = fill(three)
    cached = batches_of(three, filled, batch_size=2)
    part = use(teacher="source")
    again = fill(three)
    online = batches_of(three, again, batch_size=2)
    with part.open_feature_encoder("cpu") as encoder:
        teacher = Teacher(three.family, encoder, None)
        for number in range(3):
            kept, made = cached[number], online[number]
            assert made.sample_ids == kept.sample_ids
            assert not made.features
            assert made.frames.dtype == torch.uint8
            assert made.frames.shape == (2, 3, 5, 64, 128)
            found = teacher(given(made))
            assert (found - kept.features["toy-colours"]).abs().max() <= 1e-4
    online.close()


def test_nothing_is_read_for_a_regularizer_that_is_not_asked_for(three, use, monkeypatch) -> None:
    use()
    filled = fill(three)
    batches = batches_of(three, filled)
    shutil.rmtree(three.cache / "features")
    assert batches.get(0, features=()).features == {}
    with pytest.raises(DataError):
        batches.get(0, features=("toy-colours",))
    use(teacher="source")
    online = batches_of(three, fill(three))
    monkeypatch.setattr("vtrain.data.batches.SourceFrames.of", lambda *_: pytest.fail("frames were decoded"))
    assert online.get(0, features=()).frames is None
    assert online.get(0, features=("another",)).frames is None


def test_a_clip_that_fails_at_a_step_is_an_error_that_names_it(three, use, make_video) -> None:
    use(teacher="source")
    batches = batches_of(three, fill(three))
    for k in range(3):
        (three.folder / f"{k}.mp4").write_bytes(make_video(frames=40, fps=24))
    with pytest.raises(DataError, match=r"dataset/\d\.mp4: .*its frames are read at each step"):
        batches[0]
    for k in range(3):
        (three.folder / f"{k}.mp4").unlink()
    with pytest.raises(DataError, match=r"dataset/\d\.mp4: cannot be opened: No such file"):
        batches[0]
    batches.close()


def test_the_processes_that_decode_at_each_step_end_with_the_batches(three, use, monkeypatch) -> None:
    from vtrain.data import batches as frames
    from vtrain.data.decoding.worker import Workers

    monkeypatch.setattr(frames, "Workers", Workers)
    use(teacher="source")
    batches = batches_of(three, fill(three))
    assert batches[0].frames is not None
    workers = batches._frames._workers
    (process,) = workers._all
    assert process.alive
    batches.close()
    assert not process.alive
    assert batches[1].frames is not None, "they are started again"
    batches.close()


def test_prune_keeps_what_a_run_uses_and_takes_the_features_of_another_encoder(three, use) -> None:
    use(channels=7)
    fill(three)
    use()
    fill(three)
    stores = Stores(three.plan())
    found = wanted(stores, scan(stores.plan).samples, ())
    check_all_read(found, "config.toml")
    assert {kind: len(each.keys) for kind, each in found.items()} == {
        "text": 4, "video": 3, "features": 3, "mask": 0, "condition": 0,
    }  # fmt: skip
    assert len(list(prunable(stores.feature, found["features"]))) == 3
    assert list(prunable(stores.video, found["video"])) == []


def test_the_frames_of_tokens_are_the_last_that_each_covers(three) -> None:
    latents = three.family.latent_shape(ClipShape(17, 64, 128))
    assert token_frames(three.family, latents.frames, three.family.token_grid(latents)) == (0, 4, 8, 12, 16)
