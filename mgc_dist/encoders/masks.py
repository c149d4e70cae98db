"""SpecAugment drawn by row: the same masks on any number of ranks, on the device, without a wait.

transformers draws masks for a whole batch on the host, so they depend on which rows share a batch,
and each forward pass of a GPU waits for them. Here a row's masks follow from a number of its own,
the draw, by integer arithmetic that is the same on every device. How many spans of which length a
row gets is as in transformers (`_compute_mask_indices`), but that each row rounds by itself.

Source: Park et al., "SpecAugment", Interspeech 2019; Baevski et al., "wav2vec 2.0", appendix B.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mgc_dist.sound.draws import mixed

_STREAMS = {"time": 1, "feature": 2}
"""Streams of numbers of a row, by axis."""


class RowMasks:
    """The masks of a model of wav2vec2's family, in place of its own.

    Args:
        net: an audio classifier of transformers.

    Attributes:
        draw: int64 [B], a number for each row of the coming forward pass in training; None lets
            torch's generator draw them.
    """

    def __init__(self, net: PreTrainedModel) -> None:
        self._base, self._config = net.base_model, net.config
        self.draw: Tensor | None = None
        self._base._mask_hidden_states = self._masked

    @classmethod
    def of(cls, net: PreTrainedModel) -> "RowMasks | None":
        """The masks of a model, the same however often it is asked for; None if it has none."""
        own = getattr(net.base_model, "_mask_hidden_states", None)
        found = getattr(own, "__self__", None)
        return found if own is None or isinstance(found, RowMasks) else cls(net)

    def _masked(
        self,
        hidden_states: Tensor,
        mask_time_indices: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What transformers calls: [B, F, D] -> [B, F, D] with some frames and features masked."""
        config, base = self._config, self._base
        if not (base.training and applies_masks(config)):
            return hidden_states
        rows, frames, width = hidden_states.shape
        draw = self.draw
        if draw is None:
            draw = torch.randint(1 << 62, (rows,), device=hidden_states.device)
        if config.mask_time_prob > 0:
            mask = self._spans(draw, "time", frames)
            filler = base.masked_spec_embed.to(hidden_states.dtype)
            hidden_states = torch.where(mask[:, :, None], filler, hidden_states)
        if config.mask_feature_prob > 0:
            mask = self._spans(draw, "feature", width)
            hidden_states = hidden_states.masked_fill(mask[:, None, :], 0)
        return hidden_states

    def _spans(self, draw: Tensor, axis: str, size: int) -> Tensor:
        """Masked spans of an axis, as the configuration has them: bool [B, size]."""
        share, length, least = (
            getattr(self._config, f"mask_{axis}_{name}") for name in ("prob", "length", "min_masks")
        )
        return spans(mixed(draw, _STREAMS[axis]), size, share=share, length=length, least=least)


def applies_masks(config: PretrainedConfig) -> bool:
    """Whether a model masks in training; what says nothing of it does (data2vec-audio)."""
    return bool(getattr(config, "apply_spec_augment", True))


def spans(draw: Tensor, size: int, *, share: float, length: int, least: int) -> Tensor:
    """Where masked spans lie: bool [B, size].

    Args:
        draw: int64 [B].
        size: of the axis, at least `length`.
        share: of the axis that spans would cover if they did not overlap.
        length: of a span.
        least: number of spans at least.
    """
    starts = size - length + 1
    place = torch.arange(starts + 1, device=draw.device)
    numbers = mixed(draw[:, None], place)  # [B, starts + 1]; the last one rounds
    fraction = (numbers[:, -1] >> 11 & (1 << 53) - 1).double() * 2.0**-53  # [0, 1)
    count = (share * size / length + fraction).floor().long()
    count = count.clamp(min=least).clamp(max=min(size // length, starts))  # [B]
    order = numbers[:, :-1].argsort(dim=1)  # [B, starts], a permutation
    begins = torch.zeros_like(order).scatter(1, order, (place[:-1] < count[:, None]).long())
    total = nn.functional.pad(begins.cumsum(dim=1), (length, length - 1))  # [B, size + length]
    total[:, starts + length :] = total[:, starts + length - 1 : starts + length]
    return total[:, length:] > total[:, :-length]  # a begin among the last `length` places
