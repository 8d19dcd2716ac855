"""Check every family and write docs/models.md: `python tests/families/matrix.py`, or `make families`.

The checks of a family run in a process of its own, each with a time limit; after a check that takes longer or ends the
process, the rest runs in another one. results.json beside this file keeps the outcomes, so that a run may be cut into
pieces; a check that was not run says so in the table.
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "models.md"
WORKS, REFUSED, THEIRS, FAILS, LATE = "works", "refused", "transformers", "fails", "too late"
BUILT = "built"  # the outcome of a family whose tiny plain model does not run
sys.path.insert(0, str(HERE))
# the least that tells whether a composition is right; the other checks follow if they are asked for
FIRST = ("compose", "identity", "no leak", "greedy", "training", "dual LoRA", "score_sequences", "SelfConsistency")
TITLES = {"causal": "Causal language models", "seq2seq": "Encoder-decoders", "encoder": "Encoders"}
HEAD = """# Models

`make families` writes this page from tests/families: a tiny random model of every causal language model,
encoder-decoder and encoder of the installed transformers, beside a Llama. Outcomes:

- **works**: every check that was run is right.
- **refused**: `compose`, or the function, raises an error that names the reason.
- **transformers**: the check also fails for the plain model, so the fault is not the composition's.
- **fails**: a fault of ours, or a config that the shrinker makes wrong (the note says what came).
- **not run**: nobody has tried it.

Roles: a causal language model is the anchor over a Llama, or the augmenter of one. An encoder-decoder is the anchor
(its decoder reads what a Llama makes of the source), or its encoder reads the prompt of a Llama in full. An encoder
reads the prompt of a Llama in full (`bidirectional="prompt"`), or all text anew at every token (`"reencode"`).

Checks of a role: {checks}.
A cell names those that do not work. Generation with a cache is compared with recomputation, token by token.
score_sequences is compared with the plain model's logits, and SelfConsistency at temperature 0, over prompts of
different lengths, with the plain model's best tokens.

"""

# our errors say where they come from and which argument is meant
_WHERE = r"compose|generate|score_sequences|SelfConsistency|add_dual_lora|gradient checkpointing|Composed\w+"
_OURS = re.compile(rf"ValueError ({_WHERE}): `\w+` must be")


def run_checks(family: str, checks: Iterable[str]) -> Iterator[list[str]]:
    """Run checks of a family in this process; yield [check] before and [check, outcome, note] after each.

    A role that cannot be composed is not tried further.
    """
    from checks import ALONE, in_role, plain

    skipped: set[str] = set()
    for check in checks:
        role, _, name = check.rpartition(": ")
        if role in skipped:
            continue
        yield [check]
        error = error_of(lambda: in_role(family, role, name) if role else ALONE[name](family))  # noqa: B023
        if error is None:
            yield [check, WORKS, ""]
        elif _OURS.match(error):
            yield [check, REFUSED, error.removeprefix("ValueError ")]
        else:
            theirs = error_of(lambda: plain(family, name))  # noqa: B023
            yield [check, FAILS, error] if theirs is None else [check, THEIRS, theirs]
        if error is not None and name == "compose":
            skipped.add(role)


def error_of(call: Callable[[], None]) -> str | None:
    """Run `call`; return its error on one line, None if there is none."""
    try:
        call()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as problem:
        return " ".join(f"{type(problem).__name__} {problem}"[:2000].split())
    return None


def apart(rows: Callable[[], Iterable[Any]], limit: float) -> Iterator[Any]:
    """Yield what `rows` yields in a process of its own, as JSON can hold it; LATE if nothing comes for `limit` seconds.

    Ends early if the process does.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        for row in rows():
            os.write(write, (json.dumps(row) + "\n").encode())
        os._exit(0)
    os.close(write)
    kept = b""
    try:
        while True:
            ready, _, _ = select.select([read], [], [], limit)  # an answer, or the end of the process
            if not ready:
                yield LATE
                return
            block = os.read(read, 65536)
            if not block:
                return
            *lines, kept = (kept + block).split(b"\n")
            for line in lines:
                yield json.loads(line)
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)  # ended, or late
        os.waitpid(child, 0)


def run_family(family: str, wanted: list[str], limit: float) -> dict[str, list[str]]:
    """Return the outcomes of a family by check."""
    from checks import plain

    broken = list(apart(lambda: [error_of(lambda: plain(family, "forward"))], limit))
    if broken != [None]:
        return {BUILT: [FAILS, f"the tiny plain model does not run: {broken[0] if broken else 'the process died'}"]}
    outcomes: dict[str, list[str]] = {}
    left = wanted
    while left:
        running = None
        for row in apart(lambda: run_checks(family, left), limit):  # noqa: B023
            if row == LATE:
                outcomes[running or left[0]] = [LATE, f"no answer in {limit:.0f} s"]
                break
            if len(row) == 1:
                running = row[0]
            else:
                outcomes[row[0]], running = row[1:], None
        else:
            if running is None:
                break
            outcomes[running] = [FAILS, "the process died"]
        left = left[left.index(running or left[0]) + 1 :]
    return outcomes


