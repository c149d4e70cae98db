"""What an audit has found, shown: on the terminal, as JSON, and as a page with audio."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from mgc_dist.bias_model.families import OF_FILES
from mgc_dist.bias_model.findings import Audit
from mgc_dist.data.reader import ShardSet
from mgc_dist.files import replace_text
from mgc_dist.report import figures
from mgc_dist.report.dossier import wav_of
from mgc_dist.report.figures import Bar
from mgc_dist.report.page import render
from mgc_dist.report.section import Drawing, Example, Section, Table
from mgc_dist.sound.traits import PREFIX

_HEARD = 12
"""Doubted tracks that the page brings along."""

Figures = dict[str, Any]


def bring(found: Audit, shards: ShardSet, folder: Path, name: str) -> None:
    """Write FOLDER/audit.json and audit.html, and print the same in short.

    Args:
        found: of these shards.
        shards: for the audio.
        folder: is made.
        name: of the data set, for the title.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        _families(found.figures),
        *_heard(found, shards),
        _leaks(found.figures),
        _doubts(found, shards),
    ]
    replace_text(folder / "audit.html", render(f"Audit of {name}", sections))
    text = json.dumps(found.figures, indent=1, ensure_ascii=False)
    replace_text(folder / "audit.json", text)
    _show(found.figures, folder)


def _unit(of: Figures) -> str:
    return (
        f"{of['artists']} artists are kept together in folds and intervals"
        if of["unit"] == "groups"
        else "artists are unknown: folds and intervals are by track, so figures are too high and "
        "intervals too narrow (--groups FILE names artists)"
    )


def _rule(of: Figures) -> str:
    return (
        f"A family is named if its 95 % interval, corrected for the {len(of['families'])} families "
        f"(Holm), lies above {of['named_above']:.3f}, a tenth of the way from chance "
        f"({of['chance']:.3f}, the largest genre's share) to certainty."
    )


def _verdict(of: Figures) -> str:
    named = [each for each in of["families"] if each["named"]]
    if not named:
        return "No family of traits tells the genre by itself."
    told = ", ".join(f"{each['about']} ({each['accuracy']:.2f})" for each in named)
    return f"The genre is told by {told}. A model can live on these in place of music."


def _families(of: Figures) -> Section:
    drawn = [
        Bar(name=each["name"], value=each["accuracy"], interval=each["interval"])
        for each in of["families"]
    ]
    shares = ", ".join(f"{each['name']} {each['accuracy']:.2f}" for each in of["families"])
    drawing = Drawing(
        name="families",
        title="Accuracy by family",
        label=f"Accuracy of a linear model on each family: {shares}",
        figure=figures.bars(drawn, level=of["chance"]),
        about="A linear model on each family, tracks of artists that it has not seen, with 95 % "
        "intervals. Dashed: chance.",
    )
    rows = tuple(
        (
            each["name"],
            "yes" if each["named"] else "no",
            f"{each['accuracy']:.3f}",
            _told(each["interval"]),
            f"{each['p']:.2g}",
        )
        for each in of["families"]
    )
    columns = ("family", "named", "accuracy", "95 %", "p, corrected")
    uses = tuple(
        (each["name"], each["about"], "; ".join(each["uses"]) or "nothing")
        for each in of["families"]
    )
    is_told = any(each["named"] for each in of["families"])
    return Section(
        title="What tells the genre",
        warnings=(_verdict(of),) if is_told else (),
        paragraphs=(
            *(() if is_told else (_verdict(of),)),
            _rule(of),
            f"{of['tracks']} tracks; {_unit(of)}.",
        ),
        drawings=(drawing,),
        tables=(Table(label="families", columns=columns, rows=rows),),
        folded=(
            (
                "what they are, and go by",
                Table(label="uses", columns=("family", "what", "goes by"), rows=uses),
            ),
        ),
    )


