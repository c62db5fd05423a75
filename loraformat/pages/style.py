"""How a report looks, in light and dark, on a screen and on paper. Every rule begins under ``.lf``, for notebooks."""

__all__ = ["STYLE"]

STYLE = """
.lf { color-scheme: light dark; --text: #1b1f24; --soft: #59636e; --line: #d5dae0; --card: #f6f8fa; --page: #fff;
  --cold: #f1f5f9; --hot: #3f93e8; --bad: #b42318; --warn: #8a5a00; --good: #1a7f37; --accent: #0b5cad;
  color: var(--text); background: var(--page); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans",
  sans-serif; }
@media (prefers-color-scheme: dark) { .lf { --text: #e6edf3; --soft: #9aa7b4; --line: #30363d; --card: #161b22;
  --page: #0d1117; --cold: #1a212b; --hot: #1b66b8; --bad: #ff8a80; --warn: #e3b341;
  --good: #57c96f; --accent: #6cb6ff; } }
body.lf { margin: 0; }
.lf main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
.lf h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
.lf h2 { font-size: 18px; margin: 36px 0 10px; }
.lf p { margin: 6px 0; } .lf .soft { color: var(--soft); } .lf bdi { overflow-wrap: anywhere; }
.lf dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 10px; margin: 18px 0 0; }
.lf dl > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 9px 13px; }
.lf dt { color: var(--soft); font-size: 12.5px; } .lf dd { margin: 0; overflow-wrap: anywhere; }
.lf .scroll { overflow: auto; max-height: 82vh; border: 1px solid var(--line); border-radius: 8px; }
.lf .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.lf table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: 13px; }
.lf th, .lf td { padding: 4px 9px; text-align: left; vertical-align: top; color: var(--text); background: var(--page); }
.lf thead th { position: sticky; top: 0; background: var(--card); border-bottom: 1px solid var(--line);
  vertical-align: bottom; font-weight: 600; z-index: 2; }
.lf tbody th { font-weight: 400; } .lf .heat tbody th { position: sticky; left: 0; z-index: 1; white-space: nowrap; }
.lf .heat thead th { min-width: 62px; max-width: 130px; text-align: center; }
.lf .heat bdi { overflow-wrap: break-word; }
.lf .heat thead th:first-child { left: 0; z-index: 3; text-align: left; min-width: 120px; }
.lf .heat td, .lf .heat tbody th { vertical-align: middle; } .lf .heat td { text-align: center; padding: 5px 6px; border: 1px solid var(--page);
  background: color-mix(in oklab, var(--hot) calc(var(--v, 0) * 100%), var(--cold)); }
.lf .heat td.none { background: var(--page); color: var(--soft); }
.lf .number { text-align: right; white-space: nowrap; } .lf .list td, .lf .list tbody th { border-top: 1px solid var(--line); }
.lf .list { width: 100%; }
.lf .scale { display: flex; align-items: center; gap: 10px; margin: 8px 0 0; font-size: 13px; color: var(--soft); }
.lf .scale span { width: 180px; height: 10px; border-radius: 5px; border: 1px solid var(--line);
  background: linear-gradient(90deg in oklab, var(--cold), var(--hot)); }
.lf .figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px; }
.lf figure { margin: 0; padding: 10px 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.lf figcaption { font-size: 13px; overflow-wrap: anywhere; } .lf figure p { font-size: 13px; margin: 2px 0 0; } .lf svg { display: block; width: 100%; max-width: 320px; height: auto; }
.lf .band { fill: var(--accent); opacity: .18; } .lf .mean { fill: none; stroke: var(--accent); stroke-width: 2; }
.lf .axis { stroke: var(--line); } .lf svg text { fill: var(--soft); font-size: 11px; }
.lf ul.problems { list-style: none; padding: 0; margin: 0; }
.lf .problems li { border-left: 4px solid var(--warn); background: var(--card); padding: 7px 12px; margin: 0 0 8px;
  border-radius: 0 8px 8px 0; overflow-wrap: anywhere; }
.lf .problems li.error { border-color: var(--bad); } .lf .problems b { font-weight: 600; }
.lf .error b { color: var(--bad); } .lf .warning b { color: var(--warn); } .lf .good { color: var(--good); }
.lf summary { cursor: pointer; color: var(--accent); padding: 4px 0; } .lf code { font-size: 13px; }
@media print { .lf .scroll { max-height: none; overflow: visible; } }
"""
