"""The probe: states of every kind, heads as scikit-learn's, choices that see no test row."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from layouts import SMALL, write_mert, write_mert2
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.preprocessing import StandardScaler
from test_bias import killed_after
from test_families import write
from transformers import AutoModelForAudioClassification, HubertConfig, HubertModel

from mgc_dist import bias, cli, probe, shard
from mgc_dist.bias_model import probe as body
from mgc_dist.bias_model.probe_heads import Rows, choose, track_nll
from mgc_dist.bias_model.states import STORE
from mgc_dist.config import ProbeConfig, ShardConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.encoders.hub import normalise
from mgc_dist.errors import UserError
from mgc_dist.models.backbone import LayerMeans, build_probed

CPU = torch.device("cpu")


def config(shards: Path, out: Path, **changes: Any) -> ProbeConfig:
    """Linear heads on log-mel bands."""
    settings: dict[str, Any] = {"model": "logmel", "batch": 8, "head": ("linear",)}
    settings |= {"c": (0.01, 1.0), "device": "cpu"}
    return ProbeConfig(shards=shards, out=out, **(settings | changes))


def found_by(settings: ProbeConfig, world: int = 1) -> dict[str, Any]:
    run_ranks(world, probe.run, settings)
    content: dict[str, Any] = json.loads((settings.results / "probe.json").read_text())
    return content


@pytest.fixture(scope="module")
def probed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which log-mel bands were probed by linear heads."""
    out = tmp_path_factory.mktemp("probe")
    run_ranks(1, probe.run, config(shards, out))
    return out


