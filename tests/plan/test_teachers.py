"""The arithmetic of encoders of features, at each step and while they fill the cache. Against counted steps: test_memory.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from vtrain.contract import BlockMemory, ClipShape, FeatureSource, TokenBytes
from vtrain.contract.records import ClipBytes, EncoderMemory
from vtrain.plan.memory import (
    AHEAD,
    BACKWARD,
    DECODING,
    FORWARD,
    SAVING,
    SOLVING,
    STEP,
    MemoryEstimate,
    MemorySettings,
    Workload,
    estimate_of,
)
from vtrain.plan.records import Plan
from vtrain.plan.teachers import Teacher
from vtrain.plan.workload import memory_estimate, workload

PlanOf = Callable[..., Plan]
SETTINGS = MemorySettings(stored=4.0, trained=4.0, adapter=False, recompute="nothing")
WORK = Workload(
    parameters=1000, blocks=4, in_blocks=0.8, adapter=50, guessed=False, tokens=20, latents=30,
    kept=BlockMemory(TokenBytes(100, 7), TokenBytes(10, 3)), largest=ClipShape(9, 4, 6),
)  # fmt: skip
TEACHER = Teacher("crepa", "source", 2, EncoderMemory(300, ClipBytes(10, 2)), frames=3 / 9, features_bytes=60)
"""Two clips at once; of WORK's clip of 9 frames three are seen."""
AREA = 4 * 6


def parts(found: MemoryEstimate, name: str) -> dict[str, int]:
    (phase,) = (phase for phase in found.phases if phase.name == name)
    return {key: size for key, size in phase.device.items() if size}


def test_a_teacher_is_there_from_the_first_step_to_the_last_and_works_where_the_forward_pass_ends() -> None:
    work = replace(WORK, teachers=(TEACHER,), video=ClipShape(5, 4, 6), video_tokens=11)
    found = estimate_of(work, SETTINGS)
    working = 2 * 3 * AREA * (12 + 3) + AREA * (10 + 9 * 2)
    assert parts(found, FORWARD)["teacher"] == 300 + working
    for name in (BACKWARD, STEP, SOLVING, DECODING, SAVING):
        assert parts(found, name)["teacher"] == 300
    (step,) = (phase for phase in found.phases if phase.name == STEP)
    assert step.host["clips"] == AHEAD * (30 * 8 + 3 * AREA * 3), "frames wait as they were decoded"
    assert "the encoder of features of crepa" not in found.unknown
    # Recomputing the first block, when the teacher is done, may take more than the end of the forward pass.
    recomputed = estimate_of(replace(work, tokens=900), replace(SETTINGS, recompute="blocks"))
    assert parts(recomputed, FORWARD)["teacher"] == 300


def test_a_teacher_that_sees_decoded_frames_has_the_codec_too() -> None:
    teacher = replace(TEACHER, features="decoded", clips=1)
    codec = EncoderMemory(500, ClipBytes(10, 2), ClipBytes(900, 3))
    work = replace(WORK, teachers=(teacher, replace(teacher, name="other")), encoders={"video codec": codec})
    found = estimate_of(work, SETTINGS)
    assert parts(found, STEP)["teacher"] == 2 * 300 + 500, "one codec for both"
    assert parts(found, FORWARD)["teacher"] == 2 * 300 + 500 + AREA * (900 + 9 * 3), "a clip being decoded is most"
    small = replace(work, encoders={"video codec": replace(codec, decode=ClipBytes(0, 1))})
    encoding = AREA * (12 * (9 + 3) + 10 + 9 * 2)
    assert parts(estimate_of(small, SETTINGS), FORWARD)["teacher"] == 2 * 300 + 500 + encoding
    unmeasured = replace(work, encoders={"video codec": EncoderMemory(500)})
    assert "the video codec that decodes for crepa" in estimate_of(unmeasured, SETTINGS).unknown


def test_cached_features_are_a_phase_of_filling_and_wait_for_their_step() -> None:
    work = replace(WORK, teachers=(replace(TEACHER, features="cached"),))
    found = estimate_of(work, SETTINGS)
    working = 2 * 3 * AREA * (12 + 3) + AREA * (10 + 9 * 2)
    assert parts(found, "encoding features of crepa") == {"encoders": 300, "activations": working}
    assert "teacher" not in parts(found, FORWARD)
    (step,) = (phase for phase in found.phases if phase.name == STEP)
    assert step.host["clips"] == AHEAD * (30 * 8 + 60)


@pytest.mark.parametrize("features", ["cached", "source", "decoded"])
def test_an_encoder_that_does_not_say_what_it_takes_is_named(features: FeatureSource) -> None:
    found = estimate_of(replace(WORK, teachers=(replace(TEACHER, features=features, memory=None),)), SETTINGS)
    assert "the encoder of features of crepa" in found.unknown


@pytest.mark.parametrize(("teacher", "clips"), [("cached", 3), ("source", 2), ("decoded", 1)])
def test_teachers_are_the_plans(plan_of: PlanOf, teacher: str, clips: int) -> None:
    part = f'[[regularizer]]\nuse = "toy-colours"\nblock = 1\nteacher = "{teacher}"\n'
    plan = plan_of(train="steps = 5\nbatch_size = 2", cache="video_batch = 3", more=part)
    (found,) = workload(plan).teachers
    assert (found.name, found.features, found.clips, found.frames) == ("toy-colours", teacher, clips, 3 / 9)
    assert found.features_bytes == 3 * 4 * 6 * 4 * 4
    assert found.memory is not None
    assert found.memory.weights == 3 * 4 * 4
    names = [phase.name for phase in memory_estimate(plan).phases]
    assert ("encoding features of toy-colours" in names) == (teacher == "cached")
