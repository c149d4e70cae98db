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

    from mgc_dist.model import WaveClassifier

SHORTEST_S = 0.5
"""Shorter files hold too little to name a genre."""


def run(config: PredictConfig) -> int:
    """Predict each file; unusable files are named at the end.

    Returns:
        0, or 2 if a file could not be read.

    Raises:
        UserError: no model, or no file given.
    """
    from mgc_dist import model, ranks

    if not config.files:
        raise UserError(
            "FILE",
            got="none",
            expected="audio files",
            cure="python -m mgc_dist.predict RUN FILE...",
        )
    folder = model.find_exported(config.run)
    classifier = model.load_exported(folder)
    classifier = classifier.to(ranks.device_of(config.device, 0))
    sample_rate = model.sample_rate_of(folder)
    failed: list[UserError] = []
    results = []
    for path in config.files:
        try:
            starts_s, probabilities = _predict(config, classifier, path, sample_rate)
        except UserError as error:
            failed.append(error)
            continue
        if config.json:
            results.append(_as_json(path, classifier.genres, starts_s, probabilities))
        else:
            _print(config, path, classifier.genres, starts_s, probabilities)
    if config.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
    if failed:
        raise failed[0] if len(failed) == 1 else _several(failed)
    return 0


def _predict(
    config: PredictConfig, classifier: "WaveClassifier", path: Path, sample_rate: int
) -> "tuple[list[float], NDArray[np.float64]]":
    """Start of each segment in seconds, and its probabilities float64 [S, K]."""
    import numpy as np
    import torch
    from scipy.special import softmax

    from mgc_dist import audio

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
            parts.append(classifier(batch.to(device)).double().cpu().numpy())  # [B, K]
    starts_s = [segment * hop / sample_rate for segment in range(len(windows))]
    return starts_s, softmax(np.concatenate(parts), axis=1)


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
) -> None:
    mean = probabilities.mean(axis=0)
    best = mean.argsort()[::-1][: max(1, config.top)]
    named = ", ".join(f"{genres[k]} {mean[k]:.3f}" for k in best)
    print(f"{path}: {genres[int(best[0])]}  ({named})")
    runs: list[tuple[float, str]] = []
    for start, row in zip(starts_s, probabilities, strict=True):
        genre = genres[int(row.argmax())]
        if not runs or runs[-1][1] != genre:
            runs.append((start, genre))
    print("  timeline: " + ", ".join(f"{start:g} s {genre}" for start, genre in runs))


def _several(failed: list[UserError]) -> UserError:
    return UserError(
        "audio files",
        got=f"{len(failed)} that cannot be used",
        expected="readable audio",
        cure="\n  ".join(str(error).splitlines()[0] for error in failed),
    )


if __name__ == "__main__":
    cli.main("predict", PredictConfig, run)
