"""The style of a comparison's page: by hand, for light and dark, for a desk, a phone and paper."""

from __future__ import annotations

from string import Template
from typing import Final

from bnify.report.comparison_style import palette

_CSS: Final = Template("""
:root {
  color-scheme: light dark;
  --ground: #ffffff; --ink: #1d2126; --soft: #5a626d; --rule: #dde1e6; --panel: #f6f7f9;
  --good: #00693f; --bad: #a32a16; --open: #5a626d;
  $light
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #131519; --ink: #e4e7eb; --soft: #a0a8b3; --rule: #30353d; --panel: #1b1e24;
    --good: #5fd3a0; --bad: #ff9b85; --open: #a0a8b3;
    $dark
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  overflow-wrap: anywhere;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1, h2, h3 { line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; text-wrap: balance; }
h1 { font-size: clamp(26px, 4.2vw, 38px); margin: 4px 0 16px; max-width: 24em; }
h2 { font-size: 22px; margin: 52px 0 12px; }
h3 { font-size: 16px; margin: 28px 0 6px; }
p, ul, dl, figure { margin: 0 0 14px; }
p, li, dd { max-width: 72ch; }
.kicker, .meta { color: var(--soft); font-size: 14px; margin: 0; }
.lede { font-size: clamp(18px, 2.2vw, 21px); line-height: 1.45; max-width: 56ch; }
.meta { margin-top: 18px; max-width: none; }
.warning { border-left: 3px solid var(--bad); padding: 2px 0 2px 14px; }
.verdicts { list-style: none; padding: 0; margin: 0; border-bottom: 1px solid var(--rule); }
.verdicts li {
  display: grid; grid-template-columns: 9.5em 9em 1fr; gap: 2px 18px; align-items: baseline;
  max-width: none; padding: 10px 0; border-top: 1px solid var(--rule);
}
.verdicts b { font-weight: 650; }
.verdicts b::before {
  content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 9px; background: var(--mark);
}
.word { font-size: 14px; font-weight: 600; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
.verdicts span:last-child { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; vertical-align: top; padding: 7px 24px 7px 0; font-weight: 400;
  border-bottom: 1px solid var(--rule); overflow-wrap: normal;
}
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-size: 14px; vertical-align: bottom; }
tbody th { font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
.claims { width: 100%; }
.claims tbody th { font-weight: 400; min-width: 12em; width: 36%; }
.claims td:last-child { min-width: 16em; width: 50%; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px 44px; }
.figures figure { display: flex; flex-direction: column; margin: 0; }
.figures h3 { margin-bottom: 8px; }
figure svg { display: block; width: 100%; height: auto; max-width: 620px; }
figure svg text { font-family: inherit; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--soft); font-size: 14px; line-height: 1.45; margin-top: 8px; }
details { margin: 18px 0 0; } summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 720px) {
  main { padding: 24px 16px 48px; }
  h2 { margin-top: 40px; }
  .figures { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  .verdicts li { grid-template-columns: auto 1fr; }
  .verdicts .word { justify-self: end; }
  .verdicts span:last-child { grid-column: 1 / -1; }
  th, td { padding-right: 18px; white-space: nowrap; }
  tbody th { position: sticky; left: 0; background: var(--ground); padding-right: 12px; }
  tbody th { max-width: 45vw; overflow: hidden; text-overflow: ellipsis; }
  .claims, .claims tbody, .claims tr, .claims th, .claims td { display: block; width: auto; }
  .claims thead { display: none; }
  .claims tr { padding: 10px 0; border-bottom: 1px solid var(--rule); }
  .claims tbody th, .claims tbody td { padding: 0; border: 0; width: auto; white-space: normal; }
  .claims tbody th { font-weight: 600; max-width: none; }
  .claims tbody td:last-child { width: auto; min-width: 0; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: 8px; }
}
@media print { h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
""")


def style_sheet() -> str:
    """The style sheet; it asks for nothing from outside."""
    return _CSS.substitute(light=palette(dark=False), dark=palette(dark=True)).strip()
