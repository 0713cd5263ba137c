"""The page's style sheet. Colours are Okabe and Ito's, darkened or lightened until text in them reads well."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fcfbf8; --card: #ffffff; --text: #23262b; --quiet: #646a73; --rule: #e4e1da; --grid: #ebe8e1;
  --c0: #0067a5; --c1: #c04f00; --c2: #00795a; --c3: #a23e7c; --c4: #946200; --c5: #2b7fae; --c6: #6b7079; --c7: #4b3f8f;
  --good: #00795a; --bad: #b3420a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1c1f23; --text: #e5e3de; --quiet: #9aa0a8; --rule: #30343a; --grid: #2a2e33;
    --c0: #5cb3f2; --c1: #ff9558; --c2: #3fc79d; --c3: #e694c2; --c4: #e9b44c; --c5: #8fd0f5; --c6: #a4abb4; --c7: #b3a7f0;
    --good: #3fc79d; --bad: #ff9558;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.55;
  font: 400 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 5rem; }
h1, h2 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Cambria, Georgia, serif; font-weight: 600; line-height: 1.15; }
h1 { font-size: clamp(1.9rem, 5vw, 2.7rem); margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.5rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 2rem 0 .5rem; }
h4 { font-size: .8rem; font-weight: 600; color: var(--quiet); margin: 0 0 .35rem; }
p { margin: .4rem 0 1rem; max-width: 44rem; text-wrap: pretty; }
section { border-top: 1px solid var(--rule); margin-top: 3rem; padding-top: 1.6rem; }
a { color: var(--c0); text-decoration-thickness: 1px; text-underline-offset: .18em; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1.4rem; font-size: .92rem; }
.absent, small { color: var(--quiet); }
.absent { font-size: .92rem; }
.alarm { border-left: 3px solid var(--bad); padding: .1rem 0 .1rem .9rem; }
dl.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1.4rem 0 0; }
dl.facts dt { font-size: .8rem; color: var(--quiet); }
dl.facts dd { margin: 0; font-weight: 500; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19.5rem), 1fr)); gap: 1rem; }
.card { margin: 0; padding: .9rem 1rem .8rem; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; min-width: 0; }
.card figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .4rem; }
.card p { font-size: .86rem; line-height: 1.45; color: var(--quiet); margin: .5rem 0 0; }
svg { display: block; width: 100%; overflow: visible; }
svg.chart { height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
.tick { fill: var(--quiet); } .end { text-anchor: end; } .middle { text-anchor: middle; }
.label { font-weight: 600; fill: var(--c); }
.grid { stroke: var(--grid); stroke-width: 1; }
.zero { stroke: var(--quiet); stroke-width: 1; }
.bound { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 4 4; }
.line { fill: none; stroke: var(--c); stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.pale { stroke-width: 1; opacity: .32; }
.dot, .fill { fill: var(--c); }
.bar { stroke: var(--c); stroke-width: 5; stroke-linecap: round; opacity: .4; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.forest { font-size: .92rem; font-variant-numeric: tabular-nums; }
.forest .row { display: grid; grid-template-columns: 23.5rem minmax(6rem, 1fr) 12.6rem; gap: 0 1.2rem; align-items: center; }
.forest .value { text-align: right; color: var(--quiet); white-space: nowrap; } .forest .value b { color: var(--text); }
svg.interval { height: 1.9rem; } svg.axis { height: 1.2rem; }
@media (max-width: 60rem) {
  .forest .row { grid-template-columns: 1fr auto; row-gap: 0; }
  .forest .name { grid-row: 1; } .forest .value { grid-row: 1; grid-column: 2; }
  .forest svg { grid-column: 1 / -1; margin-bottom: .3rem; } svg.interval { height: 1.3rem; }
  .forest .last span { display: none; }
  .forest { font-size: .86rem; } .forest .row { column-gap: .6rem; }
  .pairs .name { grid-column: 1 / -1; } .pairs .value { grid-row: 2; grid-column: 1 / -1; text-align: left; }
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem 1.1rem .34rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th:last-child, td:last-child { padding-right: 0; }
.card table { width: 100%; } .card th, .card td { padding-right: .6rem; } .card th:last-child, .card td:last-child { padding-right: 0; }
thead th { font-size: .8rem; font-weight: 600; color: var(--quiet); } tbody th { font-weight: 400; }
td small { display: block; font-size: .76rem; line-height: 1.2; }
details { margin: 1rem 0; } summary { cursor: pointer; }
.rollout { border: 1px solid var(--rule); border-radius: 8px; background: var(--card); padding: .7rem 1rem; margin: .7rem 0; }
.rollout summary { display: flex; flex-wrap: wrap; gap: .1rem 1rem; align-items: baseline; }
.rollout .user::before { content: "▸"; display: inline-block; width: 1.1em; } .rollout[open] .user::before { content: "▾"; }
.rollout .user { color: var(--quiet); } .rollout .target { font-weight: 600; overflow-wrap: anywhere; }
.rollout .rank { margin-left: auto; font-variant-numeric: tabular-nums; }
.better { color: var(--good); } .worse { color: var(--bad); } .same { color: var(--quiet); }
.rollout > div { margin-top: .9rem; }
.rollout ol { margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem .45rem; list-style: none; font-size: .86rem; }
.rollout li { border: 1px solid var(--rule); border-radius: 5px; padding: .05rem .45rem; overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem 2rem; }
blockquote { margin: 0 0 .5rem; font-size: .92rem; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--text); }
.answer { margin: 0; } .answer + p { margin: .1rem 0 0; }
pre { overflow-x: auto; font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; padding: .9rem 1rem; }
footer { margin-top: 3rem; font-size: .86rem; color: var(--quiet); }
@media print { details > * { display: block; } .card { break-inside: avoid; } }
"""
