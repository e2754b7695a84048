"""What filling the caches tells a run beside its samples."""

import dataclasses
from contextlib import contextmanager

from vtrain.contract import Caption
from vtrain.data.caching.caches import fill_caches
from vtrain.data.index import build
from vtrain.data.scanning.scan import scan


def test_a_recount_takes_what_was_left_out_from_the_survey_with_its_reason(setup, make_video) -> None:
    for name in ("a.mp4", "b.mp4"):
        setup.add(name, make_video())
    plan = setup.plan()
    found = scan(plan)
    filled = fill_caches(plan, found.samples, (), "cpu", lambda *_: None)
    assert filled.recount(found.survey) == found.survey
    first = build([next(iter(scan(plan).samples))], lambda _: ["00"], lambda _: ["00"])
    less = dataclasses.replace(filled, index=first, skipped={"clips/b.mp4": "torn"})
    (survey,) = less.recount(found.survey).datasets
    assert sum(survey.samples.values()) == 1
    assert survey.skipped == {"torn": (1, "b.mp4")}


def test_captions_that_lost_their_end_are_counted_when_the_encoder_counts_them(setup, make_video) -> None:
    setup.add("a.mp4", make_video(), caption="one two three four five six seven eight nine")
    plan = setup.plan()
    samples = list(scan(plan).samples)
    assert fill_caches(plan, samples, (), "cpu", lambda *_: None).truncated == 0

    opened = setup.family.open_words

    @contextmanager
    def counting(device: str):
        with opened(device) as encoder:
            encoder.truncated = 3
            yield encoder

    setup.family.open_words = counting
    extra = [(Caption("new words"), "prompt")]
    assert fill_caches(plan, samples, extra, "cpu", lambda *_: None).truncated == 3