def test_linear_heads_are_those_of_scikit_learn(shards: Path, probed: Path) -> None:
    found = json.loads((probed / "probe.json").read_text())
    (line,) = found["lines"]
    states = np.load(probed / STORE.array)[:, 0].astype(np.float64)
    with ShardSet(shards) as data:
        label, track = data.labels, data.tracks
        train, validation, test = (
            slice(*data.manifest.splits[name]) for name in ("train", "validation", "test")
        )
    scaler = StandardScaler().fit(states[train])
    fits = {
        c: LogisticRegression(C=c, max_iter=2000, tol=1e-6).fit(
            scaler.transform(states[train]), label[train]
        )
        for c in (0.01, 1.0)
    }

    def by_track(c: float, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        logs = fits[c].predict_log_proba(scaler.transform(states[rows]))
        places = np.unique(track[rows])
        means = np.stack([logs[track[rows] == place].mean(axis=0) for place in places])
        truth = np.array([label[rows][track[rows] == place][0] for place in places])
        return np.exp(log_softmax(means, axis=1)), truth

    losses = {}
    for c in fits:
        given, truth = by_track(c, validation)
        losses[c] = log_loss(truth, given, labels=[0, 1, 2])
    best = min(losses, key=lambda c: losses[c])
    assert line["setting"] == [best]
    assert line["validation_nll"] == pytest.approx(losses[best], abs=1e-6)
    given, truth = by_track(best, test)
    assert line["track"]["accuracy"] == accuracy_score(truth, given.argmax(1))
    assert line["track"]["macro_f1"] == pytest.approx(
        f1_score(truth, given.argmax(1), average="macro")
    )
    assert line["track"]["nll"] == pytest.approx(log_loss(truth, given, labels=[0, 1, 2]), abs=1e-6)
    rows = fits[best].predict_proba(scaler.transform(states[test]))
    assert line["segment"]["accuracy"] == accuracy_score(label[test], rows.argmax(1))
    assert line["segment"]["nll"] == pytest.approx(log_loss(label[test], rows), abs=1e-6)
    assert found["chosen"]["linear"] == line
    assert set(line["intervals"]) == {"tracks", "groups"}


def test_two_ranks_store_equal_states_and_find_the_same(
    shards: Path, probed: Path, tmp_path: Path
) -> None:
    run_ranks(2, probe.run, config(shards, tmp_path))
    for name in (STORE.array, STORE.header, "probe.json", "layers.csv", "probe.png"):
        assert (tmp_path / name).read_bytes() == (probed / name).read_bytes(), name


def test_a_killed_pass_goes_on_and_gives_the_same_file(
    shards: Path, probed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bias, "run", probe.run)  # which `killed_after` starts
    settings = config(shards, tmp_path)
    killed_after(12, settings)
    assert not (tmp_path / STORE.header).exists()
    left = len((tmp_path / STORE.ledger).read_text().splitlines())
    assert left == 13  # its name, and 12 batches
    found_by(settings)
    assert (tmp_path / STORE.array).read_bytes() == (probed / STORE.array).read_bytes()
    assert (tmp_path / "probe.json").read_bytes() == (probed / "probe.json").read_bytes()


@pytest.mark.parametrize("kind", ["audio-spectrogram-transformer", "wav2vec2", "whisper", "sew"])
def test_the_states_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    name = write(tmp_path, kind)
    built = build_probed(str(name), ("a", "b"), segment_samples=8000, sample_rate=16_000)
    assert isinstance(built, LayerMeans)
    again = build_probed(str(name), ("a", "b"), segment_samples=8000, sample_rate=16_000)
    wave = torch.from_numpy(np.random.default_rng(0).integers(-9000, 9000, (2, 8000)).astype("i2"))
    found = built(wave)
    assert found.equal(again(wave))
    assert found.shape == (2, built.layers, built.width) == (2, 3, 16)
    net = built._kind.net
    assert isinstance(net, tuple(AutoModelForAudioClassification._model_mapping.values()))
    net.eval()
    if kind in ("wav2vec2", "sew"):
        theirs = net(normalise(wave), output_hidden_states=True).hidden_states
        means = [each.mean(1) for each in theirs]
    elif kind == "whisper":
        bands = built._kind.inputs(wave / 32768.0)
        means = [e.mean(1) for e in net(bands, output_hidden_states=True).hidden_states]
    else:  # 10 frames a stride: 48 frames have 5 of 9 patches, in each of 12 bands
        bands = built._kind.inputs(wave / 32768.0)
        theirs = net(bands, output_hidden_states=True).hidden_states
        kept = [2 + band * 9 + at for band in range(12) for at in range(5)]
        means = [each[:, kept].mean(1) for each in theirs]
    torch.testing.assert_close(found, torch.stack(means, dim=1))


def test_code_of_ones_own_is_probed_if_it_gives_states(tmp_path: Path) -> None:
    name = write_mert(tmp_path / "MERT")
    settings: dict[str, Any] = {"segment_samples": 12_000, "sample_rate": 24_000}
    with pytest.raises(UserError, match=r"--trust-remote-code"):
        build_probed(str(name), ("a", "b"), **settings)
    built = build_probed(str(name), ("a", "b"), trust_remote_code=True, **settings)
    assert isinstance(built, LayerMeans)
    rng = np.random.default_rng(0)
    wave = torch.from_numpy(rng.integers(-9000, 9000, (2, 12_000)).astype("i2"))
    torch.manual_seed(0)
    theirs = HubertModel(HubertConfig(**SMALL)).eval()
    with torch.no_grad():
        *states, last = theirs(normalise(wave), output_hidden_states=True).hidden_states
    wanted = [each.mean(1) for each in (*states, last * (1 + 2 + 3 + 4))]  # its own forward's
    torch.testing.assert_close(built(wave), torch.stack(wanted, dim=1))
    second = build_probed(
        str(write_mert2(tmp_path / "MERT2")), ("a", "b"), trust_remote_code=True, **settings
    )
    assert second(wave).shape == (2, 3, 16)
    silent = write_mert2(tmp_path / "silent")
    code = silent / "modeling_mert2.py"
    layers = "(Layer(config) for _ in range(config.num_hidden_layers))"
    told = code.read_text().replace(f"nn.ModuleList{layers}", f"nn.Sequential(*{layers})")
    code.write_text(
        told.replace(", output_hidden_states=False):", "):").replace(
            "states if output_hidden_states else None", "None"
        )
    )
    with pytest.raises(UserError, match=r"gives no hidden states.*\n.*mgc train --freeze backbone"):
        build_probed(str(silent), ("a", "b"), trust_remote_code=True, **settings)


@pytest.mark.parametrize(("kind", "world"), [("audio-spectrogram-transformer", 1), ("wav2vec2", 2)])
def test_models_are_probed_from_end_to_end(
    kind: str, world: int, shards: Path, tmp_path: Path
) -> None:
    name = write(tmp_path, kind)
    settings = config(
        shards, tmp_path / "out", model=str(name), batch=33, head=("linear", "mlp", "mix"),
        lr=(1e-3,), epochs=2, seeds=2,
    )  # fmt: skip
    found = found_by(settings, world)
    places = [(line["head"], line["layer"][0]) for line in found["lines"]]
    assert places == [(h, n) for h in ("linear", "mlp") for n in range(3)] + [("mix", None)]
    for line in found["lines"]:
        assert len(line["track_accuracy_by_seed"]) == (1 if line["head"] == "linear" else 2)
        assert line["track"]["accuracy"] == pytest.approx(np.mean(line["track_accuracy_by_seed"]))
    assert sum(found["lines"][-1]["weights"]) == pytest.approx(1)
    for head in ("linear", "mlp", "mix"):
        lines = [line for line in found["lines"] if line["head"] == head]
        assert found["chosen"][head] == min(lines, key=lambda line: line["validation_nll"])
    best = min(found["lines"], key=lambda line: line["validation_nll"])
    assert found["chosen"]["any"] == best
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["head"], row["layer"]) for row in rows] == [(h, str(n)) for h, n in places]
    assert sum(int(row["chosen"]) for row in rows) == 3
    assert {each["part"]: each["followed"] for each in found["protocol"]} == {
        "encoder": True, "states": False, "segments to tracks": True, "split": False,
        "layers": False, "MLP": True, "learning rate": False, "inputs of heads": False,
        "optimiser": False, "chosen by": False, "seeds": False,
    }  # fmt: skip


