"""Event files as TensorBoard itself reads them; nothing that fails here reaches the run."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from metrics import read_metrics, step_event, validation_event
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile

from mgc_dist.board import Board
from mgc_dist.events import CheckpointEvent, SaveFailedEvent, StartEvent
from mgc_dist.journal import Journal
from mgc_dist.report import figures
from mgc_dist.report.figures import PICTURES

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def points(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_the_journals_numbers_over_samples_seen(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writes=True, pictures=PICTURES)
    journal.write(StartEvent(samples_seen=0, world=2, genres=["$\\frac$", "日本の曲"]))
    for step in (1, 2):
        norm = None if step == 1 else 2.0
        journal.write(step_event(step, loss=0.5 * step, grad_norm=norm, mfu=0.5))
    journal.write(step_event(3, loss=float("nan"), grad_norm=None))
    journal.write(validation_event(30, track_accuracy=0.75, confusion=[[3, 1], [0, 9]]))
    journal.write(CheckpointEvent(samples_seen=30, save_s=1.5))
    journal.write(SaveFailedEvent(samples_seen=30, step=3, reason="no room"))
    journal.close()
    found = read(tmp_path / "tensorboard")
    tags = set(found.Tags()["scalars"])
    assert {"checkpoint/save_s", "train/grad_norm", "train/loss", "train/mfu"} <= tags
    assert {"train/data_wait_share", "validation/track_accuracy"} <= tags
    assert not {tag for tag in tags if tag.endswith(("/step", "/epoch", "/samples_seen"))}
    assert not {tag for tag in tags if "beta" in tag or "gain" in tag}, "it has neither"
    assert points(found, "train/loss") == [(10, 0.5), (20, 1.0)]
    assert points(found, "train/grad_norm") == [(20, 2.0)]
    assert points(found, "validation/track_accuracy") == [(30, 0.75)]
    (image,) = found.Images("validation/confusion")
    assert image.step == 30
    assert image.encoded_image_string.startswith(b"\x89PNG")
    size = (image.width, image.height)
    assert tuple(_png_size(image.encoded_image_string)) == size
    (lost,) = [line for line in read_metrics(tmp_path, "step") if line["step"] == 3]
    assert lost["loss"] is None, "the truth has it all the same"


def _png_size(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_steps_that_a_resumed_run_does_again_are_not_shown_twice(tmp_path: Path) -> None:
    first = Journal(tmp_path, writes=True, pictures=PICTURES)
    first.write(StartEvent(samples_seen=0))
    for seen in (10, 20, 30):
        first.write(step_event(1, samples_seen=seen, loss=1.0))
    # killed: the checkpoint is that of 20
    again = Journal(tmp_path, writes=True, pictures=PICTURES)
    again.write(StartEvent(samples_seen=20))
    for seen in (30, 40):
        again.write(step_event(1, samples_seen=seen, loss=2.0))
    again.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found = points(read(tmp_path / "tensorboard"), "train/loss")
    assert found == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_ranks_that_do_not_write_make_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writes=False)
    journal.write(step_event(1, samples_seen=1, loss=1.0))
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_points_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, writes=True)
    journal.write(step_event(1, samples_seen=1, loss=1.0))
    write, write_bytes = gfile.LocalFileSystem._write, Path.write_bytes

    def half(self: Any, filename: bytes, content: bytes, mode: str) -> None:
        write(self, filename, content[: len(content) // 2], mode)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(filename))

    def none(path: Path, content: bytes) -> int:
        write_bytes(path, content[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", half)
    monkeypatch.setattr(Path, "write_bytes", none)
    with caplog.at_level(logging.WARNING):
        journal.write(step_event(1, samples_seen=2, loss=2.0))
        journal.write(step_event(1, samples_seen=3, loss=3.0))
    assert len([r for r in caplog.records if "No space left" in r.message]) == 1, "told once"
    monkeypatch.undo()
    journal.write(step_event(1, samples_seen=4, loss=4.0))
    journal.close()
    assert {path.name.split(".")[0] for path in (tmp_path / "tensorboard").iterdir()} == {"events"}
    assert points(read(tmp_path / "tensorboard"), "train/loss") == [(1, 1.0), (4, 4.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 2.0, 3.0, 4.0]


def test_a_folder_that_cannot_be_made_costs_points_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file is in the way")
    journal = Journal(tmp_path, writes=True, pictures=PICTURES)
    journal.write(step_event(1, samples_seen=1, loss=1.0))
    journal.close()
    assert len(read_metrics(tmp_path, "step")) == 1


def test_a_picture_that_cannot_be_drawn_costs_points_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writes=True, pictures=PICTURES)
    journal.write(validation_event(1, confusion=["no", "matrix"]))
    journal.write(validation_event(2, track_accuracy=0.25))
    journal.close()
    assert len(read_metrics(tmp_path, "validation")) == 2
    assert points(read(tmp_path / "tensorboard"), "validation/track_accuracy")[-1] == (2, 0.25)


def test_genres_without_names_are_numbers() -> None:
    figure = figures.confusion([[1, 0, 0], [0, 2, 0], [0, 1, 0]], ["only one"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "1", "2"]


def test_an_event_without_place_is_no_point(tmp_path: Path) -> None:
    Board(tmp_path / "tensorboard", {}).add("save_failed", {"step": 3})
    assert list(tmp_path.iterdir()) == []
