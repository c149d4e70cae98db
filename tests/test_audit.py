"""The audit: what is planted is named by its own family, nothing where nothing is planted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import bias_config, make_table, run_ranks, shard_config, write_tracks
from trainings import config, train_on

from mgc_dist import audit, shard, synth
from mgc_dist.bias_model import families
from mgc_dist.bias_model import table as tables
from mgc_dist.bias_model.findings import LEAST_GAIN
from mgc_dist.bias_model.heads import cross_fit
from mgc_dist.config import AuditConfig, ShardConfig, SourceConfig, SynthConfig
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tracks import group_key
from mgc_dist.errors import UserError
from mgc_dist.packing import music
from mgc_dist.sound import traits

OWN = {"tone": "lines", "cutoff": "bandwidth", "tilt": "tilt", "codec": "bandwidth"}


def planted(folder: Path, artefact: str, share: float) -> Path:
    """Shards of 100 tracks of 2 s, 6 artists a genre."""
    settings = {"tracks_per_genre": 8, "validation_tracks": 1, "test_tracks": 1}
    settings |= {"shifted_tracks": 1, "tracks_per_artist": 2, "duration_s": 2.0, "jobs": 1}
    data = folder / "set"
    synth.run(
        SynthConfig(out=data, shortcut=True, artefact=artefact, shortcut_strength=share, **settings)
    )
    out = folder / "shards"
    shard.run(
        ShardConfig(
            data=data / "genres_original",
            groups=data / "artists.csv",
            split_file=data / "splits.csv",
            out=out,
            segment_s=1.0,
            hop_s=1.0,
            repetitions=False,
            jobs=1,
        )
    )
    return out


def audited(shards: Path, **changes) -> dict:
    audit.run(AuditConfig(data=shards, jobs=1, **changes))
    folder = changes.get("out") or shards / "audit"
    assert (folder / "audit.html").is_file()
    return json.loads((folder / "audit.json").read_text())


@pytest.fixture(scope="module")
def toned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("tone"), "tone", 0.9)


def test_a_tone_is_named_first_and_alone_and_its_bands_are_listed(
    toned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = audited(toned)
    first, *others = found["families"]
    assert (first["name"], first["named"]) == ("lines", True)
    assert first["accuracy"] > 0.6
    assert first["interval"][0] > found["named_above"] == pytest.approx(0.1 + 0.9 * LEAST_GAIN)
    assert not [each["name"] for each in others if each["named"]]
    assert [each["name"] for each in found["families"]] != list(families.NAMES)
    listed = [float(line.split()[2].replace(",", "")) for line in first["uses"]]
    assert all(4100 <= hz <= 6600 for hz in listed), "its ten tones lie from 4200 to 6540 Hz"
    assert (found["unit"], found["artists"], found["tracks"]) == ("groups", 60, 100)
    said = capsys.readouterr().out
    assert "The genre is told by steady lines" in said
    assert "--backbone audit:lines" in said
    page = (toned / "audit" / "audit.html").read_text()
    assert page.count("data:audio/wav;base64,") >= 3
    assert "corrected for the 10 families (Holm)" in page


@pytest.mark.parametrize("artefact", ["cutoff", "tilt", "codec"])
def test_other_artefacts_are_named_first_by_their_family(artefact: str, tmp_path: Path) -> None:
    first = audited(planted(tmp_path, artefact, 0.9))["families"][0]
    assert (first["name"], first["named"]) == (OWN[artefact], True)


def test_nothing_is_named_where_the_artefact_is_at_random(tmp_path: Path) -> None:
    found = audited(planted(tmp_path, "tone", 0.1))
    assert not [each["name"] for each in found["families"] if each["named"]]


def test_inflation_is_what_knowing_the_artists_gives(toned: Path) -> None:
    """Artists have timbres: folds that split them let the probe recognise them."""
    found = audited(toned)["inflation"]
    assert found["difference"] == pytest.approx(found["random"] - found["by_artist"])
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Music of one style, whose genres are the formats of its files; no artists."""
    home = tmp_path_factory.mktemp("formats") / "music"
    for genre, (kind, rate) in {
        "a": ("mp3", 22_050),
        "b": ("ogg", 22_050),
        "c": ("flac", 44_100),
    }.items():
        (home / genre).mkdir(parents=True)
        for number in range(8):
            wave = music.compose(
                "pop", 3 * number + ord(genre), seed=1, duration_s=3.2, per_artist=1
            )
            wave = np.repeat(wave, rate // 22_050)
            soundfile.write(home / genre / f"{genre}{number}.{kind}", wave, rate)
    return home


def test_a_codec_a_genre_is_called_out_in_a_folder_of_music(
    formats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(formats.rglob("*"))
    artists = [f"{genre}{number},{genre} {number // 4}" for genre in "abc" for number in range(8)]
    (tmp_path / "two.csv").write_text("track,artist\n" + "\n".join(artists) + "\n")
    out = tmp_path / "two"  # artists of a genre: too few for splits, enough for an audit
    audit.run(AuditConfig(data=formats, groups=tmp_path / "two.csv", out=out, folds=2, jobs=1))
    known = json.loads((out / "audit.json").read_text())
    assert (known["unit"], known["artists"]) == ("groups", 6)
    assert max(each["accuracy"] for each in known["families"]) == 1.0
    audit.run(AuditConfig(data=formats, jobs=1))
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    named = {each["name"]: each for each in found["families"] if each["named"]}
    assert named["file"]["accuracy"] == 1.0
    assert any("codec" in line or "container" in line for line in named["file"]["uses"])
    assert found["unit"] == "tracks"
    assert found["inflation"] is None
    assert any("codec" in line for line in found["leaks"]), "what packing has found is told too"
    assert "artists are unknown" in capsys.readouterr().out.lower()
    assert sorted(formats.rglob("*")) == before, "nothing is written into the music"
    assert {path.name for path in tmp_path.iterdir()} == {"audit", "two", "two.csv"}
    assert "Audit of music" in (tmp_path / "audit" / "audit.html").read_text()


def test_a_wrong_label_is_doubted_and_can_be_listened_to(tmp_path: Path) -> None:
    write_tracks(tmp_path / "music", genres=3, tracks=8)
    wrong = tmp_path / "music" / "blues" / "blues.00005.wav"
    wrong.rename(tmp_path / "music" / "country" / wrong.name)
    out = tmp_path / "audit"
    audit.run(AuditConfig(data=tmp_path / "music", out=out, jobs=1))
    doubts = json.loads((out / "audit.json").read_text())["doubts"]
    first = doubts["tracks"][0]
    assert (first["source"], first["genre"]) == (f"country/{wrong.name}", "country")
    assert first["sounds_like"] == "blues"
    assert first["probability"] > first["of_label"]
    assert doubts["share"] == pytest.approx(len(doubts["tracks"]) / 24)
    assert doubts["accuracy_without"] >= doubts["accuracy"]
    page = (out / "audit.html").read_text()
    assert "labelled country" in page
    assert f"would score {1 - doubts['share']:.3f} at most" in page


def test_processes_change_no_figure(shards: Path, tmp_path: Path) -> None:
    with ShardSet(shards, is_whole=True) as opened:
        one, probe = families.gather(opened, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(families, "_ROWS", 100)
            two, again = families.gather(opened, 2)
    assert (probe == again).all()
    assert all((a.values == b.values).all() for a, b in zip(one, two, strict=True))
    assert [each.name for each in one] == list(families.NAMES)
    assert all(each.values.shape == (18, len(each.columns)) for each in one)


def test_shards_without_a_table_of_sources_are_audited_by_their_waves(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families.provenance, "read", lambda folder, manifest: None)
    names = {each["name"] for each in audited(copy, folds=3)["families"]}
    assert names == set(traits.FAMILIES)


def test_what_cannot_be_audited_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        audit.run(AuditConfig(data=tmp_path / "none"))
    with pytest.raises(UserError, match=r"--folds 50: got 9 non-empty folds(.|\n)*fewer folds"):
        audit.run(AuditConfig(data=shards, folds=50))


def test_repetitions_that_packing_found_are_told(tracks: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shard.run(shard_config(tracks, out))
    (out / "repetitions.csv").write_text(
        "track,split,genre,same_as,its_split,its_genre,speed,start_s\n"
        "x.wav,train,blues,y.wav,train,country,1.0,0.0\n"
    )
    found = audited(out, folds=3)
    assert found["repetitions"] == {
        "pairs": 1,
        "of_two_genres": ["x.wav (blues) is y.wav (country)"],
    }
    assert "x.wav (blues) is y.wav (country)" in (out / "audit" / "audit.html").read_text()


@pytest.mark.parametrize("fold", [None, 1])
def test_the_bias_table_of_a_family_is_its_cross_fit(
    fold: int | None, tracks: Path, shards: Path, tmp_path: Path
) -> None:
    if fold is not None:
        shards = tmp_path / "folds"
        shard.run(shard_config(tracks, shards, split="kfold", folds=3, repetitions=False))
    settings = {"bias_table": tmp_path / "bias", "backbone": "audit:lines"}
    made = bias_config(shards, source=SourceConfig(fold=fold), **settings)
    run_ranks(2, make_table, made)
    header = tables.read_header(made.table)
    assert (header.backbone, header.layers) == ("audit:lines", (0,))
    with ShardSet(shards, fold) as data:
        of_track = [header.fold_of.get(group_key(t.id, t.group), -1) for t in data.manifest.tracks]
        waves = np.stack([data.read(row) for row in range(data.manifest.rows)])
        values = traits.Traits("lines", 16_000)(torch.from_numpy(waves))[:, 0].numpy()
        dealt, label = np.array(of_track)[data.tracks], data.labels
        read = tables.read(made.table, data.manifest, data.keys)
    fit = cross_fit(values, label, dealt, folds=2, genres=3, c=1.0)
    assert np.abs(read.log_probability - fit.log_probability).max() < 1e-3


@pytest.mark.parametrize("fold", [None, 1])
def test_the_bias_table_of_file_facts_knows_the_format_of_each_row(
    fold: int | None, formats: Path, tmp_path: Path
) -> None:
    """A format is a genre: the table of any split or fold names the genre of every row."""
    split = {"split": "stratified"} if fold is None else {"split": "kfold", "folds": 4}
    shard.run(shard_config(formats, tmp_path / "out", groups=None, repetitions=False, **split))
    made = bias_config(
        tmp_path / "out", source=SourceConfig(fold=fold), backbone="audit:file", folds=2
    )
    run_ranks(2, make_table, made)
    before = (made.table / tables.HEADER).stat().st_mtime_ns
    run_ranks(1, make_table, made)
    assert (made.table / tables.HEADER).stat().st_mtime_ns == before, "it was there already"
    with ShardSet(tmp_path / "out", fold) as data:
        read = tables.read(made.table, data.manifest, data.keys)
        assert (read.log_probability.argmax(axis=1) == data.labels).all()
    with pytest.raises(UserError, match=r"a table of another bias model(.|\n)*--overwrite"):
        run_ranks(1, make_table, replace(made, backbone="audit:stereo"))


def test_a_run_trains_with_the_table_of_a_family(
    copy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run_ranks(1, make_table, bias_config(copy, backbone="audit:lines"))
    train_on(1, config(copy, tiny_model, tmp_path / "run", epochs=20 / 66))
    told = json.loads((tmp_path / "run" / "env.json").read_text())
    sha256 = tables.read_header(copy / "bias").table_sha256
    assert sha256 in json.dumps(told), "the table is a part of the run's identity"


def test_families_that_cannot_serve_are_refused_with_a_way_out(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"--backbone audit:line: got line, expected one of file, st"
    ):
        run_ranks(1, make_table, bias_config(copy, backbone="audit:line"))
    monkeypatch.setattr(families.provenance, "read", lambda folder, manifest: None)
    with pytest.raises(
        UserError, match=r"--backbone audit:file: got no tracks\.parquet(.|\n)*audit:lin"
    ):
        run_ranks(1, make_table, bias_config(copy, backbone="audit:file"))
    run_ranks(1, make_table, bias_config(copy, backbone="audit:lines"))  # the cure
