"""Heads that transformers does not have: attention over time, and sums over layers for any model.

A copy of this file lies beside an exported model that has such a head. It needs no mgc_dist:
transformers runs it with `trust_remote_code=True`, and without that refuses to load the model.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING

MODEL_TYPE = "mgc-head"
"""In config.json in place of the model's own type: a plain transformers would load that one, and
leave out the weights that it does not know."""
ATTENTION = "attention_pooling"
"""In config.json."""
_SUM = "use_weighted_layer_sum"
_OWN_TYPE = "type_below_head"


class AttentionProjector(nn.Linear):
    """A projector that weighs frames, so that the mean over them is one by attention.

    Source: Safari, India, Hernando, "Self-attention encoding and pooling for speaker recognition",
    Interspeech 2020: softmax(w H) H.

    Args:
        like: the projector that it replaces.
    """

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.score = nn.Linear(like.in_features, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """States [B, F, D] -> [B, F, P]."""
        projected = super().forward(hidden)  # [B, F, P]
        share = self.score(hidden).float().softmax(dim=1) * hidden.shape[1]  # [B, F, 1]
        weighed: Tensor = projected * share.to(projected.dtype)
        return weighed


class AttentionMean(nn.Module):
    """The mean over frames by the same attention, for a head without a projector.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """States [B, F, D] -> [B, D]."""
        share = self.score(hidden).float().softmax(dim=1)  # [B, F, 1]
        mean: Tensor = (hidden * share.to(hidden.dtype)).sum(dim=1)  # [B, D]
        return mean


