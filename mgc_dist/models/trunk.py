"""Where a frozen main model is cut in two, for a cache of what its lower part gives.

Three boundaries: `cnn`, what the feature encoder gives, before the projection; `layers:N`, the
hidden states after encoder layer N; `backbone`, what the head gets. All are [B, F, D], and
constants of a segment where everything below is frozen, in eval mode, and draws no numbers.

The parts above are called as the model itself calls them, in the same order, so that dropout
above the boundary draws the same numbers with a cache and without one.
"""

import fnmatch
import hashlib
import json
from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgc_dist.errors import UserError

_NO_EFFECT = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id"),
    *("num_labels", "segment_samples", "calibration_temperature", "classifier_proj_size"),
    *("*dropout", "*layerdrop", "mask_*", "apply_spec_augment", "ctc_*", "*_token_id"),
)
"""Settings of a transformers model that do not change what its frozen parts give in eval mode."""


def boundary(cache: str, freeze: str) -> str:
    """The boundary of `--cache cnn|trunk` for a `--freeze` other than none."""
    return "cnn" if cache == "cnn" or freeze == "feature_encoder" else freeze


def refuse_inexact(net: PreTrainedModel, at: str, flag: str) -> None:
    """Refuse a boundary below which a step's result is no constant of the segment.

    Args:
        net: a transformers audio classifier with its parts frozen, or `logmel-cnn`.
        at: `cnn`, `layers:N` or `backbone`.
        flag: that asks for it, in the message.

    Raises:
        UserError: with the reason.
    """
    base, config = net.base_model, net.config
    if not hasattr(base, "feature_extractor"):
        _refuse(flag, f"{config.model_type}, of which nothing costly is frozen", "--cache none")
    if at == "cnn":
        return
    if getattr(config, "use_weighted_layer_sum", False):
        _refuse(flag, "a head that reads the states of all layers", "--cache cnn")
    if at == "backbone":
        return  # in eval mode as a whole: no SpecAugment, no dropout
    masks = max(config.mask_time_prob, config.mask_feature_prob) > 0
    if config.apply_spec_augment and masks:
        _refuse(
            flag,
            "SpecAugment (mask_time_prob or mask_feature_prob of the model's config), which "
            "changes the input of layer 1 at every step, frozen or not",
            "--no-spec-augment; or --cache cnn, which lies below it",
        )
    if hasattr(base.encoder.layers[0].attention, "rel_attn_embed"):
        _refuse(flag, "layers that share a position bias which layer 1 makes", "--cache cnn")


def _refuse(flag: str, got: str, cure: str) -> None:
    raise UserError(
        flag,
        got=got,
        expected="a frozen part that gives the same for a segment at every step",
        cure=f"use {cure}",
    )


def pass_by(net: PreTrainedModel) -> None:
    """Let the feature encoder hand its own output on, when it is given that instead of waves.

    float32 waves [B, T] are encoded as ever; features [B, F, D] come back as [B, D, F], which is
    how the model gets them from its encoder. So it is the model's own forward pass that runs, with
    its mask and, at ZeRO-3, its hooks; calling its inner methods would find partitioned weights.
    """
    extractor = net.base_model.feature_extractor
    encode = extractor.forward

    def encode_or_pass(x: Tensor) -> Tensor:
        passed: Tensor = x.transpose(1, 2) if x.dim() == 3 else encode(x)  # [B, D, F]
        return passed

    extractor.forward = encode_or_pass


def below(net: PreTrainedModel, at: str, x: Tensor) -> Tensor:
    """What the frozen part gives: float32 waves [B, T] -> [B, F, D], of autocast's dtype."""
    base = net.base_model
    if at == "backbone":
        states: Tensor = base(x).last_hidden_state  # [B, F, D]
        return states
    features: Tensor = base.feature_extractor(x).transpose(1, 2)  # [B, F, D]
    if at == "cnn":
        return features
    encoder = base.encoder
    projected = base.feature_projection(features)  # a tuple but for hubert
    hidden: Tensor = projected[0] if isinstance(projected, tuple) else projected  # [B, F, D]
    hidden = hidden + encoder.pos_conv_embed(hidden)
    if not norms_last(net):
        hidden = encoder.layer_norm(hidden)
    hidden = encoder.dropout(hidden)
    for layer in encoder.layers[: layers_below(at)]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def above(net: PreTrainedModel, at: str, hidden: Tensor) -> Tensor:
    """What the rest makes of it: [B, F, D] -> logits [B, K]; `pass_by` must have been called."""
    if at == "cnn":
        logits: Tensor = net(hidden).logits
        return logits
    encoder = net.base_model.encoder
    if at != "backbone":
        for layer in encoder.layers[layers_below(at) :]:
            hidden = layer(hidden, attention_mask=None)
        if norms_last(net):
            hidden = encoder.layer_norm(hidden)
    pooled = net.projector(hidden).mean(dim=1)  # [B, D]
    logits = net.classifier(pooled)  # [B, K]
    return logits


def fingerprint(net: PreTrainedModel, at: str, *settings: object) -> str:
    """xxh3_128 of all that the frozen part's output depends on, but for the segment.

    Args:
        net: the model, with whole weights (before ZeRO-3 takes them apart).
        at: the boundary.
        settings: anything else that counts.
    """
    config = net.config.to_dict()
    kept = {
        k: config[k] for k in sorted(config) if not any(fnmatch.fnmatch(k, p) for p in _NO_EFFECT)
    }
    words = json.dumps([kept, at, *settings], sort_keys=True, default=str)
    digest = xxhash.xxh3_128(hashlib.sha256(words.encode()).digest())
    for name, tensor in _weights(net, at):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(net: PreTrainedModel, at: str) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what lies below the boundary."""
    base = net.base_model
    parts: dict[str, nn.Module] = {"backbone": base}
    if at != "backbone":
        parts = {"feature_extractor": base.feature_extractor}
    if at.startswith("layers:"):
        encoder = base.encoder
        parts |= {"projection": base.feature_projection, "positions": encoder.pos_conv_embed}
        parts |= {f"layer {n}": layer for n, layer in enumerate(encoder.layers[: layers_below(at)])}
        parts |= {} if norms_last(net) else {"norm": encoder.layer_norm}
    for part, module in parts.items():
        for name, tensor in sorted(module.state_dict().items()):
            yield f"{part} {name}", tensor


def layers_below(at: str) -> int:
    """N of the boundary `layers:N`."""
    return int(at.removeprefix("layers:"))


def norms_last(net: PreTrainedModel) -> bool:
    """Whether the encoder's norm stands behind its layers; else it stands before them.

    By the encoder that was built: a config may carry do_stable_layer_norm to a model that does not
    look at it (data2vec-audio).
    """
    return "StableLayerNorm" in type(net.base_model.encoder).__name__
