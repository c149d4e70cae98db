"""A trained model on any audio file: a genre, and probabilities over its time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from mgc_dist.data import audio
from mgc_dist.errors import UserError
from mgc_dist.models import folder
from mgc_dist.models.classifier import WaveClassifier

NEAR_CHANCE = 1.5
"""A genre that is less than half more probable than a guess says little: 0.15 of ten genres."""
SHORTEST_S = 0.5
"""Shorter files hold too little to name a genre."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says about a file.

    Attributes:
        path: of the file.
        genres: names in label order.
        starts_s: start of each segment in seconds, S of them.
        segment_s: length of a segment in seconds.
        probabilities: float64 [S, K] of the segments.
    """

    path: Path
    genres: tuple[str, ...]
    starts_s: list[float]
    segment_s: float
    probabilities: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Probabilities of the whole file: the mean over its segments, float64 [K]."""
        return np.asarray(self.probabilities.mean(axis=0))

    @property
    def genre(self) -> str:
        """The most probable one."""
        return self.genres[int(self.mean.argmax())]

    @property
    def is_near_chance(self) -> bool:
        """Whether the most probable genre is hardly more so than if all were equal."""
        return bool(self.mean.max() < NEAR_CHANCE / len(self.genres))

    def to_json(self) -> dict[str, object]:
        """The file, its genre, and the probabilities of the whole and of each segment."""

        def named(row: NDArray[np.float64]) -> dict[str, float]:
            return dict(zip(self.genres, row.tolist(), strict=True))

        return {
            "file": str(self.path),
            "genre": self.genre,
            "is_near_chance": self.is_near_chance,
            "probabilities": named(self.mean),
            "segments": [
                {"start_s": start, "probabilities": named(row)}
                for start, row in zip(self.starts_s, self.probabilities, strict=True)
            ],
        }


class Predictor:
    """A model that predicts files.

    Args:
        classifier: in eval mode, on its device.
        sample_rate: in Hz, of the segments that it was trained on.
    """

    def __init__(self, classifier: WaveClassifier, sample_rate: int) -> None:
        self._classifier, self._sample_rate = classifier, sample_rate

    @property
    def genres(self) -> tuple[str, ...]:
        """Names in label order."""
        return self._classifier.genres

    @classmethod
    def load(
        cls,
        run_or_export: Path,
        device: torch.device,
        *,
        ema: bool = False,
        trust_remote_code: bool = False,
    ) -> "Predictor":
        """The best model of a run folder, or with `ema` its averaged weights, or an exported one.

        Raises:
            UserError: there is none.
        """
        exported = folder.find_exported(run_or_export, ema=ema)
        classifier = folder.load_exported(exported, trust_remote_code=trust_remote_code)
        return cls(classifier.to(device), folder.sample_rate_of(exported))

    def predict(self, path: Path, *, hop_s: float, batch: int) -> Prediction:
        """The genre of a file of any length, format, rate and number of channels.

        Args:
            path: of the file.
            hop_s: seconds from the start of a segment to that of the next one.
            batch: segments at a time.

        Raises:
            UserError: it cannot be decoded, or is shorter than SHORTEST_S.
        """
        classifier, rate = self._classifier, self._sample_rate
        wave = audio.to_int16(audio.read(path, rate))
        if len(wave) < SHORTEST_S * rate:
            raise UserError(
                f"audio file {path}",
                got=f"{len(wave) / rate:.2f} s",
                expected=f"at least {SHORTEST_S} s",
                cure="give a longer recording",
            )
        length, hop = min(classifier.segment_samples, len(wave)), round(hop_s * rate)
        windows = audio.segments(wave, length, hop)  # [S, T]
        device = next(classifier.parameters()).device
        parts = []
        with torch.inference_mode():
            for first in range(0, len(windows), batch):
                rows = torch.from_numpy(np.array(windows[first : first + batch]))
                logits = classifier.calibrated(rows.to(device))  # [B, K]
                parts.append(logits.double().cpu().numpy())
        return Prediction(
            path=path,
            genres=classifier.genres,
            starts_s=[segment * hop / rate for segment in range(len(windows))],
            segment_s=length / rate,
            probabilities=softmax(np.concatenate(parts), axis=1),
        )
