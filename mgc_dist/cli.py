"""Typed configurations to command lines and YAML files, and back.

One parser: a preset is read as flags that stand before the user's own, so that types,
precedence (default < preset < config file < flag) and error messages are the same for both.
YAML scalars stay text until tyro reads them, so `1e-4`, `no` and `012` mean what was typed.
"""

import contextlib
import dataclasses
import difflib
import importlib.resources
import os
import re
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from mgc_dist.config import knobs
from mgc_dist.errors import EXIT_BROKEN_PIPE, PeerLost, RunFailed, UserError, exit_code_of

C = TypeVar("C")

PRESETS = Path(str(importlib.resources.files("mgc_dist") / "presets"))
COMMANDS = {
    "synth": "write a synthetic data set",
    "shard": "pack tracks into shards; `shard verify` and `shard info` look at them",
    "audit": "say what besides music tells the genre in a data set",
    "bias": "run the bias model over the shards, and make the bias table",
    "probe": "judge a frozen model by heads on its layers",
    "train": "train the main model",
    "evaluate": "measure a run on a split",
    "exam": "change the music in ways that keep its genre, and count changed answers",
    "compare": "compare runs on the same tracks",
    "predict": "name the genre of audio files",
    "export": "write a run's best model as a folder for transformers",
    "doctor": "look at what goes wrong on clusters",
    "cache": "list the caches of frozen features, and remove some",
    "slurm": "write the batch files for Slurm into a folder",
}
"""The commands, in the order of use, and what they do; each is a module of this package."""


class _Words(yaml.BaseLoader):
    """Scalars stay text, but for a null without quotes: `'null'` and `''` are words."""


_Words.add_implicit_resolver("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Words.add_constructor("null", lambda loader, node: None)

_BREAKS = re.compile("[\x85\u2028\u2029]")

_HELP = """{about}

Before the flags below: --preset NAME reads a preset of the package ({presets}), --config FILE
reads any file of that form (a run's config.yaml too); flags typed by you win. --debug shows
tracebacks."""


def main(command: str, config_type: type[C], body: Callable[[C], int | None]) -> NoReturn:
    """Parse the command line, run the command, and turn its outcome into an exit code.

    Args:
        command: the verb; names the section of a YAML file that is meant for it.
        config_type: dataclass of the command's knobs; its docstring is the help text.
        body: the command; returns an exit code, None for 0.
    """
    argv = sys.argv[1:]
    debug = "--debug" in argv
    try:
        code = body(parse(command, config_type, [arg for arg in argv if arg != "--debug"])) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug:
            raise
        _tell(command, error)
        code = exit_code_of(error)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # a broken process group may block the end; and with all done and well, rank 1 of 2 has
        # ended with "terminate called without an active exception", of a thread of torch's
        leave(code)
    sys.exit(code)


def _tell(command: str, error: Exception) -> None:
    """Print an error once: on rank 0, unless the others may have met another one."""
    is_told = isinstance(error, UserError | RunFailed) and not isinstance(error, PeerLost)
    own = not is_told or getattr(error, "this_rank_only", False)
    if own or os.environ.get("RANK", "0") == "0":
        print(f"mgc_dist {command}: error: {_said(error)}", file=sys.stderr)


def _said(error: Exception) -> str:
    """What an error says; the traceback of one that nobody has foreseen goes into a file."""
    if isinstance(error, UserError | RunFailed | OSError):
        return str(error)
    trace = "".join(traceback.format_exception(error))
    try:
        handle, name = tempfile.mkstemp(prefix="mgc_dist-", suffix=".txt", text=True)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(trace)
    except OSError:  # no room even for that
        return trace
    what = " ".join(str(error).split())[:300]
    return (
        f"{type(error).__name__}: {what}\n  this was not foreseen, and may be a defect: please "
        f"report it with the file {name}"
    )


def leave(code: int) -> NoReturn:
    """End this process at once, without what Python and C++ do at exit.

    Files are closed by whoever opened them.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def parse(command: str, config_type: type[C], argv: Sequence[str]) -> C:
    """Read presets, configuration files and flags into a configuration.

    Args:
        command: section of a YAML file to read.
        config_type: a frozen dataclass, possibly of sections; flag names carry no section.
        argv: words of the command line; `--local_rank=N` of the deepspeed launcher is dropped.

    Raises:
        UserError: a YAML file is missing, malformed or has an unknown key.
        SystemExit: with code 2 on a bad flag (tyro prints the near miss), 0 on `--help`.
    """
    words = [word for word in argv if not word.startswith("--local_rank=")]
    files, words = _take_files(words)
    flags = [flag for file in files for flag in flags_of_file(file, command, config_type)]
    return tyro.cli(
        config_type,
        config=(tyro.conf.OmitArgPrefixes,),
        prog=program(command),
        description=_HELP.format(
            about=(config_type.__doc__ or "").strip(), presets=", ".join(preset_names())
        ),
        args=[*flags, *words],
    )


def program(command: str) -> str:
    """How this process was told to run a command: `mgc train`, or `python -m mgc_dist.train`."""
    started = Path(sys.argv[0])
    if started.stem == "mgc":
        return f"mgc {command}"
    through = " " if started == Path(__file__).with_name("__main__.py") else "."
    return f"python -m mgc_dist{through}{command}"


def launched(command: str) -> str:
    """How to start a command on all GPUs of a node: a checkout's launch file, or the module."""
    file = Path("launch", f"{command}.py")
    return f"deepspeed {file}" if file.exists() else f"deepspeed --module mgc_dist.{command}"


def dump(command: str, config: object) -> str:
    """YAML text that `--config`, with the words that have no flag, reads back to an equal one."""

    def section(of: object) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, hint in _in_files(type(of)).items():
            value = getattr(of, name)
            found |= section(value) if knobs.mark(hint, knobs.Flat) else {name: plain(value)}
        return found

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value):
            return section(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value if isinstance(value, (bool, int, float, NoneType)) else str(value)

    content = {command: plain(config)}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if _BREAKS.search(text):  # PyYAML writes them as they are and reads them as spaces
        text = yaml.safe_dump(content, sort_keys=False)
    return text


def flags_of(config: object) -> dict[str, str]:
    """Flag -> value of every knob, to be compared between ranks."""
    return {knobs.flag(name): str(value) for name, value in knobs.values(config)}


def flags_of_file(file: Path, command: str, config_type: type[Any]) -> list[str]:
    """The flags that a YAML file stands for.

    Args:
        file: a mapping of commands to (nested) mappings of knobs; other commands' are ignored.
        command: whose section is read; a missing section gives no flags.
        config_type: decides which keys exist, in which section, and which are booleans.

    Raises:
        UserError: unreadable file, unknown section or key, or a value of the wrong form.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Words)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"configuration file {file}",
            got=" ".join(str(error).split()),
            expected="a readable YAML file",
            cure=f"presets in {PRESETS}: {', '.join(preset_names())}",
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(
            f"configuration file {file}",
            got=type(content).__name__,
            expected="commands at the top level, each a mapping of knobs",
            cure=f"write `{command}:` and indent its knobs below it",
        )
    _refuse_unknown(file, "command", content, {command, *COMMANDS})
    return _flags(file, content.get(command, {}), config_type)


def preset_names() -> list[str]:
    """Names that `--preset` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _take_files(words: list[str]) -> tuple[list[Path], list[str]]:
    files: dict[str, list[Path]] = {"--preset": [], "--config": []}
    rest: list[str] = []
    stream = iter(words)
    for word in stream:
        flag, equals, value = word.partition("=")
        if flag not in files:
            rest.append(word)
            continue
        value = value if equals else next(stream, "")
        if not value:
            raise UserError(flag, got="nothing", expected="a name or a file", cure=f"{flag} NAME")
        is_name = flag == "--preset" and not value.endswith((".yaml", ".yml"))
        files[flag].append(_preset(value) if is_name else _file(value))
    return files["--preset"] + files["--config"], rest


def _preset(name: str) -> Path:
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"--preset {name}",
            got=name,
            expected=f"one of {', '.join(names)}, or the path of a .yaml file",
            cure=f"did you mean {near[0]}?" if near else f"presets live in {PRESETS}",
        )
    return PRESETS / f"{name}.yaml"