class Planted:
    """Rows of 4 tracks a genre and split, whose layers know different things.

    Layer 0 knows the genre, a little, everywhere. Layer 1 knows it in training and, much better,
    in test, where it leads; in validation it says the next genre.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.label = np.tile(np.repeat(np.arange(3), 20), 3)  # [180], 60 rows a split
        self.track = np.arange(180) // 5
        self.split = np.repeat(["train", "validation", "test"], 60)
        states = rng.normal(size=(180, 2, 8)).astype(np.float32)
        onehot = np.eye(3, 8, dtype=np.float32)
        states[:, 0] += 1.5 * onehot[self.label]
        leak = np.where(self.split == "validation", (self.label + 1) % 3, self.label)
        states[:, 1] += 6.0 * onehot[leak]
        self.states = states

    def rows(self, split: str) -> Rows:
        rows = np.flatnonzero(self.split == split)
        return Rows(states=self.states, rows=rows, label=self.label[rows], track=self.track[rows])


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_layer_that_only_test_likes_is_not_chosen(head: Any, tmp_path: Path) -> None:
    planted = Planted()
    settings = config(tmp_path, tmp_path, head=(head,), lr=(1e-3, 1e-2), epochs=20, seeds=1)
    train, validation, test = map(planted.rows, ("train", "validation", "test"))

    def chosen_by(judge: Rows) -> int | None:
        choices = [choose(head, layer, train, judge, 3, settings, CPU) for layer in (0, 1)]
        return body.best([body._test(choice, test) for choice in choices], head).layer

    assert chosen_by(test) == 1, "the leak is there to be seen"
    assert chosen_by(validation) == 0


def test_a_strength_that_only_test_likes_is_not_chosen(tmp_path: Path) -> None:
    """Layer 1's strength: test wants the surest head, validation the least sure one."""
    planted = Planted()
    settings = config(tmp_path, tmp_path, c=(1e-4, 10.0))
    train, validation, test = map(planted.rows, ("train", "validation", "test"))
    assert choose("linear", 1, train, test, 3, settings, CPU).setting == 10.0
    assert choose("linear", 1, train, validation, 3, settings, CPU).setting == 1e-4


@pytest.mark.parametrize("head", ["linear", "mlp", "mix"])
def test_what_is_chosen_does_not_depend_on_test_rows(head: Any, tmp_path: Path) -> None:
    layer = None if head == "mix" else 0
    settings = config(tmp_path, tmp_path, lr=(1e-3, 1e-2), epochs=3, seeds=2)
    numbers = []
    for fill in (None, np.nan):
        planted = Planted()
        if fill is not None:
            planted.states[planted.split == "test"] = fill
        train, validation = planted.rows("train"), planted.rows("validation")
        choice = choose(head, layer, train, validation, 3, settings, CPU)
        logits = [fit.logits(validation.of(layer)) for fit in choice.fits]
        losses = [track_nll(each, validation) for each in logits]
        assert choice.nll == pytest.approx(np.mean(losses), abs=1e-6)
        numbers.append((choice.setting, choice.nll, [each.tobytes() for each in logits]))
    assert numbers[0] == numbers[1]
    if head != "linear":
        assert len(set(numbers[0][2])) == 2, "each seed has weights of its own"


