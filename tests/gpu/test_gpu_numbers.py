"""What a GPU computes against the CPU, and what reaches it, in this process."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import BASE_FLAVOUR, write_model
from fresh import Tell
from test_cache import cut
from test_equality import build, drawn
from torch import Tensor, nn

from mgc_dist.bias_model.states import float32
from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.data.order import Plan, lay_out, training_batches
from mgc_dist.data.reader import Reader, ShardSet
from mgc_dist.models.classifier import WaveClassifier

FLAVOURS = {"large": {}, "base": BASE_FLAVOUR}
WIDE = {"initializer_range": 0.2, "hidden_size": 64, "conv_dim": [32] * 7}
"""For half precision: with logits of 1 to 2, where those of the tiny model are rounding errors."""
LOSS_SCALE = 1024.0
"""Of float16, whose smallest gradients would be 0 without one."""
SPIN_CYCLES = 20_000_000
"""Of a GPU that is kept busy, about 10 ms: the host runs ahead of its copies."""


@dataclass(frozen=True)
class Numbers:
    """Float64, on the CPU."""

    logits: Tensor
    loss: float
    grads: dict[str, Tensor]


def numbers(
    model: WaveClassifier,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> Numbers:
    """Logits, mean loss and gradients of nine rows."""
    (wave, label), scale = drawn(), LOSS_SCALE if autocast == torch.float16 else 1.0
    model = model.to(device=device, dtype=dtype).train()
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        logits = model(wave.to(device))  # [B, K]
    logits = logits.to(torch.float64)
    loss = nn.functional.cross_entropy(logits, label.to(device))
    (loss * scale).backward()
    grads = {
        name: p.grad.double().cpu() / scale
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return Numbers(logits.detach().cpu(), loss.item(), grads)


def apart(found: Numbers, true: Numbers) -> tuple[float, float, float]:
    """How far off logits (of the largest), loss, and the worst tensor of the gradient are.

    A tensor with less than 1/1000 of the gradient's norm is noise, such as the bias of the keys,
    whose true gradient is zero: it is compared to the whole gradient.
    """
    assert found.grads.keys() == true.grads.keys()
    logits = float((found.logits - true.logits).abs().max() / true.logits.abs().max())
    whole = float(torch.stack([grad.norm() for grad in true.grads.values()]).norm())
    worst = max(
        float((found.grads[name] - grad).norm() / max(float(grad.norm()), 1e-3 * whole))
        for name, grad in true.grads.items()
    )
    return logits, abs(found.loss - true.loss), worst


def true_numbers(file: Path) -> Numbers:
    return numbers(build(file, "none", False), torch.device("cpu"), dtype=torch.float64)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_float32_is_that_of_the_cpu(
    flavour: str, device: torch.device, tmp_path: Path, tell: Tell
) -> None:
    file = write_model(tmp_path / "m.json", **FLAVOURS[flavour])
    true = true_numbers(file)
    on_cpu = apart(numbers(build(file, "none", False), torch.device("cpu")), true)
    with float32():
        found = apart(numbers(build(file, "none", False), device), true)
    as_trained = apart(numbers(build(file, "none", False), device), true)
    tell(f"{flavour}: off by {found}; with torch's own TF32 {as_trained}; the CPU by {on_cpu}")
    for figure, bound in zip(found, (2e-5, 2e-6, 1e-3), strict=True):
        assert figure < bound, found
    for figure, bound in zip(as_trained, (5e-3, 5e-3, 5e-2), strict=True):
        assert figure < bound, as_trained


@pytest.mark.parametrize(
    ("autocast", "bounds"),
    [  # about three times what the CPU is off by
        (torch.bfloat16, (0.1, 2e-2, 0.4)),
        (torch.float16, (1e-2, 2e-3, 6e-2)),
    ],
)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_half_precision_is_within_bounds(
    flavour: str,
    autocast: torch.dtype,
    bounds: tuple[float, ...],
    device: torch.device,
    tmp_path: Path,
    tell: Tell,
) -> None:
    file = write_model(tmp_path / "m.json", **FLAVOURS[flavour], **WIDE)
    found = numbers(build(file, "none", False), device, autocast=autocast)
    figures = apart(found, true_numbers(file))
    tell(f"{flavour} {autocast}: off by {figures}, bounds {bounds}")
    for figure, bound in zip(figures, bounds, strict=True):
        assert 1e-9 < figure < bound, figures


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("at", ["cnn", "layers:1", "backbone"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_both_halves_of_a_cached_model_are_the_whole(
    flavour: str,
    at: str,
    autocast: torch.dtype | None,
    device: torch.device,
    tmp_path: Path,
    tell: Tell,
) -> None:
    model, wave = cut(write_model(tmp_path / "m.json", **FLAVOURS[flavour]), at)
    model, wave = model.to(device).train(), wave.to(device)
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        seed_everything(0)
        whole = model(wave)
        inner = model(wave, only_below=True)
        model.boundary_dtype = inner.dtype
        seed_everything(0)
        halves = model(inner)
    off = float((whole.float() - halves.float()).abs().max() / whole.float().abs().max())
    tell(f"{flavour} at {at}, {autocast}: off by {off}")
    assert off <= 1e-6


def test_page_locked_batches_are_those_of_the_cpu(device: torch.device, shards: Path) -> None:
    """The copies wait behind a busy GPU, while the reader goes on with the next buffers."""
    plan = Plan(rows=66, total=640, global_batch=10, seed=2)
    planned = list(
        training_batches(plan, lay_out(global_batch=10, world=1, largest_micro_batch=5), 0, 0)
    )
    on_gpu = device.type == "cuda"
    with ShardSet(shards) as data:
        with Reader(data, "train", planned, read_ahead=8, pin=False) as reader:
            expected = [(batch.input.clone(), batch.label, batch.weight) for batch in reader]
        found = []
        with Reader(data, "train", planned, read_ahead=8, pin=on_gpu, threads=3) as reader:
            for batch in reader:
                assert batch.input.is_pinned() == on_gpu
                if on_gpu:
                    torch.cuda._sleep(SPIN_CYCLES)
                parts = (batch.input, batch.label, batch.weight)
                found.append([part.to(device, non_blocking=True) for part in parts])
                del batch, parts
    assert len(found) == len(expected) == 128
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.cpu().equal(other)
