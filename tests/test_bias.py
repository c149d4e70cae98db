"""The bias command: right rows, right fingerprints, restarts, new heads without another pass."""

import io
import json
import os
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BASE_FLAVOUR,
    TINY,
    _free_port,
    bias_config,
    make_table,
    run_ranks,
    shard_config,
    write_tracks,
)
from transformers import Wav2Vec2Config, Wav2Vec2Model

from mgc_dist import bias, cli, shard
from mgc_dist.bias_model import states as hidden
from mgc_dist.bias_model import table as tables
from mgc_dist.bias_model.heads import cross_fit
from mgc_dist.config import BiasConfig
from mgc_dist.data import manifest, rowstore
from mgc_dist.data.reader import ShardSet
from mgc_dist.data.tracks import group_key
from mgc_dist.encoders.hub import normalise
from mgc_dist.errors import UserError
from mgc_dist.files import locked, sha256
from mgc_dist.models.backbone import HiddenMean, LogMel

FILES = (
    tables.TABLE,
    tables.HEADER,
    hidden.STORE.array,
    hidden.STORE.header,
    "report.json",
    "report.png",
)
BATCHES = 27  # 66 rows in each of three splits, 8 at a time


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved wav2vec2 of the base flavour: 3 layers of states, 32 wide."""
    folder = tmp_path_factory.mktemp("backbone")
    settings = {k: v for k, v in TINY.items() if k != "model_type"} | BASE_FLAVOUR
    torch.manual_seed(1)
    Wav2Vec2Model(Wav2Vec2Config(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(shards: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bias table on the last layer of that wav2vec2."""
    folder = tmp_path_factory.mktemp("deep") / "bias"
    run_ranks(1, make_table, bias_config(shards, bias_table=folder, backbone=str(backbone)))
    return folder


def counted(config: BiasConfig) -> tuple[int, str]:
    """Run the command in a fork of its own: batches that it computed, and what it printed."""
    batches = []
    for kind in (LogMel, HiddenMean):

        def counting(self, wave, forward=kind.forward):
            batches.append(len(wave))
            return forward(self, wave)

        kind.forward = counting
    with redirect_stdout(io.StringIO()) as said:
        bias.run(config)
    return len(batches), said.getvalue()


def test_the_table_is_the_same_on_two_ranks(shards: Path, table: Path, tmp_path: Path) -> None:
    run_ranks(2, make_table, bias_config(shards, bias_table=tmp_path / "two"))
    for name in FILES:
        assert (tmp_path / "two" / name).read_bytes() == (table / name).read_bytes(), name
    assert {path.name for path in (tmp_path / "two").iterdir()} == set(FILES)


def modes_of(config: BiasConfig) -> list[tuple[str, bool]]:
    """Whether TF32 is allowed in products and convolutions: in each batch, and afterwards."""
    modes, forward = [], LogMel.forward

    def mode() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def noting(self: LogMel, wave: torch.Tensor) -> torch.Tensor:
        modes.append(mode())
        return forward(self, wave)

    LogMel.forward = noting
    torch.set_float32_matmul_precision("high")  # as a variable of some containers does
    bias.run(config)
    return [*modes, mode()]


def test_the_pass_is_in_float32_whatever_else_is_allowed(shards: Path, tmp_path: Path) -> None:
    ((*during, after),) = run_ranks(1, modes_of, bias_config(shards, bias_table=tmp_path / "table"))
    assert during == [("highest", False)] * BATCHES
    assert after == ("high", True)


def test_one_pass_keeps_the_time_mean_of_every_layer(
    shards: Path, backbone: Path, deep: Path
) -> None:
    net = Wav2Vec2Model.from_pretrained(backbone).eval()
    states = np.load(deep / hidden.STORE.array, mmap_mode="r")
    assert (states.shape, states.dtype) == ((198, 3, 32), np.float32)
    with ShardSet(shards) as data, torch.no_grad():
        for row in (0, 65, 66, 140, 197):
            wave = normalise(torch.from_numpy(data.read(row).copy())[None])
            for layer, found in enumerate(net(wave, output_hidden_states=True).hidden_states):
                assert states[row, layer] == pytest.approx(found[0].mean(0).numpy(), abs=1e-5)
    said = json.loads((deep / hidden.STORE.header).read_text())
    assert said["dataset_id"] == manifest.read(shards).dataset_id
    assert said["bias_hash"] == tables.read_header(deep).bias_hash
    assert (said["rows"], said["layers"], said["width"]) == (198, 3, 32)