def test_folds_test_every_track_once_and_keep_artists_together(
    shards: Path, probed: Path, tmp_path: Path
) -> None:
    settings = config(shards, probed, folds=3)
    with ShardSet(shards, is_whole=True) as data:
        divisions = body.divide(settings, data)
        groups = np.array([track.group for track in data.manifest.tracks])
    assert [sorted(set(split)) for split in divisions] == [["test", "train", "validation"]] * 3
    tested = np.stack([split == "test" for split in divisions])
    assert (tested.sum(axis=0) == 1).all()
    validates = np.stack([split == "validation" for split in divisions])
    assert (validates == np.roll(tested, 1, axis=0)).all()
    for split in divisions:
        for group in set(groups):
            assert len(set(split[groups == group])) == 1, group
    before = (probed / STORE.array).stat().st_mtime_ns
    found = found_by(settings)
    assert (probed / STORE.array).stat().st_mtime_ns == before, "no other pass"
    assert (found["tracks"], found["segments"]) == (18, 198)
    assert len(found["lines"][0]["setting"]) == 3
    assert (probed / "folds3" / "probe.png").exists()


def test_folds_that_were_packed_are_taken(tracks: Path, tmp_path: Path) -> None:
    out = tmp_path / "kfold"
    shard.run(
        ShardConfig(
            data=tracks, out=out, groups=tracks / "artists.csv", segment_s=0.5, hop_s=0.5,
            rows_per_shard=20, split="kfold", folds=3, jobs=1,
        )
    )  # fmt: skip
    with ShardSet(out, is_whole=True) as data:
        names = np.array([track.split for track in data.manifest.tracks])
        divisions = body.divide(config(out, out, folds=3), data)
        (one,) = body.divide(
            cli.parse("probe", ProbeConfig, ["--shards", str(out), "--fold", "2"]), data
        )
        with pytest.raises(
            UserError, match=r"--folds 4: got shards packed in 3 folds.*\n.*--folds 3"
        ):
            body.divide(config(out, out, folds=4), data)
        with pytest.raises(UserError, match="got no --fold"):
            body.divide(config(out, out), data)
    for k, split in enumerate(divisions):
        assert set(names[split == "test"]) == {f"fold{k}"}
        assert set(names[split == "validation"]) == {f"fold{(k - 1) % 3}"}
    assert (one == divisions[2]).all()


def test_what_does_not_fit_is_refused(shards: Path, probed: Path, tmp_path: Path) -> None:
    other = write(tmp_path, "wav2vec2")
    with pytest.raises(UserError, match=r"another bias_hash.*\n.*--overwrite, or .* --out"):
        run_ranks(1, probe.run, config(shards, probed, model=str(other)))
    for words, message in (
        ({"c": (0.0,)}, "--c: got 0.0"),
        ({"lr": ()}, "--lr: got nothing"),
        ({"head": ("mlp", "mlp")}, "--head: got mlp mlp"),
        ({"folds": 2}, "--folds: got 2"),
    ):
        with pytest.raises(UserError, match=message):
            config(shards, tmp_path, **words)
    with pytest.raises(UserError, match="--folds: got 3 with --fold 1"):
        cli.parse("probe", ProbeConfig, ["--fold", "1", "--folds", "3"])


def test_a_data_set_for_evaluation_only_is_told_of_folds(tracks: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    names = [path.stem for path in sorted(tracks.glob("*/*.wav"))]
    lines = [f"{name},test" for name in names]
    (tmp_path / "splits.csv").write_text("\n".join(["track,split", *lines]) + "\n")
    shard.run(
        ShardConfig(
            data=tracks, out=out, groups=tracks / "artists.csv", segment_s=0.5, hop_s=0.5,
            rows_per_shard=20, split="table", split_file=tmp_path / "splits.csv", jobs=1,
        )
    )  # fmt: skip
    with ShardSet(out, is_whole=True) as data:
        with pytest.raises(UserError, match=r"got no tracks in train, valid.*\n.*--folds 5"):
            body.divide(config(out, out), data)
        assert len(body.divide(config(out, out, folds=5), data)) == 5
