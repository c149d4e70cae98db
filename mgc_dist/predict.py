"""`python -m mgc_dist.predict RUN FILE...`: the genre of any audio file, or of a whole library."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mgc_dist import cli
from mgc_dist.config import PredictConfig
from mgc_dist.data.tables import plain
from mgc_dist.data.tracks import files_below, is_music
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    from mgc_dist.models.predictor import Prediction

    Result = Prediction | UserError


_STRETCHES = 20
"""Of a file's timeline on the terminal; neighbouring segments are merged to as many at most."""
_BAR = 24
"""Characters of a bar that stands for probability 1."""
_NAMED = 10
"""Unusable files that the last message names."""


def run(config: PredictConfig) -> int:
    """Predict each file, and leave this process as it was found; for the rest see `_run`."""
    from mgc_dist import guest  # it imports torch

    with guest.as_found():
        return _run(config)


def _run(config: PredictConfig) -> int:
    """Predict each file; unusable files are named at the end.

    Returns:
        0, or 2 if a file could not be read.

    Raises:
        UserError: no model, no file given, or files that could not be read.
    """
    # here, not above: they import torch, which takes seconds, and --help answers without
    from mgc_dist.cluster.ranks import device_of
    from mgc_dist.console import progress
    from mgc_dist.models.predictor import Predictor
    from mgc_dist.report import canvas, figures

    files = _files(config)
    pictures = _pictures(config, files)
    predictor = Predictor.load(
        config.run,
        device_of(config.device, 0),
        ema=config.ema,
        trust_remote_code=config.trust_remote_code,
    )
    failed: dict[Path, UserError] = {}
    with (
        _writer(config, predictor.genres) as tell,
        progress(
            "predicting", len(files), unit="files", shown=bool(config.jsonl or config.csv)
        ) as bar,
    ):
        for path in bar.over(files):
            try:
                found = predictor.predict(path, hop_s=config.hop_s, batch=config.batch)
            except UserError as error:
                failed[path] = error
                tell(path, error)
                continue
            tell(path, found)
            if path in pictures:
                figure = figures.timeline(
                    found.genres, found.starts_s, found.probabilities, hop_s=config.hop_s
                )
                canvas.save(figure, pictures[path], path.name)
    if failed:
        raise next(iter(failed.values())) if len(failed) == 1 else _several(failed, len(files))
    return 0


def _files(config: PredictConfig) -> list[Path]:
    """The files that are asked for: those named, those in folders, those on standard input.

    Raises:
        UserError: none.
    """
    found: list[Path] = []
    for path in config.files:
        if str(path) == "-":
            found += (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
        elif path.is_dir():
            found += (each for each in files_below(path) if is_music(each))
        else:
            found.append(path)
    if not found:
        named = ", ".join(str(path) for path in config.files)
        raise UserError(
            "FILE",
            got=f"no audio files in {named}" if named else "none",
            expected="audio files, folders of them, or - for a list on standard input",
            cure="python -m mgc_dist.predict RUN FILE...",
        )
    return list(dict.fromkeys(found))


@contextmanager
def _writer(
    config: PredictConfig, genres: tuple[str, ...]
) -> Iterator[Callable[[Path, "Result"], None]]:
    """What takes the result of each file, and shows or writes it."""
    if config.json:
        results: list[dict[str, object]] = []

        def gather(path: Path, found: "Result") -> None:
            if not isinstance(found, UserError):
                results.append(found.to_json())

        yield gather
        print(json.dumps(results, indent=1, ensure_ascii=False))
    elif out := config.jsonl or config.csv:
        with out.open("w", encoding="utf-8", newline="", buffering=1) as file:
            yield _lines(file) if config.jsonl else _rows(file, genres)
        print(f"{out} holds the results")
    else:

        def show(path: Path, found: "Result") -> None:
            if not isinstance(found, UserError):
                _print(found, config.top)

        yield show


def _lines(file: TextIO) -> Callable[[Path, "Result"], None]:
    def write(path: Path, found: "Result") -> None:
        if isinstance(found, UserError):
            line: dict[str, object] = {"file": str(path), "error": _reason(found)}
        else:
            line = found.to_json()
        file.write(json.dumps(line, ensure_ascii=False) + "\n")

    return write


def _rows(file: TextIO, genres: tuple[str, ...]) -> Callable[[Path, "Result"], None]:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(plain(("file", "genre", "probability", "is_near_chance", "error", *genres)))

    def write(path: Path, found: "Result") -> None:
        if isinstance(found, UserError):
            rows.writerow(plain((path, "", "", "", _reason(found), *("" for _ in genres))))
            return
        mean = [f"{value:.6f}" for value in found.mean]
        best = f"{found.mean.max():.6f}"
        rows.writerow(plain((path, found.genre, best, found.is_near_chance, "", *mean)))

    return write


def _reason(error: UserError) -> str:
    return str(error).splitlines()[0].partition(": ")[2]


def _pictures(config: PredictConfig, files: list[Path]) -> dict[Path, Path]:
    """File -> where its picture goes.

    Raises:
        UserError: two files would share a picture.
    """
    plot = config.plot
    if plot is None:
        return {}
    if len(files) == 1:
        return {files[0]: plot}
    found = {path: plot.with_stem(f"{plot.stem}-{path.stem}") for path in files}
    names = list(found.values())
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(
            f"--plot {plot}",
            got=f"two files whose picture would be {twice[0]}",
            expected="files of different names",
            cure="predict them one after another, each with a --plot of its own",
        )
    return found


def _print(predicted: "Prediction", top: int) -> None:
    """Print a file's genre, then a line a stretch of it: start, genre, a bar of its probability."""
    from mgc_dist.report.timeline import clock, merge

    genres, mean = predicted.genres, predicted.mean
    best = mean.argsort()[::-1][: max(1, top)]
    named = ", ".join(f"{genres[k]} {mean[k]:.3f}" for k in best)
    note = ", hardly more than chance" if predicted.is_near_chance else ""
    print(f"{predicted.path}: {predicted.genre}  ({named}){note}")
    stretches = merge(
        predicted.starts_s, predicted.probabilities, segment_s=predicted.segment_s, most=_STRETCHES
    )
    width = max(len(genres[stretch.best]) for stretch in stretches)
    last = max(len(clock(stretch.start_s)) for stretch in stretches)
    if stretches[0].segments > 1:
        count = len(predicted.starts_s)
        print(f"  a line is {stretches[0].segments} of {count} segments, their mean")
    for stretch in stretches:
        sure = float(stretch.probabilities[stretch.best])
        print(
            f"  {clock(stretch.start_s):>{last}}  {genres[stretch.best]:<{width}}  {sure:.2f} "
            f"{'█' * round(_BAR * sure)}"
        )


def _several(failed: dict[Path, UserError], files: int) -> UserError:
    named = [str(error).splitlines()[0] for error in failed.values()]
    rest = [f"and {len(named) - _NAMED} others"] if len(named) > _NAMED else []
    return UserError(
        "audio files",
        got=f"{len(failed)} of {files} that cannot be used",
        expected="readable audio",
        cure="\n  ".join([*named[:_NAMED], *rest]),
    )


def main() -> None:
    """Entry of `python -m mgc_dist.predict`."""
    cli.main("predict", PredictConfig, _run)


if __name__ == "__main__":
    main()
