"""The body of `probe`: the pass, heads on every layer, and what their test tracks say.

Each division of the tracks is a test of its own: heads are fitted on its training rows, settings
and layers are chosen by its validation tracks, and when all of that is done its test rows are
looked at, once. The figures are over the test tracks of all divisions.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mgc_dist.bias_model import states
from mgc_dist.bias_model.folds import deal_folds, of_tracks
from mgc_dist.bias_model.heads import refuse_empty_folds
from mgc_dist.bias_model.probe_heads import Choice, Mix, Net, Rows, choose
from mgc_dist.bias_model.states import STORE, StatesKey
from mgc_dist.cluster.ranks import Ranks
from mgc_dist.config import HeadName, ProbeConfig
from mgc_dist.console import progress
from mgc_dist.data import cross_validation
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tracks import SPLITS, folds_of
from mgc_dist.errors import UserError
from mgc_dist.models.backbone import build_probed, fingerprint
from mgc_dist.scoring import intervals
from mgc_dist.scoring.metrics import Scores
from mgc_dist.scoring.score import SplitScores, judge

_LEADING = ("accuracy", "macro_f1")


@dataclass(frozen=True, kw_only=True)
class Tested:
    """A choice of one division, and what it makes of the division's test rows.

    Attributes:
        head, layer, setting, nll: as in `Choice`.
        logits: of each fit, float32 [M, K].
        weights: of the layers in `mix`, the mean over the fits; else None.
    """

    head: HeadName
    layer: int | None
    setting: float
    nll: float
    logits: list[NDArray[np.float32]]
    weights: list[float] | None


def make(config: ProbeConfig, shards: ShardSet, peers: Ranks) -> dict[str, Any] | None:
    """Do what is missing of the pass (a collective); then rank 0 alone fits and measures.

    Args:
        config: which model, heads, settings.
        shards: all rows, as they were packed.
        peers: who takes part.

    Returns:
        All figures, as JSON has them; None on other ranks, which are done.

    Raises:
        UserError: a split without tracks, no model, or other states are in the way.
    """
    divisions = divide(config, shards)  # refused before the pass, not after it
    model = build_probed(
        config.model,
        shards.manifest.genres,
        segment_samples=shards.manifest.segment_samples,
        sample_rate=shards.manifest.sample_rate,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    key = StatesKey(
        dataset_id=shards.packed_id,
        bias_hash=fingerprint(model, "pass float32"),
        rows=shards.manifest.rows,
        layers=model.layers,
        width=model.width,
    )
    with ExitStack() as held:
        peers.all_decide(lambda: held.enter_context(states.taken(config.states, "--out")))
        states.all_bring(
            config.states,
            key,
            model,
            shards,
            peers,
            batch=config.batch,
            overwrite=config.overwrite,
            flags=("--out", "--model"),
        )
        if not peers.is_first:  # no collective is left to come
            return None
        del model
        return _about(config, shards, key) | _measure(config, shards, key, divisions, peers.device)


def divide(config: ProbeConfig, shards: ShardSet) -> list[NDArray[np.str_]]:
    """The split of every track in each division, in the order of the manifest.

    Args:
        config: `folds`, `seed`, and the fold that is tested.
        shards: all rows, as they were packed.

    Raises:
        UserError: a split has no tracks, or there are no such folds.
    """
    packed = shards.manifest
    if config.folds is None:
        seen = cross_validation.of_fold(shards.folder, packed, config.source.fold)
        split = np.array([track.split for track in seen.tracks])
        _refuse_empty(split, config)
        return [split]
    fold = _folds(config.folds, config.seed, shards)
    refuse_empty_folds(np.bincount(fold, minlength=config.folds), config.folds)
    train, validation, test = SPLITS
    return [
        np.where(fold == k, test, np.where(fold == (k - 1) % config.folds, validation, train))
        for k in range(config.folds)
    ]


def _folds(folds: int, seed: int, shards: ShardSet) -> NDArray[np.int64]:
    """Fold of every track: as it was packed, else dealt so that groups stay together."""
    packed = shards.manifest
    there = folds_of(packed.splits)
    if not there:
        dealt = deal_folds(packed.labelled_tracks(), folds, seed)
        return of_tracks(dealt, packed.tracks)
    if there != folds:
        raise UserError(
            f"--folds {folds}",
            got=f"shards packed in {there} folds",
            expected="the same folds",
            cure=f"use --folds {there}",
        )
    return np.array([int(t.split.removeprefix("fold")) for t in packed.tracks], np.int64)


def _refuse_empty(split: NDArray[np.str_], config: ProbeConfig) -> None:
    there = Counter(split.tolist())
    missing = [name for name in SPLITS if not there[name]]
    if missing:
        raise UserError(
            f"data set {config.shards}",
            got=f"no tracks in {', '.join(missing)}",
            expected="tracks in each of train, validation and test",
            cure="use --folds 5, which deals all tracks anew",
        )


def _about(config: ProbeConfig, shards: ShardSet, key: StatesKey) -> dict[str, Any]:
    found = shards.manifest
    return {
        "model": config.model,
        "revision": config.revision,
        "model_hash": key.bias_hash,
        "dataset_id": found.dataset_id,
        "genres": list(found.genres),
        "segment_s": found.segment_samples / found.sample_rate,
        "sample_rate": found.sample_rate,
        "split": str(found.settings["split"]),
        "fold": config.source.fold,
        "folds": config.folds,
        "layers": key.layers,
        "width": key.width,
        "heads": list(config.head),
        "settings": {"c": list(config.c), "lr": list(config.lr), "epochs": config.epochs},
        "seeds": config.seeds,
        "seed": config.seed,
    }


def _measure(
    config: ProbeConfig,
    shards: ShardSet,
    key: StatesKey,
    divisions: Sequence[NDArray[np.str_]],
    device: torch.device,
) -> dict[str, Any]:
    """Figures of every head and layer, and of those that validation chose."""
    held = STORE.open(config.states, key)
    parts = [_parts(held, shards, split) for split in divisions]
    places = _places(config, key.layers)
    genres = len(shards.manifest.genres)
    tested: list[list[Tested]] = []  # by division, then as in `places`
    for number, (training, validation, test) in enumerate(parts, start=1):
        title = f"heads, division {number} of {len(parts)}"
        with progress(title, len(places), shown=True, unit="heads") as bar:
            choices = [
                choose(head, layer, training, validation, genres, config, device)
                for head, layer in bar.over(places)
            ]
        tested.append([_test(choice, test) for choice in choices])  # all is chosen
    judged = _Judge(shards, [test for _, _, test in parts])
    return judged.about | {
        "lines": [judged.figures(line) for line in zip(*tested, strict=True)],
        "chosen": {
            name: judged.figures([best(of, name) for of in tested])
            for name in (*config.head, *(["any"] if len(config.head) > 1 else []))
        },
    }


def best(tested: Sequence[Tested], head: str) -> Tested:
    """Of a division, what validation tracks like best among a kind of heads, or `any`."""
    return min((one for one in tested if head in (one.head, "any")), key=lambda one: one.nll)


def _parts(
    held: NDArray[np.float32], shards: ShardSet, split: NDArray[np.str_]
) -> tuple[Rows, Rows, Rows]:
    label, track = shards.labels, shards.tracks
    of_row = split[track]
    rows = (np.flatnonzero(of_row == name) for name in SPLITS)
    train, validation, test = (
        Rows(states=held, rows=each, label=label[each], track=track[each]) for each in rows
    )
    return train, validation, test


def _places(config: ProbeConfig, layers: int) -> list[tuple[HeadName, int | None]]:
    found: list[tuple[HeadName, int | None]] = []
    for head in config.head:
        found += [(head, None)] if head == "mix" else [(head, layer) for layer in range(layers)]
    return found


def _test(choice: Choice, test: Rows) -> Tested:
    mixes = [
        fit.net.mix for fit in choice.fits if isinstance(fit, Net) and isinstance(fit.net, Mix)
    ]
    weights = torch.stack([mix.detach().softmax(0) for mix in mixes]).mean(0) if mixes else None
    return Tested(
        head=choice.head,
        layer=choice.layer,
        setting=choice.setting,
        nll=choice.nll,
        logits=choice.logits(test),
        weights=None if weights is None else weights.tolist(),
    )


class _Judge:
    """Judges test tracks of all divisions.

    Attributes:
        about: what they are.
    """

    def __init__(self, shards: ShardSet, tests: Sequence[Rows]) -> None:
        self._genres = len(shards.manifest.genres)
        self._label = np.concatenate([test.label for test in tests])
        self._track = np.concatenate([test.track for test in tests])
        places = np.unique(self._track)
        groups = [shards.manifest.tracks[place].group for place in places]
        self._clusters = intervals.units_of(groups)
        self.about = {
            "tracks": len(places),
            "segments": len(self._track),
            "known_groups": len({group for group in groups if group is not None}),
            "level": intervals.LEVEL,
        }

    def figures(self, line: Sequence[Tested]) -> dict[str, Any]:
        """Figures of one choice a division; means over the seeds, and their intervals."""
        seeds = max(len(one.logits) for one in line)
        repeated = [list(islice(cycle(one.logits), seeds)) for one in line]
        runs = [
            judge(np.concatenate(each), self._label, self._track, "test", "mean-logit")
            for each in zip(*repeated, strict=True)
        ]

        def means(of: list[Scores]) -> dict[str, float]:
            return {
                name: float(np.mean([each.figures[name] for each in of]))
                for name in (*_LEADING, "nll")
            }

        weights = [one.weights for one in line if one.weights]
        return {
            "head": "/".join(dict.fromkeys(one.head for one in line)),
            "layer": [one.layer for one in line],
            "setting": [one.setting for one in line],
            "validation_nll": float(np.mean([one.nll for one in line])),
            "track": means([run.track for run in runs]),
            "segment": means([run.segment for run in runs]),
            "track_accuracy_by_seed": [run.track.accuracy for run in runs],
            "intervals": {
                unit: self._intervals(runs, cluster) for unit, cluster in self._clusters.items()
            },
            "weights": np.mean(weights, axis=0).tolist() if weights else None,
        }

    def _intervals(
        self, runs: list[SplitScores], cluster: NDArray[np.int64]
    ) -> dict[str, list[float]]:
        """Of the means over seeds; a cluster is left out of all of them."""
        left = [
            intervals.leave_out(run.labels, run.guesses, cluster, genres=self._genres)
            for run in runs
        ]
        found = {}
        for name in _LEADING:
            without = np.mean([each.figures[name] for each in left], axis=0)  # [C]
            bounds = intervals.of_figure(
                float(np.mean([run.track.figures[name] for run in runs])),
                intervals.deviation(without),
                clusters=len(without),
                items=len(cluster),
            )
            found[name] = list(bounds or (0.0, 1.0))
        return found
