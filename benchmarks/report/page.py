"""Write report.html: verdicts, plots, all rows, the setting. One file, readable on a phone and on paper."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from calm_fast.benchmarks.report import figures
from calm_fast.benchmarks.report.facts import (
    ABSENT,
    MET,
    MISSED,
    OPEN,
    WRONG,
    Curve,
    Row,
    Verdict,
    curves,
    setting_lines,
    single,
    summary,
    times,
)
from calm_fast.benchmarks.report.text import HEADINGS, HOW, rows_table
from calm_fast.benchmarks.timing import Ceilings

BRIEF = (
    "1.50x: that baseline takes 1.5 times as long as calm_fast; the best baseline comes first. Floor: the time that "
    "the arithmetic or the memory traffic alone would take here."
)
BARS = "Blue: calm_fast, the headline first; grey: baselines; pale: yardsticks, which do less work than the case."

_CLASS = {MET: "met", MISSED: "missed", ABSENT: "open", OPEN: "open", WRONG: "wrong"}

CSS = """
:root{--ink:#1d2329;--muted:#5d6770;--line:#dfe3e7;--ours:#17627f;--met:#1b6b3a;--missed:#8a5a00;--wrong:#b3261e}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,Ubuntu,"Helvetica Neue",sans-serif;color:var(--ink);
background:#fff;max-width:76rem;margin:0 auto;padding:1.2rem 1rem 3rem}
h1{font-size:1.35rem;margin:0}
h2{font-size:1.05rem;margin:2rem 0 .5rem;border-top:1px solid var(--line);padding-top:.8rem}
h3{font-size:.9rem;margin:0}
p,dd,li{max-width:70ch}.muted,figcaption{color:var(--muted);font-size:13px}.muted a{color:var(--ours)}
.head{display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:baseline;margin-bottom:.6rem}
.counts span{margin-right:.9rem;white-space:nowrap}
.met{color:var(--met)}.missed{color:var(--missed)}.wrong{color:var(--wrong);font-weight:600}.open{color:var(--muted)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th{text-align:left;font-weight:600;font-size:12px;color:var(--muted)}
td,th{padding:.18rem .9rem .18rem 0;border-bottom:1px solid var(--line);vertical-align:top}
.verdicts{font-size:14px}.verdicts .name a{font-weight:600;color:inherit;text-decoration:none}
.verdicts .name a:hover{text-decoration:underline}.verdicts b.slower{color:var(--missed)}
.verdicts .name,.verdicts .ratio,.verdicts th{white-space:nowrap}.verdicts b{color:var(--ours);font-size:15px}
.verdicts small{color:var(--muted);font-size:12px;white-space:nowrap}.verdicts th:first-child{width:17rem}
.verdicts .long{white-space:normal}.verdicts .long a{font-weight:400}
.others{color:var(--muted);font-size:12.5px;white-space:normal;margin-left:.7rem}
.others span{display:inline-block;white-space:nowrap;margin-right:.8rem}
.goal,.item{display:inline-block;margin-right:.8rem}.item{white-space:nowrap}.item b{color:var(--ink)}
.verdicts .op th{padding:.45rem 0 0;font-size:13px;font-weight:400;border:0}
sup{line-height:0}p.counts,p.muted{max-width:none;margin:.4rem 0}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:6px;padding:.2rem .7rem}
.box table{font-size:12.5px;width:auto;min-width:100%}.box td,.box th{white-space:nowrap}.box td.why{white-space:normal;
min-width:16rem}.box tr.ours td:first-child{color:var(--ours);font-weight:600}
.box tbody:last-child tr:last-child td{border-bottom:0}.box tbody th{color:var(--ink);padding-top:.6rem}
.box td.num,.box th.num{text-align:right}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:1.2rem 1.6rem;
align-items:start}
figure{margin:0;min-width:0;break-inside:avoid}svg{display:block;width:100%;height:auto;font-family:inherit}
figcaption{margin:.1rem 0 .3rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:0}dt{color:var(--muted)}dd{margin:0;
overflow-wrap:anywhere}
@media print,screen and (min-width:901px){.verdicts wbr{display:none}}
@media screen and (max-width:900px){body{padding:.9rem .8rem 2rem}
.verdicts thead{display:block;position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.verdicts,.verdicts tbody,.verdicts td{display:block}
.verdicts .op th{display:block;grid-column:1/3}
.verdicts tr{display:grid;grid-template-columns:1fr auto;gap:0 .8rem;padding:.4rem 0;
border-bottom:1px solid var(--line)}
.verdicts td{grid-column:1/3;border:0;padding:0}.verdicts .name{grid-area:1/1;white-space:normal}
.verdicts .op{border:0;padding:.2rem 0 0}.verdicts .floor{grid-area:1/2}.verdicts .ratio{white-space:normal}
.verdicts .floor:not(:empty)::after{content:" the floor";color:var(--muted)}.verdicts td:empty{display:none}
.box{padding:.2rem .5rem}.box td,.box th{padding-right:.55rem}dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}}
@media print{@page{margin:12mm}body{font-size:10pt;max-width:none;padding:0}h2{break-after:avoid}
p.counts{font-size:9pt}.verdicts{font-size:8pt;table-layout:fixed}.verdicts b{font-size:8.5pt}
.verdicts th:first-child{width:10.5rem}.verdicts th:nth-child(2){width:15.5rem}.verdicts th:nth-child(3){width:4rem}
.verdicts thead th{font-size:8pt;white-space:normal}.verdicts td,.verdicts th{padding:.08rem .6rem .08rem 0}
.verdicts .op th{padding:.15rem 0 0;font-size:7.5pt}
.verdicts small,.others{font-size:7pt}.others{margin-left:.4rem}.others span,.goal{margin-right:.5rem}
p.muted,figcaption{font-size:8pt}tr,.box tbody{break-inside:avoid}p,dd{max-width:none}
.grid{grid-template-columns:1fr 1fr;gap:5mm}
.box{overflow:visible;border:0;padding:0}.box table{font-size:7.5pt}.box th{font-size:7.5pt}
.box td,.box th{padding-right:1.6mm}
.box td.why{min-width:0}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def _e(text: str) -> str:
    return html.escape(text)


def _spaced(text: str) -> str:
    """Let names break after an underscore, and typeset comparisons."""
    return _e(text).replace("_", "_<wbr>").replace("&gt;= ", "\u2265\u202f").replace("&lt;= ", "\u2264\u202f")


def _powers(text: str) -> str:
    """Typeset the exponent of M^1.13."""
    return re.sub(r"\^([\d.?]+)", r"<sup>\1</sup>", _spaced(text))


def _others(ratios: Iterable[tuple[str, float]]) -> str:
    """Return the baselines after the best one."""
    each = " ".join(f"<span>{times(value)} {_e(name)}</span>" for name, value in ratios)
    return f'<span class="others">{each}</span>' if each else ""


def _verdict_row(v: Verdict) -> str:
    wrong = "".join(f'<span class="goal wrong">{_e(r["impl"])}: {_e(r["failure"])}</span>' for r in v.red)
    goals = "".join(
        f'<span class="goal {_CLASS[g.state]}">{_spaced(g.wanted)}: {_e(g.measured)}'
        f"{', ' + g.state if g.found is not None else ''}</span>"
        for g in v.goals
    )
    if v.ours is None:
        ratio = '<span class="open">not measured</span>' if not v.red else '<span class="wrong">no time</span>'
    elif not v.ratios or v.ratio is None:
        ratio = '<span class="open">no baseline ran</span>'
    else:
        slower = ' class="slower"' if v.ratio < 1 else ""
        best, *others = v.ratios
        ratio = f"<b{slower}>{times(best[1])}</b> {_spaced(best[0])}{_others(others)}"
    return (
        f'<tr><td class="name"><a href="#{_e(v.name)}">{_spaced(v.name)}</a></td>'
        f'<td class="ratio">{ratio}</td><td class="floor">{times(v.above_floor)}</td><td>{wrong}{goals}</td></tr>'
    )


def _curve_row(curve: Curve) -> str:
    v = curve.largest
    ratio = ""
    if v.ratios:
        best, *others = v.ratios
        ratio = f"<b>{times(best[1])}</b> {_spaced(best[0])}{_others(others)}"
    found = ABSENT if curve.state == ABSENT else f"{curve.series.size}^{curve.found}, {curve.state}"
    goal = _powers(f"{curve.wanted}: {found}")
    return (
        f'<tr><td class="name long"><a href="#scaling">{_e(curve.series.title)}</a> <small>{_e(curve.series.size)} '
        f"{curve.sizes[0]} to {curve.sizes[-1]}</small></td>"
        f'<td class="ratio">{ratio}</td><td class="floor">{times(v.above_floor)}</td>'
        f'<td><span class="goal {_CLASS[curve.state]}">{goal}</span></td></tr>'
    )


def _verdicts(found: Sequence[Verdict]) -> str:
    classes = {"targets met": "met", "missed": "missed", "wrong or broken": "wrong"}
    counts = " ".join(
        f'<span class="{classes.get(what, "") if count else "open"}">{count} {_e(what)}</span>'
        for what, count in summary(found).items()
    )
    head = "<th>case</th><th>times faster than each baseline</th><th>measured / floor</th><th>target</th>"
    groups = [(op, "".join(map(_verdict_row, members))) for op, members in groupby(single(found), lambda v: v.op)]
    drawn = curves(found)
    if drawn:
        groups.append(("scaling curves, ratios at the largest size", "".join(map(_curve_row, drawn))))
    bodies = (f'<tbody><tr class="op"><th colspan="4">{_e(title)}</th></tr>{lines}</tbody>' for title, lines in groups)
    return (
        f'<p class="counts">{counts}</p><p class="muted">{_e(BRIEF)} <a href="#how">How to read it</a></p>'
        f'<table class="verdicts"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table>'
    )


def _figure(plot: str, title: str, caption: str = "", anchor: str = "") -> str:
    """Return a plot under its title. `caption` is html."""
    target = f' id="{_e(anchor)}"' if anchor else ""
    head = f"<h3{target}>{_spaced(title)}</h3>"
    return f"<figure>{head}{f'<figcaption>{caption}</figcaption>' if caption else ''}{plot}</figure>"


def _numbered(names: Iterable[str]) -> str:
    return " ".join(f'<span class="item"><b>{i}</b> {_e(name)}</span>' for i, name in enumerate(names, 1))


def _grid(plots: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(plots)}</div>'


def _rows(found: Sequence[Verdict]) -> str:
    """Return the table of all rows. A case's name has its own line, so a phone shows the times beside the names."""
    head = "".join(f"<th{' class=num' if i else ''}>{_e(h)}</th>" for i, h in enumerate(HEADINGS[1:]))
    bodies = []
    for v in (v for v in found if v.rows):
        body = [f'<tr><th colspan="7">{_e(v.name)}</th></tr>']
        for row, (_, name, *values) in zip(v.rows, rows_table([v]), strict=True):
            if row["ms"] is None:
                kind = "wrong" if any(row is r for r in v.red) else "open"
                cells = f'<td class="num {kind}">no time</td><td class="why {kind}" colspan="5">{_e(values[1])}</td>'
            else:
                cells = "".join(f"<td class=num>{_e(value)}</td>" for value in values)
            body.append(f"<tr{' class=ours' if row['ours'] else ''}><td>{_e(name)}</td>{cells}</tr>")
        bodies.append(f"<tbody>{''.join(body)}</tbody>")
    return f'<div class="box"><table><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'


def document(title: str, body: str) -> str:
    """Return a whole page in our style around `body`."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light">'
        f"<title>{_e(title)}</title><style>{CSS}</style></head><body>{body}</body></html>\n"
    )


def settings(lines: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values."""
    return "<dl>" + "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in lines) + "</dl>"


def page(rows: Sequence[Row], found: Sequence[Verdict], ceilings: Mapping[str, Ceilings]) -> str:
    """Return report.html: text, tables and plots, nothing loaded from elsewhere."""
    device = ", ".join((rows[0]["device"], rows[0]["date"][:10].replace("-", "\u2011"))) if rows else ""
    parts = [
        f'<div class="head"><h1>calm_fast bench</h1><span class="muted">{_e(device)}</span></div>',
        _verdicts(found),
    ]
    alone = single(found)
    overview = [
        (figures.ratio_bars(alone), "Ratio to the best baseline"),
        (figures.floor_dots(alone), "Distance to the floor"),
        (figures.memory_dots(alone), "Peak memory"),
    ]
    parts.append("<h2>Ratios, floors, memory</h2>")
    parts.append(_grid(_figure(plot, title) for plot, title in overview if plot))
    roofs = figures.rooflines(rows, alone, ceilings)
    if roofs:
        parts += ["<h2>Roofline</h2>", _grid(_figure(plot, dtype, _numbered(names)) for dtype, plot, names in roofs)]
    lines = [
        _figure(plot, curve.series.title, said)
        for curve in curves(found)
        for plot, said in (
            (figures.scaling(curve, "ms"), _powers(f"{curve.wanted}, found {curve.series.size}^{curve.found}")),
            (figures.scaling(curve, "peak_bytes"), "peak memory"),
        )
        if plot
    ]
    if lines:
        parts += ['<h2 id="scaling">Scaling</h2>', _grid(lines)]
    each = [_figure(plot, v.name, _spaced(v.shape), v.name) for v in alone if (plot := figures.case_times(v))]
    parts += ["<h2>Case by case</h2>", f'<p class="muted">{_e(BARS)}</p>', _grid(each)]
    parts += ["<h2>Every row</h2>", _rows(found)]
    parts += ["<h2>Setting</h2>", settings(setting_lines(rows, ceilings))]
    parts += ['<h2 id="how">How to read it</h2>', *(f"<p>{_e(part)}</p>" for part in HOW)]
    return document("calm_fast bench", "".join(parts))
