"""How the page looks: one column on a telephone, two on a screen, light and dark."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5b6676; --line: #dfe4ea; --code: #eef1f5;
  --accent: #2f5fd0; --warn: #b45309; --warn-soft: #fef4e2; --good: #17753a; --good-soft: #e3f5e8;
  --bad: #b3261e; --bad-soft: #fdeceb; --prompt: #5c6b8a; --prompt-soft: #eef1f8; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #11151b; --card: #191f28; --ink: #e6eaf0; --soft: #9aa6b5; --line: #2b3440; --code: #242c37;
  --accent: #86a8ff; --warn: #f3b354; --warn-soft: #33291a; --good: #6fd08f; --good-soft: #182d20;
  --bad: #ff9c93; --bad-soft: #361f1f; --prompt: #a9b7d3; --prompt-soft: #202836; } }
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
footer { margin-top: 48px; color: var(--soft); font-size: .85rem; }
@media (max-width: 700px) { main { padding: 24px 16px 48px; } .two { grid-template-columns: minmax(0, 1fr); }
  h1 { font-size: 1.3rem; } h2 { margin-top: 34px; } .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile { padding: 12px 14px; } .tile b { font-size: 1.3rem; }
  .feature { grid-template-columns: minmax(0, 1fr) 64px; } .feature .plot { grid-column: 1 / 3; grid-row: 2; }
  .feature .sign { grid-column: 1 / 3; } }
@media print { body { background: none; } .card { break-inside: avoid; } .part { max-height: none; } }
"""
