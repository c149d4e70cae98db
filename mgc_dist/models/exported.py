"""The genre of a file of any length, from a model that mgc_dist has exported.

This file lies in the model's folder, beside the weights, and needs no mgc_dist:

    from genre import GenreClassifier                     # or: python genre.py FILE...
    classify = GenreClassifier()                          # the folder that this file lies in
    classify("song.mp3")                                  # {"genre": ..., "probabilities": ...}
    classify(wave, sampling_rate=44_100)                  # float [samples] or [samples, channels]

A file is mixed to mono, resampled by soxr HQ, and cut into segments; its probabilities are the
mean of theirs. It needs transformers, torch, soxr, and soundfile (WAV, FLAC) or av (all else).
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification


class GenreClassifier:
    """A model with its windows.

    Args:
        folder: of the exported model.
        hop_s: seconds from the start of a segment to that of the next one.
        batch: segments at a time.
        device: of torch.
        trust_remote_code: run the code that lies beside the weights, where there is some.
    """

    def __init__(
        self,
        folder: str | Path = Path(__file__).parent,
        hop_s: float = 1.5,
        batch: int = 16,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self._extractor = AutoFeatureExtractor.from_pretrained(str(folder))
        own_head = Path(folder, "pooling.py").is_file()
        beside = own_head and Path(folder).resolve() == Path(__file__).resolve().parent
        model = AutoModelForAudioClassification.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code or beside
        )
        self._model, self._device = model.eval().to(device), device
        self._rate = int(self._extractor.sampling_rate)
        self._hop, self._batch = round(hop_s * self._rate), batch

    def __call__(
        self, audio: str | Path | NDArray[Any], sampling_rate: int | None = None
    ) -> dict[str, Any]:
        """Genre, and probability of each genre.

        Args:
            audio: a file; or float samples within -1 to 1, [samples] or [samples, channels].
            sampling_rate: of samples, in Hz.
        """
        if isinstance(audio, np.ndarray):
            samples, rate = audio, sampling_rate or self._rate
        else:
            samples, rate = _decoded(Path(audio))
        mono = np.asarray(samples, np.float32)
        mono = mono.mean(axis=1) if mono.ndim == 2 else mono
        if rate != self._rate:
            mono = soxr.resample(mono, rate, self._rate, "HQ")[: len(mono) * self._rate // rate]
        wave = np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.float32) / 32768
        length = min(int(self._model.config.segment_samples), len(wave))
        windows = [
            wave[start : start + length] for start in range(0, len(wave) - length + 1, self._hop)
        ]
        found = []
        for first in range(0, len(windows), self._batch):
            rows = self._extractor(
                windows[first : first + self._batch],
                sampling_rate=self._rate,
                return_tensors="pt",
            )
            with torch.inference_mode():
                logits = self._model(**rows.to(self._device)).logits
            found.append(logits.double().softmax(dim=1).cpu().numpy())
        mean = np.concatenate(found).mean(axis=0)
        names = [self._model.config.id2label[number] for number in range(len(mean))]
        probabilities = dict(zip(names, mean.tolist(), strict=True))
        return {"genre": names[int(mean.argmax())], "probabilities": probabilities}


def _decoded(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples [samples, channels] within -1 to 1, and their rate in Hz."""
    if path.suffix.lower() in (".wav", ".flac"):
        import soundfile

        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return samples, int(rate)
    import av

    blocks = []
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        resampler = av.AudioResampler(format="fltp")  # the type of numbers only
        for frame in file.decode(stream):
            blocks += [part.to_ndarray().T for part in resampler.resample(frame)]
        blocks += [part.to_ndarray().T for part in resampler.resample(None)]
        return np.concatenate(blocks), int(stream.rate or 0)


if __name__ == "__main__":
    classify = GenreClassifier()
    for name in sys.argv[1:]:
        answer = classify(name)
        best = max(answer["probabilities"].values())
        sys.stdout.write(f"{name}\t{answer['genre']}\t{best:.3f}\n")
