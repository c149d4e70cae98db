"""Many runs: grouped by what their settings differ in, paired by seed, compared over seeds.

Runs that differ in nothing but the seed, their folders and how the machine did the work are one
condition. The shards may change with the seed (a planted shortcut is packed once a seed), and so
may the bias table; within a seed all conditions must have been measured on the same tracks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mgc_dist.config import TrainConfig
from mgc_dist.config.knobs import effects
from mgc_dist.config.losses import LOSSES
from mgc_dist.errors import UserError
from mgc_dist.scoring import intervals
from mgc_dist.scoring.metrics import confusion_of, figures_of
from mgc_dist.scoring.results import Result, refuse_different, refuse_other_genres

Report = dict[str, Any]
Settings = dict[str, str]

_SAME = {name for name, mark in effects(TrainConfig).items() if not (mark and mark.condition)}
"""Settings that do not change what is learned, or change with the seed."""
SUBGROUP = "accuracy of "
"""Before the name of a subgroup among the figures."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run among many.

    Attributes:
        result: its predictions.
        seed: of the training.
        settings: what may have changed the outcome, by flag.
    """

    result: Result
    seed: int
    settings: Settings

    @cached_property
    def without(self) -> dict[str, NDArray[np.float64]]:
        """Each of `figures` without each cluster, float64 [C]; of a subgroup, of those it has."""
        result = self.result
        cluster = next(iter(intervals.units_of(result.groups).values()))

        def of(inside: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
            label, guess = result.label[inside], result.guess[inside]
            genres = len(result.genres)
            return intervals.leave_out(label, guess, cluster[inside], genres=genres).figures

        found = of(np.ones(len(result.label), bool))
        for name in sorted({name for name in result.subgroups if name is not None}):
            inside = np.array([each == name for each in result.subgroups])
            found[f"{SUBGROUP}{name}"] = of(inside)["accuracy"]
        return found


def settings_of(run: Path) -> tuple[int, Settings]:
    """Seed and settings from RUN/config.yaml.

    Raises:
        UserError: there is none, or it is unreadable.
    """
    path = run / "config.yaml"
    try:
        sections = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["train"]
        seed = int(sections["output"]["seed"])
        loss = sections["objective"]
        others = _knobs_of_others(loss["loss"])
        sections["objective"] = {k: v for k, v in loss.items() if k not in others}
        flat = {key: value for section in sections.values() for key, value in section.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"settings {path}",
            got=" ".join(str(error).split()) or type(error).__name__,
            expected="the settings that training wrote",
            cure="more than two runs are compared by their settings; give run folders",
        ) from error
    return seed, {key: str(value) for key, value in flat.items() if key not in _SAME}


def _knobs_of_others(loss: str) -> set[str]:
    """Knobs that other losses alone read; a loss of another version may read any."""
    if loss not in LOSSES:
        return set()
    return {knob for each in LOSSES.values() for knob in each.knobs} - set(LOSSES[loss].knobs)


def group(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Condition -> seed -> run, conditions named by what they differ in, in the given order.

    Raises:
        UserError: two runs have the same settings and seed.
    """
    differing = {
        key
        for key in {key for run in runs for key in run.settings}
        if len({run.settings[key] for run in runs if key in run.settings}) > 1
    }
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        label = _label(run.settings, differing)
        other = found.setdefault(label, {}).setdefault(run.seed, run)
        if other is not run:
            raise UserError(
                f"runs {other.result.run} and {run.result.run}",
                got=f"the same settings and seed {run.seed} ({label})",
                expected="one run for each settings and seed",
                cure="leave one of them out",
            )
    return found


def _label(settings: Settings, differing: set[str]) -> str:
    loss = settings["loss"]
    shown = ["loss", *(LOSSES[loss].knobs if loss in LOSSES else ())]
    shown += sorted(key for key in differing & set(settings) if key not in shown)
    return " ".join(f"{key}={settings[key]}" for key in shown if settings[key] != "null")


