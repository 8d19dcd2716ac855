"""Check every family and write docs/models.md: `python tests/families/matrix.py`, or `make families`.

Every check runs in a process of its own, with a time limit. results.json beside this file keeps the outcomes, so that a
run may be cut into pieces; a check that was not run says so in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "models.md"
WORKS, REFUSED, THEIRS, FAILS, LATE = "works", "refused", "transformers", "fails", "too late"
sys.path.insert(0, str(HERE))
# the least that tells whether a composition is right; the other checks follow if they are asked for
FIRST = ("compose", "identity", "no leak", "greedy", "training", "dual LoRA", "score_sequences")
HEAD = """# Models

`make families` writes this page from tests/families: a tiny random model of every causal language model class of the
installed transformers, in either role beside a Llama. Outcomes:

- **works**: every check that was run is right.
- **refused**: `compose`, or the function, raises an error that names the reason.
- **transformers**: the check also fails for the plain model, so the fault is not the composition's.
- **fails**: a fault of ours, or a config that the shrinker makes wrong (the note says what came).
- **not run**: nobody has tried it.

Checks of a role: {checks}.
A cell names those that do not work. Generation with a cache is compared with recomputation, token by token.

"""


def run_check(model_type: str, check: str, limit: float) -> tuple[str, str]:
    """Return (outcome, note) of a check, "role: name" or a name alone."""
    import checks

    role, _, name = check.rpartition(": ")
    if not role:
        call: Callable[[], None] = lambda: checks.ALONE[name](model_type)  # noqa: E731
    else:
        call = lambda: checks.in_role(model_type, role, name)  # noqa: E731
    error = apart(call, limit)
    if error is None:
        return WORKS, ""
    if error == LATE:
        return LATE, f"no answer in {limit:.0f} s"
    # our errors say where they come from and which argument is meant
    if re.match(r"ValueError (compose|score_sequences|add_dual_lora|gradient checkpointing): `\w+` must be", error):
        return REFUSED, error.removeprefix("ValueError ")
    theirs = apart(lambda: checks.plain(model_type, name), limit)
    return (FAILS, error) if theirs is None else (THEIRS, theirs)


def apart(call: Callable[[], None], limit: float) -> str | None:
    """Run `call` in a process of its own; return its error, None if there is none, or LATE."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        error = ""
        try:
            call()
        except BaseException as problem:
            error = f"{type(problem).__name__} {problem}"
        os.write(write, ("." + error)[:2000].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], limit)  # an answer, or the end of the process
        if not ready:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read().decode(errors="replace")
    os.waitpid(child, 0)
    if not ready:
        return LATE
    if not answer:
        return "the process died"
    return " ".join(answer[1:].split()) or None


def all_checks(which: Iterable[str] | None = None) -> list[str]:
    """Return the checks of a class in order, limited to the names `which`."""
    import checks

    names = [f"{role}: {name}" for role in checks.ROLES for name in checks.IN_ROLES] + list(checks.ALONE)
    return [name for name in names if which is None or name.rpartition(": ")[2] in which]


def run_class(model_type: str, wanted: list[str], limit: float) -> dict[str, list[str]]:
    """Return the outcomes of one class by check; a role that cannot be composed is not tried further."""
    import checks

    outcomes: dict[str, list[str]] = {}
    broken = apart(lambda: checks.plain(model_type, "forward"), limit)
    if broken is not None:
        return {"built": [FAILS, f"the tiny plain model does not run: {broken}"]}
    for check in wanted:
        role = check.rpartition(": ")[0]
        if role and outcomes.get(f"{role}: compose", [WORKS])[0] != WORKS:
            continue
        outcomes[check] = list(run_check(model_type, check, limit))
    return outcomes


