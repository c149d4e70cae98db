"""The report in a real browser: nothing fails, nothing is fetched, nothing overflows on a phone."""

import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import bias_report, write_evaluation, write_training
from test_report import measured, told

from mgc_dist.data import manifest
from mgc_dist.report import canvas, evaluation, figures, gallery, page
from mgc_dist.report.figures import Bar
from mgc_dist.report.section import Drawing, Section, Table, Tile

EVIL = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not browser.COMMAND:
        pytest.skip("NO BROWSER: apt-get install chromium; the report is not looked at")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def evaluated(shards: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a report may show."""
    folder = tmp_path_factory.mktemp("page")
    copy = Path(shutil.copytree(shards, folder / "shards"))
    report = bias_report(list(manifest.read(copy).genres))
    (copy / "bias" / "report.json").write_text(json.dumps(report))
    write_training(folder / "run", copy)
    write_evaluation(folder / "run", copy)
    page.write(folder / "run", copy)
    return folder / "run"


def complaints(opened: Browser) -> list[str]:
    """Errors, console messages, and requests but for the page and what it holds itself."""
    opened.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
    found = []
    for event in opened.events:
        method, params = event["method"], event.get("params", {})
        if method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            found.append(json.dumps(params)[:300])
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith("data:") and params["type"] != "Document":
                found.append(url[:300])
    return found


@pytest.mark.parametrize(("width", "dark"), [(390, False), (320, True), (1280, True)])
def test_everything_is_shown_at_any_width(
    chromium: Browser, evaluated: Path, width: int, dark: bool
) -> None:
    chromium.open(evaluated / page.NAME, width=width, dark=dark)
    chromium.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.value("innerWidth") == width
    assert chromium.value("document.documentElement.scrollWidth") <= width
    sizes = chromium.value(
        "[...document.querySelectorAll('svg')].map(s => [s.getAttribute('aria-label'), "
        "s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    wrong = chromium.value("document.querySelectorAll('article').length")
    assert len(sizes) == 3 + 1 + 1 + 1 + 1 + 1 + wrong, [label for label, _, _ in sizes]
    for label, wide, high in sizes:
        assert label
        assert wide > 200
        assert high > 40
    assert chromium.value("document.querySelectorAll('h2').length") == 14
    outside = chromium.value(
        "[...document.querySelectorAll('svg text')].filter(t => {"
        "const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();"
        "return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1"
        " || a.bottom > b.bottom + 1}).map(t => t.textContent)"
    )
    assert outside == [], "text that its figure cuts off"
    assert complaints(chromium) == []


def test_dark_and_light_differ_and_can_be_read(chromium: Browser, evaluated: Path) -> None:
    contrast = (
        "(() => {const light = c => {const [r, g, b] = c.match(/\\d+/g).map(x => x / 255)"
        ".map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);"
        "return .2126 * r + .7152 * g + .0722 * b};"
        "const page = getComputedStyle(document.body).backgroundColor;"
        "return ['body', 'figcaption span', '.note', 'summary', 'svg text'].filter(name =>"
        "[...document.querySelectorAll(name)].some(e => {"
        "const s = getComputedStyle(e), c = e.ownerSVGElement ? s.fill : s.color;"
        "if (/^\\d+$/.test(e.textContent) && e.closest('svg[aria-label^=Confusion]'))"
        " return false;"  # on a cell of its own
        "const [a, b] = [light(c), light(page)].sort((x, y) => y - x);"
        "return (a + .05) / (b + .05) < 4.5}))})()"
    )
    pages = []
    for dark in (False, True):
        chromium.open(evaluated / page.NAME, width=390, dark=dark)
        assert chromium.value(contrast) == [], "WCAG AA wants 4.5 to 1"
        pages.append(chromium.value("getComputedStyle(document.body).backgroundColor"))
    assert pages[0] != pages[1]


def test_the_players_hold_three_seconds_of_sound(chromium: Browser, evaluated: Path) -> None:
    chromium.open(evaluated / page.NAME, width=390)
    durations = chromium.value(
        "Promise.all([...document.querySelectorAll('audio')].map(a => new Promise((done, fail) =>"
        " {a.onloadedmetadata = () => done(a.duration); a.onerror = () => fail(a.error.message);"
        " a.preload = 'auto'; a.load()})))"
    )
    assert durations
    assert durations == pytest.approx([0.5] * len(durations), abs=0.01)


def test_names_of_strangers_stay_text(chromium: Browser, evaluated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    for path in (
        run / "evaluation" / "test.json",
        run / "predictions" / "test.jsonl",
        run / "metrics.jsonl",
        run / "env.json",
    ):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        text = "\n".join(json.dumps(_poisoned(line)) for line in lines)
        path.write_text(text + "\n")
    page.write(run)
    chromium.open(run / page.NAME, width=390)
    assert chromium.value("document.querySelectorAll('script, img, iframe, object').length") == 0
    assert chromium.value("document.title") == "run: report"
    assert "<img src=x" in chromium.value("document.body.innerText"), "shown as it is"
    assert chromium.value("document.documentElement.scrollWidth") <= 390
    assert complaints(chromium) == []


def _poisoned(value: object) -> object:
    """The same with every genre, track and version renamed."""
    if isinstance(value, dict):
        named = {"blues": EVIL, "torch": EVIL}
        return {named.get(k, k): _poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_poisoned(item) for item in value]
    return EVIL if value in ("blues", "2.11.0", "0123abcd") else value


def test_a_page_that_broke_the_rules_would_be_found(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<!doctype html><meta name=viewport content='width=device-width'>"
        "<div style='width:600px'>wide</div><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('no')</script>"
    )
    chromium.open(tmp_path / "bad.html", width=390)
    assert chromium.value("document.documentElement.scrollWidth") > 390
    found = " ".join(complaints(chromium))
    assert "x.png" in found
    assert '"no"' in found


def test_the_page_forbids_itself_scripts_and_requests(
    chromium: Browser, evaluated: Path, tmp_path: Path
) -> None:
    text = (evaluated / page.NAME).read_text()
    bad = "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png'></body>"
    (tmp_path / "bad.html").write_text(text.replace("</body>", bad))
    chromium.open(tmp_path / "bad.html", width=390)
    assert chromium.value("document.title") == "run: report"
    assert any("Content Security Policy" in line for line in complaints(chromium))


def test_a_folder_with_nothing_still_gives_a_page(tmp_path: Path) -> None:
    text = page.write(tmp_path).read_text()
    for part in ("Neither validated nor evaluated yet", "holds no steps", "tells of no try"):
        assert part in text
    assert "could not be made" not in text


@pytest.mark.parametrize(
    "file",
    [
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "attempts.jsonl",
        "status.json",
        "ds_config.json",
        "evaluation/test.json",
        "predictions/test.jsonl",
        "predictions/test.logits.npy",
    ],
)
@pytest.mark.parametrize("content", ["", "[1, 2]", '{"event": "step", "track": 3}\n', None])
def test_a_missing_or_foreign_file_costs_its_part_only(
    evaluated: Path,
    file: str,
    content: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(canvas, "inline", lambda *_: "<svg></svg>")  # it takes the time
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    text = page.write(run).read_text()
    assert "What may be concluded" in text
    assert text.endswith("</html>\n")


def test_a_part_that_fails_is_named(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def confusion(_: object) -> None:
        raise KeyError("genres")

    monkeypatch.setattr(gallery, "EVALUATION", (confusion, *gallery.EVALUATION[1:]))
    with caplog.at_level(logging.WARNING):
        text = page.write(evaluated).read_text()
    assert "The part confusion could not be made" in text
    assert "What may be concluded" in text
    assert "report without confusion: KeyError: 'genres'" in caplog.text


def test_a_new_figure_is_one_entry(
    chromium: Browser, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on the page, and a PNG beside the other figures of an evaluation."""

    def precision(found: dict[str, Any]) -> Section:
        drawn = [Bar(name=g, value=of["precision"]) for g, of in found["per_genre"].items()]
        figure = figures.bars(drawn)
        drawing = Drawing(name="precision", title="Precision", label="Planted", figure=figure)
        return Section(title="Planted", drawings=(drawing,))

    monkeypatch.setattr(gallery, "EVALUATION", (*gallery.EVALUATION, precision))
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    page.write(run)
    chromium.open(run / page.NAME, width=390)
    assert chromium.value("document.querySelectorAll('svg[aria-label=Planted]').length") == 1
    subject, result = measured()
    evaluation.write(tmp_path / "new", subject, result, told(subject, result))
    path = tmp_path / "new" / "evaluation" / f"precision-{subject.name}.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_ids_of_a_page_are_its_own_and_there(chromium: Browser, evaluated: Path) -> None:
    chromium.open(evaluated / page.NAME, width=390)
    ids = chromium.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)) > 20
    text = (evaluated / page.NAME).read_text()
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert used
    assert {one or other for one, other in used} <= set(ids)


