"""The report: conclusions drawn from rows, and pages that hold them."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch

from calm_fast.benchmarks import report
from calm_fast.benchmarks.measure import ROW_FIELDS
from calm_fast.benchmarks.registry import REGISTRY, Case, Contestant, Series, Target, cases
from calm_fast.benchmarks.report import canvas, facts, figures, text
from calm_fast.benchmarks.timing import Ceilings

CPU = torch.device("cpu")
MIB = 2**20
CEILINGS = Ceilings(1e11, 2e10)


def case(name="layer", targets=(), yardsticks=(), series=None, shape=None, names=("ours", "eager", "fused", "bare")):
    contestants = [Contestant(n, None, ours=n.startswith("ours"), yardstick=n in yardsticks) for n in names]
    return Case(
        "op", name, shape or {"T": 8}, torch.float32, 10**9, 10**7, None, contestants, None, names[0],
        targets=targets, series=series,
    )  # fmt: skip


def row(impl, ms, name="layer", peak=MIB, failure=None, shape=None):
    values = {
        "op": "op", "case": name, "impl": impl, "device": "cpu, 1 thread", "dtype": "float32",
        "shape": shape or {"T": 8},
        "ms": ms, "p20": ms and 0.9 * ms, "p80": ms and 1.1 * ms, "peak_bytes": ms and peak, "flops": 10**9,
        "bytes": 10**7, "floor_ms": 10.0, "error": 1e-7, "versions": {"torch": "2"}, "commit": "abc",
        "date": "2026-01-01T00:00:00+00:00", "ours": impl.startswith("ours"), "bound": 2e-7, "failure": failure,
        "rounds": 5, "lane": "avx2", "ceiling": {},
    }  # fmt: skip
    assert tuple(values) == ROW_FIELDS
    return values


ROWS = [row("ours", 20.0, peak=MIB), row("eager", 60.0, peak=8 * MIB), row("fused", 30.0), row("bare", 10.0)]


def test_the_best_baseline_is_the_fastest_that_does_the_same_work():
    (found,) = facts.verdicts(ROWS, [case(yardsticks=("bare",))])
    assert found.rival["impl"] == "fused" and found.ratio == pytest.approx(1.5)
    assert found.above_floor == pytest.approx(2.0) and found.state == facts.OPEN
    (found,) = facts.verdicts(ROWS, [case()])
    assert found.rival["impl"] == "bare" and found.ratio == pytest.approx(0.5)


def test_every_baseline_is_named_the_best_first():
    (found,) = facts.verdicts(ROWS, [case(yardsticks=("bare",))])
    assert found.ratios == [("fused", pytest.approx(1.5)), ("eager", pytest.approx(3.0))]
    assert text.against(found) == "1.50x fused, 3.00x eager"
    (found,) = facts.verdicts(ROWS[1:], [case(yardsticks=("bare",))])  # ours has no time
    assert found.ratios == [] and found.ratio is None and text.against(found) == "not measured"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0.0, "0.00x"),
        (0.00172, "1/581x"),
        (0.094, "1/11x"),
        (0.095, "0.10x"),
        (1.343, "1.34x"),
        (580, "580x"),
    ],
)
def test_ratios_have_sensible_digits(value, shown):
    assert facts.times(value) == shown


@pytest.mark.parametrize(
    ("target", "wanted", "measured", "state"),
    [
        (Target("ours", "eager", 2.5), ">= 2.5x eager", "3.00x", facts.MET),
        (Target("ours", "eager", 3.5), ">= 3.5x eager", "3.00x", facts.MISSED),
        (Target("ours", "best", 1.4), ">= 1.4x the best baseline", "1.50x", facts.MET),
        (Target("ours", "bare", 1 / 1.2), "<= 1.2x the time of bare", "2.00x", facts.MISSED),
        (Target("ours", "eager", 8.0, "peak_bytes"), ">= 8x less memory than eager", "8.00x", facts.MET),
        (Target("ours", "elsewhere", 2.0), ">= 2x elsewhere", "not measured", facts.ABSENT),
    ],
)
def test_targets_and_measured_values_in_words(target, wanted, measured, state):
    (found,) = facts.verdicts(ROWS, [case(targets=(target,), yardsticks=("bare",))])
    (goal,) = found.goals
    assert (goal.wanted, goal.measured, goal.state) == (wanted, measured, state)
    assert found.state == state


def test_wrong_values_outrank_everything_and_have_no_ratio():
    bad = [row("ours", None, failure="wrong: error 1 against float64 exceeds the bound 2e-07"), row("eager", 60.0)]
    (found,) = facts.verdicts(bad, [case(targets=(Target("ours", "eager", 1.0),))])
    assert found.state == facts.WRONG and found.ratio is None and found.above_floor is None
    assert [r["impl"] for r in found.red] == ["ours"]
    assert facts.summary([found]) == {
        "cases": 1, "targets met": 0, "missed": 0, "targets not measured": 1, "wrong or broken": 1,
    }  # fmt: skip


def test_a_slowed_implementation_moves_the_ratio_and_misses_the_target():
    target = case(targets=(Target("ours", "eager", 1.5),))
    before, after = (facts.verdicts([row("ours", ms), row("eager", 60.0)], [target])[0] for ms in (30.0, 90.0))
    assert (before.ratio, before.state) == (pytest.approx(2.0), facts.MET)
    assert (after.ratio, after.state) == (pytest.approx(2 / 3), facts.MISSED)


def test_cases_without_rows_and_rows_without_a_case_are_both_reported():
    found = facts.verdicts([row("ours", 1.0, name="retired")], [case()])
    assert [(v.name, v.state) for v in found] == [("layer", facts.ABSENT), ("retired", facts.OPEN)]
    assert text.against(found[0]) == "not measured" and text.against(found[1]) == "no baseline ran"


def test_points_of_a_curve_are_not_verdicts_of_their_own_unless_wrong():
    rows, members = scaling(1.0)
    found = facts.verdicts([*rows, *ROWS], [*members, case()])
    assert [v.name for v in facts.single(found)] == ["layer"]
    bad = [row("ours", None, name="e1_2", failure="wrong: by far", shape={"augmenters": 2})]
    found = facts.verdicts([*bad, *(r for r in rows if r["case"] != "e1_2")], members)
    assert [v.name for v in facts.single(found)] == ["e1_2"]
    assert [v.name for v in facts.single(facts.verdicts(rows[:2], members[:1]))] == ["e1_1"]  # no curve of one point


def scaling(power, sizes=(1, 2, 4, 8)):
    series = Series("step, augmenters", "augmenters")
    members = [case(f"e1_{n}", series=series, shape={"augmenters": n}) for n in sizes]
    rows = [
        row(impl, factor * n**power, name=f"e1_{n}", peak=n * MIB, shape={"augmenters": n})
        for n in sizes for impl, factor in (("ours", 1.0), ("eager", 3.0))
    ]  # fmt: skip
    return rows, members


def test_cases_of_a_series_become_one_curve():
    rows, members = scaling(1.0)
    (curve,) = facts.curves(facts.verdicts(reversed(rows), reversed(members)))
    assert {impl: [x for x, _ in line] for impl, line in curve.lines.items()} == {
        "ours": [1, 2, 4, 8],
        "eager": [1, 2, 4, 8],
    }
    assert curve.growth("ours") == pytest.approx(1.0) and curve.growth("ours", "peak_bytes") == pytest.approx(1.0)
    assert curve.growth("nobody") is None
    assert curve.sizes == [1, 2, 4, 8] and curve.largest.name == "e1_8" and curve.state == facts.MET
    assert not facts.curves(facts.verdicts(rows[:2], members))  # one point is no curve


@pytest.mark.parametrize(("power", "says"), [(1.0, "no faster than"), (2.0, "FASTER than")])
def test_growth_is_compared_with_the_expected_power(power, says):
    rows, members = scaling(power)
    (line,) = text.growth_lines(facts.verdicts(rows, members))
    assert f"augmenters^{power:.2f}, {says} the augmenters^1" in line


def everything():
    """Render every case of the quick suite with made-up times, the largest page needed."""
    chosen = [c for op in REGISTRY for c in cases(op, CPU, "quick")]
    rows = []
    for c in chosen:
        for i, contestant in enumerate(c.contestants):
            made = row(contestant.name, 5.0 + 7 * i, name=c.name, peak=(i + 1) * MIB, shape=dict(c.shape))
            made |= {"op": c.op, "dtype": str(c.dtype).removeprefix("torch."), "ours": contestant.ours}
            rows.append(made | {"flops": c.flops, "bytes": c.bytes})
    series_rows, members = scaling(1.0)
    return [*rows, *series_rows], [*chosen, *members]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rows, chosen = everything()
    rows[1] = rows[1] | {"ms": None, "failure": "wrong: error <1> exceeds"}
    out = tmp_path_factory.mktemp("report")
    report.write(out, rows, {c.name: CEILINGS for c in chosen}, chosen)
    return (out / "report.html").read_text(encoding="utf-8"), (out / "report.md").read_text(encoding="utf-8"), chosen


def test_quick_suite_has_at_least_eight_plots_each_well_formed(page):
    plots = re.findall(r"<svg .*?</svg>", page[0], re.DOTALL)
    assert len(plots) >= 8 + len(cases("cross_attention", CPU, "quick"))
    labels = [ElementTree.fromstring(plot).get("aria-label") for plot in plots]
    assert len(set(labels)) == len(labels) and all(labels)
    for kind in ("How many times faster", "Distance to the floor", "Peak memory", "Roofline", "augmenters: ms"):
        assert any(kind in label for label in labels), kind


def test_page_loads_nothing_and_its_ids_are_its_own(page):
    for loads in ("<script", "<link", "@import", "src=", 'href="http', "url(http"):
        assert loads not in page[0]
    ids = re.findall(r'\bid="([^"]+)"', page[0])
    assert len(set(ids)) == len(ids)
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page[0]):
        assert target in ids


def test_page_begins_with_a_verdict_for_every_case(page):
    html, markdown, chosen = page
    first = html[: html.index("<h2")]
    for c in chosen:
        assert (f'href="#{c.name}"' in first) == (f"| {c.name} (" in markdown) == (c.series is None)
        assert c.series is None or c.series.title in first
    assert "1 wrong or broken" in first and "wrong: error &lt;1&gt; exceeds" in first and "<1>" not in html
    assert "**WRONG**" in markdown


def test_page_begins_with_the_ratio_to_every_baseline(page):
    html, markdown, chosen = page
    first = html[: html.index("<h2")].replace("<wbr>", "")
    for c in (c for c in chosen if c.series is None and c is not chosen[0]):  # the first has a wrong baseline
        (line,) = re.findall(rf'<a href="#{c.name}">.*?</tr>', first)
        (text_line,) = (line for line in markdown.splitlines() if line.startswith(f"| {c.name} ("))
        rivals = [k.name for k in c.contestants if not k.ours and not k.yardstick]
        assert len(rivals) >= 2
        for name in rivals:
            assert re.search(rf"\d+x(</b>)? {name}<", line) and re.search(rf"\d+x {name}[ ,]", text_line), name


def test_page_is_made_for_phones_and_paper(page):
    assert '<meta name="viewport" content="width=device-width,initial-scale=1">' in page[0]
    assert "@media print" in page[0] and "@media screen and (max-width:900px)" in page[0]
    assert re.search(r"\.box\{[^}]*overflow-x:auto", page[0]) and '<div class="box"><table>' in page[0]


def test_page_groups_verdicts_by_op_and_rows_by_case(page):
    html, _, chosen = page
    ops = list(dict.fromkeys(c.op for c in chosen if c.series is None))
    assert re.findall(r'<tr class="op"><th colspan="4">(.*?)</th>', html)[: len(ops)] == ops
    table = html[html.index("<h2>Every row</h2>") :]
    bodies = dict(re.findall(r'<tbody><tr><th colspan="7">(.*?)</th></tr>(.*?)</tbody>', table))
    assert list(bodies) == [c.name for c in chosen]
    for c in chosen[1:]:  # the first has a wrong row without numbers
        lines = re.findall(r"<tr.*?</tr>", bodies[c.name])
        assert len(lines) >= 2 and all(line.count("<td") == 7 for line in lines)


def test_page_says_how_to_read_it_where_it_is_needed(page):
    html, markdown, _ = page
    assert '<a href="#how">How to read it</a>' in html[: html.index("<h2")]
    for part in text.HOW:
        assert part in markdown


def test_growth_counts_among_the_targets():
    for power, met in ((1.0, 1), (2.0, 0)):
        rows, members = scaling(power)
        found = facts.summary(facts.verdicts([*rows, *ROWS], [*members, case()]))
        assert (found["cases"], found["of them on scaling curves"]) == (5, 4)
        assert (found["targets met"], found["missed"]) == (met, 1 - met)


def test_numbers_of_a_roofline_cover_no_mark_and_no_other_number():
    points = [(100.0 * 1.02**i, 1e10 * 1.03**i) for i in range(12)]  # closer than a number is wide
    with canvas.style():
        _, axes = canvas.figure(3.4)
        axes.set(xscale="log", yscale="log", xlim=(1, 1e4), ylim=(1e8, 1e12))
        figures._number(axes, points, [(100.0, 9e9)])
    boxes = [t.get_window_extent() for t in axes.texts]
    marks = [axes.transData.transform(p) for p in [*points, (100.0, 9e9)]]
    assert [t.get_text() for t in axes.texts] == [str(i) for i in range(1, 13)]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_report_of_nothing_says_so(tmp_path):
    report.write(tmp_path, [], {}, [case()])
    assert "not measured" in (tmp_path / "report.md").read_text()
    assert "nothing was measured" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("low", "high", "most"), [(0.9, 45, 5), (1, 1e6, 5), (2e9, 3e11, 6), (1.1, 1.4, 5), (0.0001, 1000, 4)]
)
def test_logarithmic_ticks_are_few_and_round(low, high, most):
    from matplotlib.figure import Figure

    axes = Figure().add_axes((0, 0, 1, 1))
    axes.set(xscale="log", xlim=(low, high))
    canvas.log_ticks(axes.xaxis, low, high, most)
    ticks = axes.xaxis.get_major_locator()()
    assert len(ticks) <= most and all(low <= t <= high for t in ticks)
    assert len(ticks) > 1 and all(float(f"{t:.2e}") == pytest.approx(t) for t in ticks)
    assert [canvas.plain(v) for v in (0.02, 5, 2000, 5e7)] == ["0.02", "5", "2k", "50M"]


def test_yardsticks_are_marked_in_the_table():
    found = facts.verdicts(ROWS, [case(yardsticks=("bare",))])
    lines = text.rows_table(found)
    assert [line[1] for line in lines] == ["ours", "eager", "fused", "bare (yardstick)"]
    assert lines[2][5] == "1.50x" and lines[2][6] == "3.00x"
