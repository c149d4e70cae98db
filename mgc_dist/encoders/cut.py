"""An encoder in two parts: up to a layer, and from it on.

The lower part is the model's own forward pass, which ends at the layer. In the upper part layers
are called as their encoders call them, with what those make of the number of frames alone.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from mgc_dist.encoders import hub
from mgc_dist.encoders.masks import applies_masks


class _Reached(Exception):
    """A layer has given its states, [B, F, D]; what follows need not be computed."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def until(layer: nn.Module, forward: Callable[[], object]) -> Tensor:
    """What a layer gives, [B, F, D], in a forward pass that ends there."""

    def stop(module: nn.Module, inputs: object, output: Any) -> None:  # noqa: ANN401
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(stop)
    try:
        forward()
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise AssertionError("the forward pass does not call the layer")


def through(encoder: nn.Module, first: int, hidden: Tensor) -> Tensor:
    """The layers from a number on: [B, F, D] -> [B, F, D].

    Args:
        encoder: of transformers, with `layers`.
        first: number of the first layer to call, from 0.
        hidden: what the layer below gives.
    """
    layers: Any = encoder.layers
    named: dict[str, Any] = {"attention_mask": None}
    own: Any = encoder
    if getattr(encoder, "embed_positions", None) is not None and hasattr(layers[0], "conv_module"):
        named["relative_position_embeddings"] = own.embed_positions(hidden)  # of conformers
    attention: Any = getattr(layers[0], "attention", None)
    if first < len(layers) and hasattr(attention, "rel_attn_embed"):
        rows, frames = hidden.shape[:2]
        bias = attention.compute_bias(frames, frames)  # WavLM's layer 0 makes it for all layers
        named["position_bias"] = bias.repeat(rows, 1, 1)  # [B heads, F, F]
    for layer in layers[first:]:
        found = layer(hidden, **named)
        hidden = found[0] if isinstance(found, tuple) else found
    return hidden


def layers_below(at: str) -> int:
    """N of the boundary `layers:N`."""
    return int(at.removeprefix("layers:"))


def refuse_masks(config: PretrainedConfig, flag: str) -> None:
    """Refuse a boundary above layer 0 where SpecAugment lies below it.

    Raises:
        UserError: it does.
    """
    said = config.to_dict()
    masks = max(said.get("mask_time_prob", 0), said.get("mask_feature_prob", 0)) > 0
    if applies_masks(config) and masks:
        raise hub.inexact(
            flag,
            "SpecAugment (mask_time_prob or mask_feature_prob of the model's config), which "
            "changes the input of layer 1 at every step, frozen or not",
            "--no-spec-augment; or --cache cnn, which lies below it",
        )
