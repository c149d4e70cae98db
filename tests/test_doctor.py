"""`python -m mgc_dist.doctor`: sentences and exit code, alone and on two ranks."""

from pathlib import Path

import pytest
from conftest import run_ranks
from test_launcher import answer

from mgc_dist import doctor
from mgc_dist.config import DoctorConfig
from mgc_dist.errors import UserError


def test_alone(shards: Path, table: Path, tmp_path: Path) -> None:
    done = answer("-m", "mgc_dist.doctor", "--shards", shards, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(lines)
    assert "1 ranks" not in done.stdout
    assert any("198 segments in 12 shards" in line for line in lines)


def test_damaged_data_is_wrong(copy: Path, tmp_path: Path) -> None:
    shard = next(copy.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = answer("-m", "mgc_dist.doctor", "--shards", copy, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "WRONG  data         " in done.stdout
    assert f"{shard}: got {shard.stat().st_size} bytes" in done.stdout
    assert done.stderr == ""


def test_no_data_yet_is_worth_a_note(tmp_path: Path) -> None:
    done = answer("-m", "mgc_dist.doctor", "--shards", tmp_path, "--run", tmp_path / "run")
    assert done.returncode == 0
    assert f"note   data         no data set in {tmp_path} yet" in done.stdout


def test_a_device_that_is_not_there_is_wrong(tmp_path: Path) -> None:
    words = ("--shards", tmp_path, "--run", tmp_path / "run", "--device", "cuda")
    done = answer("-m", "mgc_dist.doctor", *words)
    assert done.returncode == 2
    assert "WRONG  device" in done.stdout


def ask(configs: list[DoctorConfig]) -> tuple[int, str]:
    import contextlib
    import io
    import os

    said = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(said):
            code = doctor.run(configs[int(os.environ["RANK"])])
    except UserError as error:
        return error.exit_code, f"{said.getvalue()}{error}"
    return code, said.getvalue()


def test_two_ranks_give_one_answer(shards: Path, table: Path, tmp_path: Path) -> None:
    config = DoctorConfig(shards=shards, run=tmp_path / "run", device="cpu")
    (code, said), other = run_ranks(2, ask, [config, config])
    assert other == (0, "")
    assert code == 0
    assert "2 ranks on 1 host: " in said
    assert said.count("data set") == 1
    assert f"all ranks see {tmp_path}" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["shards", "device"])
def test_ranks_with_other_flags_are_refused(flag: str, shards: Path, tmp_path: Path) -> None:
    one = DoctorConfig(shards=shards, run=tmp_path / "run", device="cpu")
    two = DoctorConfig(
        shards=tmp_path if flag == "shards" else shards,
        run=tmp_path / "run",
        device="auto" if flag == "device" else "cpu",
    )
    answers = run_ranks(2, ask, [one, two])
    assert [code for code, _ in answers] == [2, 2]
    assert f"--{flag} on rank 1 (" in answers[0][1]
