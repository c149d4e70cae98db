"""The best model of a run as a folder for transformers, with a card that says what it is."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from mgc_dist import cli
from mgc_dist.config import TrainConfig
from mgc_dist.encoders import custom, pooling, wrapped
from mgc_dist.errors import UserError
from mgc_dist.files import replace_text, replacing_folder
from mgc_dist.journal import read_environment
from mgc_dist.models import exported, folder

CARD = """---
pipeline_tag: audio-classification
---
# {name}

A music genre classifier, trained with mgc_dist.

## A file of any length

`genre.py` in this folder cuts a file into segments of {seconds:g} s, one every 1.5 s, and takes the
mean of their probabilities, as `python -m mgc_dist.predict` does. It needs transformers, torch,
soxr, soundfile and av, but no mgc_dist. In this folder:

```python
from genre import GenreClassifier

classify = GenreClassifier()
classify("song.mp3")
```

## A segment

Give the pipeline {seconds:g} s of mono audio at {sample_rate} Hz. It takes a longer file as one
segment, and then says something else than `genre.py`. {head}

```python
from transformers import pipeline

classify = pipeline("audio-classification", model=".", top_k=None{trust})
classify({{"array": wave, "sampling_rate": {sample_rate}}})
```

## What it is

- probabilities: {calibration}
- genres: {genres}
- loss: {loss}; main model: {model}
- data set: {dataset_id}
"""
CARD_WITH_CODE = CARD.replace(
    "GenreClassifier()", "GenreClassifier(trust_remote_code=True)"
).replace(
    "## A file of any length",
    "The model has code of its own, which lies here in .py files: read it, then trust it. "
    "`modeling_genre.py`\nputs the head of mgc_dist on it.\n\n## A file of any length",
)


@dataclass(frozen=True, kw_only=True)
class Export:
    """An exported model.

    Attributes:
        folder: that transformers loads.
        temperature: that its last layer was divided by; None if by none.
        has_code: whether transformers runs code that lies in it.
    """

    folder: Path
    temperature: float | None
    has_code: bool


def export(run: Path, out: Path, *, ema: bool = False, trust_remote_code: bool = False) -> Export:
    """Copy the best model of a run, with a card and with what predicts whole files.

    Args:
        run: the run folder.
        out: a new or empty folder.
        ema: take the averaged weights.
        trust_remote_code: run code that lies beside the weights.

    Raises:
        UserError: no best model in the run, one that transformers cannot load, or a folder with
            files in the way.
    """
    source = folder.find_exported(run, ema=True) if ema else folder.best_of(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"OUT {out}",
            got="something that is there already",
            expected="a new or empty folder",
            cure="choose another name",
        )
    own_head = pooling.is_marked(source)
    has_code = custom.has_code(source) and not own_head
    classifier = folder.load_exported(source, trust_remote_code=trust_remote_code)
    if has_code and pooling.is_headed(classifier.net):
        raise _needs_our_code(run, source, "a model with code of its own under a head of ours")
    if classifier.needs_our_code and not (has_code or own_head):
        raise _needs_our_code(run, source, classifier.net.config.model_type)
    card = CARD_WITH_CODE if has_code else CARD
    trained = cli.parse("train", TrainConfig, ["--config", str(run / "config.yaml")])
    environment = read_environment(run)
    sample_rate, temperature = folder.sample_rate_of(source), classifier.temperature
    text = card.format(
        name=out.name,
        seconds=classifier.segment_samples / sample_rate,
        sample_rate=sample_rate,
        calibration="as trained"
        if temperature is None
        else f"the last layer is divided by {temperature:.3f}, a temperature fitted on "
        "validation tracks",
        genres=", ".join(classifier.genres),
        loss=trained.objective.description,
        model=trained.main.model,
        dataset_id=environment["dataset_id"],
        trust=", trust_remote_code=True" if has_code or own_head else "",
        head="Its head is in `pooling.py` in this folder, which `trust_remote_code=True` runs."
        if own_head
        else "",
    )
    with replacing_folder(out) as aside:
        if temperature is None:
            shutil.copytree(source, aside, dirs_exist_ok=True)
        else:
            folder.save_calibrated(classifier, aside, sample_rate)
        shutil.copyfile(Path(exported.__file__), aside / "genre.py")
        if has_code:
            _add_class(aside)
        replace_text(aside / "README.md", text)
    return Export(folder=out, temperature=temperature, has_code=has_code or own_head)


def _add_class(folder: Path) -> None:
    """Put the class beside the weights with which transformers loads foreign code and our head."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    file, _, config = written["auto_map"]["AutoConfig"].rpartition(".")
    bound = (
        f"\n\nfrom .{file} import {config}  # noqa: E402\n\n"  # transformers compares the two
        f"CustomAudioClassifier.config_class = {config}\n"
    )
    code = Path(wrapped.__file__).read_text(encoding="utf-8") + bound
    replace_text(folder / "modeling_genre.py", code)
    written["auto_map"]["AutoModelForAudioClassification"] = "modeling_genre.CustomAudioClassifier"
    replace_text(folder / "config.json", json.dumps(written, indent=2) + "\n")


def _needs_our_code(run: Path, source: Path, kind: str) -> UserError:
    return UserError(
        f"main model of {run}",
        got=f"{kind}, which transformers cannot load without our code",
        expected="a model of transformers",
        cure=f"`predict` and `evaluate` take {source} as it is",
    )