class Seen(HTMLParser):
    """An independent reader of what was written."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names += [name, *(key for key, _ in attributes)]

    def handle_data(self, data: str) -> None:
        self.text += data


def plain(text: str) -> Seen:
    """A page whose every text is the given one."""
    figure = figures.bars([Bar(name=text, value=0.5, note="of 3"), Bar(name=text, value=None)])
    return Seen(
        page.render(
            text,
            [
                Section(
                    title=text,
                    tiles=(Tile(value=text, name=text, below=text),),
                    warnings=(text,),
                    facts=((text, text),),
                    code=text,
                    tables=(Table(label=text, columns=(text,), rows=((text, text),)),),
                    drawings=(
                        Drawing(name="d", title=text, label=text, figure=figure, about=text),
                    ),
                    paragraphs=(text,),
                    notes=(text,),
                    bullets=(text,),
                )
            ],
        )
    )


@settings(max_examples=15)
@given(st.text(min_size=1))
def test_any_text_stays_text(text: str) -> None:
    seen = plain(text)
    assert set(seen.names) <= set(plain("x").names)
    ordinary = "".join(c for c in text if c.isprintable() and c != "\ufffd")
    assert ordinary in "".join(c for c in seen.text if c.isprintable() and c != "\ufffd")


@pytest.mark.parametrize("text", ["half \ud800 a pair, and \x00", EVIL, "$\\frac$", "]]>--><!--"])
def test_text_can_always_be_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text(page.render(text, []), encoding="utf-8")
    assert plain(text).names == plain("x").names


def test_a_page_that_cannot_be_written_is_told_and_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        page.attempt(tmp_path / "not there")
    assert "report.html: FileNotFoundError" in caplog.text


def test_a_long_run_makes_a_small_page_quickly(evaluated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    line = {"event": "step", "time_s": 1.0, "loss": 1.0, "lr": 1e-4, "head_lr": 1e-3}
    start = json.dumps({"event": "start", "samples_seen": 0, "time_s": 0.0, "world": 1})
    lines = (json.dumps(line | {"samples_seen": k, "epoch": k / 1e4}) for k in range(100_000))
    (run / "metrics.jsonl").write_text("\n".join([start, *lines]) + "\n")
    shutil.rmtree(run / "predictions")
    started = time.process_time()
    assert page.write(run).stat().st_size < 200_000
    assert time.process_time() - started < 20
