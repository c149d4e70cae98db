"""Flags, presets and configuration files: one parser, one precedence, near misses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgc_dist import cli, config
from mgc_dist.config import BiasConfig, OptimConfig, TrainConfig
from mgc_dist.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def parse(*words: str) -> TrainConfig:
    return cli.parse("train", TrainConfig, words)


def test_flags_carry_no_section_and_the_launchers_flag_is_dropped() -> None:
    made = parse("--lr", "1e-4", "--loss=ce", "--local_rank=3", "--resume", "auto")
    assert (made.optim.lr, made.objective.loss, made.output.resume) == (1e-4, "ce", "auto")


def test_precedence_is_default_preset_file_flag(tmp_path: Path) -> None:
    preset, file = tmp_path / "a.yaml", tmp_path / "b.yaml"
    preset.write_text("train: {optim: {lr: 1e-4, head_lr: 2e-4, epochs: 3}}\n")
    file.write_text("train: {optim: {head_lr: 3e-4, epochs: 4}}\n")
    made = parse("--config", str(file), "--preset", str(preset), "--epochs", "5").optim
    assert (made.lr, made.head_lr, made.epochs) == (1e-4, 3e-4, 5.0)
    assert made.global_batch == OptimConfig().global_batch


def test_yaml_scalars_mean_what_was_typed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "train:\n  optim: {lr: 1e-4}\n  output: {run: 012, resume: no}\n"
        "  data: {bias_table: null}\n  main: {activation_checkpointing: true}\n"
    )
    made = parse("--config", str(file))
    assert made.optim.lr == 1e-4  # PyYAML alone reads this as text
    assert (made.output.run, made.output.resume) == (Path("012"), "no")
    assert made.data.bias_table is None
    assert made.main.activation_checkpointing is True


def test_changes_are_named_one_by_one(tmp_path: Path) -> None:
    made = parse("--change", "lr", "--lr", "1e-4", "--change=epochs")
    assert made.output.change == ("lr", "epochs")
    (tmp_path / "c.yaml").write_text(cli.dump("train", made))
    assert parse("--config", str(tmp_path / "c.yaml")) == made
    with pytest.raises(UserError, match="--change: got freeze, expected one of shards, bias-table"):
        parse("--change", "freeze")


def test_misspelt_key_names_file_and_near_miss(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_text("train: {optim: {leraning_rate: 1, lr: 2, global_bach: 3}}\n")
    with pytest.raises(UserError, match=r"d\.yaml: unknown key leraning_rate"):
        parse("--config", str(file))
    file.write_text("train: {optim: {global_bach: 3}}\n")
    with pytest.raises(UserError, match="did you mean global_batch"):
        parse("--config", str(file))
    file.write_text("tran: {optim: {global_batch: 3}}\n")
    with pytest.raises(UserError, match="did you mean train"):
        parse("--config", str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [1", "expected a readable YAML file"),
        ("- a", "got list"),
        ("[" * 5000, "expected a readable YAML file"),
        ("train: {optim: {lr: null}}", "lr: got nothing, expected a value"),
        ("train: {optim: 3}", "a section of knobs"),
        ("train: {main: {activation_checkpointing: maybe}}", "true or false"),
    ],
)
def test_malformed_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        parse("--config", str(file))
    with pytest.raises(UserError, match=r"f\.yaml.*No such file"):
        parse("--config", str(tmp_path / "f.yaml"))


def test_misspelt_preset_and_flag_name_the_near_miss(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="did you mean gtzan"):
        parse("--preset", "gtzam")
    with pytest.raises(UserError, match="--preset: got nothing"):
        parse("--preset")
    with pytest.raises(SystemExit, match="2"):
        parse("--global-bach", "3")
    assert "--global-batch" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.preset_names())
def test_presets_parse_and_say_what_they_are(name: str) -> None:
    parse("--preset", name, "--model", "any")
    cli.parse("bias", BiasConfig, ["--preset", name])
    head = (cli.PRESETS / f"{name}.yaml").read_text().split("\n\n")[0]
    for word in ("Purpose:", "Source:", "Cost:", "Expect:", "Command:"):
        assert f"# {word}" in head


@pytest.mark.parametrize("flag", ["--config", "--preset"])
def test_presets_are_found_where_they_were(flag: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(flag, "launch/presets/demo.yaml") == parse("--preset", "demo")
    own = tmp_path / "launch" / "presets" / "demo.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("train: {optim: {epochs: 3}}\n")
    assert parse(flag, "launch/presets/demo.yaml").optim.epochs == 3


def test_field_names_are_unique_over_sections() -> None:
    flags = [flag for flag in cli._flags(Path("x"), _plain(), TrainConfig)]
    names = [flag.split("=")[0].removeprefix("--no-").removeprefix("--") for flag in flags]
    assert len(names) == len(set(names)) > 25


def _plain() -> dict[str, dict[str, object]]:
    import yaml

    loaded = yaml.load(cli.dump("train", TrainConfig()), Loader=yaml.BaseLoader)
    return dict(loaded["train"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config.ModelConfig(freeze="layers:0"), "--freeze"),
        (lambda: config.ModelConfig(freeze="half"), "layers:N"),
        (
            lambda: config.EngineConfig(precision="bf16-weights", zero_stage=1),
            "bf16-weights with --zero-stage 1",
        ),
        (
            lambda: config.TrainConfig(
                main=config.ModelConfig(model="logmel-cnn"),
                engine=config.EngineConfig(precision="bf16-weights"),
            ),
            "--model logmel-cnn",
        ),
        (lambda: config.ShardConfig(test_fraction=0.9, validation_fraction=0.2), "below 1"),
        (lambda: config.ShardConfig(segment_s=0.001), "--segment-s"),
        (lambda: config.ShardConfig(hop_s=0), "--hop-s"),
        (
            lambda: config.EvaluateConfig(run=Path("x"), source=config.SourceConfig(fold=1)),
            "--fold",
        ),
        (lambda: config.ShardConfig(part="0/4"), "--part"),
        (lambda: config.ShardConfig(part="5/4"), "--part"),
        (lambda: config.ShardConfig(part="one"), "--part"),
        (lambda: config.ShardConfig(part="1/4", join=True), "--part"),
        (lambda: config.EvaluateConfig(run=Path("x"), name="a/b"), "--name"),
        (lambda: config.CompareConfig(runs=(Path("x"),)), "RUN: got 1 run folders"),
        (lambda: config.CompareConfig(runs=(Path("x"), Path("y")), name=".."), "--name"),
    ],
)
def test_values_that_do_not_go_together_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_evaluations_of_other_data_have_names_of_their_own() -> None:
    def name(**changes: object) -> str:
        return config.EvaluateConfig(run=Path("x"), **changes).result_name

    assert name() == "test"
    assert name(split="validation") == "validation"
    assert name(data=Path("shards/shifted")) == "test-of-shifted"
    assert name(data=Path("shards/a b")) == "test-of-a_b"
    assert name(data=Path("/")) == "test-of-data"
    assert name(data=Path("shards/shifted"), name="mine") == "mine"


def test_a_comparison_lies_in_the_second_run_or_beside_the_first() -> None:
    a, b, c = Path("/r/a"), Path("/s/b"), Path("/r/c")
    assert config.CompareConfig(runs=(a, b)).folder == Path("/s/b/comparison/a")
    assert config.CompareConfig(runs=(a, b, c)).folder == Path("/r/comparison")
    assert config.CompareConfig(runs=(a, b), out=Path("o")).folder == Path("o")


@pytest.mark.parametrize("verb", [*cli.COMMANDS, "shard verify", "shard info"])
def test_help_is_quick_and_says_what_the_command_does(verb: str) -> None:
    """No time is asked for, which a busy machine decides: what takes it is not imported."""
    command = [*f"-m mgc_dist.{verb}".split(), "--help"]
    if (ROOT / "launch" / f"{verb}.py").exists():
        command = [f"launch/{verb}.py", "--help"]
    command = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")
    }
    assert "tyro" in imported
    assert not imported & {"torch", "numpy", "scipy", "transformers", "deepspeed", "matplotlib"}
    assert not imported & {"soundfile", "sklearn", "webdataset", "jinja2", "tensorboard"}
    assert f"usage: python -m mgc_dist.{verb} " in done.stdout
    assert "--preset NAME" in done.stdout


def test_exit_codes_and_debug(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mgc_dist.shard", "--data", str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mgc_dist shard: error: --data")
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [*command, "--debug"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_among_others_ends_without_the_libraries_exit(world: int) -> None:
    lines = (
        "import atexit, dataclasses",
        "from mgc_dist import cli",
        "@dataclasses.dataclass(frozen=True)",
        "class Config:",
        "    'nothing'",
        "atexit.register(lambda: print('exit handlers ran'))",
        "def body(config):",
        "    print('all done', end='')",
        "    return 3",
        "cli.main('train', Config, body)",
    )
    words = [sys.executable, "-c", "\n".join(lines)]
    environment = os.environ | {"WORLD_SIZE": str(world)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "all done" + ("exit handlers ran\n" if world == 1 else "")


@pytest.mark.parametrize("world", [1, 2])
def test_what_nobody_has_foreseen_becomes_a_message_and_a_file(world: int, tmp_path: Path) -> None:
    lines = (
        "import dataclasses",
        "from mgc_dist import cli",
        "@dataclasses.dataclass(frozen=True)",
        "class Config:",
        "    'nothing'",
        "def body(config):",
        "    return {}['lost']",
        "cli.main('train', Config, body)",
    )
    words = [sys.executable, "-c", "\n".join(lines)]
    environment = os.environ | {"WORLD_SIZE": str(world), "RANK": str(world - 1)}
    environment |= {"TMPDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    (file,) = tmp_path.glob("mgc_dist-*.txt")
    assert done.stderr == (
        "mgc_dist train: error: KeyError: 'lost'\n  this was not foreseen, and may be a defect: "
        f"please report it with the file {file}\n"
    )
    assert "Traceback" in file.read_text()
    assert "KeyError: 'lost'" in file.read_text()
    done = subprocess.run([*words, "--debug"], capture_output=True, text=True, env=environment)
    assert "Traceback" in done.stderr
