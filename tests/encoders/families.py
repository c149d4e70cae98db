"""The table of families: what each kind of model can do here, tried out.

    make families           # all of it, ten minutes; writes docs/models.md's table and its JSON

Each family is its own default configuration made small, with random weights. Trainings are two
steps on two ranks of the CPU. A cell is `yes`, or what the refusal said that it got.
"""

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from conftest import run_ranks, shard_config, write_tracks
from layouts import RATE, write_mert, write_mert2, write_muq
from test_families import FAMILIES, write
from trainings import config, losses, train_until
from transformers import pipeline

from mgc_dist import export, predict, shard, train
from mgc_dist.config import ExportConfig, PredictConfig, TrainConfig
from mgc_dist.errors import UserError

ROOT = Path(__file__).parents[2]
PAGE, RESULT = ROOT / "docs" / "models.md", ROOT / "benchmarks" / "results" / "families.json"
BEGIN, END = "<!-- make families -->\n", "<!-- end -->\n"
TWO_STEPS = 20 / 66
"""Epochs of two global batches of ten of the 66 rows."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model.

    Attributes:
        write: writes one into a folder; returns what `--model` takes.
        freeze: what must be frozen: all below the head, where BatchNorm would be trained.
        trusted: whether code of its own runs.
        rate: of its shards in Hz.
        layers: N of `layers:N`.
    """

    write: Callable[[Path], str]
    freeze: str = "feature_encoder"
    trusted: bool = False
    rate: int = 16_000
    layers: int = 1


def _of_transformers(kind: str) -> Family:
    is_conformer = kind == "wav2vec2-conformer"
    return Family(
        write=lambda folder: str(write(folder, kind)),
        freeze="backbone" if is_conformer else "feature_encoder",
        layers=2 if is_conformer else 1,
    )


ALL: Mapping[str, Family] = {
    **{kind: _of_transformers(kind) for kind in FAMILIES},
    "MERT v1 (its layout)": Family(
        write=lambda folder: str(write_mert(folder / "mert")), trusted=True, rate=RATE
    ),
    "MERT v1 with a CQT (its layout)": Family(
        write=lambda folder: str(write_mert(folder / "mert", feature_extractor_cqt=True)),
        trusted=True,
        rate=RATE,
    ),
    "MERT v2 (its layout)": Family(
        write=lambda folder: str(write_mert2(folder / "mert")), trusted=True, rate=RATE
    ),
    "MuQ (package muq)": Family(
        write=lambda folder: f"muq:{write_muq(folder / 'muq')}",
        freeze="backbone",
        rate=RATE,
        layers=2,
    ),
    "OMAR-RQ (package omar-rq)": Family(write=lambda folder: "omar-rq:mtg-upf/omar-rq-base"),
}
NEEDS = {"MuQ (package muq)": "muq"}
"""Packages that a family cannot be tried without."""


def is_here(name: str) -> bool:
    """Whether a family's package is installed."""
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None


