"""Which processes of a run are still there, while one waits for the others: a slow one is distinguished from one that is gone.

A thread of each process counts up a number of its own in the store through which torch brought them together. Who waits looks at
the others' numbers. A process that ends closes its connections, which a waiting one notices at once; one whose machine has lost its
power or its network, or that was stopped, closes nothing, and would be waited for as long as one that fills caches for hours.
"""

from __future__ import annotations

import platform
import threading
import time
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

from vtrain.contract import Problem, TrainingError

BEAT = 2.0
"""Seconds from one sign of life to the next."""
SILENCE = 120.0
"""Seconds without a sign of life after which a process is gone. What a library does without letting other threads run takes some of
them: saving 1.6 GB as safetensors 1 s, on two busy cores."""
LOOK = 5.0
"""Seconds from one look at the others to the next."""


class Heartbeat:
    """This process's sign of life, and the look at those of the others. Ends with `stop`, or with the process."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        """store: torch's (`dist.Store`), which all processes share."""
        # Connections of their own: in one, a request waits for the one before.
        self._beats, self._look = (distributed_c10d.PrefixStore("vtrain/heartbeat", store.clone()) for _ in range(2))
        self._rank, self._count = rank, count
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._ended = threading.Event()
        self.sign(0)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def of_group(cls, rank: int, count: int) -> Heartbeat:
        """Of the processes of torch's own group."""
        return cls(distributed_c10d._get_default_store(), rank, count)

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(BEAT):
            number += 1
            try:
                self.sign(number)
            except RuntimeError:  # the store is gone, with the process that kept it: who waits notices
                return

    def sign(self, number: int) -> None:
        """Give one. number: another than the last."""
        self._beats.set(str(self._rank), f"{number} {platform.node()}")

    def wait(self, work: Any) -> None:
        """Until a collective is done that was begun with async_op. Raises what that raises, and TrainingError where one is gone."""
        self.begin()
        pause, since = 0.0, time.monotonic()
        while not work.is_completed():
            if (now := time.monotonic()) - since > LOOK:
                self.look(now)
            time.sleep(pause)
            pause = min(0.05, pause + 0.0002)
        work.wait()

    def begin(self) -> None:
        """Nothing is known of the others: who waits for the first time in hours has looked at none."""
        self._heard.clear()
        self._looked = 0.0

    def look(self, now: float) -> None:
        """now: seconds of a monotonic clock. Raises TrainingError where one has given no sign of life for SILENCE."""
        if now - self._looked < LOOK:
            return
        if now - self._looked > 4 * LOOK:  # this process was stopped meanwhile, and with it perhaps the others
            self._heard.clear()
        self._looked = now
        others = [rank for rank in range(self._count) if rank != self._rank]
        try:
            self._look.set_timeout(timedelta(seconds=SILENCE))
            signs = self._look.multi_get([str(rank) for rank in others])
        except RuntimeError as error:
            where = "the process or the launcher that keeps the list of all"
            raise gone(self._rank, self._count, f"{where} cannot be reached any more ({_line(error)}).") from error
        for rank, sign in zip(others, signs, strict=True):
            before, since = self._heard.get(rank, (b"", now))
            self._heard[rank] = (sign, now if sign != before else since)
            if now - self._heard[rank][1] >= SILENCE:
                machine = sign.decode(errors="replace").partition(" ")[2]
                what = (
                    f"process {rank + 1} ({machine}) has given no sign of life for {now - self._heard[rank][1]:.0f} s."
                )
                raise gone(self._rank, self._count, what)

    def stop(self) -> None:
        """Give no more signs."""
        self._ended.set()
        self._thread.join(BEAT)


def gone(rank: int, count: int, what: str) -> TrainingError:
    """The error of a process that waited for another one."""
    remedy = "Start the command again: it resumes from the newest checkpoint."
    return TrainingError(Problem(f"process {rank + 1} of {count}", what, remedy))


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
