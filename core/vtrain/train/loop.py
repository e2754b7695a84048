"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from vtrain.config.tables import CheckpointTable, TrainTable
from vtrain.contract import (
    CheckpointError,
    Ended,
    Event,
    Logged,
    Problem,
    StepMetrics,
    Stepped,
    TrainingError,
    Warned,
)
from vtrain.data.seeds import derive
from vtrain.plan.optimizer import Factor
from vtrain.registry.blame import at_step
from vtrain.train.ema import Average
from vtrain.train.prefetch import Prefetched, Prefetcher
from vtrain.train.processes import Processes
from vtrain.train.readings import Failure, Measured, Unread, rows
from vtrain.train.saving import Interval, Saves
from vtrain.train.spikes import Skipped, skipped_step, too_many
from vtrain.train.statistics import Statistics
from vtrain.train.step import StepOutput, clip_gradients, gradient_norm

if TYPE_CHECKING:
    from vtrain.train.sharding import Shares


class Requests(Protocol):
    """What people ask of a run while it trains. Read at the end of each step."""

    @property
    def stop(self) -> bool:
        """Whether it is to save and end."""
        ...

    def take(self) -> tuple[bool, bool]:
        """(save, validate): whether a checkpoint or a validation was asked for since the last call."""
        ...


Validate = Callable[[int], Iterator[Event]]
"""Optimizer steps done -> what happens while videos are generated. Never raises for a video that fails."""


class BrokenOff(Exception):
    """A stop was asked for between two micro-batches of a step, of which nothing is kept: it is made again at the resume."""


@dataclass(frozen=True)
class Ends:
    """What the loop calls at its edges.

    owed: optimizer steps done, whether a validation is due there -> whether one is still to be made. The first process asks.
    observe: a step's numbers when they are read, steps in order, and whether conclusions may be drawn from them.
    stepped: after the first step of the session. seen: a step's numbers, steps in order -> what is to be told of them. failed: of a
    step that is not finite, before an error is raised or it is skipped. skipped: how many steps were not taken, and may be.
    """

    saves: Saves
    validate: Validate | None
    requests: Requests
    observe: Callable[[StepMetrics, bool], None] = lambda row, decide: None
    owed: Callable[[int, bool], bool] = lambda done, due: False
    stepped: Callable[[], None] = lambda: None
    seen: Callable[[StepMetrics], Iterator[Event]] = lambda row: iter(())
    failed: Callable[[Failure], Iterator[Event]] = lambda failure: iter(())
    skipped: Skipped = field(default_factory=Skipped)


