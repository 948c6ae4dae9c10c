"""Mutation test of the core: change one expression, and see whether a test fails; many times.

mutmut makes the mutants and runs the tests that reach each of them; `[tool.mutmut]` in
pyproject.toml names the modules and the tests. This module draws a sample, because all 4,000 take
hours, and prints a table with the survivors.

    make mutants                          # 400 of them, seed 0
    make mutants ARGS="--sample 50 --seed 7 --modules compress.loss"
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

# What mutmut's exit codes mean. A mutant that takes thirty times the processor time of its tests is
# seen too: it hangs.
SEEN = {1: "caught", 3: "caught"} | dict.fromkeys((24, 36, 152, 255, -24), "hung")
SURVIVED = {0: "survived", 5: "no test", 33: "no test"}


def outcomes() -> dict[str, int | None]:
    """The exit code by name of every mutant that is in the folder ``mutants``; None: not run."""
    found: dict[str, int | None] = {}
    for path in sorted(Path("mutants").rglob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def mutmut(*names: str) -> None:
    """Make what mutants are missing, and run those that ``names`` match."""
    subprocess.run([sys.executable, "-m", "mutmut", "run", *names], check=True)


def main() -> int:
    """Draw, run, and print; 0 where at least nine in ten were seen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", help="only these; default: all of pyproject.toml")
    asked = parser.parse_args()
    mutmut("compress.divergence.*__mutmut_1")  # makes all mutants
    modules = asked.modules
    names = [n for n in sorted(outcomes()) if not modules or module_of(n) in modules]
    drawn = random.Random(asked.seed).sample(names, min(asked.sample, len(names)))
    mutmut(*drawn)
    codes = outcomes()
    by_module: dict[str, Counter[str]] = {}
    for name in drawn:
        code = codes[name]
        outcome = (SEEN | SURVIVED).get(code, f"exit {code}") if code is not None else "not run"
        by_module.setdefault(module_of(name), Counter())[outcome] += 1
    print(f"\n{'module':<34}{'mutants':>8}{'seen':>6}   seed {asked.seed}")
    for module, counts in sorted(by_module.items()):
        rest = ", ".join(f"{n} {what}" for what, n in counts.items() if what != "caught")
        print(f"{module:<34}{counts.total():>8}{seen(counts):>6}   {rest}")
    total = sum(by_module.values(), Counter())
    for name in drawn:
        if codes[name] not in SEEN:
            shown = subprocess.run(
                [sys.executable, "-m", "mutmut", "show", name], capture_output=True, text=True
            )
            print("\n" + shown.stdout.strip())
    share = seen(total) / total.total()
    print(json.dumps({"mutants": total.total(), "seen": seen(total), "share": round(share, 4)}))
    return 0 if share >= 0.9 else 1


def module_of(mutant: str) -> str:
    """``compress.loss`` of ``compress.loss.x_fused__mutmut_3``."""
    return mutant.rpartition(".")[0]


def seen(counts: Counter[str]) -> int:
    return sum(counts[outcome] for outcome in set(SEEN.values()))


if __name__ == "__main__":
    sys.exit(main())
