"""What filling the caches tells a run beside its samples."""

import dataclasses

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
