"""Models whose inside nobody here has seen: code beside weights, or a package of its own.

What can be known of them is looked at: a segment of silence goes through once, and tells which
weights it reaches. The encoder's layers are the list of modules of that length; what its owners
were given before it lies below the layers, and is the feature encoder.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mgc_dist.encoders import hub, load_errors
from mgc_dist.encoders.masks import RowMasks
from mgc_dist.encoders.pooling import path_of_layers
from mgc_dist.encoders.wav2vec2 import states_of
from mgc_dist.errors import UserError

log = logging.getLogger(__name__)

_QUERIES_AND_VALUES = (("q_proj", "v_proj"), ("linear_q", "linear_v"), ("query", "value"), ("qkv",))
"""Names that models have for them: of HuBERT, conformers, BERT, and of one product for both."""
_OWN_MASK = "masked_spec_embed"
"""Silence in eval mode never reaches it; an adapter knows when training does."""


def look(net: PreTrainedModel, base: nn.Module, name: str, segment_samples: int) -> None:
    """Refuse a model that cannot take a segment, and keep what none reaches out of training.

    A weight without a gradient would stop ZeRO, or get another weight's (`final_proj` of MERT).

    Args:
        net: a `CustomAudioClassifier`, on any device, the meta device too.
        base: all below its head.
        name: of the model.
        segment_samples: T.

    Raises:
        UserError: its code fails, or gives no states of the width that its configuration says.
    """
    width, trains = net.projector.in_features, net.training
    wave = torch.zeros(1, segment_samples, device=net.device, dtype=net.dtype)
    try:
        with ExitStack() as kept:
            kept.enter_context(unchanged(net))
            kept.callback(net.train, trains)
            net.eval()
            if net.device.type == "meta":
                kept.enter_context(torch.device("meta"))
            hidden = base(wave).last_hidden_state  # [1, F, D]
            shape = tuple(hidden.shape)
    except Exception as error:  # whatever a stranger's code may raise
        when = f"for a segment of {segment_samples} samples"
        when += " without numbers (a dry run needs that)" if net.device.type == "meta" else ""
        raise load_errors.failed(name, when, error) from error
    if len(shape) != 3 or shape[1] == 0 or shape[2] != width:
        raise UserError(
            f"--model {name}",
            got=f"states of shape {list(shape)} for a segment of {segment_samples} samples",
            expected=f"[1, frames, {width}], as its config.json says",
            cure="pack longer segments (python -m mgc_dist.shard --segment-s 5), or choose another "
            "model",
        )
    reached = _leaves(hidden)
    kept_by_adapter = (_OWN_MASK,) if is_of_wav2vec2(base) else ()
    lost = [
        part
        for part, weight in base.named_parameters()
        if weight.requires_grad and id(weight) not in reached and part not in kept_by_adapter
    ]
    for part in lost:
        base.get_parameter(part).requires_grad_(False)
    if lost:
        log.info("never reached, and so not trained: %s", ", ".join(lost))


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    """A block after which modules that have kept a tensor in it have the attributes that they had.

    Rotary positions keep their table for the next segment of that length, on the device of this
    one, which may be meta.
    """
    had = [(module, dict(vars(module))) for module in net.modules()]
    try:
        yield
    finally:
        for module, before in had:
            own = vars(module)
            if any(isinstance(own[n], Tensor) and own[n] is not before.get(n) for n in own):
                own.clear()
                own.update(before)


def _leaves(output: Tensor) -> set[int]:
    """The ids of the weights from which a result was computed."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo = [output.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        todo += [below for below, _ in node.next_functions]
    return found


def is_of_wav2vec2(base: nn.Module) -> bool:
    """Whether a model has the parts of wav2vec2 by their names, as MERT v1 has."""
    encoder = getattr(base, "feature_extractor", None)
    return hasattr(encoder, "_freeze_parameters") and isinstance(
        getattr(getattr(base, "encoder", None), "layers", None), nn.ModuleList
    )


