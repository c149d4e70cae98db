"""Why a pretrained model cannot be loaded: a cause, a sentence, and a cure for each."""

import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mgc_dist.errors import UserError

_POINTER = b"version https://git-lfs.github.com/spec/"
_NO_SUCH_FAMILY = ("Unrecognized configuration class", "not recognize this architecture")
_NO_FAMILY = "Should have a `model_type` key"
_LACKS_A_FILE = "does not appear to have"
_RATE_LIMITED = 429
_FOLDER = "a folder with config.json and weights"


def is_custom_code(error: Exception) -> bool:
    """Whether transformers says that it would have to run a model's own code."""
    return "trust_remote_code" in str(
        error
    )  # "... contains custom code which must be executed ..."


def explained(name: str, error: Exception) -> UserError:
    """What to say when transformers cannot find or read a model, or would run code for it."""
    if is_custom_code(error):
        return _refused(
            name,
            "a model with custom code (`auto_map` in its config.json)",
            "a model whose code is in transformers; only a main model's network may have its own",
            "choose wav2vec2, hubert, wavlm, data2vec-audio or the like",
        )
    folder = Path(name)
    found = _of_folder(folder, error) if folder.is_dir() else _of_hub(name, error)
    return found or _of_content(name, error)


def failed(name: str, when: str, error: Exception) -> UserError:
    """What to say of an error in code that is not ours."""
    told = " ".join(str(error).split())[:200]
    return UserError(
        f"--model {name}",
        got=f"{type(error).__name__} of its own code {when}: {told}",
        expected="code that works with this version of transformers and segments of this length",
        cure="see its page for the version that it needs; else pack longer segments, or choose "
        "another model",
    )


def _of_folder(folder: Path, error: Exception) -> UserError | None:
    """What is wrong with a folder by its files; None if nothing is to be seen there."""
    best = folder / "best"
    if (folder / "config.yaml").is_file() or best.is_dir():
        cure = f"give {best}" if best.is_dir() else "it has no best/ yet: give another model"
        return _refused(str(folder), "a run folder", _FOLDER, cure)
    if not any(folder.iterdir()):
        return _refused(str(folder), "an empty folder", _FOLDER, _again(folder))
    config = folder / "config.json"
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    for file in (config, *weights):
        if file.is_file() and _begins(file) == _POINTER:
            got = f"a pointer of Git LFS in place of {file.name}"
            cure = f"fetch what it points to: git -C {folder} lfs pull; or {_again(folder)}"
            return _refused(str(folder), got, "the file itself", cure)
    if not config.is_file():
        return _refused(str(folder), "a folder without config.json", _FOLDER, _again(folder))
    if not weights and not _is_of_no_family(error):
        return _refused(str(folder), "a folder without weights", _FOLDER, _again(folder))
    return None


def _of_hub(name: str, error: Exception) -> UserError | None:
    """What the hub said, or that it cannot be reached; None if it is something else."""
    if Path(name).is_file():
        cure = f"give its folder: {Path(name).parent}"
        return _refused(name, "a file", f"{_FOLDER}, or a config .json", cure)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        cure = "correct the path; or give a name of the hub, such as facebook/wav2vec2-base"
        return _refused(name, "no such folder", _FOLDER, cure)
    page = f"https://huggingface.co/{name}"
    causes = list(_causes(error))
    if any(isinstance(each, GatedRepoError) for each in causes):
        return _refused(
            name,
            "a gated model, to which you have no access yet",
            "a model that you may read",
            f"ask for access at {page}, and log in: hf auth login",
        )
    if any(isinstance(each, RevisionNotFoundError) for each in causes):
        return _refused(
            f"{name} --revision",
            "a revision that the model does not have",
            "a branch, tag or commit",
            f"take one from {page}/commits",
        )
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):
        return _refused(
            name,
            "no such folder, and no such model on the hub, or a private one",
            "a folder, or a name of the hub such as facebook/wav2vec2-base",
            "correct the name (https://huggingface.co/models); for a private model, first: "
            "hf auth login",
        )
    said = [each.response.status_code for each in causes if isinstance(each, HfHubHTTPError)]
    if _RATE_LIMITED in said:
        return _refused(
            name,
            "the hub's limit of requests (429)",
            "fewer requests in a short time",
            f"wait five minutes, or log in for a higher limit: hf auth login; or {_bring(name)}",
        )
    if _LACKS_A_FILE in str(error):
        return _refused(
            name,
            _first_line(error),
            "a model of transformers: config.json, weights and preprocessor_config.json",
            f"see what it holds at {page}/tree/main, and choose another model",
        )
    if _is_of_no_family(error) or not isinstance(error, OSError):
        return None
    return _refused(
        name,
        f"no such folder, and no answer of the hub ({_first_line(error)})",
        "a folder with config.json and weights, or a hub name and a network",
        _bring(name),
    )


def _of_content(name: str, error: Exception) -> UserError:
    """What files say that can be read, or that they cannot."""
    if isinstance(error, UnpicklingError | LookupError | EOFError):
        return _refused(
            name,
            f"weights that would run code, or are none ({type(error).__name__})",
            "tensors: model.safetensors, or a .bin of nothing else",
            "download it again; do not use it if it came from a stranger",
        )
    if _is_of_no_family(error):
        return _refused(
            name,
            f"{_family(Path(name), error)}, which transformers has for no such use",
            "a model over audio: wav2vec2, hubert, wavlm, data2vec-audio or the like",
            "choose such a model",
        )
    return _refused(
        name,
        f"files that cannot be read ({_first_line(error)})",
        "whole files, as the hub has them",
        _again(Path(name)),
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_no_family(error: Exception) -> bool:
    return any(words in str(error) for words in (*_NO_SUCH_FAMILY, _NO_FAMILY))


def _family(folder: Path, error: Exception) -> str:
    """The `model_type` of a folder; of a model of the hub what transformers says."""
    if _NO_FAMILY in str(error):
        return "a model without config.json, or with one that names no model_type"
    if not folder.is_dir():
        return f"another family ({_first_line(error)})"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config["model_type"])


def _begins(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(_POINTER))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _bring(name: str) -> str:
    return (
        f"on a machine with a network: hf download {name} --local-dir models/{Path(name).name}; "
        "bring that folder and give its path instead"
    )


def _again(folder: Path) -> str:
    return (
        f"download it again, NAME being its name on the hub: hf download NAME --local-dir {folder}"
    )


def _refused(name: str, got: str, expected: str, cure: str) -> UserError:
    return UserError(f"model {name}", got=got, expected=expected, cure=cure)