def test_the_table_is_the_cross_fit_of_these_states(shards: Path, deep: Path) -> None:
    header, found = tables.read_header(deep), manifest.read(shards)
    assert header.layers == (2,)
    fold = [header.fold_of.get(group_key(t.id, t.group), -1) for t in found.tracks]
    with ShardSet(shards) as data:
        tracks, labels = data.tracks, data.labels
    assert (np.array(fold)[tracks] >= 0).sum() == 66
    states = np.load(deep / hidden.STORE.array)[:, 2]
    fit = cross_fit(states, labels, np.array(fold)[tracks], folds=2, genres=3, c=1.0)
    assert np.load(deep / tables.TABLE) == pytest.approx(fit.log_probability, abs=1e-5)
    assert header.temperature == pytest.approx(fit.temperature)


@pytest.mark.parametrize(
    "changes", [{"layer": (0,)}, {"layer": (1, -1)}, {"head_c": 0.1}, {"folds": 3}, {"seed": 4}]
)
def test_new_heads_need_no_other_pass(
    shards: Path, backbone: Path, deep: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(deep, tmp_path / "bias"))
    settings = {"bias_table": folder, "backbone": str(backbone)} | changes
    (name,) = changes
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=rf"a table of another {flag}, expected.*\n.*--overwrite"):
        run_ranks(1, make_table, bias_config(shards, **settings))
    again = bias_config(shards, overwrite=True, **settings)
    assert run_ranks(1, counted, again)[0][0] == 0
    assert (folder / hidden.STORE.array).stat().st_mtime_ns == (
        deep / hidden.STORE.array
    ).stat().st_mtime_ns
    assert getattr(tables.read_header(folder), {"layer": "layers"}.get(name, name)) != getattr(
        tables.read_header(deep), {"layer": "layers"}.get(name, name)
    )
    if name != "seed":  # two artists a genre: their folds may only change places
        assert (folder / tables.TABLE).read_bytes() != (deep / tables.TABLE).read_bytes()
    if name == "layer":
        fit = np.load(deep / hidden.STORE.array)[:, [layer % 3 for layer in changes["layer"]]].mean(
            1
        )
        got = hidden.mean_of_layers(
            np.load(folder / hidden.STORE.array), tables.read_header(folder).layers
        )
        assert got == pytest.approx(fit, abs=1e-6)


def test_layers_that_are_not_there_are_refused(
    shards: Path, backbone: Path, tmp_path: Path
) -> None:
    settings = {"backbone": str(backbone), "bias_table": tmp_path / "t"}
    with pytest.raises(UserError, match=r"--layer 3: got 3, expected -3 to 2"):
        run_ranks(1, make_table, bias_config(shards, layer=(3,), **settings))
    with pytest.raises(UserError, match=r"--layer 2 -1: got a layer twice"):
        run_ranks(1, make_table, bias_config(shards, layer=(2, -1), **settings))
    with pytest.raises(UserError, match="--layer: got 1 1, expected one or more layers"):
        bias_config(shards, layer=(1, 1))
    assert not (tmp_path / "t").exists()


def dying(whole, count: int):
    """A function that kills its process in call number `count`."""
    calls = []

    def call(*args):
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(args)
        return whole(*args)

    return call


def die_at(module, name: str, config: BiasConfig, world: int, count: int = 0) -> None:
    """Run the command on real processes; rank 0 is killed (SIGKILL) in its call number `count`.

    Args:
        module: that has the function.
        name: of the function that is the place of the kill.
        config: of the command.
        world: number of ranks.
        count: calls that still succeed.
    """
    port, pids = _free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in numbers.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            setattr(module, name, dying(getattr(module, name), count))
            try:
                bias.run(config)
            finally:
                os._exit(1)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [-signal.SIGKILL, *[1] * (world - 1)]


