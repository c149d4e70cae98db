"""Knobs of exam: which transformations, controls and bands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from mgc_dist.config.knobs import FLAT, Range, check
from mgc_dist.config.scoring import EvaluateConfig
from mgc_dist.config.source import BATCH, SEED, Device, SourceConfig, SplitName

Controls = Literal["worst", "all", "none"]


@dataclass(frozen=True, kw_only=True)
class ExamConfig:
    """Examine a run's best model: change the music in ways that keep its genre, and count answers
    that change. What is done is kept in RUN/exam/NAME; the same command goes on with the rest.
    """

    run: Positional[Path]
    """Run folder, or a folder that `export` wrote."""
    split: SplitName = "test"
    """Split to examine on."""
    ema: bool = False
    """Examine the averaged weights, RUN/best-ema, of a run that was trained with --ema-decay."""
    trust_remote_code: bool = False
    """Run the code that lies beside the model's weights."""
    data: Path | None = None
    """Shards of the model's genres to examine on; the run's own by default."""
    source: Annotated[SourceConfig, FLAT] = field(default_factory=SourceConfig)
    name: str | None = None
    """Name of what is written; the split's, with `-of-FOLDER` of --data and `-ema`."""
    only: tuple[str, ...] = ()
    """Transformations to try, such as `polarity mp3`; all by default."""
    controls: Controls = "worst"
    """Fit the last layer anew on transformed training segments: for the `worst` three
    transformations, for `all`, or for `none`. Of what comes back, the rest of the model still tells
    the genre."""
    head_c: Annotated[float, Range(minimum=1e-9, maximum=1e9, cure="1.0 is usual")] = 1.0
    """Inverse strength of the L2 penalty of the fitted layers (scikit-learn's C)."""
    band_segments: Annotated[int, Range(minimum=0, maximum=1_000_000, cure="64 is usual")] = 64
    """Segments of which the bands that suffice for the answer are searched; 0 leaves it out."""
    seed: Annotated[int, SEED] = 0
    """Of noise, rooms and orders."""
    batch: Annotated[int, BATCH] = 32
    """Segments in a batch."""
    device: Device = "auto"
    """Where the model runs, and most transformations; codecs and rates are done on the CPU."""

    @property
    def evaluation(self) -> EvaluateConfig:
        """How the same music is measured as it is."""
        return EvaluateConfig(
            run=self.run,
            split=self.split,
            ema=self.ema,
            trust_remote_code=self.trust_remote_code,
            data=self.data,
            source=self.source,
            name=self.name,
            batch=self.batch,
            device=self.device,
        )

    @property
    def folder(self) -> Path:
        """What is kept of the work: answers by transformation, and audio to listen to."""
        return self.run / "exam" / self.evaluation.result_name

    @property
    def file(self) -> Path:
        """All figures."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def __post_init__(self) -> None:
        check(self)
        self.evaluation.__post_init__()
