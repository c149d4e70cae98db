"""Bias tables: ours checked against the data set, foreign ones put into row order, or refused."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from mgc_dist.bias_model import table as tables
from mgc_dist.data import manifest, tracks
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError

GENRES = ("blues", "classical", "country")


@pytest.fixture
def copy(table: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(table, tmp_path / "bias"))


@pytest.fixture(scope="module")
def keys(shards: Path) -> list[str]:
    with ShardSet(shards) as data:
        return data.keys()


def edit(folder: Path, **changes: object) -> None:
    path = folder / tables.HEADER
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_lookup_gives_a_rows_log_probabilities_and_uniform_padding(
    shards: Path, table: Path
) -> None:
    found = tables.read(table, manifest.read(shards))
    raw = np.load(table / tables.TABLE)
    assert raw.shape == (198, 3)
    looked = found.lookup(torch.tensor([5, -1, 170]))
    assert looked[0].tolist() == raw[5].tolist()
    assert looked[2].tolist() == raw[170].tolist()
    assert looked[1].exp().tolist() == pytest.approx([1 / 3] * 3)
    assert np.exp(raw).sum(1) == pytest.approx(np.ones(198), abs=1e-5)
    assert (found.name, found.fold_status) == ("logmel", "out-of-fold")
    assert found.sha256 == hashlib.sha256((table / tables.TABLE).read_bytes()).hexdigest()


def test_tables_that_do_not_belong_are_refused(shards: Path, copy: Path) -> None:
    found = manifest.read(shards)
    header = json.loads((copy / tables.HEADER).read_text())
    folds = header["fold_of"]
    someone = next(iter(folds))
    without = {k: v for k, v in folds.items() if k != someone}
    other = next(t for t in found.tracks if t.split == "test")
    judged = tracks.group_key(other.id, other.group)
    for changes, message in (
        ({"dataset_id": "f" * 64}, "a table of data set ffffffffffff"),
        ({"genres": ["x", "y", "z"]}, "genres"),
        ({"fold_of": without}, "fold None for"),
        ({"fold_of": folds | {someone: 7}}, "fold 7 for"),
        ({"fold_of": folds | {judged: 0}}, f"a fold for {other.id} of the test split"),
        ({"fold_of": folds | {"group nobody": 0}}, "a fold for group nobody"),
        ({"fold_of": dict.fromkeys(folds, 0)}, "1 of 2 folds in use"),
        ({"fold_of": dict.fromkeys(folds, 0), "folds": 1}, "1 of 1 folds in use"),
        ({"fold_of": folds | {someone: "1"}}, "no whole numbers"),
        ({"fold_of": list(folds)}, "has no attribute"),
        ({"table_sha256": "0"}, "another sha256"),
        ({"format_version": 9}, "version 9"),
        ({"crop": 3}, "keys"),
    ):
        edit(copy, **changes)
        with pytest.raises(UserError, match=message):
            tables.read(copy, found)
        (copy / tables.HEADER).write_text(json.dumps(header))
    tables.read(copy, found)


def test_one_changed_byte_of_the_table_is_refused(shards: Path, copy: Path) -> None:
    data = bytearray((copy / tables.TABLE).read_bytes())
    data[-7] ^= 1
    (copy / tables.TABLE).write_bytes(data)
    with pytest.raises(UserError, match="another sha256 than its header says"):
        tables.read(copy, manifest.read(shards))


def test_rows_without_logits_and_pickles_are_refused(shards: Path, copy: Path) -> None:
    found, table = manifest.read(shards), np.load(copy / tables.TABLE)

    def put(array: np.ndarray) -> None:
        np.save(copy / tables.TABLE, array, allow_pickle=True)
        digest = hashlib.sha256((copy / tables.TABLE).read_bytes()).hexdigest()
        edit(copy, table_sha256=digest)

    table[17, 1] = np.nan
    put(table)
    with pytest.raises(UserError, match="no logits for row 17"):
        tables.read(copy, found)
    put(table[:-1])
    with pytest.raises(UserError, match=r"float32 \(197, 3\), expected float32 \(198, 3\)"):
        tables.read(copy, found)
    put(np.array([{"evil": 1}]))
    with pytest.raises(UserError, match="Python objects in dtype"):
        tables.read(copy, found)


def test_no_table_names_the_command(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such table.*\n.*deepspeed launch/bias\.py"):
        tables.read(tmp_path / "none", manifest.read(shards))
    (tmp_path / "table.txt").write_text("key")
    with pytest.raises(UserError, match=r"ends in \.txt, expected a folder .*\.csv, \.tsv"):
        tables.read(tmp_path / "table.txt", manifest.read(shards))


def drawn(keys: list[str], seed: int = 3) -> dict[str, np.ndarray]:
    """Logits of each key, over the genres in the manifest's order."""
    rng = np.random.default_rng(seed)
    return {key: 3 * rng.normal(size=len(GENRES)) for key in keys}


def save_csv(path: Path, values: dict[str, np.ndarray], order: tuple[int, ...] = (2, 0, 1)) -> Path:
    """Columns and lines in an order of their own, the key in the middle."""
    names = [GENRES[k] for k in order]
    lines = [",".join([names[0], "key", *names[1:]])]
    for key in sorted(values, key=lambda k: hashlib.md5(k.encode()).digest()):
        first, *rest = (repr(float(values[key][k])) for k in order)
        lines.append(",".join([first, key, *rest]))
    path.write_text("\n".join(lines) + "\n")
    return path


def save_npy(path: Path, values: dict[str, np.ndarray], kind: str = "U40") -> Path:
    dtype = [("country", "<f8"), ("key", kind), ("blues", "<f8"), ("classical", "<f4")]
    array = np.zeros(len(values), np.dtype(dtype))
    for n, (key, row) in enumerate(reversed(values.items())):
        array[n] = (row[2], key, row[0], row[1])
    np.save(path, array)
    return path