def compare(runs: Sequence[Run], name: str) -> Report:
    """Figures of each condition over seeds, and paired gains over the baseline, as JSON.

    Args:
        runs: all of them; the baseline is the first condition with loss ce, else the first.
        name: of the evaluation.

    Raises:
        UserError: two runs of a seed were not measured on the same tracks, or are the same; or
            only some runs were measured on genres in common.
    """
    conditions = group(runs)
    plain = [label for label, seeds in conditions.items() if _loss(seeds) == "ce"]
    baseline = (plain or list(conditions))[0]
    for seeds in conditions.values():
        for seed, run in seeds.items():
            first = next(each[seed] for each in conditions.values() if seed in each)
            refuse_other_genres(runs[0].result, run.result)
            refuse_different(first.result, run.result)
    base = conditions[baseline]
    values = {
        label: {seed: figures(run.result) for seed, run in sorted(seeds.items())}
        for label, seeds in conditions.items()
    }
    gains = {
        label: _gains(conditions[label], base, values[label], values[baseline])
        for label in conditions
        if label != baseline
    }
    _correct([each for each in gains.values() if each])
    return {
        "mode": "seeds",
        "name": name,
        "in_common": runs[0].result.in_common,
        "baseline": baseline,
        "tries": len(gains),
        "conditions": {
            label: {
                "runs": {str(s): str(conditions[label][s].result.run) for s in found},
                "figures": _over_seeds(found),
                "gain": gains.get(label),
            }
            for label, found in values.items()
        },
    }


def _loss(seeds: dict[int, Run]) -> str:
    return next(iter(seeds.values())).settings["loss"]


def figures(result: Result) -> dict[str, float]:
    """Every metric of a confusion matrix, and the accuracy of each subgroup, over tracks."""
    right = result.guess == result.label
    confusion = confusion_of(result.label, result.guess, len(result.genres))
    found = {name: float(value) for name, value in figures_of(confusion).items()}
    for name in sorted({name for name in result.subgroups if name is not None}):
        inside = np.array([each == name for each in result.subgroups])
        found[f"{SUBGROUP}{name}"] = float(right[inside].mean())
    return found


def _over_seeds(found: dict[int, dict[str, float]]) -> Report:
    names = dict.fromkeys(name for each in found.values() for name in each)
    return {
        name: _spread({seed: each[name] for seed, each in found.items() if name in each})
        for name in names
    }


def _spread(values: dict[int, float]) -> Report:
    numbers = list(values.values())
    return {
        "values": {str(seed): value for seed, value in values.items()},
        "mean": float(np.mean(numbers)),
        "sd": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
        "min": min(numbers),
        "max": max(numbers),
    }


def _alike(runs: dict[int, Run], base: dict[int, Run]) -> set[int]:
    """Seeds in which both have the same subgroups."""
    shared = set(runs) & set(base)
    return {s for s in shared if runs[s].result.subgroups == base[s].result.subgroups}


def _gains(
    runs: dict[int, Run],
    base: dict[int, Run],
    found: dict[int, dict[str, float]],
    before: dict[int, dict[str, float]],
) -> Report | None:
    """Gains in the seeds that both have, of subgroups in those where they are the same."""
    shared, alike = [seed for seed in found if seed in before], _alike(runs, base)
    names = dict.fromkeys(name for seed in shared for name in found[seed] if name in before[seed])
    gains: Report = {}
    for name in names:
        seeds = [
            seed
            for seed in shared
            if name in found[seed] and name in before[seed]
            if seed in alike or not name.startswith(SUBGROUP)
        ]
        if seeds:
            gain = {seed: found[seed][name] - before[seed][name] for seed in seeds}
            gains[name] = _spread(gain) | _sure([(base[s], runs[s]) for s in seeds], gain, name)
    return gains or None


def _sure(pairs: Sequence[tuple[Run, Run]], gain: dict[int, float], name: str) -> Report:
    """How sure a gain is, and over what: seeds jointly with artists, or with tracks."""
    values = np.array(list(gain.values()))
    results = [run.result for pair in pairs for run in pair]
    unit, without = "", None
    if len({(each.dataset_id, each.tracks) for each in results}) == 1:
        unit = next(iter(intervals.units_of(results[0].groups)))
        without = np.array([run.without[name] - one.without[name] for one, run in pairs])
    sure = intervals.over_seeds(values, without)
    return {
        "unit": {"": "seeds", "groups": "seeds and artists", "tracks": "seeds and tracks"}[unit],
        "interval": sure and list(sure.interval),
        "p": sure and sure.p,
        "detectable": sure and sure.detectable,
        "gained": int((values > 1e-12).sum()),  # rounding is no gain
    }


def _correct(gains: Sequence[Report]) -> None:
    """Add p-values that are corrected for the number of conditions, figure by figure."""
    for name in {name for each in gains for name in each}:
        rows = [each[name] for each in gains if name in each and each[name]["p"] is not None]
        for row, value in zip(rows, intervals.holm([row["p"] for row in rows]), strict=True):
            row["p_corrected"] = value
