"""FLOP counts against torch's counter of a real backward pass, and a table worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE_FLAVOUR, build_tiny, write_model
from test_slow import LARGE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mgc_dist.models import flops
from mgc_dist.models.classifier import WaveClassifier
from mgc_dist.models.main import describe_main

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
FREEZES = ["none", "feature_encoder", "layers:1", "backbone"]


def empty(file: Path | str, freeze: str, samples: int = 48_000) -> WaveClassifier:
    """A model without weights, ten genres, SpecAugment off: it looks at numbers."""
    model = describe_main(
        str(file),
        [str(number) for number in range(10)],
        freeze=freeze,
        frozen_layers=int(freeze.split(":")[1]) if ":" in freeze else None,
        activation_checkpointing=False,
        segment_samples=samples,
    )
    model.net.config.apply_spec_augment = False
    return model.train()


def found(model: WaveClassifier, samples: int = 48_000) -> flops.SegmentFlops:
    return flops.count(model, samples)


def counted_by_torch(model: WaveClassifier, rows: int, samples: int) -> tuple[int, int]:
    """Forward and backward of a batch, by FlopCounterMode (1 MAC is 2 FLOP there too)."""
    wave = torch.zeros(
        (rows, samples), dtype=torch.int16, device=model.net.classifier.weight.device
    )
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(wave)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


def corrections(model: WaveClassifier, samples: int) -> int:
    """What torch's counter has of a backward pass that we have not, less the other way round.

    It counts the weight gradient of a grouped convolution once for each group. On the meta device
    attention is not fused, so that nothing is recomputed; ours has half a forward more.
    """
    frames, more = samples, 0
    for layer in model.net.base_model.feature_extractor.conv_layers:
        frames = (frames - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
    for conv in model.net.base_model.encoder.pos_conv_embed.modules():
        if isinstance(conv, torch.nn.Conv1d) and any(p.requires_grad for p in conv.parameters()):
            size, padding = conv.kernel_size[0], conv.padding[0]
            out = frames + 2 * padding - size + 1
            per_group = conv.in_channels // conv.groups * size
            more += (conv.groups - 1) * 2 * out * conv.out_channels * per_group
    if model.net.config.model_type == "wavlm":
        return more
    trained = [
        layer
        for layer in model.net.base_model.encoder.layers
        if any(p.requires_grad for p in layer.parameters())
    ]
    return more - len(trained) * 2 * frames**2 * model.net.config.hidden_size


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("wav2vec2", {}),
        ("wav2vec2", BASE_FLAVOUR),
        ("wav2vec2", {"use_weighted_layer_sum": True, "adapter_attn_dim": 8}),
        ("hubert", {}),
        ("hubert", {"feat_proj_layer_norm": False} | BASE_FLAVOUR),
        ("data2vec-audio", {"conv_pos_kernel_size": 3}),
        ("unispeech", BASE_FLAVOUR),
        ("unispeech-sat", {}),
        ("wavlm", BASE_FLAVOUR),
        ("wavlm", {}),
    ],
)
def test_every_family_as_torch_counts_it(
    kind: str, changes: dict[str, Any], freeze: str, tmp_path: Path
) -> None:
    file, samples = write_model(tmp_path / "m.json", model_type=kind, **changes), 8000
    model = empty(file, freeze, samples)
    own = found(model, samples)
    forward, backward = counted_by_torch(model, 1, samples)
    assert own.forward == forward
    assert own.training - own.forward == backward - corrections(model, samples)
    assert 0 < forward < own.training


def test_a_count_leaves_no_table_of_its_own(tmp_path: Path) -> None:
    """Rotary positions keep theirs for the next segment, and the count's has no numbers."""
    kind = {"model_type": "wav2vec2-conformer", "position_embeddings_type": "rotary"}
    model = build_tiny(write_model(tmp_path / "m.json", **kind), freeze="backbone")
    flops.count(model, 8000)
    assert model(torch.zeros(2, 8000, dtype=torch.int16)).isfinite().all()


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("freeze", ["none", "feature_encoder", "half", "backbone"])
def test_both_sizes_as_torch_counts_them(size: str, freeze: str, tmp_path: Path) -> None:
    settings = LARGE if size == "large" else BASE
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"model_type": "wav2vec2", **settings}))
    freeze = f"layers:{settings['num_hidden_layers'] // 2}" if freeze == "half" else freeze
    model = empty(file, freeze)
    own = found(model)
    forward, backward = counted_by_torch(model, 1, 48_000)
    assert own.forward == forward
    assert own.training - own.forward == backward - corrections(model, 48_000)


