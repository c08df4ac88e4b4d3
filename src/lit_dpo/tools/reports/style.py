"""How the page looks: one column on a telephone, two on a screen, light and dark."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5b6676; --line: #dfe4ea; --code: #eef1f5;
  --accent: #2f5fd0; --warn: #b45309; --warn-soft: #fef4e2; --good: #17753a; --good-soft: #e3f5e8;
  --bad: #b3261e; --bad-soft: #fdeceb; --prompt: #5c6b8a; --prompt-soft: #eef1f8;
  --a0: #2f5fd0; --a1: #d0640a; --a2: #17855a; --a3: #c42f55; --a4: #7a4fc9; --a5: #0c8696;
  --a6: #8a5a3c; --a7: #b93a9a; --a8: #74760f; --a9: #56657a; --a10: #3f95d6; --a11: #55961c; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #11151b; --card: #191f28; --ink: #e6eaf0; --soft: #9aa6b5; --line: #2b3440; --code: #242c37;
  --accent: #86a8ff; --warn: #f3b354; --warn-soft: #33291a; --good: #6fd08f; --good-soft: #182d20;
  --bad: #ff9c93; --bad-soft: #361f1f; --prompt: #a9b7d3; --prompt-soft: #202836;
  --a0: #86a8ff; --a1: #f5a35c; --a2: #5fd0a0; --a3: #ff8ba6; --a4: #bb9cff; --a5: #58cfdd;
  --a6: #d3a182; --a7: #f08fd6; --a8: #cfd05c; --a9: #a9b6c8; --a10: #8fcbff; --a11: #a5dd6c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 44px 0 14px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; } .eyebrow { color: var(--accent); font-weight: 600; font-size: .85rem; margin-bottom: 6px; }
.soft { color: var(--soft); } .small { font-size: .875rem; } .wrap { overflow-wrap: anywhere; }
.note { margin-top: 8px; padding: 8px 12px; border-radius: 8px; background: var(--code); font-size: .9rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--code);
  padding: 0 .35em; border-radius: 4px; overflow-wrap: anywhere; display: inline-block; max-width: 100%; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile.warn b { color: var(--warn); } .tile.fine b { color: var(--good); }
.card + .card, .two + .card { margin-top: 12px; }
.finding { border-left: 4px solid var(--warn); }
.finding header { display: flex; justify-content: space-between; gap: 16px; align-items: baseline; }
.finding .share { font-size: 1.25rem; font-weight: 650; color: var(--warn); white-space: nowrap; }
.remedy { margin: 10px 0 0; padding: 8px 12px; background: var(--warn-soft); border-radius: 8px; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
ul { margin: 8px 0 0; padding-left: 18px; } li { margin: 2px 0; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
.two .card + .card { margin-top: 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: .85rem; white-space: nowrap; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; padding-right: 0; padding-left: 12px; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.plot { display: block; width: 100%; } .plot.tall { height: 150px; border-bottom: 1px solid var(--line); }
.plot.thin { height: 22px; } .plot.line { height: 8px; border-radius: 4px; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; margin-top: 4px; }
.chosen { fill: var(--good); fill-opacity: .8; } .rejected { fill: var(--bad); fill-opacity: .75; }
.prompt { fill: var(--prompt); fill-opacity: .75; } .track { fill: var(--code); } .bar { fill: var(--accent); }
.interval { fill: var(--accent); fill-opacity: .3; } .middle { fill: var(--accent); }
.chance { fill: var(--soft); fill-opacity: .6; } .threshold { fill: var(--warn); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 6px 0 14px; }
.key.c { background: var(--good); } .key.r { background: var(--bad); } .key.t { background: var(--warn); width: 3px; }
.key.h { background: var(--soft); width: 3px; }
.feature { display: grid; grid-template-columns: 130px minmax(0, 1fr) 64px; gap: 4px 16px;
  align-items: center; padding: 9px 0; border-bottom: 1px solid var(--line); }
.feature:last-of-type { border-bottom: 0; }
.feature .sign { grid-column: 2 / 4; } .feature .right { text-align: right; font-variant-numeric: tabular-nums; }
.part { white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px 12px; border-radius: 8px; margin-top: 8px;
  font-size: .92rem; max-height: 22rem; overflow-y: auto; }
.part.p { background: var(--prompt-soft); color: var(--prompt); }
.part.c { background: var(--good-soft); color: var(--good); }
.part.r { background: var(--bad-soft); color: var(--bad); }
.part.o { background: var(--code); } .role { font-size: .8rem; font-weight: 600; margin-top: 12px; color: var(--soft); }
main.wide { max-width: 1200px; } .verdict { max-width: 62rem; overflow-wrap: anywhere; }
.under { display: block; font-size: .78rem; } .right { text-align: right; } pre { overflow-x: auto; }
pre code { background: none; padding: 0; overflow-wrap: normal; font-size: .85rem; }
h2 + .card, p + .card, p + .panels, .legend + .panels { margin-top: 12px; } .card h3 + * { margin-top: 8px; }
.pinned { padding: 8px 18px; } .pinned table { width: auto; min-width: 100%; }
.pinned td.number, .pinned th.number { padding-left: 18px; }
.pinned thead th { vertical-align: bottom; white-space: normal; line-height: 1.25; }
.pinned th:first-child, .pinned td:first-child { position: sticky; left: 0; background: var(--card); z-index: 1;
  min-width: 180px; max-width: 260px; overflow-wrap: anywhere; }
.who { white-space: normal; } .who .under { padding-left: 36px; }
.rank { display: inline-block; min-width: 1.4em; margin-right: 4px; color: var(--soft); text-align: right; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; background: var(--of);
  margin-right: 6px; }
.matrix td.own { outline: 2px solid var(--soft); outline-offset: -3px; border-radius: 6px; }
.matrix td.number { padding-right: 10px; } .matrix th.number { padding-right: 10px; }
.a0 { --of: var(--a0); } .a1 { --of: var(--a1); } .a2 { --of: var(--a2); } .a3 { --of: var(--a3); }
.a4 { --of: var(--a4); } .a5 { --of: var(--a5); } .a6 { --of: var(--a6); } .a7 { --of: var(--a7); }
.a8 { --of: var(--a8); } .a9 { --of: var(--a9); } .a10 { --of: var(--a10); } .a11 { --of: var(--a11); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0; margin: 8px 0 0; }
.legend li { outline-offset: 2px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px; }
.panels.two-wide { grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure { margin: 0; min-width: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 12px 14px; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: .9rem; font-weight: 600; }
figcaption .soft { font-weight: 400; }
.plane { position: relative; height: 170px; margin: 12px 8px 34px 42px; }
.plane svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; display: block; }
.plane path { vector-effect: non-scaling-stroke; fill: none; }
.plane .grid { stroke: var(--line); stroke-width: 1; } .plane .zero { stroke: var(--soft); stroke-width: 1.5; }
.plane .line { stroke: var(--of); stroke-width: 1.8; stroke-linejoin: round; } .plane .dashed { stroke-dasharray: 5 4; }
.plane .band { fill: var(--of); fill-opacity: .16; }
.plane .dot { stroke: var(--of); stroke-width: 11; stroke-linecap: round; } .plane .small-dot { stroke-width: 7; }
.plane .whisker { stroke: var(--of); stroke-width: 1.5; stroke-opacity: .6; } .plane .open { stroke-opacity: .35; }
.plane .pareto { --of: var(--soft); stroke-dasharray: 2 4; }
.plane .chosen { fill: var(--good); } .plane .rejected { fill: var(--bad); } .plane .prompt { fill: var(--prompt); }
.tick, .name, .mark, .row-name { position: absolute; font-size: .75rem; line-height: 1; white-space: nowrap; }
.tick, .plane .name { color: var(--soft); font-variant-numeric: tabular-nums; }
.tick.x { top: calc(100% + 6px); transform: translateX(-50%); }
.tick.y { right: calc(100% + 6px); transform: translateY(-50%); }
.name.x { top: calc(100% + 22px); right: 0; } .name.y { bottom: calc(100% + 4px); left: 0; }
.mark { color: var(--of); transform: translate(0, -50%); text-shadow: 0 0 2px var(--card), 0 0 2px var(--card),
  0 0 3px var(--card), 0 0 4px var(--card); }
.mark.left { transform: translate(-100%, -50%); }
.mark.above, .mark.below { transform: translate(-50%, -50%); } .on-narrow { display: none; }
.plane.high { height: 400px; margin-top: 20px; }
.plane.rows { height: calc(26px * var(--rows)); margin-bottom: 44px; margin-left: 230px; }
.row-name { right: calc(100% + 12px); transform: translateY(-50%); max-width: 215px; overflow: hidden;
  text-overflow: ellipsis; line-height: 1.3; }
.ridge-row { display: grid; grid-template-columns: 200px minmax(0, 1fr) 56px; gap: 0 14px; align-items: end; }
.plane.ridge { height: 42px; margin: 8px 0 0; } .ridge-row:not(.last) .tick { display: none; }
.ridge-row.last { align-items: start; } .ridge-row.last .plane { margin-bottom: 34px; }
.ridge-row.last > :not(.plane) { padding-top: 28px; }
.said { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 0 14px; }
.said > * { min-width: 0; } .said .part { margin-top: 4px; } .failed { border-left: 4px solid var(--bad); }
.card > .role:first-child { margin-top: 0; } .plain > .card { margin-top: 12px; }
.defined td:first-child { white-space: nowrap; }
main:has(.arms .arm:is(:hover, :focus)) .plane .arm { opacity: .12; }
main:has(.arms .a0:is(:hover, :focus)) .plane .a0,
main:has(.arms .a1:is(:hover, :focus)) .plane .a1,
main:has(.arms .a2:is(:hover, :focus)) .plane .a2,
main:has(.arms .a3:is(:hover, :focus)) .plane .a3,
main:has(.arms .a4:is(:hover, :focus)) .plane .a4,
main:has(.arms .a5:is(:hover, :focus)) .plane .a5,
main:has(.arms .a6:is(:hover, :focus)) .plane .a6,
main:has(.arms .a7:is(:hover, :focus)) .plane .a7,
main:has(.arms .a8:is(:hover, :focus)) .plane .a8,
main:has(.arms .a9:is(:hover, :focus)) .plane .a9,
main:has(.arms .a10:is(:hover, :focus)) .plane .a10,
main:has(.arms .a11:is(:hover, :focus)) .plane .a11 { opacity: 1; }
footer { margin-top: 48px; color: var(--soft); font-size: .85rem; }
@media (max-width: 700px) { main { padding: 24px 16px 48px; } .two { grid-template-columns: minmax(0, 1fr); }
  h1 { font-size: 1.3rem; } h2 { margin-top: 34px; } .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile { padding: 12px 14px; } .tile b { font-size: 1.3rem; }
  .feature { grid-template-columns: minmax(0, 1fr) 64px; } .feature .plot { grid-column: 1 / 3; grid-row: 2; }
  .feature .sign { grid-column: 1 / 3; }
  .panels, .panels.two-wide { grid-template-columns: minmax(0, 1fr); } .pinned { padding: 4px 14px; }
  .pinned th:first-child, .pinned td:first-child { min-width: 110px; max-width: 150px; }
  .on-narrow { display: inline; } .on-wide { display: none; } .plane.rows { margin-left: 96px; }
  .row-name { max-width: 88px; } .ridge-row { grid-template-columns: 92px minmax(0, 1fr) 48px; gap: 0 8px; } }
@media print { body { background: none; } .card { break-inside: avoid; } .part { max-height: none; } }
"""