def class_of(plain: type[PreTrainedModel], config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a classifier whose configuration asks for a head.

    Args:
        plain: the class with the head of transformers.
        config: of the model.
    """
    said = config.to_dict()
    sums = said.get(_SUM) and not _can_sum(plain)
    if not (said.get(ATTENTION) or sums):
        return plain
    headed: type[PreTrainedModel] = _headed(plain)  # type: ignore[arg-type]
    return headed


def _can_sum(plain: type[PreTrainedModel]) -> bool:
    """Whether a class has a sum over layers of its own."""
    own = plain.config_class
    return own is not None and _SUM in own().to_dict()


@cache
def _headed(plain: Any) -> Any:  # noqa: ANN401 - a class of transformers
    class Headed(plain):  # type: ignore[misc]
        """A classifier with a head of ours."""

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.sums = bool(config.to_dict().get(_SUM)) and not _can_sum(plain)
            _add_parts(self, config)
            self.post_init()

        def forward(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401
            """As the model's own: its inputs -> logits [B, K]."""
            if hasattr(self, "projector") and not self.sums:
                return super().forward(*given, **named)
            inputs = given[0] if given else named[self.main_input_name]
            if self.sums:
                states = states_of(self, inputs, _layers_of(self))
                hidden = _summed(states or [], self.layer_weights)  # [B, F, D]
                norm = getattr(self.base_model, "layernorm", None)  # of AST, behind its last layer
                hidden = norm(hidden) if norm else hidden
            else:
                hidden = self.base_model(inputs).last_hidden_state  # [B, F, D]
            return SequenceClassifierOutput(logits=self.classifier(pooled(self, hidden)))

    Headed.__name__ = plain.__name__  # a pipeline reports others, which it then takes all the same
    return Headed


def states_of(
    net: PreTrainedModel, x: Tensor, layers: Iterable[nn.Module]
) -> Sequence[Tensor] | None:
    """Hidden states by layer, L times [B, F, D]; None where they cannot be told.

    Code that calls its encoder itself, as MERT v1 does, gets no states from transformers 5: they
    are then what each layer is given, and what comes out in the end.

    Args:
        net: an audio classifier.
        x: the model's inputs.
        layers: of its encoder.
    """
    given: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.append(inputs[0] if inputs else named["hidden_states"])

    with ExitStack() as kept:
        for layer in layers:
            hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
            kept.callback(hook.remove)
        try:
            found = net.base_model(x, output_hidden_states=True)
        except TypeError as error:
            if "hidden_states" not in str(error):
                raise
            given.clear()
            found = net.base_model(x)
    states: Sequence[Tensor] | None = getattr(found, "hidden_states", None)
    return states or ([*given, found.last_hidden_state] if given else None)


def path_of_layers(base: nn.Module, config: PretrainedConfig) -> str:
    """Name of the list of as many modules as a configuration has layers; "" where there is none."""
    wanted = config.to_dict().get("num_hidden_layers")
    lists = {
        name: len(module) for name, module in base.named_modules() if type(module) is nn.ModuleList
    }
    return next((name for name, length in lists.items() if length == wanted), "")


def _layers_of(net: PreTrainedModel) -> Iterable[nn.Module]:
    path = path_of_layers(net.base_model, net.config)
    layers: Any = net.base_model.get_submodule(path) if path else ()
    return layers  # type: ignore[no-any-return]


def _add_parts(net: Any, config: PretrainedConfig) -> None:  # noqa: ANN401
    attends = config.to_dict().get(ATTENTION)
    if attends and hasattr(net, "projector"):
        net.projector = AttentionProjector(net.projector)
    elif attends:
        net.attention = AttentionMean(config.hidden_size)
    if net.sums:
        layers = config.num_hidden_layers + 1  # with the input of the first one
        net.layer_weights = nn.Parameter(torch.ones(layers) / layers)


def pooled(net: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
    """What the classifier of a model gets, with a head of ours or without: [B, F, D] -> [B, D]."""
    vector: Tensor
    if hasattr(net, "projector"):
        vector = net.projector(hidden).mean(dim=1)  # [B, P]
    elif hasattr(net, "attention"):
        vector = net.attention(hidden)  # [B, D]
    else:
        vector = (hidden[:, 0] + hidden[:, 1]) / 2  # [B, D], of the tokens of AST
    return vector


def _summed(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """L times [B, F, D] -> [B, F, D], as transformers does it."""
    shares = weights.softmax(dim=0).view(-1, 1, 1)
    return (torch.stack(list(states), dim=1) * shares).sum(dim=1)


def is_headed(net: PreTrainedModel) -> bool:
    """Whether a model has a head of ours."""
    return hasattr(net, "sums")


def mark(folder: Path, own_type: str) -> None:
    """Make a saved model one that transformers loads with the class in this file, or not at all.

    Args:
        folder: with its config.json; gets a copy of this file.
        own_type: `model_type` of the model below the head.
    """
    name = Path(__file__).stem
    file = folder / "config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    said |= {"model_type": MODEL_TYPE, _OWN_TYPE: own_type, "architectures": ["HeadModel"]}
    said["auto_map"] = {
        "AutoConfig": f"{name}.HeadConfig",
        "AutoModelForAudioClassification": f"{name}.HeadModel",
    }
    file.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(__file__, folder / Path(__file__).name)


def is_marked(folder: Path | str) -> bool:
    """Whether a folder holds a model that `mark` has marked."""
    file = Path(folder, "config.json")
    if not file.is_file():
        return False
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # transformers says more
        return False
    return isinstance(said, dict) and said.get("model_type") == MODEL_TYPE


class HeadConfig(PretrainedConfig):  # type: ignore[misc]
    """Reads the configuration of a marked model: gives that of the model below the head."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **settings: Any) -> Any:  # noqa: ANN401
        """As that of transformers."""
        said = dict(config_dict)
        said["model_type"] = said.pop(_OWN_TYPE, None)
        if said["model_type"] not in CONFIG_MAPPING:
            raise ValueError(f"config.json: {_OWN_TYPE} is {said['model_type']}")
        return CONFIG_MAPPING[said["model_type"]].from_dict(said, **settings)


class HeadModel:
    """Loads a marked model."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str) -> None:
        """Nothing to do: it is saved with this file by `mark`."""

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *given: Any,  # noqa: ANN401
        config: PretrainedConfig,
        **named: Any,  # noqa: ANN401
    ) -> PreTrainedModel:
        """As that of transformers."""
        plain = MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING[type(config)]
        net: PreTrainedModel = class_of(plain, config).from_pretrained(
            name, *given, config=config, **named
        )
        return net
