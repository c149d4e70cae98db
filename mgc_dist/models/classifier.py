"""The main model: waves of segments to logits of genres, and what of it is frozen."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from mgc_dist.encoders.hub import standardised
from mgc_dist.encoders.kind import kind_of
from mgc_dist.sound.augment import Augment
from mgc_dist.sound.draws import crop, spaced

TEMPERATURE = "calibration_temperature"
"""In config.json; transformers refuses "temperature" there: "Some generation parameters are set
in the model config"."""

CROP_OF = "crop_of_samples"
"""In config.json, of a model that was trained on crops: T of the segments that they are of."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a checkpoint keeps of the model that a run began with, besides weights.

    Attributes:
        name, revision: as they were given.
        commit: that the revision stood for; `none` where there is none.
        settings: its configuration, as in config.json.
        do_normalize: whether its feature extractor normalises.
    """

    name: str
    revision: str | None
    commit: str
    settings: dict[str, Any]
    do_normalize: bool


class WaveClassifier(nn.Module):
    """A transformers audio classifier that takes int16 segments.

    Args:
        net: an `AutoModelForAudioClassification`.
        do_normalize: whether its feature extractor normalises.
        frozen: modules that stay in eval mode, so that no dropout or mask changes them.
        learns_gain: add a layer for the gain of the learned mixins, which is not exported.
        boundary: of `kind`, where it takes the cached output of its frozen part.
        augment: changes waves in training.

    Attributes:
        net, do_normalize, boundary: as given.
        kind: the adapter of the model.
        crop_of: T of segments of which it hears crops; None where it hears segments whole.
        boundary_dtype: of the model's own values at the boundary, in the run's precision.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        *,
        do_normalize: bool,
        frozen: Sequence[nn.Module] = (),
        learns_gain: bool = False,
        boundary: str | None = None,
        augment: Augment | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.kind = kind_of(net)
        self.crop_of: int | None = net.config.to_dict().get(CROP_OF)
        self.boundary = boundary
        self._augment = augment
        self.boundary_dtype = torch.float32
        self.do_normalize = do_normalize
        self._frozen = list(frozen)
        head = net.get_submodule(self.kind.head)
        self.gain = nn.Linear(head.in_features, 1) if learns_gain else None
        self._below_head: Tensor | None = None
        if self.gain is not None:
            head.register_forward_pre_hook(self._keep_below_head)

    def _keep_below_head(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._below_head = inputs[0]  # [B, D]

    def forward(
        self,
        wave: Tensor,
        draw: Tensor | None = None,
        *,
        with_gain: bool = False,
        only_below: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """int16 [B, T] -> logits [B, K]; with the gain, g = softplus(w h + c), float32 [B].

        h is what the last layer gets, [B, D] (Clark et al., EMNLP 2019). The gain trains w and c
        only: no gradient flows from it into h, where Clark's code lets it. In place of waves it
        takes what lies at the boundary, of any floating type [B, F, D]: nothing below is computed.
        `only_below` gives just that, [B, F, D]. In training, `draw`, int64 [B], decides of each row
        the crop, where it hears crops, the augmentation and the masks of SpecAugment. Else the
        logits are the mean over crops that cover the segment.
        """
        if wave.shape[1] == self.crop_of and not wave.is_floating_point():
            if not self.training:
                crops = spaced(wave, self.segment_samples)
                each = [self.net(self._inputs(part)).logits for part in crops]
                return torch.stack(each).mean(dim=0)  # [B, K]
            assert draw is not None
            wave = crop(wave, draw, self.segment_samples)
        if self.kind.masks is not None:
            self.kind.masks.draw = draw
        if wave.is_floating_point():
            assert self.boundary is not None
            assert self.kind.cut is not None
            logits = self.kind.cut.above(self.boundary, wave.to(self.boundary_dtype))  # [B, K]
        else:
            x = self._inputs(wave, draw)
            if only_below:
                assert self.boundary is not None
                assert self.kind.cut is not None
                return self.kind.cut.below(self.boundary, x)  # [B, F, D]
            logits = self.net(x).logits  # [B, K]
        if not with_gain:
            return logits
        below, self._below_head = self._below_head, None
        assert self.gain is not None
        assert below is not None
        # detached: else the gain's gradient trains the features for the product p b^g, and the
        # shifted test of benchmarks/shortcut.py falls from 0.840 to 0.555 (docs/log.md)
        return logits, F.softplus(self.gain(below.detach()).float())[:, 0]  # [B]

    def _inputs(self, wave: Tensor, draw: Tensor | None = None) -> Tensor:
        """What the model takes: int16 [B, T] -> float waves [B, T], or bands of them.

        A draw of each row, int64 [B], changes it in training.
        """
        x = wave.float() / 32768.0
        if self.training and self._augment and draw is not None:
            x = self._augment(x, draw)  # [B, T]
        x = standardised(x) if self.do_normalize else x
        return self.kind.inputs(x).to(self.net.dtype)

    def train(self, mode: bool = True) -> "WaveClassifier":
        """Switch the mode; frozen modules stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def as_base(self, name: str, revision: str | None, commit: str) -> Base:
        """What a checkpoint keeps of this model; the arguments are as in `Base`."""
        return Base(
            name=name,
            revision=revision,
            commit=commit,
            settings=json.loads(self.net.config.to_json_string(use_diff=False)),
            do_normalize=self.do_normalize,
        )

    @property
    def genres(self) -> tuple[str, ...]:
        """Names in label order."""
        names: Mapping[int, str] = self.net.config.id2label
        return tuple(names[label] for label in range(len(names)))

    @property
    def segment_samples(self) -> int:
        """T: audio samples of the segments that it was trained on."""
        return int(self.net.config.segment_samples)

    @property
    def crops_in_words(self) -> str:
        """How a whole segment is heard, where crops of it are."""
        count = -(-(self.crop_of or 0) // self.segment_samples)
        return f"{count} crops that cover it, evenly spaced: the mean of their logits"

    @property
    def needs_our_code(self) -> bool:
        """Whether transformers alone cannot load it."""
        return self.kind.needs_our_code

    @property
    def is_adapted(self) -> bool:
        """Whether adapters are trained in place of its own weights below the head."""
        return any(".lora_A." in name for name, _ in self.net.named_modules())

    @property
    def temperature(self) -> float | None:
        """T that calibrates the mean over segments of softmax(logits / T), if one was accepted."""
        value = self.net.config.to_dict().get(TEMPERATURE)
        return None if value is None else float(value)

    def calibrated(self, wave: Tensor) -> Tensor:
        """int16 [B, T] -> logits [B, K] divided by the temperature: what evaluation reports."""
        logits: Tensor = self(wave)
        return logits / self.temperature if self.temperature else logits

    def head_and_backbone(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Trainable parameters of the head (everything above the base model) and below."""
        inner = {id(p) for p in self.kind.base.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        head = [p for p in trained if id(p) not in inner]
        return head, [p for p in trained if id(p) in inner]

    def backbone_by_layer(self) -> dict[int, list[nn.Parameter]]:
        """Its trainable parameters by how many encoder layers lie above them, the lowest first.

        Raises:
            UserError: the model has no encoder layers.
        """
        inner = {id(p) for p in self.kind.base.parameters()}
        found: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) in inner:
                found.setdefault(self.kind.layers_above(name), []).append(parameter)
        return dict(sorted(found.items(), reverse=True))
