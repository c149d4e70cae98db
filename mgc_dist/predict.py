"""`python -m mgc_dist.predict RUN FILE...`: the genre of any audio file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mgc_dist import cli
from mgc_dist.config import PredictConfig
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mgc_dist.models.main import WaveClassifier

SHORTEST_S = 0.5
"""Shorter files hold too little to name a genre."""
ROWS = 20
"""Of a file's timeline on the terminal; neighbouring segments are merged to as many at most."""
BAR = 24
"""Characters of a bar that stands for probability 1."""


def run(config: PredictConfig) -> int:
    """Predict each file; unusable files are named at the end.

    Returns:
        0, or 2 if a file could not be read.

    Raises:
        UserError: no model, or no file given.
    """
    from mgc_dist.cluster import ranks
    from mgc_dist.models import folder as exported
    from mgc_dist.report import canvas, figures

    if not config.files:
        raise UserError(
            "FILE",
            got="none",
            expected="audio files",
            cure="python -m mgc_dist.predict RUN FILE...",
        )
    pictures = _pictures(config)
    folder = exported.find_exported(config.run)
    classifier = exported.load_exported(folder)
    classifier = classifier.to(ranks.device_of(config.device, 0))
    sample_rate = exported.sample_rate_of(folder)
    failed: list[UserError] = []
    results = []
    for path in config.files:
        try:
            starts_s, probabilities, segment_s = _predict(config, classifier, path, sample_rate)
        except UserError as error:
            failed.append(error)
            continue
        if config.json:
            results.append(_as_json(path, classifier.genres, starts_s, probabilities))
        else:
            _print(config, path, classifier.genres, starts_s, probabilities, segment_s)
        if path in pictures:
            figure = figures.timeline(
                classifier.genres, starts_s, probabilities, hop_s=config.hop_s
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


def _predict(
    config: PredictConfig, classifier: "WaveClassifier", path: Path, sample_rate: int
) -> "tuple[list[float], NDArray[np.float64], float]":
    """Start of each segment, its probabilities float64 [S, K]; a segment's length in seconds."""
    import numpy as np
    import torch
    from scipy.special import softmax

    from mgc_dist.data import audio

    wave = audio.to_int16(audio.read(path, sample_rate))
    if len(wave) < SHORTEST_S * sample_rate:
        raise UserError(
            f"audio file {path}",
            got=f"{len(wave) / sample_rate:.2f} s",
            expected=f"at least {SHORTEST_S} s",
            cure="give a longer recording",
        )
    length = min(classifier.segment_samples, len(wave))
    hop = round(config.hop_s * sample_rate)
    windows = audio.segments(wave, length, hop)  # [S, T]
    device = next(classifier.parameters()).device
    parts = []
    with torch.inference_mode():
        for first in range(0, len(windows), config.batch):
            batch = torch.from_numpy(np.array(windows[first : first + config.batch]))
            logits = classifier.calibrated(batch.to(device))  # [B, K]
            parts.append(logits.double().cpu().numpy())
    starts_s = [segment * hop / sample_rate for segment in range(len(windows))]
    return starts_s, softmax(np.concatenate(parts), axis=1), length / sample_rate


def _as_json(
    path: Path,
    genres: tuple[str, ...],
    starts_s: list[float],
    probabilities: "NDArray[np.float64]",
) -> dict[str, object]:
    mean = probabilities.mean(axis=0)
    return {
        "file": str(path),
        "genre": genres[int(mean.argmax())],
        "probabilities": dict(zip(genres, mean.tolist(), strict=True)),
        "segments": [
            {"start_s": start, "probabilities": dict(zip(genres, row.tolist(), strict=True))}
            for start, row in zip(starts_s, probabilities, strict=True)
        ],
    }


def _print(
    config: PredictConfig,
    path: Path,
    genres: tuple[str, ...],
    starts_s: list[float],
    probabilities: "NDArray[np.float64]",
    segment_s: float,
) -> None:
    """The genre of a file, then a line a stretch of it: start, genre, a bar of its probability."""
    from mgc_dist.report.timeline import clock, merge

    mean = probabilities.mean(axis=0)
    best = mean.argsort()[::-1][: max(1, config.top)]
    named = ", ".join(f"{genres[k]} {mean[k]:.3f}" for k in best)
    print(f"{path}: {genres[int(best[0])]}  ({named})")
    stretches = merge(starts_s, probabilities, segment_s=segment_s, most=ROWS)
    width = max(len(genres[stretch.best]) for stretch in stretches)
    last = max(len(clock(stretch.start_s)) for stretch in stretches)
    if stretches[0].segments > 1:
        print(f"  a line is {stretches[0].segments} of {len(starts_s)} segments, their mean")
    for stretch in stretches:
        sure = float(stretch.probabilities[stretch.best])
        print(
            f"  {clock(stretch.start_s):>{last}}  {genres[stretch.best]:<{width}}  {sure:.2f} "
            f"{'█' * round(BAR * sure)}"
        )


def _several(failed: list[UserError]) -> UserError:
    return UserError(
        "audio files",
        got=f"{len(failed)} that cannot be used",
        expected="readable audio",
        cure="\n  ".join(str(error).splitlines()[0] for error in failed),
    )


if __name__ == "__main__":
    cli.main("predict", PredictConfig, run)
