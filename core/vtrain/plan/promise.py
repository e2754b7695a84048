"""Memory as a promise: [memory] says how much there is, and the plan chooses what fits, the fastest first. No torch.

All sets of rows of plan/savings.py that `may` allows are reckoned with the plan's own estimate, and the one of least time that fits
is taken. What the file sets itself stays; so does what may not change in a run that resumes, and, as long as it fits, all that was
chosen for it on the same card with the same limit: what others hold there differs from day to day.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from vtrain.config.keys import key_text
from vtrain.config.tables import LoraTable, MemoryTable
from vtrain.contract import Catalog, ConfigError, Problem
from vtrain.contract.rooms import Room, bytes_of
from vtrain.plan.choices import Choice, Limit, Options
from vtrain.plan.memory import CAPTIONS, CONTEXT, PROCESS, MemoryEstimate, MemorySettings, Phase, Workload, estimate_of
from vtrain.plan.records import MemoryChoice, Plan
from vtrain.plan.savings import ALL, SAVINGS, enough, gib
from vtrain.plan.workload import FLOAT32, block_memory, memory_settings, usual_adapter, workload


def promised(plan: Plan, room: Room | None, catalog: Catalog | None) -> Plan:
    """The plan with what [memory] makes it choose. room: what there is; given without that table (vtrain plan --device-memory), the
    plan is compared with it, and stays as it is.

    Raises ConfigError when nothing that is allowed fits, with the nearest that would.
    """
    if plan.config.memory is None:
        return plan if room is None else _compared(plan, room, catalog)
    room = room or Room()
    limit = _limit(plan, plan.config.memory, room)
    work = workload(plan)
    if work.kept is None:
        what = "what a block of this model keeps in memory was never measured, so that nothing can be promised."
        raise ConfigError(
            Problem(plan.config.where("memory"), what, "Leave [memory] out, and set what saves memory yourself.")
        )
    options = Options(plan, work, catalog, on_cpu=limit.on_cpu)
    found = options.choices(plan.config.memory.may)
    fitting = [each for each in found if limit.holds(each.estimate)]
    if not fitting:
        raise ConfigError(refusal(options, found, limit))
    begun = options.begun_with(room.name)
    chosen = next((each for each in fitting if each.words == begun), fitting[0])
    record = replace(_recorded(limit, found, chosen), room=room, kept=chosen is not fitting[0])
    made = replace(chosen.plan, memory=record)
    more = [*_without_effect(options, plan.config.memory), *_not_counted(chosen.estimate)]
    return replace(made, warnings=(*made.warnings, *more))


def _recorded(limit: Limit, found: Sequence[Choice], chosen: Choice) -> MemoryChoice:
    base = min(each.time for each in found)
    faster: list[tuple[tuple[str, ...], int]] = []
    for each in found[: found.index(chosen)]:
        size = limit.amount(each.estimate)
        if not faster or size < NEARER * faster[-1][1]:
            faster.append((each.words, size))
    amount = limit.amount(chosen.estimate)
    time = chosen.time / base
    return MemoryChoice(limit.size, limit.where, limit.host, chosen.words, time, tuple(faster), amount, limit.on_cpu)


NEARER = 0.98
"""A slower set is told of beside a faster one if it takes less than this share of it."""


def _compared(plan: Plan, room: Room, catalog: Catalog | None) -> Plan:
    """A plan without [memory], with a word on whether it fits there."""
    limit, work = _limit(plan, MemoryTable(), room), workload(plan)
    options = Options(plan, work, catalog, on_cpu=limit.on_cpu)
    now = estimate_of(work, memory_settings(plan.config, plan.family, plan.processes, on_cpu=limit.on_cpu))
    amount = limit.amount(now)
    if limit.holds(now):
        return replace(
            plan, memory=MemoryChoice(limit.size, limit.where, limit.host, (), 1.0, (), amount, limit.on_cpu)
        )
    fitting = next((each for each in options.choices(MemoryTable().may) if limit.holds(each.estimate)), None)
    text = f"{limit.size / 2**30:.2f} GiB"
    if fitting is None:
        advice = f"[memory] would find nothing that fits. {refusal(options, options.choices(MemoryTable().may), limit).remedy}"
    else:
        advice = f'with a table [memory], limit = "{text}", the plan would choose {" and ".join(fitting.words) or "what fits"}'
    least = "at least " if now.unknown else ""
    what = f"the run takes {least}{amount / 2**30:.2f} GiB ({now.peak.name}), and {limit.where} is {text}: {advice}"
    return replace(plan, warnings=(*plan.warnings, what))


def _limit(plan: Plan, table: MemoryTable, room: Room) -> Limit:
    """Raises ConfigError where nobody knows it."""
    on_cpu = room.device is not None and not room.name
    host = None if on_cpu else room.host
    words = _room_words(room)
    if table.limit != "auto":
        size = bytes_of(table.limit)
        if room.free is not None and room.free < size:
            return Limit(room.free, f"{words}, and memory.limit is {table.limit}", host, on_cpu)
        return Limit(size, "memory.limit", host, on_cpu, given=True)
    if room.free is None:
        what = 'memory.limit = "auto", and this machine does not say how much memory it has.'
        raise ConfigError(
            Problem(plan.config.where("memory", "limit"), what, 'Give an amount, such as limit = "16 GiB".')
        )
    return Limit(room.free, words, host, on_cpu, given=room.name.startswith("--"))


def _room_words(room: Room) -> str:
    if room.device is None:
        return ""
    gib = f"{room.device / 2**30:.2f} GiB"
    others = f", less {room.held / 2**30:.2f} GiB that others hold" if room.held else ""
    if not room.name:
        return f"this machine's memory, {gib} free for each process"
    return room.name if room.name.startswith("--") else f"{room.name}, {gib}{others}"


def _without_effect(options: Options, table: MemoryTable) -> Iterator[str]:
    """Words of `may` that the file itself has, and that allow nothing here."""
    if ("memory", "may") not in options.plan.config.lines:
        return
    for word in dict.fromkeys(table.may):
        whys = [options.why_not(saving) for saving in SAVINGS if saving.may == word]
        if all(whys):
            yield f'memory.may: "{word}" has no effect: {whys[0]}'


def _not_counted(estimate: MemoryEstimate) -> Iterator[str]:
    if estimate.unknown:
        yield f"memory.limit is kept without what nobody measured: {', '.join(estimate.unknown)}"


# -- nothing fits --------------------------------------------------------------------------------------------------------


def refusal(options: Options, found: Sequence[Choice], limit: Limit) -> Problem:
    """What does not fit, the nearest settings that would, and what else lowers it."""
    config = options.plan.config
    least = min(found, key=lambda each: limit.amount(each.estimate))
    if limit.amount(least.estimate) <= limit.size and limit.host is not None:
        lightest = min(
            (each for each in found if limit.amount(each.estimate) <= limit.size),
            key=lambda each: each.estimate.on_host,
        )
        needed = f"{gib(lightest.estimate.on_host)} of the machine's memory{_with(lightest)}"
        what = f"what fits in {gib(limit.size)} of the card takes {needed}, and {gib(limit.host)} are free."
        remedy = "Give it more memory, train fewer processes on this machine, or lower train.batch_size."
        return Problem(config.where("memory"), what, remedy)
    phase = max(least.estimate.phases, key=lambda each: each.on_cpu if limit.on_cpu else each.total)
    size = phase.on_cpu if limit.on_cpu else phase.total
    given, most = f"{gib(limit.size)} ({limit.where})", _most(phase, on_cpu=limit.on_cpu)
    what = f"nothing that is allowed fits in {given}: {phase.name} takes {enough(size)}{_with(least)}, mostly {most}."
    floor = _floor(least.estimate, limit)
    room = "a limit of" if limit.given else "a machine with" if limit.on_cpu else "a card with"
    free = "" if limit.given else " free"
    fitting = [*_fitting(options, least, limit), f"{room} {enough(limit.amount(least.estimate))}{free}"]
    return Problem(config.where("memory", "limit"), what, f"{floor}What would fit: {'; or '.join(fitting)}.")


def _with(choice: Choice) -> str:
    return f" with {' and '.join(choice.words)}" if choice.words else ""


def _most(phase: Phase, *, on_cpu: bool) -> str:
    """The largest of what it takes."""
    parts = {**phase.device, **({"the process itself": PROCESS} if on_cpu else {"the driver": CONTEXT})}
    name, size = max(parts.items(), key=lambda part: part[1])
    return f"{name} ({gib(size)})"


def _fitting(options: Options, least: Choice, limit: Limit) -> Iterator[str]:
    """Settings that would fit, the nearest first; each reckoned."""
    plan, table = options.plan, options.plan.config.memory or MemoryTable()
    free = Options(plan, options.work, options.catalog, on_cpu=limit.on_cpu, given=False)
    for who, may in ((options, ALL), (free, table.may), (free, ALL)):
        best = next((each for each in who.choices(may) if limit.holds(each.estimate)), None)
        if best is None:
            continue
        more = [f'"{word}"' for word in dict.fromkeys(each.may for each in best.savings) if word not in table.may]
        left = [key_text(key) for each in best.savings for key in each.keys if key in plan.config.lines]
        named = [f"memory.may with {', '.join(more)}"] * bool(more) + [
            f"without {', '.join(dict.fromkeys(left))} in the file"
        ] * bool(left)
        yield f"{' and '.join(named)}: {' and '.join(best.words)} ({gib(limit.amount(best.estimate))})"
        break
    settings = memory_settings(least.plan.config, plan.family, plan.processes, on_cpu=limit.on_cpu)
    for text, work, changed in _smaller(plan, options.work, settings):
        size = limit.amount(estimate_of(work, changed))
        if size <= limit.size:
            yield f"{text} ({gib(size)})"
            break
    if not settings.adapter and limit.amount(found := _as_lora(plan, options.work, settings)) <= limit.size:
        yield f'model.train = "lora" ({gib(limit.amount(found))})'


def _as_lora(plan: Plan, work: Workload, settings: MemorySettings) -> MemoryEstimate:
    """Of an adapter of the default rank on a frozen bf16 base, with the same clips."""
    weights = usual_adapter(plan.family, int(LoraTable.model_fields["rank"].default))
    lora = replace(settings, adapter=True, stored=2.0, trained=FLOAT32, cast=False)
    return estimate_of(replace(work, adapter=weights, kept=block_memory(replace(plan, base="bf16"))), lora)


def _floor(estimate: MemoryEstimate, limit: Limit) -> str:
    """What does not depend on clips and does not fit; "" for nothing."""
    for phase in estimate.phases:
        size = phase.on_cpu if limit.on_cpu else phase.total
        if phase.name == CAPTIONS and size > limit.size:
            return f"Smaller clips do not help: {CAPTIONS} takes {enough(size)}, whatever clips there are. "
    return ""


def _smaller(plan: Plan, work: Workload, settings: MemorySettings) -> Iterator[tuple[str, Workload, MemorySettings]]:
    """Less at once: clips of a batch, and then fewer frames of clips and of validation's videos, by the family's rule."""
    said = []
    if settings.batch > 1:
        settings = replace(settings, batch=1)
        said.append("train.batch_size = 1")
        yield " and ".join(said), work, settings
    if settings.video_batch > 1:
        settings = replace(settings, video_batch=1)
        said.append("cache.video_batch = 1")
        yield " and ".join(said), work, settings
    for share, size in ((1.0, ""), (0.75, "three quarters"), (0.5, "half")):
        more = [*said, f"data.resolution and validation.size {size} as wide and high"] if size else said
        for names, fewer in _shorter(plan, _narrower(work, share)):
            yield " and ".join([*more, names] if names else more), fewer, settings


def _narrower(work: Workload, share: float) -> Workload:
    """Pictures so many times as wide and high."""
    area, shapes = share * share, (work.largest, work.video)
    largest, video = (
        shape and shape._replace(height=int(share * shape.height), width=int(share * shape.width)) for shape in shapes
    )
    return replace(
        work,
        tokens=int(area * work.tokens),
        latents=int(area * work.latents),
        largest=largest,
        video=video,
        video_tokens=int(area * work.video_tokens),
    )


def _shorter(plan: Plan, work: Workload) -> Iterator[tuple[str, Workload]]:
    """Fewer frames of clips and of validation's videos, by the family's rule, one step fewer at a time; at first as many."""
    stride, clip, video = plan.family.frame_rule.stride, work.largest, work.video
    assert clip is not None
    for frames in range(clip.frames, 0, -stride):
        share = frames / clip.frames
        cut = video is not None and video.frames > frames
        of_video = frames / video.frames if video is not None and cut else 1.0
        keys = ["data.video.frames"] * (frames < clip.frames) + ["validation.frames"] * cut
        yield (
            f"{' and '.join(keys)} = {frames}" if keys else "",
            replace(
                work,
                tokens=int(share * work.tokens),
                latents=int(share * work.latents),
                largest=clip._replace(frames=frames),
                video=video._replace(frames=frames) if video is not None and cut else video,
                video_tokens=int(of_video * work.video_tokens),
            ),
        )