def cell(outcomes: dict[str, list[str]], checks: list[str]) -> tuple[str, list[str]]:
    """Return (the text of a table cell, its notes) for some checks of a class."""
    if "built" in outcomes:
        return "not run", [outcomes["built"][1]]
    ran = {check: outcomes[check] for check in checks if check in outcomes}
    if not ran:
        return "not run", []
    bad = {check: found for check, found in ran.items() if found[0] != WORKS}
    if not bad:
        left = len(checks) - len(ran)
        return WORKS if not left else f"works ({len(ran)} of {len(checks)} checks run)", []
    composes = [check for check in bad if check.endswith("compose")]
    shown = composes or list(bad)
    text = "; ".join(
        f"{bad[check][0]}" if check in composes or ": " not in check else f"{check.split(': ')[1]}: {bad[check][0]}"
        for check in shown
    )
    return text, [f"{check}: {bad[check][1]}" for check in shown]


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/models.md."""
    from checks import ALONE, IN_ROLES, ROLES
    from shrink import classes

    columns = {role: [f"{role}: {name}" for name in IN_ROLES] for role in ROLES} | {name: [name] for name in ALONE}
    lines, notes = [], []
    counts: dict[str, Counter[str]] = {name: Counter() for name in columns}
    for model_type, name in sorted(classes().items(), key=lambda item: item[1].lower()):
        row = []
        for column, checks in columns.items():
            text, why = cell(results["classes"].get(model_type, {}), checks)
            row.append(text)
            kinds = [kind for kind in (FAILS, LATE, REFUSED, THEIRS, "not run") if kind in text]
            counts[column][kinds[0] if kinds else WORKS] += 1
            notes += [f"- {name}, {line if ': ' in line else column}" for line in why if line]
        lines.append(f"| {name} | {' | '.join(row)} |")
    kinds = (WORKS, REFUSED, THEIRS, FAILS, LATE, "not run")
    summary = [f"| {column} | {' | '.join(str(found[kind]) for kind in kinds)} |" for column, found in counts.items()]
    text = HEAD.format(checks=", ".join(IN_ROLES))
    made = f"Made with transformers {results.get('transformers', '?')}, torch {results.get('torch', '?')}"
    text += f"{made}, on a CPU.\n\n"
    text += f"| classes | {' | '.join(kinds)} |\n|{'---|' * (len(kinds) + 1)}\n" + "\n".join(summary) + "\n\n"
    text += f"| class | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n" + "\n".join(lines) + "\n\n"
    shortened = [line if len(line) <= 300 else line[:297] + "..." for line in dict.fromkeys(notes)]
    return text + "## Why\n\n" + "\n".join(shortened) + "\n"


def read() -> dict[str, Any]:
    """Return the kept outcomes."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"classes": {}}


def write(results: dict[str, Any]) -> None:
    """Keep the outcomes, and write the page."""
    RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
    PAGE.write_text(page(results))


def main() -> None:
    """Run what the arguments ask for."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", help="model types; default, all")
    parser.add_argument("--checks", help="names of checks, with commas, or `first`; default, all")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a check")
    parser.add_argument("--missing", action="store_true", help="only classes without an outcome of these checks")
    parser.add_argument("--page", action="store_true", help="only write the page from the kept outcomes")
    options = parser.parse_args()
    from shrink import classes

    torch.set_num_threads(1)
    if not options.page:  # what is imported at the first use is then there for every process
        from checks import in_role

        in_role("llama", "anchor", "greedy")
    results = read()
    names = FIRST if options.checks == "first" else options.checks.split(",") if options.checks else None
    wanted = all_checks(names)
    for model_type in () if options.page else options.classes or classes():
        kept = results["classes"].setdefault(model_type, {})
        if options.missing and ("built" in kept or any(check in kept for check in wanted)):
            continue
        getattr(transformers, classes()[model_type], None)  # imported once, before the forks
        kept.pop("built", None)
        kept |= run_class(model_type, wanted, options.limit)
        bad = {check: found for check, found in kept.items() if found[0] != WORKS}
        print(f"[families] {classes()[model_type]}: {bad or 'works'}", flush=True)
        results |= {"transformers": transformers.__version__, "torch": torch.__version__}
        write(results)
    write(results)


if __name__ == "__main__":
    main()