class Loop:
    """Runs optimizer steps `first` to `last` (zero-based, last excluded) and tells what happens.

    The device is read only when numbers are logged: every `log_every` steps, and before anything uses the weights.
    """

    def __init__(
        self,
        step: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: list[Tensor],
        factor: Factor,
        prefetcher: Prefetcher,
        processes: Processes,
        table: TrainTable,
        ends: Ends,
        *,
        first: int,
        last: int,
        micro_batch: int,
        steps_per_epoch: float,
        seed: int,
        average: Average | None = None,
        statistics: Statistics | None = None,
        shares: Shares | None = None,
    ) -> None:
        """parameters: what the optimizer moves, with [parallel] shard this process's shares."""
        self.statistics, self.shares = statistics, shares
        self.step, self.optimizer, self.parameters, self.factor = step, optimizer, parameters, factor
        self.prefetcher, self.processes, self.table, self.ends = prefetcher, processes, table, ends
        self.first, self.last, self.micro_batch, self.seed = first, last, micro_batch, seed
        self.steps_per_epoch, self.average = steps_per_epoch, average
        self.per_step = table.accumulate * processes.count
        self.unread: list[Unread] = []
        self.saved = self.begun = 0
        self.stepped = False
        self.clock = time.perf_counter()
        for group in optimizer.param_groups:
            # The file's rate, also in a resumed run: a checkpoint never brings lr or initial_lr.
            group.setdefault("initial_lr", group["lr"])

    def run(self, checkpoint: CheckpointTable, validate: Interval | None, *, at_start: bool) -> Iterator[Event]:
        """The whole run, or what is left of it."""
        save = Interval(checkpoint.every, self.steps_per_epoch, time.monotonic())
        due = self.first == self.last or (validate is not None and validate.falls_on(self.first))
        # One that was interrupted after its checkpoint was saved. Nothing of it reaches training: the run is the same run.
        if at_start if self.first == 0 else self.owed(self.first, due=due):
            yield from self.validation(self.first, validate)
            if self.first < self.last and self.processes.any(self.ends.requests.stop)[0]:
                yield Ended(self.first, self.last, "stopped")
                return
        # Its thread ends also where nobody takes another event, or one is raised.
        with closing(self.prefetcher.stream(self.order())) as fed:
            self.restart_clock()
            try:
                yield from self.steps(fed, save, validate)
            except Exception:
                yield from self.ends.saves.left()
                raise

    def steps(self, fed: Iterator[Prefetched], save: Interval, validate: Interval | None) -> Iterator[Event]:
        """Optimizer steps, with what is due after each."""
        for number in range(self.first, self.last):
            with at_step(number + 1):
                try:
                    failure = self.optimizer_step(number, fed)
                except BrokenOff:
                    yield from self.stopped_at(number, save)
                    return
                if failure is not None:
                    yield from self.skip(failure)
                elif not self.stepped:
                    self.stepped = True
                    self.ends.stepped()
            done, ended = number + 1, number + 1 == self.last
            yield Stepped(done)
            if self.logs(done):
                yield from self.read()
            stop, saving, validating, written = self.agreed(done, save, validate)
            if written:
                yield from self.settled()
            if saving or stop or ended:
                yield from self.checkpoint(done, save, must=stop or ended)
            if (validating or ended) and not stop:
                yield from self.validation(done, validate)
                # Videos take long: somebody may have asked meanwhile.
                stop = self.processes.any(self.ends.requests.stop)[0]
                if stop:
                    yield from self.settled()
                if stop and self.saved != done:
                    yield from self.checkpoint(done, save, must=True)
            if stop and (not ended or self.owed(done, due=True)):
                yield Ended(done, self.last, "stopped")
                return
        done = max(self.first, self.last)
        stopped = self.processes.any(self.ends.requests.stop)[0] and self.owed(done, due=True)
        yield Ended(done, self.last, "stopped" if stopped else "finished")

    def owed(self, done: int, *, due: bool) -> bool:
        """Whether a validation after this step is still to be made, the same on every process."""
        if self.ends.validate is None:
            return False
        return self.processes.any(self.processes.first and self.ends.owed(done, due))[0]

    def order(self) -> Iterator[tuple[int, int]]:
        """This process's global micro-batch numbers, with the optimizer step that each belongs to."""
        for number in range(self.first, self.last):
            # Counted over all processes: another number of them, or of accumulated ones, repeats and skips no draw.
            start = self.micro_batch + (number - self.first) * self.per_step
            for turn in range(self.table.accumulate):
                yield start + turn * self.processes.count + self.processes.rank, number

    def optimizer_step(self, number: int, fed: Iterator[Prefetched]) -> Failure | None:
        """Forward and backward of each micro-batch, clip, step. Nothing here waits for the device, unless steps may be skipped.

        Gives what is not finite of a step that is not taken; its gradients are still there. Raises BrokenOff.
        """
        statistics = self.statistics if self.logs(number + 1) else None
        extra: dict[str, Tensor] = {}
        micro: list[Measured] = []
        for turn in range(self.table.accumulate):
            if turn and self.processes.any(self.ends.requests.stop)[0]:
                raise BrokenOff
            micro.append(self.micro_batch_of(next(fed), turn, statistics, extra))
        if self.shares is not None:
            self.shares.take_gradients()
        before = statistics.gradients(extra) if statistics else {}
        norm = self.norm(number)
        # By hand: accelerate's scheduler steps once for each process, and a function of the step has no state to save.
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor(number)
        lr = self.optimizer.param_groups[0]["lr"]  # the denoiser's: groups of other rates come after
        measured = Unread(number + 1, tuple(micro), lr, norm, extra)
        if self.ends.skipped.limit is not None and (failure := self.broken(measured)) is not None:
            return failure
        if (clip := self.table.gradient_clip) is not None and clip.max:
            clip_gradients(self.parameters, clip.method, clip.max, norm)
        self.optimizer.step()
        if statistics:
            statistics.updates(extra, before)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.unread.append(measured)
        return None

    def micro_batch_of(
        self, item: Prefetched, turn: int, statistics: Statistics | None, extra: dict[str, Tensor]
    ) -> Measured:
        """Forward and backward of one. turn: which of the step's. extra: where statistics go."""
        self.seed_dropout(item.micro_batch)
        with self.processes.unsynchronised(self.step, when=turn < self.table.accumulate - 1):
            with statistics.outputs(extra) if statistics else nullcontext():
                output: StepOutput = self.step(item.given)
            (output.loss / self.table.accumulate).backward()  # type: ignore[no-untyped-call]
        # Numbers alone are kept: the graph and the inputs go before the next micro-batch comes.
        loss, metrics = output.loss.detach(), dict(output.metrics)
        shown = (item.micro_batch, item.sigmas, item.sample_ids)
        return Measured(*shown, loss, output.flow, metrics, item.waited, item.rolled)

    def broken(self, step: Unread) -> Failure | None:
        """What of a step is not finite on any process. Waits for the device."""
        numbers = [each.loss for each in step.micro] + ([step.norm] if step.norm is not None else [])
        finite = bool(torch.stack([each.detach().float().reshape(()) for each in numbers]).isfinite().all())
        if not self.processes.any(not finite)[0]:
            return None
        return rows([step], self.processes, self.steps_per_epoch, 0.0, 0)[1]

    def stopped_at(self, done: int, save: Interval) -> Iterator[Event]:
        """Save and end at the last whole step."""
        for parameter in self.parameters:
            parameter.grad = None
        yield from self.settled()
        if self.saved != done and done > self.first:
            yield from self.checkpoint(done, save, must=True)
        yield Ended(done, self.last, "stopped")

    def skip(self, failure: Failure) -> Iterator[Event]:
        """Leave weights and optimizer as they were. Raises TrainingError where too many steps were skipped."""
        yield from self.read()  # of the steps before, in order
        yield from self.ends.failed(failure)
        for parameter in self.parameters:  # zero_grad clears what the optimizer moves, which may be copies
            parameter.grad = None
        skipped = self.ends.skipped
        skipped.count += 1
        if skipped.count > (skipped.limit or 0):
            raise too_many(failure, skipped.count)
        yield skipped_step(failure, skipped)

    def logs(self, done: int) -> bool:
        """Whether the numbers of this step are read when it is done, whatever else happens there."""
        return done == self.last or done % self.table.log_every == 0

    def seed_dropout(self, micro_batch: int) -> None:
        """Dropout of a micro-batch is a pure function of (seed, micro-batch), like all other noise."""
        self.processes.device.seed(derive(self.seed, "dropout", micro_batch))

    def norm(self, number: int) -> Tensor | None:
        """Of all gradients before clipping, where something asks for it: it is one more pass over them."""
        clip = self.table.gradient_clip
        by_norm = clip is not None and clip.method == "norm" and clip.max > 0
        wanted = by_norm or self.ends.skipped.limit is not None or self.logs(number + 1)
        if not wanted:
            return None
        own = gradient_norm(self.parameters)
        return own if self.shares is None else self.shares.norm(own)

    def read(self) -> Iterator[Event]:
        """Fetch the unread numbers in one go. Raises TrainingError, naming samples, if any is not finite."""
        unread, self.unread = self.unread, []
        if unread:
            seconds = (time.perf_counter() - self.clock) / len(unread)
            found, broken = rows(unread, self.processes, self.steps_per_epoch, seconds, self.processes.device.peak())
            for row in found:
                # At other steps reading is a matter of chance: a signal, a checkpoint.
                with at_step(row.step):
                    self.ends.observe(row, row.step % self.table.log_every == 0)
            if found:
                yield Logged(found)
            for row in found:
                yield from self.ends.seen(row)
            if broken is not None:
                yield from self.ends.failed(broken)
                raise broken.error
            self.clock = time.perf_counter()

    def agreed(self, done: int, save: Interval, validate: Interval | None) -> tuple[bool, bool, bool, bool]:
        """(stop, save, validate, whether a checkpoint was written) after this step, the same everywhere. Waits for no device.

        Any process may have been asked to stop; what is due by the clock is due by the first one's.
        """
        now = time.monotonic()
        saving = save.due(done, now) if self.processes.first or not save.timed else False
        validating = False
        if validate is not None and (self.processes.first or not validate.timed):
            validating = validate.due(done, now)
        save_asked, validation_asked = self.ends.requests.take()
        stop, saving, validating, written = self.processes.any(
            self.ends.requests.stop,
            saving or save_asked,
            validating or validation_asked,
            self.ends.saves.written,
        )
        return stop, saving, validating, written

    def checkpoint(self, done: int, interval: Interval, *, must: bool) -> Iterator[Event]:
        """Read all flags, then save. One that fails is a warning; at the end of a run it is an error."""
        # Also of steps between two logged ones: no weights are saved while a loss before them is unread.
        yield from self.read()
        self.check_weights(done)
        yield from self.settled()
        try:
            with at_step(done):
                yield from self.ends.saves.save(done, self.micro_batch + (done - self.first) * self.per_step, now=must)
            self.begun = done
            if not self.ends.saves.writing:
                self.saved = done
        except CheckpointError as error:
            if must:
                raise
            yield Warned(str(error))
        # Also after a failure: by the clock it would otherwise be due again at the next step.
        interval.done(time.monotonic())
        self.restart_clock()

    def settled(self) -> Iterator[Event]:
        """What became of the checkpoint that was being written beside the last steps."""
        if not self.ends.saves.writing:
            return
        try:
            with at_step(self.begun):
                yield from self.ends.saves.settle()
            self.saved = self.begun
        except CheckpointError as error:
            yield Warned(str(error))

    def validation(self, done: int, interval: Interval | None) -> Iterator[Event]:
        """Read all flags, then generate."""
        yield from self.read()
        self.check_weights(done)
        if self.ends.validate is not None:
            yield from self.ends.validate(done)
        if interval is not None:
            interval.done(time.monotonic())
        self.restart_clock()

    def check_weights(self, done: int) -> None:
        """Raises TrainingError if a trained weight is not finite: a gradient can be broken whose loss is not."""
        # A sum keeps a NaN or infinity: one number for each weight, and one read for all of them.
        sums = torch.stack([parameter.detach().float().sum() for parameter in self.parameters])
        finite = bool(sums.isfinite().all()) and (self.average is None or self.average.finite)
        if self.processes.any(not finite)[0]:
            remedy = "They were not saved. Lower the learning rate, or clip the gradient, and start the run again."
            error = TrainingError(Problem(f"step {done}", "the weights are not finite.", remedy))
            error.reported = not self.processes.first
            raise error

    def restart_clock(self) -> None:
        """Seconds per step and peak memory are those of training, not of what was done in between."""
        self.clock = time.perf_counter()
        self.processes.device.reset_peak()