class ForeignKind:
    """The adapter (`mgc_dist.encoders.kind.Kind`).

    Args:
        net: a `CustomAudioClassifier`.
    """

    normalises: bool | None = None
    head = "classifier"
    needs_our_code = True
    masks: RowMasks | None = None
    never_called: tuple[str, ...] = ()

    def __init__(self, net: PreTrainedModel) -> None:
        self.net = net
        self.cut = ForeignCut(net)
        self._path = path_of_layers(self.base, net.config)

    @property
    def fuses_attention(self) -> bool:
        """Whether its attention is taken for one fused kernel."""
        return bool(self.net.config._attn_implementation != "eager")

    @property
    def base(self) -> nn.Module:
        """All below the head."""
        base: nn.Module = self.net.backbone
        return base

    @property
    def adapted(self) -> tuple[str, ...]:
        """Its queries and values, where they have one of the usual names."""
        own = {name.rpartition(".")[2] for name, _ in self.base.named_modules()}
        usual = (names for names in _QUERIES_AND_VALUES if own.issuperset(names))
        return next(usual, _QUERIES_AND_VALUES[0])

    def inputs(self, wave: Tensor) -> Tensor:
        """The waves themselves."""
        return wave

    def states(self, x: Tensor) -> Sequence[Tensor]:
        """Hidden states by layer, L times [B, F, D]; code of one's own may give none."""
        return states_of(self.net, x, self._layers)

    def take(self, extractor: Any) -> bool:  # noqa: ANN401 - of transformers
        """Whether waves are normalised."""
        return bool(getattr(extractor, "do_normalize", False))

    def extractor(self, sample_rate: int, do_normalize: bool) -> Any:  # noqa: ANN401
        """It keeps the sample rate, and whether waves are normalised."""
        return hub.wave_extractor(sample_rate, do_normalize, self.net.config)

    def fit(self, segment_samples: int) -> None:
        """Nothing: what no segment reaches is found before."""

    def refuse_unfit(self, name: str, segment_samples: int) -> None:
        """Nothing: a segment of silence tells before."""

    def freeze(self, freeze: str, frozen_layers: int | None) -> list[nn.Module]:
        """Freeze what lies below the layers, and layers; or all below the head, or nothing."""
        if freeze == "none":
            return []
        if freeze == "backbone":
            self.base.requires_grad_(False)
            return [self.base]
        parts, layers = _below_layers(self.base, self._path), self._layers
        if frozen_layers is not None:
            if frozen_layers > len(layers):
                raise hub.too_many_layers(frozen_layers, len(layers))
            parts += layers[:frozen_layers]
            _freeze_own(self.base, self._path)
        for part in parts:
            part.requires_grad_(False)
        return parts

    def part_of(self, name: str) -> str:
        """As `--freeze` divides it."""
        if ".backbone." not in name:
            return "head"
        layer = re.search(rf"\.backbone\.{re.escape(self._path)}\.(\d+)\.", name)
        if layer and self._path:
            return f"layer {layer[1]}"
        below = (name for name, _ in _named_below(self.base, self._path))
        if any(f".backbone.{part}." in name for part in below):
            return "feature_extractor"
        return "encoder, besides its layers"

    def layers_above(self, name: str) -> int:
        """0 for the last layer and what follows it; all for what lies below the first one."""
        layers, part = len(self._layers), self.part_of(name)
        if part.startswith("layer "):
            return layers - 1 - int(part.removeprefix("layer "))
        return layers if part == "feature_extractor" else 0

    @property
    def _layers(self) -> nn.ModuleList:
        layers = self.base.get_submodule(self._path) if self._path else nn.ModuleList()
        assert isinstance(layers, nn.ModuleList)
        return layers


def _named_below(base: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """What the owners of the layers were given before them, by name in the base."""
    found: list[tuple[str, nn.Module]] = []
    owner, at = base, ""
    for step in path.split(".") if path else ():
        for name, child in owner.named_children():
            if name == step:
                break
            found.append((f"{at}{name}", child))
        owner, at = owner.get_submodule(step), f"{at}{step}."
    return found


def _below_layers(base: nn.Module, path: str) -> list[nn.Module]:
    return [module for _, module in _named_below(base, path)]


def _freeze_own(base: nn.Module, path: str) -> None:
    """Freeze the parameters that the owners of the layers hold themselves, such as positions."""
    steps = path.split(".")
    for count in range(len(steps)):
        owner = base.get_submodule(".".join(steps[:count]))
        for parameter in owner.parameters(recurse=False):
            parameter.requires_grad_(False)


class ForeignCut:
    """Where the model is cut in two (`mgc_dist.encoders.kind.Cut`): below the head only.

    Args:
        net: a `CustomAudioClassifier`.
    """

    def __init__(self, net: PreTrainedModel) -> None:
        self._net = net

    def is_below(self, part: str, at: str) -> bool:
        """All but the head."""
        return part != "head"

    def refuse_inexact(self, at: str, flag: str) -> None:
        """Refuse all boundaries but the one below the head, and a head that reads all layers."""
        if at != "backbone":
            got = f"{self._net.config.model_type}, whose own code only calls it as a whole"
            raise hub.inexact(flag, got, "--cache trunk with --freeze backbone, or --cache none")
        if self._net.config.to_dict().get("use_weighted_layer_sum"):
            raise hub.inexact(flag, "a head that reads the states of all layers", "--cache none")

    def open_at(self, at: str) -> None:
        """Nothing to do: `above` calls the head alone."""

    def below(self, at: str, x: Tensor) -> Tensor:
        """What the head gets: float32 waves [B, T] -> [B, F, D]."""
        states: Tensor = self._net.backbone(x).last_hidden_state  # [B, F, D]
        return states

    def above(self, at: str, hidden: Tensor) -> Tensor:
        """The head: [B, F, D] -> logits [B, K]."""
        net = self._net
        logits: Tensor = net.classifier(net.projector(hidden).mean(dim=1))  # [B, K]
        return logits

    def modules_below(self, at: str) -> dict[str, nn.Module]:
        """The modules whose weights decide what lies at a boundary, by name."""
        return {"backbone": self._net.backbone}
