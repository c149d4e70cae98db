"""`python -m mgc_dist.export RUN OUT`: the best model as a Hugging Face folder."""

import json
import shutil

from mgc_dist import cli
from mgc_dist.config import ExportConfig
from mgc_dist.errors import UserError

CARD = """---
pipeline_tag: audio-classification
---
# {name}

A music genre classifier, trained with mgc_dist. Give it {seconds:g} s of mono audio at
{sample_rate} Hz:

```python
from transformers import pipeline

classify = pipeline("audio-classification", model="{folder}", top_k=None)
classify({{"array": wave, "sampling_rate": {sample_rate}}})
```

A track's genre is the mean of its segments' probabilities; `python -m mgc_dist.predict` does that.

- probabilities: {calibration}
- genres: {genres}
- loss: {loss}; main model: {model}
- data set: {dataset_id}
"""


def run(config: ExportConfig) -> None:
    """Copy the best model, with a card that says what it was trained on.

    Raises:
        UserError: no best model in the run, one that transformers cannot load, or a folder with
            files in the way.
    """
    from mgc_dist.config import TrainConfig
    from mgc_dist.models import folder as exported

    source, settings = config.run / "best", config.run / "config.yaml"
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(
            f"OUT {config.out}",
            got="something that is there already",
            expected="a new or empty folder",
            cure="choose another name",
        )
    classifier = exported.load_exported(source)  # refuses a folder that lacks weights
    if classifier.needs_our_code:
        raise UserError(
            f"main model of {config.run}",
            got="logmel-cnn, which transformers cannot load without our code",
            expected="a model of transformers",
            cure=f"`predict` and `evaluate` take {source} as it is",
        )
    trained = cli.parse("train", TrainConfig, ["--config", str(settings)])
    environment = json.loads((config.run / "env.json").read_text())
    sample_rate = exported.sample_rate_of(source)
    if classifier.temperature is None:
        shutil.copytree(source, config.out, dirs_exist_ok=True)
    else:
        exported.save_calibrated(classifier, config.out, sample_rate)
    card = CARD.format(
        name=config.out.name,
        seconds=classifier.segment_samples / sample_rate,
        sample_rate=sample_rate,
        folder=config.out,
        calibration="as trained"
        if classifier.temperature is None
        else f"the last layer is divided by {classifier.temperature:.3f}, a temperature fitted on "
        "validation tracks",
        genres=", ".join(classifier.genres),
        loss=trained.objective.description,
        model=trained.main.model,
        dataset_id=environment["dataset_id"],
    )
    (config.out / "README.md").write_text(card, encoding="utf-8")
    print(
        f"Wrote {config.out}; load it with "
        f'transformers.pipeline("audio-classification", model="{config.out}")'
    )


def main() -> None:
    """Entry of `python -m mgc_dist.export`."""
    cli.main("export", ExportConfig, run)


if __name__ == "__main__":
    main()
