"""What the report says about the model follows from the files of the evaluation."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from runs import write_evaluation, write_training

from mgc_dist.report import page, verdict
from mgc_dist.report.dossier import Dossier
from mgc_dist.report.section import Section

CONFUSION, RECALL = "What is taken for what", "Genre by genre"
RELIABILITY, GROUPS = "Does it know when it is right?", "Groups"


@pytest.fixture
def run(shards: Path, table: Path, tmp_path: Path) -> Path:
    write_training(tmp_path / "run", shards)
    write_evaluation(tmp_path / "run", shards)
    return tmp_path / "run"


def edit(run: Path, **changes: Any) -> None:
    path = run / "evaluation" / "test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def html(section: Section | None) -> str:
    """A section as it stands on the page."""
    assert section is not None
    text = page.render("run", [section])
    return text[text.index("<section") : text.index("</main>")]


def words(section: Section | None) -> str:
    """What a reader sees, without markup, blanks made one."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html(section))).split())


def drawn(run: Path, name: str) -> Section | None:
    """The section of a figure of the evaluation."""
    return {section.title: section for section in page.sections(Dossier(run))}.get(name)


def test_the_verdict(run: Path) -> None:
    figures = json.loads((run / "evaluation" / "test.json").read_text())
    track, (low, high) = figures["track"], figures["intervals"]["groups"]["accuracy"]
    shown = words(verdict.verdict(Dossier(run)))
    told = f"95 % interval {low:.3f} to {high:.3f} over artists"
    assert f"{track['accuracy']:.3f} track accuracy {told}" in shown
    assert f"{track['macro_f1']:.3f} macro-F1" in shown
    assert "6 tracks of the test split" in shown
    assert "0.333 chance, 3 genres naming the largest genre: 0.333" in shown
    best = Dossier(run).best
    assert best is not None
    assert f"that of epoch {best.epoch:.2f}, chosen for the least NLL" in shown
    figures["intervals"] |= {"groups": None, "known_groups": 0}
    edit(run, intervals=figures["intervals"])
    assert "by track; artists unknown, so too narrow" in words(verdict.verdict(Dossier(run)))


def test_how_the_model_was_chosen_is_told(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for select, told in (
        ("nll", "for the least NLL over tracks"),
        ("macro-f1", "by macro-F1 on the validation split"),
        ("last", "because it was the last one that was validated"),
        (None, "by macro-F1 on the validation split"),  # version 0.1.0 did not write it
    ):
        for line in lines:
            if line["event"] == "validation":
                line.pop("select", None)
                line |= {} if select is None else {"select": select}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert told in words(verdict.verdict(Dossier(run)))


def test_before_an_evaluation_validation_is_shown_as_what_it_is(
    shards: Path, tmp_path: Path
) -> None:
    write_training(tmp_path / "run", shards)
    found = Dossier(tmp_path / "run")
    shown = words(verdict.verdict(found))
    assert "validation track accuracy" in shown
    assert "Not evaluated yet" in shown
    assert "of the validation split" in words(drawn(tmp_path / "run", CONFUSION))
    assert verdict.details(found) is None
    for title in (RECALL, RELIABILITY, GROUPS):
        assert drawn(tmp_path / "run", title) is None
    assert "only the validation split" in words(verdict.conclusions(found))
    assert "Neither validated nor evaluated" in words(verdict.verdict(Dossier(tmp_path)))
    assert drawn(tmp_path, CONFUSION) is None


def test_all_figures_groups_and_other_evaluations(run: Path, shards: Path) -> None:
    write_evaluation(run, shards, name="elsewhere")
    shown = words(verdict.details(Dossier(run)))
    for part in ("tracks, mean-prob", "tracks, vote", "segments 999", "9 known", "elsewhere"):
        assert part in shown
    assert "tracks 6" not in shown, "its way is among those named"
    edit(run, aggregates=None, intervals=None)
    shown = words(verdict.details(Dossier(run)))
    assert "tracks 6 " in shown
    assert "Intervals" not in shown


def test_calibration_tells_before_and_after(run: Path) -> None:
    shown = words(drawn(run, RELIABILITY))
    assert "error 0.125 with the logits divided by 1.40" in shown
    assert "fitted on the validation split" in shown
    assert "0.062 without it (NLL 1.125)" in shown
    assert "perfectly" not in shown
    assert "Mean confidence" not in shown
    track = json.loads((run / "evaluation" / "test.json").read_text())["track"]
    edit(run, track=track | {"ece_floor": 0.0625, "overconfidence": -0.25})
    shown = words(drawn(run, RELIABILITY))
    assert "error 0.125 (a perfectly calibrated model of this size: 0.062) with the logits" in shown
    assert "Mean confidence is 0.250 below the accuracy." in shown
    for other in (None, {"value": 1.4, "nll": 1.125, "ece": 0.0625}):  # as version 0.1.0 wrote it
        edit(run, temperature=other)
        assert "divided" not in words(drawn(run, RELIABILITY))


def test_groups_and_the_worst_of_them(run: Path) -> None:
    shown = words(drawn(run, GROUPS))
    assert "The worst is bias-conflicting: 0.250." in shown
    assert "bias-aligned: 0.750, 0.500 to 0.900" in shown
    edit(run, subgroups=None)
    assert drawn(run, GROUPS) is None


def test_a_genre_without_tracks_has_no_recall(run: Path) -> None:
    figures = json.loads((run / "evaluation" / "test.json").read_text())
    figures["per_genre"]["blues"] |= {"support": 0, "recall_interval": None}
    edit(run, per_genre=figures["per_genre"])
    shown = words(drawn(run, RECALL))
    assert "none of 0" in shown
    assert f"The worst is {figures['worst_genre']['name']}" in shown


def test_mistakes_are_the_most_confident_ones(run: Path) -> None:
    path = run / "predictions" / "test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    genres = list(lines[0]["probabilities"])
    for k, line in enumerate(lines):
        sure = 0.5 + 0.05 * k
        others = [genre for genre in genres if genre != line["truth"]]
        line["prediction"] = others[0]
        line["probabilities"] = {others[0]: sure, line["truth"]: 0.9 - sure, others[1]: 0.1}
    lines[-1] |= {"prediction": lines[-1]["truth"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = html(verdict.mistakes(Dossier(run)))
    shown = words(verdict.mistakes(Dossier(run)))
    assert "5 of 6 tracks are wrong" in shown
    places = [shown.index(f"{line['track']} {line['prediction']}") for line in lines[-2::-1]]
    assert places == sorted(places)
    assert text.count("<audio") == 5
    (run / "predictions" / "test.logits.npy").unlink()
    text = html(verdict.mistakes(Dossier(run)))
    assert "cannot be heard here" in text
    assert "<audio" not in text
    path.write_text(json.dumps(lines[-1]) + "\n")
    assert "No track is wrong" in words(verdict.mistakes(Dossier(run)))
    path.unlink()
    assert "not in the run folder" in words(verdict.mistakes(Dossier(run)))


def test_nothing_is_claimed_about_debiasing(run: Path) -> None:
    assert "nothing about whether the loss poe (beta 0.5) helped" in words(
        verdict.conclusions(Dossier(run))
    )
    settings = (run / "config.yaml").read_text().replace("loss: poe", "loss: ce")
    (run / "config.yaml").write_text(settings)
    shown = words(verdict.conclusions(Dossier(run)))
    assert "the run to compare a debiased one with" in shown
    edit(run, split="validation")
    assert "flatters it" in words(verdict.conclusions(Dossier(run)))
