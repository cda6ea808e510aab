"""The look that all pages of this project share: one file each, light or dark, nothing loaded from anywhere else."""

from __future__ import annotations

from html import escape

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c1d21;--muted:#62656e;--rule:#e3e4e8;
--champion:#1f6feb;--challenger:#d9660a;--good:#1a7f45;--bad:#c4302b;--warn:#94620a;--chip:#eef0f3}
@media (prefers-color-scheme:dark){:root{--bg:#131519;--card:#1b1e24;--ink:#e8e9ec;--muted:#9ba0ab;--rule:#2e323a;
--champion:#6ea8fe;--challenger:#ff9d57;--good:#56c98a;--bad:#ff7b74;--warn:#e3b556;--chip:#272b33}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:36px 24px 72px}h1{font-size:27px;line-height:1.25;margin:0 0 8px}
h2{font-size:19px;margin:40px 0 12px}h3{font-size:15px;margin:0 0 8px}p{margin:0 0 10px;max-width:76ch}
.muted{color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:22px 0}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px}
.tile b{display:block;font-size:26px;line-height:1.2;font-weight:650}.tile span{color:var(--muted);font-size:13px}
svg{width:100%;height:auto;display:block}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:13.5px}th,td{padding:7px 8px;text-align:left;white-space:nowrap;
border-bottom:1px solid var(--rule)}tr:last-child td{border-bottom:0}
th{color:var(--muted);font-weight:600;font-size:13px;white-space:normal;vertical-align:bottom}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.chip{display:inline-block;padding:1px 9px;border-radius:99px;background:var(--chip);font-size:13px;font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}ul{margin:0 0 10px;padding-left:20px}
"""


def document(title: str, body: str, style: str = "") -> str:
    """A page of ``body``, which is HTML already; ``style`` is added to :data:`STYLE`."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f"<style>{STYLE}{style}</style></head><body><main>{body}</main></body></html>"
    )
