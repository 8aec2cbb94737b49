"""The style sheet of a page: light and dark, from a phone's width on."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#20242a;--soft:#646b76;--rule:#e4e6e9;
--good:#2f7d4f;--bad:#b3434b;--tint:31,119,168;--mark:#fbe7b8;--c0:#8a919c;--c1:#d98324;
--c2:#1f77a8;--c3:#4b9b5f;--c4:#b4536f;--c5:#7a63b0;--c6:#a88c2e;--c7:#4aa3a2}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1b1f25;--ink:#e3e6ea;--soft:#98a0ac;
--rule:#2c323b;--good:#7cc799;--bad:#e58b91;--tint:90,174,222;--mark:#5b4714;--c0:#8b93a1;
--c1:#e69f4c;--c2:#5aaede;--c3:#74c08a;--c4:#dd8aa2;--c5:#a592dc;--c6:#d0b65c;--c7:#74c9c7}}
*{box-sizing:border-box}
html{background:var(--bg);color:var(--ink);-webkit-text-size-adjust:100%;
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
body{margin:0}main{max-width:1120px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:26px;font-weight:650;letter-spacing:-.01em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;font-weight:620;margin:44px 0 6px}
h3{font-size:14px;font-weight:600;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:4px 0 14px;max-width:76ch}.soft,figcaption,.note{color:var(--soft)}.note{font-size:13px}
.lead{font-size:17px;margin-top:14px}
.grid2,.grid3{display:grid;gap:16px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.grid3{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.grid2,.grid3{align-items:start}.stack{display:grid;gap:16px;grid-template-columns:minmax(0,1fr)}
.card,figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:14px 16px;margin:0;min-width:0}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));
margin:8px 0 18px}
.tile b{display:block;font-size:20px;font-weight:620;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
figcaption{font-size:13px;margin-bottom:4px;overflow-wrap:anywhere}
figcaption b{color:var(--ink);font-weight:600}.chart{width:100%}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;border-bottom:1px solid var(--rule);text-align:right;font-size:14px}
th{font-weight:550;color:var(--soft);font-size:13px}
th:first-child,td:first-child{text-align:left}tr:last-child td{border-bottom:0}
td+td{white-space:pre}.words td+td{white-space:normal}.scroll{overflow-x:auto}
.words td{text-align:left;overflow-wrap:anywhere}
.words td:first-child{width:30%}.words th{text-align:left}
.cross td{text-align:center;border:1px solid var(--rule);padding:12px 6px;font-size:17px}
.cross th{text-align:center;border:0}.cross small{display:block;color:var(--soft);font-size:12px}
.shortcut{outline:2px solid var(--bad);outline-offset:-2px}
details{margin:16px 0}summary{cursor:pointer;font-weight:600;padding:6px 0}
details>summary~*{margin-top:8px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,monospace}
.filters{display:flex;flex-wrap:wrap;gap:10px;align-items:center;margin:0 0 14px}
.filters[hidden],.sample[hidden]{display:none}
.filters label{display:flex;gap:6px;align-items:center;color:var(--soft);font-size:13px}
input,select,button{font:inherit;font-size:14px;color:var(--ink);background:var(--card);
border:1px solid var(--rule);border-radius:7px;padding:5px 9px;max-width:100%;min-width:0}
select{max-width:220px}button{cursor:pointer}output{color:var(--soft);font-size:13px}
.sample{margin:0 0 16px}
.sample header{display:flex;flex-wrap:wrap;gap:12px 16px;align-items:flex-start;margin-bottom:10px}
.sample header>div{flex:1 1 240px;min-width:0}
.sample img{max-width:min(100%,256px);max-height:200px;height:auto;border-radius:6px;
border:1px solid var(--rule);background:#fff}
.pixels{image-rendering:pixelated}
.said{border-top:1px solid var(--rule);padding-top:8px;min-width:0}
.said.found{box-shadow:-3px 0 0 -1px var(--c2);padding-left:10px}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 12px;margin:0;
font-size:14px}
dt{color:var(--soft)}dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
mark{background:var(--mark);color:inherit;border-radius:3px}
.tag{font-size:12.5px;font-weight:600;margin-bottom:4px}
.tag span{margin-right:8px;white-space:nowrap;display:inline-block}
.good{color:var(--good)}.bad{color:var(--bad)}
@media(max-width:560px){main{padding:24px 14px 60px}.card,figure{padding:12px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(140px,1fr))}.tile b{font-size:18px}
.sample dl{grid-template-columns:minmax(0,1fr)}.sample dd{margin-bottom:6px}
.filters input[type=search]{flex:1 1 100%}.words td:first-child{width:50%}}
@media print{html{background:#fff}figure,.card{break-inside:avoid}}
"""
