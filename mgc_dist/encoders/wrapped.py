"""A model of foreign code under a head of ours.

This file lies beside the weights of an exported model too, as `modeling_genre.py`, and needs no
mgc_dist. Who loads it runs the foreign code: transformers asks for `trust_remote_code=True`.
"""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import SequenceClassifierOutput

_PROJECTED = 256
"""Width of the head's first layer: `classifier_proj_size` of wav2vec2."""


class CustomAudioClassifier(PreTrainedModel):  # type: ignore[misc]
    """A model of foreign code under the head of wav2vec2's classifiers: the mean over frames.

    Only who trusts the code may construct it: it imports the class that the configuration names.
    """

    base_model_prefix = "backbone"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig) -> None:
        own = copy.deepcopy(config)
        # what loads this class, and what follows, chooses an attention for it: "MERT2Model does not
        # support an attention implementation through torch.nn.functional..."
        own._attn_implementation = None
        super().__init__(config)
        # a configuration of an installed package makes its model itself
        self.backbone = own.backbone() if hasattr(own, "backbone") else class_of(own)(own)
        self.projector = nn.Linear(config.hidden_size, _PROJECTED)
        self.classifier = nn.Linear(_PROJECTED, config.num_labels)
        self.post_init()

    def forward(self, input_values: Tensor) -> SequenceClassifierOutput:
        """Waves [B, T] -> logits [B, K]."""
        hidden = self.backbone(input_values).last_hidden_state  # [B, F, D]
        pooled = self.projector(hidden).mean(dim=1)  # [B, 256]
        return SequenceClassifierOutput(logits=self.classifier(pooled))

    @classmethod
    def from_pretrained(cls, *args: Any, **named: Any) -> Any:  # noqa: ANN401 - of transformers
        """As of transformers, with the tensors that no checkpoint holds."""
        found = super().from_pretrained(*args, **named)
        remake_unsaved(found[0] if isinstance(found, tuple) else found)
        return found


def class_of(config: PretrainedConfig) -> type[nn.Module]:
    """The class of foreign code that a configuration names; its code runs."""
    reference = config.auto_map["AutoModel"].rpartition("--")[2]
    commit = config.to_dict().get("code_revision")
    return _class(reference, config.name_or_path, commit)


@cache
def _class(reference: str, name: str, commit: str | None) -> type[nn.Module]:
    """Kept, for the folder may move while a run goes on."""
    found: type[nn.Module] = get_class_from_dynamic_module(
        reference, name, revision=commit, code_revision=commit
    )
    return found


def remake_unsaved(net: PreTrainedModel) -> None:
    """Give a loaded model the tensors that no checkpoint holds, as its own code makes them.

    transformers builds on the meta device, where nothing has a value. What is neither a weight nor
    a saved buffer, such as the table of a rotary embedding, then holds whatever lay in memory.
    """
    saved = set(net.state_dict())
    unsaved = [name for name in _tensors(net) if name not in saved]
    if not unsaved:
        return
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        made = _tensors(type(net)(copy.deepcopy(net.config)))
    for name in unsaved:
        owner, _, own_name = name.rpartition(".")
        setattr(net.get_submodule(owner), own_name, made[name].detach())


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Buffers and plain attributes of all modules, by name."""
    return {
        f"{owner}.{name}".removeprefix("."): value
        for owner, module in net.named_modules()
        for name, value in (vars(module) | module._buffers).items()
        if isinstance(value, Tensor)
    }