class Trial:
    """One family, tried out.

    Args:
        family: which one.
        shards: its data set.
        work: an empty folder.
    """

    def __init__(self, family: Family, shards: Path, work: Path) -> None:
        self.family, self.shards, self.work = family, shards, work
        self.model = family.write(work)
        self.first = work / "ZeRO-0"

    def settings(self, run: Path, **knobs: Any) -> TrainConfig:
        knobs = {"freeze": self.family.freeze, "epochs": TWO_STEPS, "loss": "ce"} | knobs
        found = config(self.shards, Path(), run, checkpoint_every_epochs=1.0, **knobs)
        main = replace(found.main, model=self.model, trust_remote_code=self.family.trusted)
        return replace(found, main=main)

    def trains(self, name: str, **knobs: Any) -> str:
        run = self.work / name
        run_ranks(2, train.run, self.settings(run, **knobs))
        found = losses(run)
        assert len(found) == 2
        assert np.isfinite(found).all()
        return "yes"

    def at_layers(self, **knobs: Any) -> str:
        return self.trains("layers", freeze=f"layers:{self.family.layers}", **knobs)

    def caches(self, **knobs: Any) -> str:
        return self.trains(
            f"cache {knobs['freeze']}", cache="trunk", spec_augment=False,
            cache_dir=self.work / "caches", **knobs,
        )  # fmt: skip

    def dry_run(self) -> str:
        settings = self.settings(self.work / "dry")
        train.run(replace(settings, output=replace(settings.output, dry_run=True)))
        return "yes"

    def resumes(self) -> str:
        settings = self.settings(self.work / "resumed", zero_stage=0, resume="auto")
        run_ranks(2, train_until, 1, settings)
        run_ranks(2, train.run, settings)
        assert losses(self.work / "resumed") == losses(self.first)
        return "yes, same bits"

    def exports(self) -> str:
        trust = self.family.trusted
        export.run(ExportConfig(run=self.first, out=self.work / "out", trust_remote_code=trust))
        return "yes"

    def is_loaded(self) -> str:
        out, trust = str(self.work / "out"), self.family.trusted
        classify = pipeline("audio-classification", out, trust_remote_code=trust, top_k=None)
        wave = np.random.default_rng(0).normal(0, 0.1, self.family.rate // 2).astype(np.float32)
        said = classify({"array": wave, "sampling_rate": self.family.rate})
        assert sum(each["score"] for each in said) > 0.999
        return "pipeline, with a class of its own" if trust else "pipeline"

    def predicts(self) -> str:
        wave = np.random.default_rng(0).normal(0, 0.1, 22_050)
        soundfile.write(self.work / "a.wav", wave, 22_050)
        table = self.work / "a.csv"
        asked = {"run": self.first, "files": (self.work / "a.wav",), "csv": table}
        predict.run(PredictConfig(**asked, trust_remote_code=self.family.trusted))
        assert len(table.read_text().splitlines()) == 2
        return "yes"

    def cells(self) -> dict[str, str]:
        """All of it, by the column's name."""
        layers = f"layers:{self.family.layers}"
        tries: dict[str, Callable[[], str]] = {
            "ZeRO-0": lambda: self.trains("ZeRO-0", zero_stage=0),
            "ZeRO-3": lambda: self.trains("ZeRO-3", zero_stage=3),
            "nothing frozen": lambda: self.trains("none", freeze="none"),
            "freeze backbone": lambda: self.trains("backbone", freeze="backbone"),
            "freeze layers:N": self.at_layers,
            "cache at layers:N": lambda: self.caches(freeze=layers, zero_stage=3),
            "cache at the head": lambda: self.caches(freeze="backbone"),
            "LoRA": lambda: self.trains("lora", lora="r=2", freeze="feature_encoder", zero_stage=3),
            "activation checkpointing": lambda: self.trains("ac", activation_checkpointing=True),
            "dry run": self.dry_run,
            "resume": self.resumes,
            "predict": self.predicts,
            "export": self.exports,
            "loaded by": self.is_loaded,
        }
        found: dict[str, str] = {}
        for column, attempt in tries.items():
            needed = found.get({"loaded by": "export"}.get(column, "ZeRO-0"), "yes")
            reads_it = column in ("resume", "predict", "export", "loaded by")
            found[column] = needed if reads_it and needed != "yes" else tried(attempt)
        return found


def tried(attempt: Callable[[], str]) -> str:
    """What came of it: `yes`, a refusal's words, or a defect."""
    try:
        return attempt()
    except UserError as error:
        return f"refused: {error.parts['got']}"
    except Exception as error:
        return f"TRACEBACK {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def of(name: str, work: Path) -> dict[str, str]:
    """The row of a family; refusals are told without its paths, and measured numbers of them."""
    family = ALL[name]
    tracks = work / "tracks"
    write_tracks(tracks)
    shard.run(shard_config(tracks, work / "shards", sample_rate=family.rate))
    cells = Trial(family, work / "shards", work).cells()
    plain = (said.replace(f"{work}/", "") for said in cells.values())
    return dict(zip(cells, (re.sub(r"\d\.\de[-+]\d\d", "x", said) for said in plain), strict=True))


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A line a family; refusals are numbered below."""
    columns = list(next(iter(rows.values())))
    notes: dict[str, int] = {}

    def short(said: str) -> str:
        if not said.startswith("refused: "):
            return said
        number = notes.setdefault(said.removeprefix("refused: "), len(notes) + 1)
        return f"no ({number})"

    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | {' | '.join(short(cells[c]) for c in columns)} |")
    lines += ["", *(f"{number}. {words}" for words, number in notes.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try all families out, or write the table from the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--render", action="store_true", help="write the table from the JSON")
    parser.add_argument("--only", help="family: its row alone, printed")
    args = parser.parse_args()
    for name in [args.only] if args.only else ALL:
        if args.render:
            break
        if not is_here(name):
            sys.exit(f"{name} cannot be tried: pip install {NEEDS[name]}")
        with tempfile.TemporaryDirectory() as folder:
            row = of(name, Path(folder))
        print(json.dumps({name: row}, indent=1), file=sys.stderr, flush=True)
        if args.only:
            return
        held = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
        RESULT.write_text(json.dumps(held | {name: row}, indent=1) + "\n")
    rows = json.loads(RESULT.read_text())
    rows = {name: rows[name] for name in ALL}
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])
    sys.exit(any(said.startswith("TRACEBACK") for row in rows.values() for said in row.values()))


if __name__ == "__main__":
    main()
