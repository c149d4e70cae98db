"""Shards from elsewhere: checked, once, by nothing that the user did not write."""

import functools
import http.server
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_launcher import answer
from test_pack import digests

from mgc_dist.bias_model import table as tables
from mgc_dist.config import SourceConfig
from mgc_dist.data import fetch, manifest
from mgc_dist.data.reader import ShardSet
from mgc_dist.errors import UserError


class Served(http.server.SimpleHTTPRequestHandler):
    """Counts requests; sends half of what is named in `cut`."""

    asked: list[str]
    cut: set[str]

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.asked.append(name)
        if name in self.cut:
            content = (Path(self.directory) / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) // 2))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, type[Served]]]:
    """The shards on loopback."""

    class Here(Served):
        pass

    Here.asked, Here.cut = [], set()
    handler = functools.partial(Here, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", Here
        running.shutdown()


@pytest.fixture(autouse=True)
def _straight_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def bring(folder: Path, source: str, timeout_s: float = 60) -> None:
    fetch.fetch(folder, source, timeout_s=timeout_s)


def without_card(folder: Path) -> dict[str, str]:
    found = digests(folder)
    found.pop("README.md", None)
    found.pop(".staging.lock", None)
    found.pop(".checked.json", None)
    return found


@pytest.fixture
def plain(shards: Path, tmp_path: Path) -> Path:
    """The shards without the bias table that other tests put beside them."""
    out = tmp_path / "plain"
    out.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            shutil.copy(path, out)
    return out


def test_a_folder_https_and_a_pipe_give_the_same_files(
    plain: Path, server: tuple[str, type[Served]], tmp_path: Path
) -> None:
    for number, source in enumerate((str(plain), server[0], f"pipe:cat {plain}/{{}}")):
        folder = tmp_path / f"node{number}"
        bring(folder, source)
        assert without_card(folder) == without_card(plain)
        with ShardSet(folder) as data:
            data.read(0)


def test_the_path_of_a_server_is_kept(plain: Path, tmp_path: Path) -> None:
    site = tmp_path / "site" / "a b"
    shutil.copytree(plain, site)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        bring(tmp_path / "node", f"http://127.0.0.1:{running.server_port}/a%20b/")
        running.shutdown()
    assert without_card(tmp_path / "node") == without_card(plain)


def test_what_is_there_is_not_fetched_again(
    server: tuple[str, type[Served]], shards: Path, tmp_path: Path
) -> None:
    url, served = server
    bring(tmp_path / "node", url)
    served.asked.clear()
    bring(tmp_path / "node", url)
    assert served.asked == ["manifest.json"]
    (tmp_path / "node" / "manifest.json").unlink()  # as if killed before the end
    (tmp_path / "node" / "train-000001.tar").write_bytes(b"half")
    served.asked.clear()
    bring(tmp_path / "node", url)
    assert served.asked == ["manifest.json", "train-000001.tar"]


def test_a_cut_transfer_is_tried_again_and_then_refused(
    server: tuple[str, type[Served]], tmp_path: Path
) -> None:
    url, served = server
    served.cut.add("train-000002.tar")
    with pytest.raises(UserError, match=r"train-000002\.tar from http.*bytes with sha256 .*twice"):
        bring(tmp_path / "node", url)
    with pytest.raises(UserError, match=r"no manifest\.json"):
        ShardSet(tmp_path / "node")
    assert served.asked.count("train-000002.tar") == 2
    served.cut.clear()
    bring(tmp_path / "node", url)
    ShardSet(tmp_path / "node").close()


def rank(folder: Path, source: str) -> None:
    bring(folder, source)
    ShardSet(folder).close()


def test_many_ranks_fetch_once(server: tuple[str, type[Served]], tmp_path: Path) -> None:
    url, served = server
    ranks = [
        multiprocessing.get_context("fork").Process(target=rank, args=(tmp_path / "node", url))
        for _ in range(6)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert served.asked.count("manifest.json") == 6
    assert all(served.asked.count(f"train-{n:06d}.tar") == 1 for n in range(4))


def test_a_killed_copy_blocks_nobody_and_waiting_has_a_limit(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "node"
    slow = f"pipe:sleep 30; cat {plain}/{{}}"
    first = multiprocessing.get_context("fork").Process(target=rank, args=(folder, slow))
    first.start()
    while not (folder / ".staging.lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    with pytest.raises(UserError, match=r"--stage-timeout-s.*more than 0.3 s"):
        bring(folder, str(plain), timeout_s=0.3)
    first.kill()
    first.join()
    bring(folder, str(plain), timeout_s=20)
    assert without_card(folder) == without_card(plain)


def test_a_stalled_transfer_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "STALLED_S", 0.3)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        started = time.monotonic()
        with pytest.raises(UserError, match=r"manifest\.json: got no byte for 0.3 s"):
            bring(tmp_path / "node", f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/gtzan", r"got s3:.*\n.*pipe:aws s3 cp s3://bucket/gtzan/\{\} -"),
        ("gs://bucket/gtzan", "got gs:"),
        ("pipe:cat manifest.json", r"a command without \{\}"),
        ("/nowhere/at/all", r"manifest\.json: got .*No such file"),
        ("http://127.0.0.1:9/x", r"manifest\.json: got exit code 7 of curl"),
        ("pipe:false {}", r"manifest\.json: got exit code 1 of pipe:false"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        bring(tmp_path / "node", source)


def test_another_data_set_in_the_folder_is_left_alone(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "node"))
    found = manifest.read(folder)
    manifest.write(folder, replace(found, dataset_id="0" * 64))
    before = digests(folder)
    with pytest.raises(UserError, match=r"got another data set \(000000000000\)"):
        bring(folder, str(plain))
    assert digests(folder) | {".staging.lock": ""} == before | {".staging.lock": ""}


@pytest.mark.parametrize("name", ["x; touch PWNED;.tar", "$(touch PWNED).tar", "../x.tar", "-.t"])
def test_no_name_in_a_manifest_reaches_a_shell_or_leaves_the_folder(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.loads((plain / "manifest.json").read_text())
    content["shards"][0]["name"] = name
    (plain / "manifest.json").write_text(manifest.sealed(content))
    with pytest.raises(UserError, match="shard name"):
        bring(tmp_path / "node", f"pipe:cat {plain}/{{}}")
    assert not (tmp_path / "PWNED").exists()


def test_a_node_without_room_says_how_much_is_needed(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match=r"got 0.00 GB of free space, expected 0.00 GB for what"):
        bring(tmp_path / "node", str(plain))


def test_a_command_whose_children_stall_is_given_up(
    monkeypatch: pytest.MonkeyPatch, plain: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetch, "STALLED_S", 0.3)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"manifest\.json: got no byte for 0.3 s"):
        bring(tmp_path / "node", f"pipe:sleep 20; cat {plain}/{{}}")
    assert time.monotonic() - started < 10


def test_files_that_are_lost_on_the_node_are_fetched_again(plain: Path, tmp_path: Path) -> None:
    bring(tmp_path / "node", str(plain))
    (tmp_path / "node" / "train-000001.tar").unlink()
    (tmp_path / "node" / "test-000001.tar").write_bytes(b"cut")
    bring(tmp_path / "node", str(plain))
    assert without_card(tmp_path / "node") == without_card(plain)


def test_a_full_disk_is_the_nodes_fault(plain: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        fetch._fetch(str(plain), "manifest.json", Path("/dev/full"))
    assert caught.value.filename == "/dev/full"


def test_a_file_url_may_hold_escapes(plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "a b"))
    bring(tmp_path / "node", "file://" + str(source).replace(" ", "%20"))
    assert without_card(tmp_path / "node") == without_card(plain)


def test_a_folder_of_the_node_takes_several_data_sets(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH_OF_JOB", str(tmp_path / "node"))
    source = SourceConfig(stage_dir="$SCRATCH_OF_JOB/mgc", stage_timeout_s=10)
    folder = fetch.at_hand(plain, source)
    own = tmp_path / "node" / "mgc" / f"mgc-{os.geteuid()}"
    assert folder == own / manifest.read(plain).dataset_id[:16]
    assert own.stat().st_mode & 0o777 == 0o700
    assert without_card(folder) == without_card(plain)
    assert fetch.at_hand(plain, source) == folder
    assert fetch.at_hand(plain, SourceConfig()) == plain


def test_nothing_is_written_through_links_that_another_user_has_put(
    plain: Path, tmp_path: Path
) -> None:
    """/tmp/x is for all: what bears our name there may be anybody's."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "manifest.json").write_text("mine")
    node = tmp_path / "node"
    node.mkdir()
    ours, source = node / f"mgc-{os.geteuid()}", SourceConfig(stage_dir=str(node))
    ours.symlink_to(victim)
    with pytest.raises(UserError, match=rf"got {ours}: lrwx.*expected a folder of user \d+ alone"):
        fetch.at_hand(plain, source)
    ours.unlink()
    ours.mkdir()
    ours.chmod(0o777)
    with pytest.raises(UserError, match=rf"got {ours}: drwxrwxrwx of user (?s:.*)remove that"):
        fetch.at_hand(plain, source)
    ours.rmdir()
    folder = fetch.at_hand(plain, source)
    assert without_card(folder) == without_card(plain)
    for name in (".incoming", ".staging.lock"):  # in a --shards folder that is open to others
        shared = tmp_path / f"shared{name}"
        shared.mkdir()
        (shared / name).symlink_to(victim if name == ".incoming" else victim / "manifest.json")
        with pytest.raises(OSError, match=name):
            bring(shared, str(plain))
    assert digests(victim) == {"manifest.json": digests(victim)["manifest.json"]}
    assert (victim / "manifest.json").read_text() == "mine"


def test_a_folder_of_another_user_is_not_ours(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mgc-4711").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(UserError, match=r"drwx------ of user \d+, expected .* of user 4711"):
        fetch.at_hand(plain, SourceConfig(stage_dir=str(tmp_path)))

    def not_mine(self: Path, *args: object, **mode: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", not_mine)
    with pytest.raises(UserError, match=r"mgc-4711: Permission denied(?s:.*)--stage-dir /tmp"):
        fetch.at_hand(plain, SourceConfig(stage_dir=str(tmp_path)))


def test_two_users_may_name_one_folder_of_tmp(plain: Path, tmp_path: Path) -> None:
    for mode, expected in ((0o1777, 0o1777), (0o750, 0o777 & ~_umask(tmp_path))):
        above = tmp_path / f"{mode:o}"
        above.mkdir()
        above.chmod(mode)
        fetch.at_hand(plain, SourceConfig(stage_dir=str(above / "x")))
        assert (above / "x").stat().st_mode & 0o7777 == expected


def _umask(tmp_path: Path) -> int:
    (tmp_path / "plain-folder").mkdir()
    return ~(tmp_path / "plain-folder").stat().st_mode & 0o777


def test_what_has_changed_since_it_was_compared_is_compared_again(
    plain: Path, tmp_path: Path
) -> None:
    """Also where its size and the time of its content are as they were."""
    bring(tmp_path / "node", str(plain))
    shard = tmp_path / "node" / "train-000001.tar"
    facts, content = shard.stat(), bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    bring(tmp_path / "node", str(plain))
    assert without_card(tmp_path / "node") == without_card(plain)


def test_a_variable_that_this_node_does_not_have_is_named(plain: Path, tmp_path: Path) -> None:
    message = r"--stage-dir \$NOT_SET_HERE/x: got \$NOT_SET_HERE/x on "
    with pytest.raises(UserError, match=message) as caught:
        fetch.at_hand(plain, SourceConfig(stage_dir="$NOT_SET_HERE/x"))
    assert caught.value.this_rank_only


def test_every_command_reads_the_nodes_copy(shards: Path, table: Path, tmp_path: Path) -> None:
    """Bias pass, training and evaluation; what they write names the shared folder."""
    data, run, node = tmp_path / "data", tmp_path / "run", tmp_path / "node"
    shutil.copytree(shards, data, ignore=shutil.ignore_patterns("bias"))
    staged = ["--stage-dir", node]
    small = ["--model", "logmel-cnn", "--freeze", "none", "--global-batch", "8"]
    for words in (
        ["bias", "--shards", data, "--backbone", "logmel", "--folds", "2", *staged],
        ["train", "--shards", data, "--run", run, "--epochs", "0.4", *small, *staged],
        ["evaluate", run, *staged],
    ):
        done = answer(f"launch/{words[0]}.py", *words[1:], "--device", "cpu")
        assert done.returncode == 0, done.stderr
    copied = node / f"mgc-{os.geteuid()}" / manifest.read(data).dataset_id[:16]
    assert manifest.read(copied) == manifest.read(data)
    settings = yaml.safe_load((run / "config.yaml").read_text())["train"]["data"]
    assert settings["shards"] == str(data)
    assert (data / "bias" / tables.HEADER).is_file()
    assert (run / "evaluation" / "test.json").is_file()