def test_several_layers_are_given_as_words_or_in_a_preset(tmp_path: Path) -> None:
    words = ["--layer", "6", "7", "-1", "--head-c", "0.1"]
    made = cli.parse("bias", BiasConfig, words)
    assert (made.layer, made.head_c) == ((6, 7, -1), 0.1)
    (tmp_path / "c.yaml").write_text(cli.dump("bias", made))
    assert cli.parse("bias", BiasConfig, ["--config", str(tmp_path / "c.yaml")]) == made
    assert cli.parse("bias", BiasConfig, ["--layer", "-1"]).layer == (-1,)


def killed_after(batches: int, config: BiasConfig, world: int = 1) -> None:
    """A pass that is killed when the next batch is in the file, and not in the ledger."""
    die_at(rowstore, "note", config, world, batches)


@pytest.mark.parametrize(("world", "batches"), [(1, 0), (1, 12), (2, 20)])
def test_a_killed_pass_goes_on_and_gives_the_same_bytes(
    shards: Path, table: Path, tmp_path: Path, world: int, batches: int
) -> None:
    folder = tmp_path / "bias"
    config = bias_config(shards, bias_table=folder)
    killed_after(batches, config, world)
    assert not (folder / hidden.STORE.header).exists()
    assert not (folder / tables.HEADER).exists()
    assert run_ranks(1, counted, config)[0][0] == BATCHES - batches
    for name in FILES:
        assert (folder / name).read_bytes() == (table / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_what_a_crash_has_lost_is_computed_again(shards: Path, table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bias"
    config = bias_config(shards, bias_table=folder)
    killed_after(20, config)
    part = folder / hidden.STORE.partial
    data = bytearray(part.read_bytes())
    data[128 + 4 * 40 * 30] ^= 1  # row 30: batch 3 is not as the ledger says
    part.write_bytes(data)
    assert run_ranks(2, counted, config)[0][0] == 5  # 1 of train, 7 of test over two ranks
    assert (folder / hidden.STORE.array).read_bytes() == (table / hidden.STORE.array).read_bytes()
    assert (folder / tables.TABLE).read_bytes() == (table / tables.TABLE).read_bytes()


def test_killed_between_the_last_renames(shards: Path, table: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bias"
    config = bias_config(shards, bias_table=folder)

    die_at(rowstore, "replace_text", config, world=1)
    assert (folder / hidden.STORE.array).exists()
    assert run_ranks(1, counted, config)[0][0] == 0
    assert (folder / tables.TABLE).read_bytes() == (table / tables.TABLE).read_bytes()


def test_another_batch_size_begins_the_pass_again(shards: Path, tmp_path: Path) -> None:
    config = bias_config(shards, bias_table=tmp_path / "bias")
    killed_after(12, config)
    other = bias_config(shards, bias_table=tmp_path / "bias", batch=16)
    assert run_ranks(1, counted, other)[0][0] == 15


def test_other_or_damaged_states_are_refused(shards: Path, table: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(table, tmp_path / "bias"))
    (folder / tables.HEADER).unlink()
    config = bias_config(shards, bias_table=folder)
    again = bias_config(shards, bias_table=folder, overwrite=True)
    states = bytearray((folder / hidden.STORE.array).read_bytes())
    states[-5] ^= 1
    (folder / hidden.STORE.array).write_bytes(states)
    with pytest.raises(UserError, match=r"hidden states in .*another xxh3_128.*\n.*--overwrite"):
        run_ranks(2, make_table, config)
    assert run_ranks(1, counted, again)[0][0] == BATCHES
    said = json.loads((folder / hidden.STORE.header).read_text())
    for change, message in (
        ({"dataset_id": "f" * 64}, "states of another dataset_id"),
        ({"bias_hash": "f" * 64}, "states of another bias_hash"),
        ({"format_version": 9}, "states of another format_version"),
    ):
        (folder / tables.HEADER).unlink(missing_ok=True)
        (folder / hidden.STORE.header).write_text(json.dumps(said | change))
        with pytest.raises(UserError, match=message):
            run_ranks(1, make_table, config)
    assert run_ranks(1, counted, again)[0][0] == BATCHES
    for name in (hidden.STORE.array, tables.TABLE):
        assert (folder / name).read_bytes() == (table / name).read_bytes()


def test_states_that_are_not_finite_are_refused(
    shards: Path, backbone: Path, tmp_path: Path
) -> None:
    def body() -> None:
        forward = HiddenMean.forward

        def broken(self, wave):
            out = forward(self, wave)
            out[3, 1] = float("nan")
            return out

        HiddenMean.forward = broken
        bias.run(bias_config(shards, bias_table=tmp_path / "t", backbone=str(backbone)))

    with pytest.raises(UserError, match="--backbone: got hidden states of row 3 that are not"):
        run_ranks(2, body)


def test_two_commands_at_one_table_are_kept_apart(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with (
        locked(tmp_path / "t" / "lock", wait_s=0, purpose="test"),
        pytest.raises(UserError, match="another process at it"),
    ):
        run_ranks(2, make_table, bias_config(shards, bias_table=tmp_path / "t"))


def test_folds_follow_artists_and_are_recorded(shards: Path, table: Path) -> None:
    header = tables.read_header(table)
    artists = {
        f"group {track.group}" for track in manifest.read(shards).tracks if track.split == "train"
    }
    assert set(header.fold_of) == artists
    assert header.backbone == "logmel"
    assert header.genres == ("blues", "classical", "country")


def relabel(shards: Path, first: int) -> None:
    index, path = np.load(shards / "index.npy"), shards / manifest.NAME
    index["label"][first:] = (index["label"][first:] + 1) % 3
    np.save(shards / "index.npy", index)
    content = json.loads(path.read_text())
    for track in content["tracks"]:
        if track["split"] != "train":
            label = (content["genres"].index(track["genre"]) + 1) % 3
            track["genre"] = content["genres"][label]
    changes = {"index_sha256": sha256(shards / "index.npy")}
    path.write_text(manifest.sealed(content | changes))


def test_labels_of_validation_and_test_change_no_byte(tmp_path: Path) -> None:
    made = []
    for name, swap in (("one", False), ("two", True)):
        write_tracks(tmp_path / name, duration_s=1.0)
        shard.run(shard_config(tmp_path / name, tmp_path / name / "shards"))
        if swap:  # as if those splits had been labelled wrongly
            relabel(tmp_path / name / "shards", first=18)
        run_ranks(1, make_table, bias_config(tmp_path / name / "shards"))
        made.append((tmp_path / name / "shards" / "bias" / tables.TABLE).read_bytes())
    assert made[0] == made[1]


def test_made_again_is_a_no_op_and_other_settings_are_refused(shards: Path, table: Path) -> None:
    before = (table / tables.TABLE).stat().st_mtime_ns
    batches, said = run_ranks(2, counted, bias_config(shards))[0]
    assert batches == 0
    assert "already holds exactly this table" in said
    assert (table / tables.TABLE).stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"a table of another --seed.*\n.*--overwrite"):
        run_ranks(2, make_table, bias_config(shards, seed=4))


def test_what_rank_0_refuses_stops_all_ranks(shards: Path, tmp_path: Path) -> None:
    config = bias_config(shards, bias_table=tmp_path / "t", folds=20)
    with pytest.raises(UserError, match="--folds 20: got"):
        run_ranks(2, make_table, config)
    assert not (tmp_path / "t").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: got a file, expected a folder"):
        run_ranks(2, make_table, bias_config(shards, bias_table=tmp_path / "file"))


def test_a_table_from_elsewhere_only_gets_a_report(
    shards: Path, table: Path, tmp_path: Path
) -> None:
    found = manifest.read(shards)
    with ShardSet(shards) as data:
        keys = data.keys()
    rows = [
        ",".join([key, *map(repr, values.tolist())])
        for key, values in zip(keys, np.load(table / tables.TABLE).astype(float), strict=True)
    ]
    file = tmp_path / "theirs.csv"
    file.write_text("\n".join([",".join(["key", *found.genres]), *rows]) + "\n")
    batches, said = run_ranks(2, counted, bias_config(shards, bias_table=file))[0]
    assert batches == 0
    assert "fold status unknown" in said
    assert "Warning: the fold status of theirs.csv is unknown" in said
    assert "theirs.csv" in said.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {
        "theirs.csv",
        "theirs.csv.report.json",
        "theirs.csv.report.png",
    }
    theirs = json.loads((tmp_path / "theirs.csv.report.json").read_text())
    ours = json.loads((table / "report.json").read_text())
    assert theirs["splits"]["test"] == pytest.approx(ours["splits"]["test"], abs=1e-5)
    assert (theirs["fold_status"], theirs["temperature"]) == ("unknown", None)
