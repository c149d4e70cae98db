"""What the bias model knows, as a share of what a linear probe of the main model knows.

`launch/probe.py` has left the main model's states and its choice of a layer beside the shards.
Heads on them, cross-fitted on the folds of the bias table, say how much a linear head can learn
from the main model. A loss that discounts the bias model leaves the rest to be learned.
"""

import json
import logging
from pathlib import Path

import numpy as np

from mgc_dist.bias_model import states
from mgc_dist.bias_model.folds import of_tracks
from mgc_dist.bias_model.heads import cross_fit
from mgc_dist.bias_model.states import STORE, StatesKey
from mgc_dist.bias_model.table import Header
from mgc_dist.data.reader import ShardSet
from mgc_dist.scoring.metrics import scores
from mgc_dist.scoring.written import ProbeFigures

log = logging.getLogger(__name__)

PROBE = "probe.json"


def measure(
    folder: Path, header: Header, shards: ShardSet, before: ProbeFigures | None
) -> ProbeFigures | None:
    """Fit heads on the states of a probe, each on the folds that it does not judge.

    Args:
        folder: of the probe: the states, and `probe.json`, there or in the folder of a fold.
        header: of the bias table, for its folds.
        shards: the data set, or the fold of it that the table is of.
        before: what was measured for this table, which is given back where nothing has changed.

    Returns:
        None where no probe of these shards with a linear head lies there.
    """
    try:
        path = next(iter([*folder.glob(PROBE), *sorted(folder.glob(f"*/{PROBE}"))]))
        found = json.loads(path.read_text(encoding="utf-8"))
        chosen = found["chosen"]["linear"]
        layer, c = int(chosen["layer"][0]), float(chosen["setting"][0])
        if before and (before["model_hash"], before["layer"]) == (found["model_hash"], layer):
            return before
        key = StatesKey(
            dataset_id=shards.packed_id,
            bias_hash=found["model_hash"],
            rows=shards.manifest.rows,
            layers=found["layers"],
            width=found["width"],
        )
        if not STORE.is_whole(folder, key):
            return None
        hidden = states.of_shards(folder, key, (layer,), shards)  # [N, D]
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        log.debug("no probe in %s: %s", folder, error)
        return None
    fold = of_tracks(header.fold_of, shards.manifest.tracks)[shards.tracks]  # [N]
    fit = cross_fit(
        hidden,
        shards.labels,
        fold,
        folds=header.folds,
        genres=len(shards.manifest.genres),
        c=c,
    )
    training = fold >= 0
    judged = scores(
        np.exp(fit.log_probability[training].astype(np.float64)), shards.labels[training]
    )
    return {
        "model": found["model"],
        "model_hash": found["model_hash"],
        "layer": layer,
        "accuracy": judged.accuracy,
        "nll": judged.nll,
    }


def share(accuracy: float, probe: ProbeFigures, genres: int) -> float | None:
    """Of the probe's accuracy beyond chance, what the bias model has; None of a probe at chance."""
    chance = 1 / genres
    beyond = probe["accuracy"] - chance
    return (accuracy - chance) / beyond if beyond > 0 else None
