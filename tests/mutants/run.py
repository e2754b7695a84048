"""Turn on each mutant alone, run the tests where it should be noticed, and print who noticed. Exit code 1 if one lives.

`python tests/mutants/run.py [NAME ...]`; the healthy code runs the same tests first, so that a failure is the mutant's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


def failures(mutant: Mutant, *, on: bool) -> list[str]:
    """Names of the tests that fail."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "VTRAIN_MUTANT": mutant.name if on else ""}
    short = ("-m", "not slow and not long")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "mutants", "--no-header", *short, *mutant.tests],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest itself failed\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return re.findall(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, flags=re.MULTILINE)


def main() -> int:
    names = set(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if unknown := names - {mutant.name for mutant in chosen}:
        raise SystemExit(f"no such mutant: {', '.join(sorted(unknown))}")
    healthy: dict[tuple[str, ...], list[str]] = {}
    alive = []
    print("| mutant | mistake | tests that notice |")
    print("|---|---|---|")
    for mutant in chosen:
        if mutant.tests not in healthy:
            healthy[mutant.tests] = failures(mutant, on=False)
        if healthy[mutant.tests]:
            raise SystemExit(f"without a mutant these fail already: {healthy[mutant.tests]}")
        found = failures(mutant, on=True)
        if not found:
            alive.append(mutant.name)
        shown = f"{len(found)}, such as `{min(found, key=len)}`" if found else "**none**"
        print(f"| {mutant.name} | {mutant.mistake} | {shown} |", flush=True)
    print(f"\n{len(chosen) - len(alive)} of {len(chosen)} noticed" + (f"; alive: {', '.join(alive)}" if alive else ""))
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