def _told(interval: list[float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-"


def _heard(found: Audit, shards: ShardSet) -> list[Section]:
    """Examples of the families that are named and can be heard."""
    about = {each["name"]: each for each in found.figures["families"]}
    sections = []
    for name, tracks in found.examples.items():
        if name in OF_FILES:
            continue
        each = about[name]
        examples = (
            _example(shards, track, f"{shards.manifest.tracks[track].genre}, by {name} alone")
            for track in tracks
        )
        sections.append(
            Section(
                title=f"To be heard: {each['about']}",
                paragraphs=(f"It goes by {'; '.join(each['uses'])}.",),
                examples=tuple(examples),
            )
        )
    return sections


def _example(shards: ShardSet, track: int, about: str) -> Example:
    """The middle segment of a track."""
    rows = np.flatnonzero(shards.tracks == track)
    middle = rows[np.argsort(shards.index["segment"][rows])[len(rows) // 2]]
    wav = wav_of(shards.read(int(middle)), shards.manifest.sample_rate)
    return Example(track=shards.manifest.tracks[track].id, about=about, wav=wav)


def _leaks(of: Figures) -> Section:
    pairs, differ = of["repetitions"]["pairs"], of["repetitions"]["of_two_genres"]
    lines = [*of["leaks"]]
    if pairs:
        lines.append(f"{pairs} pairs of tracks hold the same recording (repetitions.csv)")
    lines += [f"one recording, two genres: {pair}" for pair in differ]
    lines += [f"left out: {line}" for line in of["left_out"]]
    return Section(
        title="Leaks",
        paragraphs=(_inflated(of),),
        bullets=tuple(lines) or ("Packing has found nothing that is in two splits.",),
    )


def _inflated(of: Figures) -> str:
    found = of["inflation"]
    if not found:
        return "How much a random split would inflate figures is unknown, as artists are."
    return (
        f"Inflation: a linear model on {found['probe']} statistics names {found['random']:.3f} of "
        f"the tracks where folds are random, and {found['by_artist']:.3f} where they keep artists "
        f"together. The difference is {found['difference']:+.3f} "
        f"(95 % {_told(found['interval'])})."
    )


def _doubts(found: Audit, shards: ShardSet) -> Section:
    doubts = found.figures["doubts"]
    tracks = doubts["tracks"]
    rows = tuple(
        (
            d["track"],
            d["genre"],
            f"{d['of_label']:.2f}",
            d["sounds_like"],
            f"{d['probability']:.2f}",
        )
        for d in tracks
    )
    columns = ("track", "label", "probability", "sounds like", "probability")
    examples = (
        _example(
            shards,
            number,
            f"labelled {d['genre']} ({d['of_label']:.2f}), sounds like {d['sounds_like']} "
            f"({d['probability']:.2f})",
        )
        for number, d in zip(found.doubted[:_HEARD], tracks, strict=False)
    )
    return Section(
        title="Labels in doubt",
        paragraphs=(_ceiling(doubts),),
        folded=(("all of them", Table(label="doubts", columns=columns, rows=rows)),)
        if rows
        else (),
        examples=tuple(examples),
    )


def _ceiling(doubts: Figures) -> str:
    count, share = len(doubts["tracks"]), doubts["share"]
    if not count:
        return "The model doubts no label, which does not mean that all are right."
    return (
        f"A linear model on {doubts['model']} statistics, right in {doubts['accuracy']:.3f} of the "
        f"tracks, is confident of another genre in {count} ({share:.1%}). Listen before you judge: "
        "most may be mistakes of the model, and wrong labels that it believes are not among them. "
        f"If all were wrong labels, a model that knows the truth would score {1 - share:.3f} at "
        "most with these labels. Without them the model scores "
        f"{doubts['accuracy_without'] or 0:.3f}, which is no gain: its own mistakes are left out."
    )


def _show(of: Figures, folder: Path) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    grid = Grid(title=f"Audit: {of['tracks']} tracks", title_justify="left")
    grid.add_column("family")
    for column in ("accuracy", "95 %", "named"):
        grid.add_column(column, justify="right")
    for each in of["families"]:
        mark = "yes" if each["named"] else ""
        grid.add_row(each["name"], f"{each['accuracy']:.3f}", _told(each["interval"]), mark)
    console.print(grid)
    console.print("\n".join((_verdict(of), _rule(of), f"{_unit(of)[0].upper()}{_unit(of)[1:]}.")))
    for each in of["families"]:
        if each["named"]:
            console.print(f"{each['name']} goes by: {'; '.join(each['uses'])}")
    console.print("\n".join((_inflated(of), _ceiling(of["doubts"]))))
    named = [each["name"] for each in of["families"] if each["named"]]
    if named:
        console.print(f"A bias model of it: `bias --backbone {PREFIX}{named[0]}`")
    console.print(f"All of it, to listen to: {folder / 'audit.html'}; figures: audit.json")