def _file(name: str) -> Path:
    """A file of knobs; presets are found where version 0.1.0 had them, too."""
    file = Path(name)
    if file.exists() or file.parts[-3:-1] != ("launch", "presets"):
        return file
    return PRESETS / file.name


def _flags(file: Path, section: dict[str, Any], config_type: type[Any]) -> list[str]:
    hints = _in_files(config_type)
    for name, hint in tuple(hints.items()):
        if knobs.mark(hint, knobs.Flat):
            hints |= knobs.hints(knobs.bare(hints.pop(name)))
    _refuse_unknown(file, "key", section, set(hints))
    flags: list[str] = []
    for key, value in section.items():
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(
                    f"{file}: {key}",
                    got=value,
                    expected="a section of knobs",
                    cure="indent its knobs below it",
                )
            flags += _flags(file, value, typing.cast(type, hints[key]))
        else:
            flags += _flag(file, key, value, hints[key])
    return flags


def _in_files(config_type: type[Any]) -> dict[str, Any]:
    """Hints of what a file may hold: what is given without a flag is typed each time."""
    hints = knobs.hints(config_type)
    return {name: hint for name, hint in hints.items() if not _has(hint, tyro.conf.Positional)}


def _has(hint: object, mark: object) -> bool:
    return mark in getattr(hint, "__metadata__", ())


def _flag(file: Path, key: str, value: object, hint: object) -> list[str]:
    name, kind = knobs.flag(key), knobs.bare(hint)
    if isinstance(value, list):
        if _has(hint, tyro.conf.UseAppendAction):
            return [word for item in value for word in (name, str(item))]
        return [name, *map(str, value)]
    if value is None and NoneType not in typing.get_args(kind):
        raise UserError(f"{file}: {key}", got="nothing", expected="a value", cure="correct it")
    text = str(value)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{file}: {key}", got=text, expected="true or false", cure="correct it")
        return [name if text.lower() == "true" else f"--no-{name[2:]}"]
    return [f"{name}={text}"]


def _refuse_unknown(file: Path, kind: str, given: dict[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            raise UserError(
                f"{file}: unknown {kind} {key}",
                got=key,
                expected=", ".join(sorted(known)),
                cure=f"did you mean {near[0]}?" if near else "remove it",
            )
