"""A manifest that is cut, edited or foreign is refused."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgc_dist.data import manifest
from mgc_dist.errors import UserError


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A folder that holds only a copy of the manifest."""
    (tmp_path / manifest.NAME).write_bytes((shards / manifest.NAME).read_bytes())
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / manifest.NAME
    path.write_text(manifest.sealed(json.loads(path.read_text()) | changes))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 0.9999))
def test_cut_anywhere_is_refused(copy: Path, shards: Path, where: float) -> None:
    whole = (shards / manifest.NAME).read_bytes()
    (copy / manifest.NAME).write_bytes(whole[: int(where * len(whole))])
    with pytest.raises(UserError, match="manifest"):
        manifest.read(copy)


def test_it_reads_back_what_was_written(shards: Path, tmp_path: Path) -> None:
    found = manifest.read(shards)
    manifest.write(tmp_path, found)
    assert manifest.read(tmp_path) == found
    assert found.rows == 198
    assert found.segment_samples == 8000
    assert found.splits == {"train": (0, 66), "validation": (66, 132), "test": (132, 198)}


def test_version_and_contents_are_checked(copy: Path, shards: Path) -> None:
    content = json.loads((copy / manifest.NAME).read_text())
    edit(copy, format_version=99)
    with pytest.raises(UserError, match=r"version 99, expected 'mgc_dist shards' version 2"):
        manifest.read(copy)
    for changes, message in (
        ({"splits": content["splits"] | {"test": [0, 5]}}, "splits"),
        ({"tracks": content["tracks"][1:]}, "do not add up"),
        ({"genres": "abc"}, "no list of names"),
        ({"extra": 1}, "keys"),
    ):
        (copy / manifest.NAME).write_text(manifest.sealed(content | changes))
        with pytest.raises(UserError, match=message):
            manifest.read(copy)
    evil = [content["shards"][0] | {"name": "../../x.tar"}, *content["shards"][1:]]
    (copy / manifest.NAME).write_text(manifest.sealed(content | {"shards": evil}))
    with pytest.raises(UserError, match="shard name"):
        manifest.read(copy)


def test_leaks_are_refused_when_loading(copy: Path) -> None:
    content = json.loads((copy / manifest.NAME).read_text())
    for track in content["tracks"]:
        track["group"] = "one artist of all"
    (copy / manifest.NAME).write_text(manifest.sealed(content))
    with pytest.raises(UserError, match="group one artist of all is in two splits"):
        manifest.read(copy)


def test_no_data_set_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*\n.*python -m mgc_dist\.shard"):
        manifest.read(tmp_path / "none")


def test_dataset_id_depends_on_content_only(shards: Path) -> None:
    rows = [("a_00", "train", None, 0, "ff"), ("b_00", "test", "Ann", 1, "00")]
    settings_ = {"segment_samples": 1, "hop_samples": 1, "sample_rate": 1, "split": "x"}
    base = manifest.dataset_id(settings_, ["g"], rows)
    assert base == manifest.dataset_id(settings_ | {"split": "y"}, ["g"], iter(rows))
    assert base != manifest.dataset_id(settings_, ["h"], rows)
    assert base != manifest.dataset_id(settings_, ["g"], rows[::-1])
    assert base != manifest.dataset_id(settings_ | {"hop_samples": 2}, ["g"], rows)


def test_dataset_id_is_the_hash_of_one_text_however_many_rows() -> None:
    settings_ = {"segment_samples": 1, "hop_samples": 2, "sample_rate": 3}
    odd = ['"rows":[', "rows", "é\u2028"]
    for count in (0, 1, 4096, 4097, 9000):
        rows = [(f"a_{n:02d}", "train", None if n % 2 else odd[0], n, "ff") for n in range(count)]
        content = settings_ | {"format_version": 2, "genres": odd, "rows": rows}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        expected = hashlib.sha256(text.encode()).hexdigest()
        assert manifest.dataset_id(settings_, odd, iter(rows)) == expected


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("tracks", "segments", "11"),
        ("tracks", "segments", -1),
        ("tracks", "segments", True),
        ("tracks", "group", 7),
        ("tracks", "split", None),
        ("shards", "rows", 20.0),
        ("shards", "bytes", "many"),
        ("shards", "name", ["x.tar"]),
        ("settings", "segment_samples", "8000"),
        ("settings", "hop_samples", 0),
    ],
)
def test_values_of_another_type_are_refused(
    copy: Path, part: str, name: str, value: object
) -> None:
    content = json.loads((copy / manifest.NAME).read_text())
    entry = content[part] if part == "settings" else content[part][0]
    entry[name] = value
    (copy / manifest.NAME).write_text(manifest.sealed(content))
    with pytest.raises(UserError, match=rf"manifest .*{name} "):
        manifest.read(copy)


def test_other_genres_than_the_tracks_have_are_refused(copy: Path) -> None:
    edit(copy, genres=["blues", "classical", "polka"])
    with pytest.raises(UserError, match="genres that are not those of its tracks"):
        manifest.read(copy)
