"""`deepspeed launch/evaluate.py RUN`: every row of a split once, judged by track."""

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mgc_dist import cli
from mgc_dist.config import EvaluateConfig, TrainConfig
from mgc_dist.errors import UserError

if TYPE_CHECKING:
    from mgc_dist.data import ShardSet
    from mgc_dist.manifest import Manifest
    from mgc_dist.model import WaveClassifier
    from mgc_dist.score import SplitScores


def run(config: EvaluateConfig) -> None:
    """Walk the split with the run's best model; print and write what it shows.

    Raises:
        UserError: no model or data there, or the genres of the two differ.
    """
    from mgc_dist import display, model, page, ranks, stage
    from mgc_dist.data import ShardSet
    from mgc_dist.display import progress
    from mgc_dist.score import all_score

    folder = model.find_exported(config.run)
    classifier = model.load_exported(folder)
    place = config.data or _own_shards(config)
    if config.shards_from:
        stage.stage(place, config.shards_from, timeout_s=config.stage_timeout_s)
    with ShardSet(place) as shards:
        if config.data is None:
            _refuse_repacked(config.run, shards)
        _refuse_other(config, classifier, model.sample_rate_of(folder), shards.manifest)
        with ranks.join(config.device) as peers:
            display.start_logging(peers.rank)
            first, stop = shards.rows_of(config.split)
            batches = -(-(stop - first) // (config.batch * peers.world))
            with progress(f"evaluating {config.split}", batches, shown=peers.is_first) as bar:
                result = all_score(
                    classifier.to(peers.device),
                    shards,
                    config.split,
                    peers,
                    batch=config.batch,
                    progress=bar.over,
                )
            if peers.is_first:
                if config.data:
                    print("--data: whether its tracks were trained on is for you to know")
                _write(config, shards.manifest, result)
                _print(config, shards.manifest, result)
                page.attempt(config.run, place)


def _own_shards(config: EvaluateConfig) -> Path:
    """Where the shards were that a run was trained on."""
    run_folder = config.run
    settings = run_folder / "config.yaml"
    if not settings.is_file():
        raise UserError(
            "--data",
            got=f"nothing, and {run_folder} is no run folder that names its shards",
            expected="a folder of shards",
            cure="add --data shards",
        )
    shards = cli.parse("train", TrainConfig, ["--config", str(settings)]).data.shards
    if not shards.is_dir() and not config.shards_from:
        raise UserError(
            f"shards of {run_folder}",
            got=f"no folder {shards} here",
            expected="to be started where the training was, or --data",
            cure="add --data FOLDER",
        )
    return shards


def _refuse_repacked(run_folder: Path, shards: "ShardSet") -> None:
    import json

    trained_on = json.loads((run_folder / "env.json").read_text())["dataset_id"]
    found = shards.manifest.dataset_id
    if found != trained_on:
        raise UserError(
            f"data set {shards.folder}",
            got=f"{found[:12]}, packed after the training",
            expected=f"{trained_on[:12]}, which {run_folder} was trained on",
            cure="its test split may hold training tracks; name another data set with --data",
        )


def _refuse_other(
    config: EvaluateConfig, classifier: "WaveClassifier", wanted: int, found: "Manifest"
) -> None:
    if classifier.genres != found.genres:
        raise UserError(
            f"genres of the shards for {config.run}",
            got=", ".join(found.genres),
            expected=", ".join(classifier.genres),
            cure="give shards with the same genres: --data FOLDER",
        )
    if classifier.segment_samples != found.segment_samples:
        raise UserError(
            f"segments of the shards for {config.run}",
            got=f"{found.segment_samples} samples",
            expected=f"{classifier.segment_samples}, as in training",
            cure="pack the data set again with the --segment-s of the training",
        )
    if wanted != found.sample_rate:
        raise UserError(
            f"sample rate of the shards for {config.run}",
            got=f"{found.sample_rate} Hz",
            expected=f"{wanted} Hz",
            cure=f"pack again: python -m mgc_dist.shard --sample-rate {wanted}",
        )


def _write(config: EvaluateConfig, found: "Manifest", result: "SplitScores") -> None:
    import json

    from mgc_dist import report
    from mgc_dist.files import replace_text

    folder = config.run / "evaluation"
    report.write_confusion(
        folder,
        f"confusion-{config.split}",
        result.track.confusion,
        found.genres,
        f"{config.run.name}, {config.split}: {result.track.count} tracks, "
        f"accuracy {result.track.accuracy:.3f}",
    )
    ids = [track.id for track in found.tracks]
    path = config.run / "predictions" / f"{config.split}.jsonl"
    report.write_predictions(path, result, ids, found.genres)
    content = {"dataset_id": found.dataset_id} | report.summary(result, found.genres)
    replace_text(folder / f"{config.split}.json", json.dumps(content, indent=1))


def _print(config: EvaluateConfig, found: "Manifest", result: "SplitScores") -> None:
    from rich.console import Console
    from rich.table import Table

    figures = Table(title=f"{config.run}: {config.split} split, data set {found.dataset_id[:12]}")
    for column in ("unit", "count", "accuracy", "balanced", "macro-F1", "NLL"):
        figures.add_column(column, justify="left" if column == "unit" else "right")
    for unit, scores in (("track", result.track), ("segment", result.segment)):
        values = (scores.accuracy, scores.balanced_accuracy, scores.macro_f1, scores.nll)
        figures.add_row(unit, str(scores.count), *(f"{value:.4f}" for value in values))
    genres = Table(title="by genre, over tracks")
    for column in ("genre", "precision", "recall", "F1", "tracks"):
        genres.add_column(column, justify="left" if column == "genre" else "right")
    for genre, row in zip(found.genres, result.track.per_genre(), strict=True):
        shown = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        genres.add_row(genre, *shown, str(row["support"]))
    console = Console()
    console.print(figures)
    console.print(genres)
    console.print(
        f"confusion matrix: {config.run / 'evaluation' / f'confusion-{config.split}.png'}\n"
        f"predictions: {config.run / 'predictions' / f'{config.split}.jsonl'}",
        highlight=False,
        soft_wrap=True,
    )


def main() -> NoReturn:
    """Entry of `launch/evaluate.py` and `python -m mgc_dist.evaluate`."""
    cli.main("evaluate", EvaluateConfig, run)


if __name__ == "__main__":
    main()
