"""Low-rank adapters (LoRA) beside the linear layers of a frozen model, through the library peft.

A layer gives W x + (alpha / r) B A x. A is random and B zero at the start, so that training begins
with the model as it was.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022, section 4.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mgc_dist.config.lora import Lora
from mgc_dist.encoders.kind import Kind
from mgc_dist.errors import UserError

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def adapt(kind: Kind, lora: Lora, frozen: Sequence[nn.Module]) -> None:
    """Freeze all below the head, and put adapters beside its linear layers.

    Args:
        kind: of the model, which is changed in place.
        lora: which adapters.
        frozen: parts that stay in eval mode; nothing in them is adapted.

    Raises:
        UserError: no layer has a name that is asked for, or all of those are frozen.
    """
    # 0.2 CPU seconds, which other runs need not wait for
    from peft import LoraConfig, inject_adapter_in_model

    net, layers = kind.net, _layers(kind, frozen)
    if not layers:
        raise UserError(
            "--lora",
            got="no linear layer below the head that --freeze leaves",
            expected="at least one, which adapters can change",
            cure="freeze less: --freeze feature_encoder",
        )
    targets = lora.targets or kind.adapted
    for target in targets:
        if not any(_ends(name, target) for name in layers):
            raise UserError(
                f"--lora: target {target}",
                got="no linear layer of that name that adapters can change, above what is frozen",
                expected=f"one of {', '.join(sorted({n.rpartition('.')[2] for n in layers}))}",
                cure="name such layers: --lora r=16,targets=NAME,NAME; or freeze less",
            )
    below = {id(parameter) for parameter in kind.base.parameters()}
    head = [p for p in net.parameters() if p.requires_grad and id(p) not in below]
    chosen = [name for name in layers if any(_ends(name, target) for target in targets)]
    with torch.device(net.device):
        inject_adapter_in_model(
            LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=chosen),  # type: ignore[arg-type]
            net,
        )
    for parameter in head:  # peft freezes all but the adapters
        parameter.requires_grad_(True)


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _layers(kind: Kind, frozen: Sequence[nn.Module]) -> list[str]:
    """Names of the linear layers below the head that an adapter can change."""
    kept = {id(module) for part in frozen for module in part.modules()}
    below = {id(module) for module in kind.base.modules()} - kept
    return [
        name
        for name, module in kind.net.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) in below
        and module.weight.requires_grad
        and name.rpartition(".")[2] not in kind.never_called
    ]


def merged(net: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the model without adapters that computes the same.

    Args:
        net: the model, with adapters or without.
        weights: its whole state, by name, in float32.
    """
    plain = dict(weights)
    for name in weights:
        if not name.endswith(_A):
            continue
        layer = name.removesuffix(_A)
        adapter: Any = net.get_submodule(layer)
        change = plain.pop(layer + _B) @ plain.pop(name)  # [out, in]
        own = plain.pop(f"{layer}.base_layer.weight")
        plain[f"{layer}.weight"] = own + adapter.scaling["default"] * change
        if f"{layer}.base_layer.bias" in weights:
            plain[f"{layer}.bias"] = plain.pop(f"{layer}.base_layer.bias")
    return plain
