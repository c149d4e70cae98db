"""Knobs of the main model's head: which states it reads, and how it pools them."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mgc_dist.config.knobs import FIXED, Range, check

Pooling = Literal["mean", "attention"]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What lies above the encoder's layers."""

    pooling: Annotated[Pooling, FIXED] = "mean"
    """How frames become one vector: their `mean` (AST: of its two tokens), or by `attention`, with
    learned weights that add up to 1. Models with attention are exported with their class, and
    keep it where they are the --model of another run."""
    layer_mix: Annotated[bool, FIXED] = False
    """Give the head a learned weighted sum of all layers in place of the last one; not with
    `--cache trunk`."""
    from_layer: Annotated[
        int | None, Range(minimum=1, maximum=1_000, cure="`probe` tells the best one"), FIXED
    ] = None
    """Give the head encoder layer N, counted from 1, and leave out what lies above it; a norm that
    follows the last layer then follows this one."""

    def __post_init__(self) -> None:
        check(self)