def wanted_checks(family: str, names: Iterable[str] | None = None) -> list[str]:
    """Return the checks of a family in order, limited to some names."""
    from checks import checks_of

    found = checks_of(family)
    return found if names is None else [check for check in found if check.rpartition(": ")[2] in set(names)]


def cell(outcomes: dict[str, list[str]], checks: list[str]) -> tuple[str, list[str]]:
    """Return (the text of a table cell, its notes) for some checks of a family."""
    if BUILT in outcomes:
        return "not run", [outcomes[BUILT][1]]
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
    from checks import IN_ROLES, checks_of
    from shrink import families, kind_of

    text = HEAD.format(checks=", ".join(IN_ROLES))
    made = f"Made with transformers {results.get('transformers', '?')}, torch {results.get('torch', '?')}"
    text += f"{made}, on a CPU.\n"
    for kind, title in TITLES.items():
        of_kind = {family: name for family, name in families().items() if kind_of(family)[0] == kind}
        columns: dict[str, list[str]] = {}
        for check in checks_of(next(iter(of_kind))):
            columns.setdefault(check.rpartition(": ")[0] or check, []).append(check)
        lines, notes = [], []
        counts: dict[str, Counter[str]] = {name: Counter() for name in columns}
        for family, name in sorted(of_kind.items(), key=lambda item: item[1].lower()):
            row = []
            for column, checks in columns.items():
                content, why = cell(results["classes"].get(family, {}), checks)
                row.append(content)
                worst = [kind for kind in (FAILS, LATE, REFUSED, THEIRS, "not run") if kind in content]
                counts[column][worst[0] if worst else WORKS] += 1
                notes += [f"- {name}, {line if ': ' in line else column}" for line in why if line]
            lines.append(f"| {name} | {' | '.join(row)} |")
        text += f"\n## {title}\n\n" + _counts(counts) + "\n" + _table(["class", *columns], lines)
        shortened = [line if len(line) <= 300 else line[:297] + "..." for line in dict.fromkeys(notes)]
        if shortened:
            text += f"\n### Why, of {title[0].lower()}{title[1:]}\n\n" + "\n".join(shortened) + "\n"
    return text


def _counts(counts: dict[str, Counter[str]]) -> str:
    kinds = (WORKS, REFUSED, THEIRS, FAILS, LATE, "not run")
    rows = [f"| {column} | {' | '.join(str(found[kind]) for kind in kinds)} |" for column, found in counts.items()]
    return _table(["classes", *kinds], rows)


def _table(head: list[str], lines: list[str]) -> str:
    return f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n" + "".join(f"{line}\n" for line in lines)


def read() -> dict[str, Any]:
    """Return the kept outcomes."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"classes": {}}


def write(results: dict[str, Any]) -> None:
    """Keep the outcomes."""
    RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")


def main() -> None:
    """Run what the arguments ask for."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types, seq2seq/TYPE, encoder/TYPE, or a kind; default, all")
    parser.add_argument("--checks", help="names of checks, with commas, or `first`; default, all")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a check")
    parser.add_argument("--missing", action="store_true", help="only the checks without an outcome")
    parser.add_argument("--page", action="store_true", help="only write the page from the kept outcomes")
    options = parser.parse_args()
    from checks import untrained
    from shrink import families, kind_of, tiny_model

    torch.set_num_threads(1)
    if not options.page:  # what is imported at the first use is then there for every process
        untrained(tiny_model("llama"), "anchor")
    results = read()
    names = FIRST if options.checks == "first" else options.checks.split(",") if options.checks else None
    asked = options.families or list(TITLES)
    unknown = set(asked) - set(TITLES) - set(families())
    if unknown:
        parser.error(f"families must be model types, seq2seq/TYPE, encoder/TYPE or a kind, got {', '.join(unknown)}")
    for family in () if options.page else families():
        if family not in asked and kind_of(family)[0] not in asked:
            continue
        kept = results["classes"].setdefault(family, {})
        wanted = wanted_checks(family, names)
        if options.missing:
            # what was refused at compose has no more outcomes
            dead = {
                check.rpartition(": ")[0] for check in kept if check.endswith(": compose") and kept[check][0] != WORKS
            }
            wanted = [check for check in wanted if check not in kept and check.rpartition(": ")[0] not in dead]
        if not wanted:
            continue
        getattr(transformers, families()[family], None)  # imported once, before the forks
        kept.pop(BUILT, None)
        kept |= run_family(family, wanted, options.limit)
        bad = {check: found for check, found in kept.items() if found[0] != WORKS}
        print(f"[families] {family} {families()[family]}: {bad or 'works'}", flush=True)
        results |= {"transformers": transformers.__version__, "torch": torch.__version__}
        write(results)
    write(results)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
