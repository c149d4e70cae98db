"""Any value of any knob of any command: a configuration, or a refusal in words."""

import contextlib
import dataclasses
import io
import os
from typing import Any

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from mgc_dist import cli, config
from mgc_dist.config import identity, knobs
from mgc_dist.errors import UserError
from mgc_dist.slurm import SlurmConfig

COMMANDS: dict[str, tuple[type[Any], list[str]]] = {
    "synth": (config.SynthConfig, ["out"]),
    "shard": (config.ShardConfig, []),
    "shard verify": (config.VerifyConfig, []),
    "shard info": (config.InfoConfig, []),
    "audit": (config.AuditConfig, []),
    "bias": (config.BiasConfig, []),
    "probe": (config.ProbeConfig, []),
    "train": (config.TrainConfig, []),
    "evaluate": (config.EvaluateConfig, ["run"]),
    "exam": (config.ExamConfig, ["run"]),
    "compare": (config.CompareConfig, ["a", "b"]),
    "predict": (config.PredictConfig, ["run", "song.mp3"]),
    "export": (config.ExportConfig, ["run", "out"]),
    "doctor": (config.DoctorConfig, []),
    "slurm": (SlurmConfig, ["out"]),
}
"""Command -> its knobs, and the words that it cannot do without."""


def fields_of(config_type: type[Any]) -> dict[str, Any]:
    """Hint of every knob by name, those of sections too."""
    found: dict[str, Any] = {}
    for name, hint in knobs.hints(config_type).items():
        kind = knobs.bare(hint)
        found |= fields_of(kind) if dataclasses.is_dataclass(kind) else {name: hint}
    return found


def is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ())


NUMBERS = [
    pytest.param(name, hint, id=f"{command} {name}")
    for command, (config_type, _) in COMMANDS.items()
    for name, hint in fields_of(config_type).items()
    if knobs.bare(hint) in (int, float, int | None, float | None)
]


@pytest.mark.parametrize(("name", "hint"), NUMBERS)
def test_every_number_has_a_range_with_two_ends(name: str, hint: Any) -> None:
    found = knobs.mark(hint, knobs.Range)
    assert found is not None, name
    assert not found.holds(float("inf"))
    assert not found.holds(10**12)
    assert not found.holds(-(10**12))


word = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
argument = st.one_of(  # what a shell can pass: bytes that are no UTF-8 too
    st.integers(-5, 70_000).map(str),
    st.integers(-(10**40), 10**40).map(str),
    st.floats().map(repr),
    st.sampled_from(["nan", "inf", "-inf", "-0", "-0.0", "1e308", "1e-320", "9" * 5000, "None"]),
    st.sampled_from(["", " ", "~", "null", "true", "no", "layers:" + "9" * 5000, "9" * 5000 + "%"]),
    st.sampled_from(["1/2", "0/0", "1" * 5000 + "/2", "٣", "٣%", "{}", "[a", "a: b", "# x", "--"]),
    word,
    st.binary(max_size=8).map(lambda b: os.fsdecode(b.replace(b"\0", b""))),
)


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command, with one or two of its knobs set to anything."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    config_type, needed = COMMANDS[command]
    flags: list[str] = []
    places = list(needed)
    for hint in fields_of(config_type).values():
        if is_positional(hint) and needed and draw(st.booleans()):
            places[draw(st.integers(0, len(places) - 1))] = draw(argument)
    names = [n for n, hint in fields_of(config_type).items() if not is_positional(hint)]
    for name in draw(st.lists(st.sampled_from(names), max_size=2)) if names else []:
        kind = knobs.bare(fields_of(config_type)[name])
        flags += [knobs.flag(name)] if kind is bool else [f"{knobs.flag(name)}={draw(argument)}"]
    return command, [*flags, *places]


def parsed(command: str, words: list[str]) -> Any:
    """The configuration; None if the words are refused in words, or ask for help."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            return cli.parse(command, COMMANDS[command][0], words)
        except (UserError, SystemExit) as error:
            refusal: UserError | SystemExit = error
    if isinstance(refusal, SystemExit):
        assert refusal.code in (0, 2)
        assert said.getvalue()
    return None


def places_of(made: Any) -> list[str]:
    """The words without a flag."""
    places: list[str] = []
    for name, hint in knobs.hints(type(made)).items():
        if is_positional(hint):
            value = getattr(made, name)
            places += map(str, value if isinstance(value, tuple) else [value])
    return places


@settings(deadline=None, max_examples=300)
@given(command_lines())
def test_any_value_is_refused_in_words_or_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, line: tuple[str, list[str]]
) -> None:
    command, words = line
    made = parsed(command, words)
    if made is None:
        return
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(cli.dump(command, made), encoding="utf-8")
    again = ["--config", str(file), *places_of(made)]
    assert cli.parse(command, COMMANDS[command][0], again) == made
    assert cli.flags_of(made)
    for each in (made, *(getattr(made, field.name) for field in dataclasses.fields(made))):
        for name, value in vars(type(each)).items():
            if isinstance(value, property):
                getattr(each, name)
    if command == "train":
        own = identity.own(made)
        del own["model"]  # a run writes the hash of its configuration
        assert identity.read(own) == own
    if command == "shard":
        assert made.bad_allowed(100) >= 0
