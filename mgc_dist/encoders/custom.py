"""Models whose code lies beside their weights (`auto_map` in config.json), with a head of ours.

Such code is a stranger's. It runs only with `--trust-remote-code`, and only the code that was read:
of one commit of the hub, or of a folder, whose hash is part of a run's identity.
"""

import fcntl
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import HF_MODULES_CACHE
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING

from mgc_dist.encoders import load_errors, packages, pooling
from mgc_dist.encoders.wrapped import CustomAudioClassifier, class_of
from mgc_dist.errors import UserError


def read_config(
    name: str,
    revision: str | None,
    *,
    trusted: bool,
    **settings: Any,  # noqa: ANN401
) -> PretrainedConfig:
    """The configuration of a checkpoint; with `trusted` its code runs, if it has some.

    Raises:
        UserError: there is no such model, its code is not trusted, or it is not pinned.
    """
    if packages.is_named(name):
        return packages.read_config(name, revision, **settings)
    try:
        if trusted:
            _refuse_unpinned(name, revision)
        with _one_at_a_time(trusted):
            of = pooling.HeadConfig if pooling.is_marked(name) else AutoConfig
            config: PretrainedConfig = of.from_pretrained(
                name, trust_remote_code=trusted, revision=revision or "main", **settings
            )
    except (OSError, ValueError) as error:
        if load_errors.is_custom_code(error):
            raise _untrusted(name) from error
        raise load_errors.explained(name, error) from error
    if not is_custom(config):
        return config
    config.code_revision = None if Path(name).is_dir() else revision  # as `class_of` wants it
    if "AutoModel" not in config.auto_map:
        raise UserError(
            f"model {name}",
            got=f"custom code for {', '.join(config.auto_map)} only",
            expected="AutoModel in `auto_map` of its config.json",
            cure="choose another model",
        )
    with _one_at_a_time(True):
        try:
            class_of(config)
        except Exception as error:  # whatever a stranger's code may raise
            raise load_errors.failed(name, "when it is imported", error) from error
    return config


def built(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """A model of foreign code, with random weights.

    Raises:
        UserError: its code fails.
    """
    try:
        found: PreTrainedModel = loader(config)(config)
        return found
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's code may raise
        raise load_errors.failed(name, "when it is built", error) from error


def is_custom(config: PretrainedConfig) -> bool:
    """Whether a configuration is an object of foreign code."""
    return type(config).__module__.startswith("transformers_modules.")


def loader(config: PretrainedConfig) -> type:
    """What loads the weights of a classifier with this configuration."""
    if is_custom(config) or packages.code_of(config):
        return pooling.class_of(CustomAudioClassifier, config)
    plain = MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING.get(type(config), None)
    found = plain and pooling.class_of(plain, config)
    return AutoModelForAudioClassification if found is plain else found


def code_of(config: PretrainedConfig) -> str:
    """What tells foreign code from any other: its commit, or a sha256 of its folder, or its
    package; else "".
    """
    if not is_custom(config):
        return packages.code_of(config)
    folder = Path(config.name_or_path)
    if not folder.is_dir():
        return str(config.code_revision)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def copy_code(net: PreTrainedModel, folder: Path) -> None:
    """Copy the code that a model was made by beside its weights."""
    for owner in (type(net.base_model), type(net.config)):
        source = Path(str(sys.modules[owner.__module__].__file__)).parent
        for path in source.glob("*.py"):
            if path.name != "__init__.py":
                shutil.copyfile(path, folder / path.name)


def has_code(folder: Path) -> bool:
    """Whether an exported model has code of its own."""
    file = folder / "config.json"
    return file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8"))


def _untrusted(name: str) -> UserError:
    pinned = "" if Path(name).is_dir() else " --revision COMMIT"
    return UserError(
        f"model {name}",
        got="a model with custom code (`auto_map` in its config.json)",
        expected="a model whose code is in transformers, or code that you trust",
        cure=f"read its .py files; if you trust them, add --trust-remote-code{pinned}",
    )


def _refuse_unpinned(name: str, revision: str | None) -> None:
    if not Path(name).is_dir() and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise UserError(
            f"--trust-remote-code with model {name}",
            got=f"--revision {revision}" if revision else "no --revision",
            expected="the commit whose code you have read, 40 hexadecimal digits",
            cure=f"take it from https://huggingface.co/{name}/commits, and add --revision COMMIT",
        )
    written, _ = PretrainedConfig.get_config_dict(name, revision=revision or "main")
    for reference in (written.get("auto_map") or {}).values():
        owner = str(reference).rpartition("--")[0]
        if owner not in ("", name):
            raise UserError(
                f"--trust-remote-code with model {name}",
                got=f"code of another repository, {owner}, which no --revision pins",
                expected="code beside the weights",
                cure=f"hf download {name} --local-dir models/own; hf download {owner} --include "
                f"'*.py' --local-dir models/own; take `{owner}--` out of models/own/config.json, "
                "read the code, and give models/own as the model",
            )


@contextmanager
def _one_at_a_time(needed: bool) -> Iterator[None]:
    """Let one rank of a machine at a time copy code to where transformers imports it from."""
    if not needed:
        yield
        return
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with Path(HF_MODULES_CACHE, ".mgc_dist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
