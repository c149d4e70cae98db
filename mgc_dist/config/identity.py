"""A run's identity: what must be the same for a checkpoint to go on, by the names of knobs.

Most of it are knobs whose `Effect` says so; the run adds what it found: the data set's id under
`shards`, the table's hash under `bias_table`, and what has no knob, under a name of `_WORDS`.
"""

import re
from collections.abc import Mapping
from typing import Any

from mgc_dist.config.knobs import effects, flag, values
from mgc_dist.config.train import TrainConfig

Identity = dict[str, Any]

_WORDS = {
    "shards": "data set (--shards)",
    "genres": "genres",
    "bias_table": "bias table (--bias-table)",
    "order_version": "order version",
    "epochs": "positions (--epochs)",
    "frozen_weights": "frozen weights of --model",
    "shapes": "shapes of --model",
    "weights_precision": "--precision of the weights",
    "model": "configuration of --model",
    "revision": "revision of --model",
    "class_weight": "weights of the genres (--class-weight)",
    "device": "kind of device",
    "libraries": "libraries",
}
SAID = ("device", "libraries", "revision")
"""Parts that change digits by rounding, or nothing: a difference is written down, not refused."""
NEWER = (*SAID, "precision", "micro_batch", "model", "class_weight")
"""Parts that version 0.1.0 did not write down, or wrote as a path: they are not compared then."""
_OLD_KNOBS = (
    *("seed", "window_shards", "global_batch", "model", "freeze", "spec_augment", "cache"),
    *("lr", "head_lr", "weight_decay", "warmup_fraction", "final_lr_fraction", "clip_norm"),
)
_OLD_LOSS = "--loss"
"""Version 0.1.0 wrote all knobs of the loss in one text, and words for people as keys."""
OLD_MODEL = "launch/presets/wav2vec2-demo.json"
"""Where version 0.1.0 had the file of `wav2vec2-demo`; a run wrote its whole path."""
_HASH = re.compile(r" [0-9a-f]{32}$")
_OLD = {old: name for name, old in _WORDS.items()} | {flag(name): name for name in _OLD_KNOBS}


def own(config: object) -> Identity:
    """The knobs of a configuration that belong to the identity of its run."""
    marks = effects(type(config))
    return {name: value for name, value in values(config) if (e := marks[name]) and e.identity}


def words(name: str) -> str:
    """How people are told of a part of the identity."""
    return _WORDS.get(name, flag(name))


def read(written: Mapping[str, Any], config_type: type[Any] = TrainConfig) -> Identity:
    """An identity as a run folder or a checkpoint holds it, of this version or 0.1.0.

    A knob that the code of that time did not have counts as its default.

    Args:
        written: as it stands there.
        config_type: whose knobs are known.
    """
    found: Identity = {}
    for key, value in written.items():
        if key == _OLD_LOSS:
            pairs = (word.split("=", 1) for word in value.split())
            found |= {name: _value(text) for name, text in pairs}
        else:
            found[_OLD.get(key, key)] = value
    if not _HASH.search(str(found.get("model"))):
        found.pop("model", None)
    if "loss" not in found:  # no whole identity
        return found
    known = set(_OLD.values()) if _OLD_LOSS in written else set()
    known |= set(NEWER)
    return {name: value for name, value in own(config_type()).items() if name not in known} | found


def _value(text: str) -> float | str | None:
    if text == "None":
        return None
    try:
        return float(text)
    except ValueError:
        return text