TABLE = {  # GFLOP a segment of 3 s: CNN, projection, positional convolution, layers, head; training
    "base": ((14.72, 0.12, 1.42, 26.13, 0.06), 42.44, (127.7, 98.2, 68.9)),
    "large": ((14.72, 0.16, 2.52, 92.18, 0.08), 109.64, (330.0, 300.4, 202.5)),
}


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_table_of_the_two_sizes(size: str, tmp_path: Path) -> None:
    """It was worked out by hand; two input gradients where torch does otherwise are named."""
    settings = LARGE if size == "large" else BASE
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"model_type": "wav2vec2", **settings}))
    parts, forward, training = TABLE[size]
    own = found(empty(file, "none"))
    layers = sum(part.forward for name, part in own.parts.items() if name.startswith("layer "))
    names = ("feature_extractor", "feature_projection", "encoder, besides its layers")
    counted = [own.parts[name].forward for name in names] + [layers, own.parts["head"].forward]
    assert [round(value / 1e9, 2) for value in counted] == list(parts)
    assert round(own.forward / 1e9, 2) == forward
    width, half = settings["hidden_size"], settings["num_hidden_layers"] // 2
    # the projection's input gradient is needed by the trained norm before it; the table lacks it
    projection = 2 * 149 * 512 * width
    # in the post-norm flavour nothing below the first trained q, k, v is trained; the table has it
    queries = 0 if size == "large" else 3 * 2 * 149 * width**2
    for freeze, expected, more in zip(
        ("none", "feature_encoder", f"layers:{half}"),
        training,
        (0, -projection, queries),
        strict=True,
    ):
        flop = found(empty(file, freeze)).training
        assert round((flop + more) / 1e9, 1) == expected
        assert flop / 1e9 == pytest.approx(expected, rel=0.008)


@pytest.mark.parametrize("freeze", ["none", "feature_encoder", "backbone"])
def test_the_small_cnn(freeze: str) -> None:
    model, samples = empty("logmel-cnn", freeze, 16_000), 16_000
    real = build_tiny("logmel-cnn", freeze=freeze, segment_samples=samples)
    forward, backward = counted_by_torch(real, 3, samples)
    own = found(real, samples)
    assert 3 * own.forward == forward
    assert 3 * (own.training - own.forward) == backward
    assert found(model, samples).parts["cnn"] == own.parts["cnn"]


def test_a_batch_on_the_cpu_costs_its_rows(tiny_model: Path) -> None:
    """The count is linear in the rows, and that of the meta device."""
    model = build_tiny(tiny_model)
    forward, _ = counted_by_torch(model, 3, 8000)
    assert forward == 3 * found(model, 8000).forward


@pytest.mark.parametrize("kind", ["wav2vec2", "data2vec-audio"])
def test_a_frozen_prefix_costs_its_forward_only(kind: str, tmp_path: Path) -> None:
    """data2vec-audio too, which has one flavour and does not read `do_stable_layer_norm`."""
    tiny_model = write_model(tmp_path / "m.json", model_type=kind, conv_pos_kernel_size=3)
    own = found(empty(tiny_model, "layers:1", 8000), 8000)
    silent = {name for name, part in own.parts.items() if not part.backward}
    assert silent == {
        "feature_extractor",
        "feature_projection",
        "encoder, besides its layers",
        "layer 0",
    }
    assert own.frozen == sum(own.parts[name].forward for name in silent)
    assert found(empty(tiny_model, "none", 8000), 8000).frozen == 0


def test_the_learned_gain_counts(tiny_model: Path) -> None:
    plain, more = (found(build_tiny(tiny_model, learns_gain=on), 8000) for on in (False, True))
    assert more.forward - plain.forward == 2 * 16
    assert more.training - plain.training == 4 * 16  # nothing flows from it into what lies below


def test_a_kind_that_is_nowhere_named_is_counted_too(tmp_path: Path) -> None:
    """All of it is trained: twice the forward, and half of attention's again."""
    strides = {"conv_stride": [2] * 7, "conv_kernel": [3] * 7}
    model = empty(write_model(tmp_path / "m.json", model_type="sew", **strides), "none", 8000)
    own = found(model, 8000)
    wave = torch.zeros((1, 8000), dtype=torch.int16, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(wave)
    counts = counter.get_flop_counts()["Global"]
    attention = counts[torch.ops.aten.bmm] if model.kind.fuses_attention else 0
    assert own.forward == counter.get_total_flops()
    assert own.training == 3 * own.forward + attention // 2


def test_peaks_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flops.peak_tflop_per_s(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_tflop_per_s(torch.device("cuda", 0)) == peak


@pytest.mark.parametrize("boundary", ["cnn", "layers:1", "layers:2", "backbone"])
def test_what_a_cache_leaves_is_what_torch_counts_above_it(boundary: str, tiny_model: Path) -> None:
    freeze = "feature_encoder" if boundary == "cnn" else boundary
    model = build_tiny(
        tiny_model,
        freeze=freeze,
        frozen_layers=int(freeze[7:]) if freeze.startswith("layers") else None,
        cache="trunk",
    ).eval()
    found = flops.count(model, 8000)
    assert found is not None
    wave = torch.zeros((1, 8000), dtype=torch.int16)
    with torch.no_grad():
        inner = model(wave, only_below=True)
        model.boundary_dtype = inner.dtype
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(inner)
    assert found.above(boundary).forward == counter.get_total_flops()