def read(path: Path, shards: Path, keys: list[str]) -> tables.BiasTable:
    return tables.read(path, manifest.read(shards), lambda: keys)


@pytest.mark.parametrize("kind", ["csv", "npy", "bytes"])
def test_a_foreign_table_is_put_into_row_order_by_key(
    shards: Path, keys: list[str], tmp_path: Path, kind: str
) -> None:
    values = drawn(keys)
    if kind == "csv":
        found = read(save_csv(tmp_path / "t.csv", values), shards, keys)
    else:
        field = "S40" if kind == "bytes" else "U40"
        found = read(save_npy(tmp_path / "t.npy", values, field), shards, keys)
    expected = log_softmax(np.array([values[key] for key in keys]), axis=1)
    assert found.log_probability == pytest.approx(expected, abs=1e-6)
    assert found.log_probability.dtype == np.float32
    assert (found.name, found.fold_status) == (
        f"t.{kind[:3]}" if kind == "csv" else "t.npy",
        "unknown",
    )
    looked = found.lookup(torch.tensor([150]))[0]
    assert looked.numpy() == pytest.approx(expected[150], abs=1e-6)


def test_keys_are_the_names_in_the_shards(shards: Path, keys: list[str]) -> None:
    import webdataset

    found = manifest.read(shards)
    names = [str(shards / entry.name) for entry in found.shards]
    records = webdataset.WebDataset(names, shardshuffle=False)
    assert [record["__key__"] for record in records] == keys


def test_log_probabilities_stay_and_the_identity_is_of_the_values(
    shards: Path, keys: list[str], tmp_path: Path
) -> None:
    values = drawn(keys)
    normed = {key: log_softmax(row) for key, row in values.items()}
    one = read(save_csv(tmp_path / "a.csv", normed), shards, keys)
    assert one.log_probability == pytest.approx(np.array([normed[k] for k in keys]), abs=1e-6)
    same = read(save_csv(tmp_path / "b.csv", normed, order=(0, 1, 2)), shards, keys)
    assert same.sha256 == one.sha256
    normed[keys[9]] = log_softmax(values[keys[9]] + np.array([1e-3, 0, 0]))
    assert read(save_csv(tmp_path / "c.csv", normed), shards, keys).sha256 != one.sha256


def test_foreign_tables_that_do_not_fit_are_refused(
    shards: Path, keys: list[str], tmp_path: Path
) -> None:
    values, path = drawn(keys), tmp_path / "t.csv"
    some = ", ".join(sorted(keys)[:3])

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            read(path, shards, keys)

    refused("No such file")
    save_csv(path, {key: row for key, row in values.items() if key != keys[7]})
    refused(rf"t\.csv: got 1 keys missing: {keys[7]}, expected each of the 198 segments")
    save_csv(path, values | {"blues_00099_01": values[keys[0]]})
    refused(r"got 1 keys unknown: blues_00099_01")
    save_csv(path, {f"x{key}": row for key, row in values.items()})
    refused(r"got 198 keys missing: .* \.\.\. \(198\)")
    save_csv(path, values)
    path.write_text(path.read_text() + "".join(path.read_text().splitlines(True)[3:8]))
    refused(r"got 5 keys twice: .* \.\.\. \(5\)")
    save_csv(path, values)
    path.write_text(path.read_text().replace("classical", "clasical"))
    refused("no column classical, expected the columns key, blues, classical, country")
    save_csv(path, values)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{lines[0]},jazz", *(f"{line},0.0" for line in lines[1:])]))
    refused("columns besides: jazz")
    path.write_text("key,blues,classical,country\n")
    refused("no column key")
    for value in ("nan", "inf", "-inf"):
        save_csv(path, values | {keys[4]: np.array([0.0, float(value), 1.0])})
        refused(rf"values that are not finite for {keys[4]}, expected a finite")
    save_csv(path, values | {keys[4]: np.array([0.0, 1e308, -1e308])})
    refused(f"values that are not finite for {keys[4]}")
    path.write_text(save_csv(path, values).read_text().replace(",", ",x", 2))
    refused("no column|line 2")
    assert some


def test_foreign_arrays_that_do_not_fit_are_refused(
    shards: Path, keys: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "t.npy"
    with pytest.raises(UserError, match="No such file"):
        read(path, shards, keys)
    for array, message in (
        (np.zeros((198, 3)), "no column key, blues, classical"),
        (np.array([{"key": "x"}]), "Python objects|no column key"),
        (np.zeros(198, [("key", "i8"), *((g, "f8") for g in GENRES)]), "structured array"),
        (np.zeros(198, [("key", "U9"), *((g, "U9") for g in GENRES)]), "structured array"),
        (np.zeros(198, [("key", "U9"), *((g, "f8", 2) for g in GENRES)]), "structured array"),
        (np.zeros((198, 1), [("key", "U9"), *((g, "f8") for g in GENRES)]), "structured array"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            read(path, shards, keys)
    for junk in (b"", b"key,blues\n", b"PK\x03\x04zip"):
        path.write_bytes(junk)
        with pytest.raises(UserError, match="structured array"):
            read(path, shards, keys)


def test_twenty_thousand_rows_are_read_in_a_moment(shards: Path, tmp_path: Path) -> None:
    keys = [f"blues_{n:05d}_{s:02d}" for n in range(1000) for s in range(20)]
    path = save_csv(tmp_path / "t.csv", drawn(keys))
    started = time.process_time()
    assert len(read(path, shards, keys).log_probability) == 20_000
    assert time.process_time() - started < 5
