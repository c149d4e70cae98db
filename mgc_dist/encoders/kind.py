"""What the trainer asks of a kind of model: one adapter a kind, each in a file of its own.

A new kind is such a file and an entry of KINDS. What no entry names is taken for one of wav2vec2's
family, whose adapter refuses what does not have its parts.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgc_dist.encoders import custom, hub
from mgc_dist.encoders.bands import LAYOUTS, BandsKind
from mgc_dist.encoders.cnn import CnnConfig, LogMelCnnKind
from mgc_dist.encoders.foreign import ForeignKind, is_of_wav2vec2
from mgc_dist.encoders.masks import RowMasks
from mgc_dist.encoders.pooling import ATTENTION
from mgc_dist.encoders.wav2vec2 import Wav2Vec2Kind
from mgc_dist.encoders.wrapped import CustomAudioClassifier

_NO_EFFECT = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id"),
    *("num_labels", "segment_samples", "calibration_temperature", "classifier_proj_size"),
    ATTENTION,
    *("*dropout", "*layerdrop", "mask_*", "apply_spec_augment", "ctc_*", "*_token_id"),
)
"""Settings of a transformers model that do not change what its frozen parts give in eval mode."""


class Cut(Protocol):
    """Where a model can be cut in two, for a cache of what its frozen lower part gives, [B, F, D].

    Three boundaries: `cnn`, what the feature encoder gives; `layers:N`, what encoder layer N gives;
    `backbone`, what the head gets. What lies there is a constant of a segment where everything
    below is frozen, in eval mode, and draws no numbers.
    """

    def refuse_inexact(self, at: str, flag: str) -> None:
        """Refuse a boundary below which a step's result is no constant of the segment.

        Raises:
            UserError: with the reason; `flag` asks for the boundary.
        """

    def open_at(self, at: str) -> None:
        """Make ready to be given what lies at a boundary, in place of waves."""

    def below(self, at: str, x: Tensor) -> Tensor:
        """What the frozen part gives: the model's inputs -> [B, F, D], of autocast's dtype."""

    def above(self, at: str, hidden: Tensor) -> Tensor:
        """What the rest makes of it: [B, F, D] -> logits [B, K], once `open_at` was called."""

    def modules_below(self, at: str) -> dict[str, nn.Module]:
        """The modules whose weights decide what lies at a boundary, by name."""

    def is_below(self, part: str, at: str) -> bool:
        """Whether a part, named as by `Kind.part_of`, lies below a boundary."""


class Kind(Protocol):
    """A model of transformers, and what is known of how its kind is built.

    Attributes:
        net: the model.
        cut: where it can be cut in two; None if it cannot.
        normalises: whether its waves have zero mean and unit variance; None where its feature
            extractor says so.
        base: all below the head.
        head: name of its last linear layer, in the model.
        needs_our_code: whether transformers alone cannot load it.
        masks: its SpecAugment, drawn by row; None if it has none.
        adapted: names of the linear layers that low-rank adapters stand beside, unless told.
        never_called: names of linear layers that adapters cannot change: only weights are read.
    """

    net: PreTrainedModel
    masks: RowMasks | None
    normalises: bool | None
    needs_our_code: bool
    never_called: tuple[str, ...]

    @property
    def cut(self) -> Cut | None:
        """As above."""

    @property
    def base(self) -> nn.Module:
        """As above."""

    @property
    def adapted(self) -> tuple[str, ...]:
        """As above."""

    @property
    def head(self) -> str:
        """As above."""

    def inputs(self, wave: Tensor) -> Tensor:
        """What the model takes: float32 waves [B, T], or bands of them."""

    def states(self, x: Tensor) -> Sequence[Tensor]:
        """Hidden states by layer: the model's inputs -> L times [B, F, D], lowest first.

        Layer 0 is what the first encoder layer gets. F covers the segment, and no padding where
        that can be told apart.
        """

    def take(self, extractor: Any) -> bool:  # noqa: ANN401 - of transformers
        """Keep what a feature extractor decides; returns whether waves are normalised.

        Raises:
            UserError: it wants another sample rate than the kind.
        """

    def extractor(self, sample_rate: int, do_normalize: bool) -> Any:  # noqa: ANN401
        """The feature extractor with which transformers gives the model the same inputs."""

    def fit(self, segment_samples: int) -> None:
        """Take from a model what segments of T samples never reach."""

    @property
    def fuses_attention(self) -> bool:
        """Whether the backward pass of attention computes its scores again."""

    def refuse_unfit(self, name: str, segment_samples: int) -> None:
        """Refuse a model, or segments of T samples, that cannot be trained as they are.

        Raises:
            UserError: with the reason.
        """

    def freeze(self, freeze: str, frozen_layers: int | None) -> list[nn.Module]:
        """Take parts out of training and of the backward pass; returns them.

        Raises:
            UserError: it has no such part.
        """

    def part_of(self, name: str) -> str:
        """Part of the model that a parameter or module belongs to, by its name."""

    def layers_above(self, name: str) -> int:
        """Encoder layers that lie above a parameter below the head, by its name.

        Raises:
            UserError: it has no encoder layers.
        """


KINDS: dict[str, Callable[[PreTrainedModel], Kind]] = {
    CnnConfig.model_type: LogMelCnnKind,
    **dict.fromkeys(LAYOUTS, BandsKind),
}
"""By `model_type`; what is not here is of wav2vec2's family, or foreign code."""


def kind_of(net: PreTrainedModel) -> Kind:
    """The adapter of a model."""
    if isinstance(net, CustomAudioClassifier) and not is_of_wav2vec2(net.backbone):
        return ForeignKind(net)
    return KINDS.get(net.config.model_type, Wav2Vec2Kind)(net)


def open_boundary(kind: Kind, cache: str, freeze: str) -> str | None:
    """Make a model ready for cached features.

    Args:
        kind: of the model, with its parts frozen.
        cache: `none`, `cnn` or `trunk`.
        freeze: which parts; other than `none` with a cache.

    Returns:
        The boundary that they lie at; None without a cache.

    Raises:
        UserError: the cache would not be exact.
    """
    if cache == "none":
        return None
    flag = f"--cache {cache} with --freeze {freeze}"
    if kind.cut is None:
        got = f"{kind.net.config.model_type}, of which nothing costly is frozen"
        raise hub.inexact(flag, got, "--cache none")
    at = "cnn" if cache == "cnn" or freeze == "feature_encoder" else freeze
    kind.cut.refuse_inexact(at, flag)
    kind.cut.open_at(at)
    return at


def fingerprint(net: PreTrainedModel, at: str, *settings: object) -> str:
    """xxh3_128 of all that the frozen part's output depends on, but for the segment.

    Args:
        net: a model that can be cut, with whole weights (before ZeRO-3 takes them apart).
        at: the boundary.
        settings: anything else that counts.
    """
    config = net.config.to_dict()
    kept = {
        k: config[k] for k in sorted(config) if not any(fnmatch.fnmatch(k, p) for p in _NO_EFFECT)
    }
    code = [custom.code_of(net.config)] if custom.is_custom(net.config) else []
    words = json.dumps([kept, at, *settings, *code], sort_keys=True, default=str)
    digest = xxhash.xxh3_128(hashlib.sha256(words.encode()).digest())
    cut = kind_of(net).cut
    assert cut is not None
    tensors = (
        (f"{part} {name}", tensor)
        for part, module in cut.modules_below(at).items()
        for name, tensor in sorted(module.state_dict().items())
    )
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
