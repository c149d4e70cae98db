"""`python -m mgc_dist.predict RUN FILE...`: the genre of any audio file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mgc_dist import cli
from mgc_dist.config import PredictConfig
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    from mgc_dist.models.predictor import Prediction


_STRETCHES = 20
"""Of a file's timeline on the terminal; neighbouring segments are merged to as many at most."""
_BAR = 24
"""Characters of a bar that stands for probability 1."""


def run(config: PredictConfig) -> int:
    """Predict each file; unusable files are named at the end.

    Returns:
        0, or 2 if a file could not be read.

    Raises:
        UserError: no model, or no file given.
    """
    # here, not above: they import torch, which takes seconds, and --help answers without
    from mgc_dist.cluster.ranks import device_of
    from mgc_dist.models.predictor import Predictor
    from mgc_dist.report import canvas, figures

    if not config.files:
        raise UserError(
            "FILE",
            got="none",
            expected="audio files",
            cure="python -m mgc_dist.predict RUN FILE...",
        )
    pictures = _pictures(config)
    predictor = Predictor.load(config.run, device_of(config.device, 0))
    failed: list[UserError] = []
    results = []
    for path in config.files:
        try:
            found = predictor.predict(path, hop_s=config.hop_s, batch=config.batch)
        except UserError as error:
            failed.append(error)
            continue
        if config.json:
            results.append(found.to_json())
        else:
            _print(found, config.top)
        if path in pictures:
            figure = figures.timeline(
                found.genres, found.starts_s, found.probabilities, hop_s=config.hop_s
            )
            canvas.save(figure, pictures[path], path.name)
    if config.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    if failed:
        raise failed[0] if len(failed) == 1 else _several(failed)
    return 0


def _pictures(config: PredictConfig) -> dict[Path, Path]:
    """File -> where its picture goes.

    Raises:
        UserError: two files would share a picture.
    """
    plot = config.plot
    if plot is None:
        return {}
    if len(config.files) == 1:
        return {config.files[0]: plot}
    found = {path: plot.with_stem(f"{plot.stem}-{path.stem}") for path in config.files}
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
    print(f"{predicted.path}: {predicted.genre}  ({named})")
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


def _several(failed: list[UserError]) -> UserError:
    return UserError(
        "audio files",
        got=f"{len(failed)} that cannot be used",
        expected="readable audio",
        cure="\n  ".join(str(error).splitlines()[0] for error in failed),
    )


def main() -> None:
    """Entry of `python -m mgc_dist.predict`."""
    cli.main("predict", PredictConfig, run)


if __name__ == "__main__":
    main()
