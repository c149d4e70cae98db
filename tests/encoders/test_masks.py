"""Masks by row: as many and as long as transformers draws, and the same in any company."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny, write_model
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from mgc_dist.cluster.ranks import seed_everything
from mgc_dist.encoders.kind import kind_of
from mgc_dist.encoders.masks import spans

CASES = [
    (149, 0.05, 10, 2),
    (149, 0.5, 10, 2),
    (149, 0.065, 10, 0),
    (30, 0.2, 3, 2),
    (9, 0.9, 2, 0),
]


@pytest.mark.parametrize(("size", "share", "length", "least"), CASES)
def test_masks_are_distributed_as_those_of_transformers(
    size: int, share: float, length: int, least: int
) -> None:
    """Masked places of a row, and how often each place is masked, over 20,000 rows of each."""
    draw = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 62, 20_000))
    ours = spans(draw, size, share=share, length=length, least=least).numpy()
    np.random.seed(0)
    theirs = np.concatenate(
        [
            _compute_mask_indices((10, size), share, length, min_masks=least)
            for _ in range(2_000)  # a batch rounds as one, so there must be many
        ]
    )
    assert ours.mean(axis=0) == pytest.approx(theirs.mean(axis=0), abs=0.025)
    counts = [np.bincount(m.sum(axis=1), minlength=size + 1) / len(m) for m in (ours, theirs)]
    assert counts[0] == pytest.approx(counts[1], abs=0.025)


def test_every_row_has_masks_of_its_own() -> None:
    rows = spans(torch.arange(500), 149, share=0.065, length=10, least=2)
    assert len({tuple(row) for row in rows.tolist()}) > 490
    again = spans(torch.arange(499, -1, -1), 149, share=0.065, length=10, least=2)
    assert torch.equal(rows, again.flip(0))


@pytest.mark.parametrize("feature_prob", [0.0, 0.3])
def test_a_row_is_masked_the_same_in_any_batch(tmp_path: Path, feature_prob: float) -> None:
    changes = {"mask_time_length": 3, "mask_feature_length": 4, "mask_feature_prob": feature_prob}
    file = write_model(tmp_path / "m.json", apply_spec_augment=True, mask_time_prob=0.3, **changes)
    model = build_tiny(file).train()
    wave = torch.randint(-9000, 9000, (6, 8000), dtype=torch.int16)
    draw = torch.arange(6)
    together = model(wave, draw)
    alone = torch.cat([model(wave[n : n + 1], draw[n : n + 1]) for n in (5, 4, 3, 2, 1, 0)]).flip(0)
    assert together.detach() == pytest.approx(alone.detach(), abs=1e-5)
    others = model(wave, draw + 100)
    assert (together - others).abs().max() > 1e-3
    assert model.eval()(wave, draw).detach() == pytest.approx(model(wave).detach(), abs=0)


def test_asking_for_the_kind_again_leaves_the_masks_in_place(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.json", apply_spec_augment=True, mask_time_prob=0.3)
    model, wave = build_tiny(file).train(), torch.ones(2, 8000, dtype=torch.int16).cumsum(1).short()
    draw = torch.arange(2)
    before = model(wave, draw)
    assert kind_of(model.net).masks is model.kind.masks
    assert torch.equal(model(wave, draw), before)


def test_without_draws_masks_come_from_the_generator(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.json", apply_spec_augment=True, mask_time_prob=0.3)
    model, wave = build_tiny(file).train(), torch.ones(2, 8000, dtype=torch.int16).cumsum(1).short()
    found = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        found.append(model(wave))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
