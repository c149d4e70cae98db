"""Knobs of augmentation: how training segments are changed each time they are heard."""

from dataclasses import dataclass
from typing import Annotated

from mgc_dist.config.knobs import LEARNED, Range, check, require

KINDS = ("shift", "lowpass", "bands", "noise", "gain", "polarity")
"""In the order in which they are done."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training segments are changed, on the device; the bias model hears them unchanged."""

    augment: Annotated[str, LEARNED] = "none"
    """`none`, or some of gain, polarity, shift, lowpass, noise and bands, with commas between. Each
    segment is changed anew, by numbers that follow from seed, position and row."""
    augment_gain_db: Annotated[float, Range(above=0, maximum=60, cure="6 is usual"), LEARNED] = 6.0
    """`gain`: louder or softer by at most so many dB. Models that normalise do not hear it."""
    augment_shift_s: Annotated[
        float, Range(above=0, maximum=3_600, cure="0.5 is usual"), LEARNED
    ] = 0.5
    """`shift`: at most so many seconds to and fro; what leaves one end comes in at the other."""
    augment_lowpass_hz: Annotated[
        float, Range(minimum=20, maximum=96_000, cure="2000 is usual"), LEARNED
    ] = 2000.0
    """`lowpass`: of second order, with a cutoff from here to half the sample rate, evenly drawn on
    a scale of octaves."""
    augment_bands: Annotated[float, Range(above=0, below=1, cure="0.2 is usual"), LEARNED] = 0.2
    """`bands`: nothing is left of a band, which has at most this share of the mel scale."""
    augment_noise_db: Annotated[
        float, Range(minimum=-20, maximum=100, cure="20 is usual"), LEARNED
    ] = 20.0
    """`noise`: white noise, so many dB below the segment or up to 30 dB less."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is done, in order."""
        named = self.augment.split(",")
        return tuple(kind for kind in KINDS if kind in named)

    def __post_init__(self) -> None:
        check(self)
        named = self.augment.split(",")
        require(
            "--augment",
            self.augment == "none" or (set(named) <= set(KINDS) and len(set(named)) == len(named)),
            self.augment or "nothing",
            f"none, or some of {', '.join(KINDS)}, each once",
            "for example --augment gain,polarity,noise",
        )
