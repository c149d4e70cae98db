"""RUN/report.html: what a run learned, how well, and what may be said; one file without a script.

The page brings its figures, its style and its audio along, and forbids itself every request and
script by its own policy, so that it can be sent to others, opened anywhere and read on a phone.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from mgc_dist.files import replace_text
from mgc_dist.report import findings, provenance
from mgc_dist.report.dossier import Dossier
from mgc_dist.report.markup import Html, join, note, tag

log = logging.getLogger(__name__)

NAME = "report.html"

_PARTS: tuple[Callable[[Dossier], Html | None], ...] = (
    findings.verdict,
    findings.details,
    provenance.data,
    provenance.training,
    provenance.curves,
    findings.confusion,
    findings.by_genre,
    findings.calibration,
    findings.subgroups,
    provenance.bias,
    findings.mistakes,
    provenance.cost,
    provenance.commands,
    findings.conclusions,
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; media-src data:; base-uri 'none'"


def write(run: Path, shards: Path | None = None) -> Path:
    """Write the page of a run; parts whose files are missing or damaged are named in it.

    Args:
        run: the run folder.
        shards: that were evaluated; those of the training are found by config.yaml.

    Returns:
        RUN/report.html.
    """
    path = run / NAME
    replace_text(path, _page(Dossier(run, shards)))
    return path


def attempt(run: Path, shards: Path | None = None) -> None:
    """Write the page of a run that must not fail for its page: an error becomes a warning."""
    try:
        log.info("report: %s", write(run, shards))
    except Exception as error:
        log.warning("no %s: %s: %s", run / NAME, type(error).__name__, error)


def _page(found: Dossier) -> str:
    name = found.run.resolve().name
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{name}: report"),
        tag("style", Html(STYLE)),
    )
    body = tag(
        "main",
        tag("header", tag("p", "mgc_dist report"), tag("h1", name)),
        *(_part(part, found) for part in _PARTS),
    )
    page = tag("html", tag("head", *head), tag("body", body), lang="en")
    return join(Html("<!doctype html>\n"), page, Html("\n"))


def _part(part: Callable[[Dossier], Html | None], found: Dossier) -> Html | None:
    """One part; files of another version must not cost the others."""
    try:
        return part(found)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        log.warning("report without %s: %s: %s", part.__name__, type(error).__name__, error)
        return note(f"The part {part.__name__} could not be made: its files are not as expected.")


STYLE = """
:root{--page:#fbfaf7;--box:#fff;--ink:#1d2129;--soft:#5b6370;--rule:#dfdcd4;--main:#1f5fa8;
--second:#b4560f;--on:#fff;--warn:#8a4b00}
@media(prefers-color-scheme:dark){:root{--page:#14171c;--box:#1c2027;--ink:#e8e6e1;--soft:#a2a9b4;
--rule:#363c46;--main:#6fb0f5;--second:#f0a35e;--on:#0c1016;--warn:#f2b765}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
overflow-wrap:anywhere}
main{max-width:56rem;margin:0 auto;padding:1rem 1rem 4rem}
header p{margin:0;color:var(--soft)}
h1{margin:.1rem 0 1rem;font-size:1.9rem;line-height:1.2}
h2{margin:0 0 .7rem;font-size:1.25rem;line-height:1.3}
h3{margin:0 0 .4rem;font-size:1rem}
section{margin-top:2.2rem;padding-top:1.2rem;border-top:1px solid var(--rule)}
p,ul{margin:.6rem 0;max-width:44rem}ul{padding-left:1.2rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem}
.tiles div,article,figure,pre{background:var(--box);border:1px solid var(--rule);border-radius:8px}
.tiles div{padding:.7rem .9rem;display:flex;flex-direction:column}
.tiles strong{font-size:1.7rem;line-height:1.2;font-variant-numeric:tabular-nums}
small,.note,figcaption span,dt{color:var(--soft)}
.tiles small{font-size:.85rem}
.note{font-style:italic}
.warning{color:var(--warn)}
figure{margin:.8rem 0;padding:.8rem;max-width:31rem;min-width:0}
figcaption{margin-bottom:.4rem}figcaption span{display:block;font-size:.9rem}
.figures,.cards{display:grid;gap:.8rem;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
.figures figure{margin:0}
article{padding:.8rem;min-width:0}
audio{width:100%;margin-top:.4rem}
.scroll{overflow-x:auto;max-width:100%}
section>.scroll,details>.scroll{background:linear-gradient(to right,var(--page) 40%,transparent)
0 0/3rem 100% no-repeat local,linear-gradient(to left,var(--page) 40%,transparent)
100% 0/3rem 100% no-repeat local,linear-gradient(to right,var(--rule),transparent)
0 0/.9rem 100% no-repeat scroll,linear-gradient(to left,var(--rule),transparent)
100% 0/.9rem 100% no-repeat scroll}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;
overflow-wrap:normal}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600}th:first-child{text-align:left;padding-left:0}
thead th{color:var(--soft);font-weight:500}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));
gap:.35rem 1.6rem;margin:.6rem 0}
dl div{min-width:0;display:grid;grid-template-columns:8rem minmax(0,1fr);gap:.6rem}dd{margin:0}
pre{padding:.8rem;overflow-x:auto;font-size:.85rem;line-height:1.7}
details{margin:.8rem 0}summary{cursor:pointer;color:var(--main);padding:.2rem 0}
svg{display:block;width:100%;height:auto;font-size:12px;fill:var(--ink)}
.small{font-size:11px;fill:var(--soft)}.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--rule)}.level{stroke:var(--soft);stroke-dasharray:5 4}
.mark{stroke:var(--soft);stroke-dasharray:2 3}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.main{stroke:var(--main)}.line.second{stroke:var(--second)}
.line.faint{stroke:var(--main);stroke-width:1;opacity:.45}
.dot.main,.bar{fill:var(--main)}.dot.second{fill:var(--second)}.dot.faint{fill:var(--main)}
.bubble{fill:var(--main);fill-opacity:.35;stroke:var(--main)}
.bar{fill-opacity:.55}.whisker{stroke:var(--ink);stroke-width:1.3;fill:none}
.diamond{fill:var(--second);stroke:var(--box)}
.cell{fill:var(--second)}.cell.right{fill:var(--main)}text.on{fill:var(--on)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.2rem 0;font-size:.85rem;
color:var(--soft)}
.key{display:inline-block;width:1.2rem;height:.25rem;margin-right:.4rem;vertical-align:middle;
background:var(--main)}.key.second{background:var(--second)}.key.faint{opacity:.45}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
