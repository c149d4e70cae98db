"""`python -m mgc_dist.slurm OUT`: the batch files for Slurm, for who has no checkout."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tyro.conf import Positional

from mgc_dist import cli
from mgc_dist.errors import UserError
from mgc_dist.files import replace_text

_FOLDER = re.compile(r"(?<!tests/)\bslurm/")
"""The name by which the files call their folder."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Write the batch files for Slurm into a folder: train.sbatch, run.sbatch, pipeline.sh, and a
    page that says how to use them. Jobs are submitted from the folder that holds it.
    """

    out: Positional[Path]
    """Folder for the files; `slurm` in the project's folder is usual."""
    overwrite: bool = False
    """Replace files that differ."""


def run(config: SlurmConfig) -> None:
    """Write the files, and print how to submit one.

    Raises:
        UserError: the folder's name needs quoting in a shell, or a file there is another one.
    """
    out = config.out.resolve()
    if not re.fullmatch(r"[\w.-]+", out.name):
        raise UserError(
            f"folder {config.out}",
            got=out.name or "the root of the file system",
            expected="a name of letters, digits, dots, dashes: the files name one another by it",
            cure="mgc slurm slurm",
        )
    wanted = {out / name: text for name, text in batch_files(out.name).items()}
    other = [path for path, text in wanted.items() if path.exists() and path.read_text() != text]
    if other and not config.overwrite:
        raise UserError(
            f"file {other[0]}",
            got="another file of that name",
            expected="none, or the same",
            cure="--overwrite replaces it",
        )
    out.mkdir(parents=True, exist_ok=True)
    for path, text in wanted.items():
        replace_text(path, text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    print(f"Wrote {', '.join(path.name for path in wanted)}; next, in {out.parent}:")
    print(f"sbatch {out.name}/train.sbatch --run runs/NAME")


def batch_files(folder: str) -> dict[str, str]:
    """Name -> text of the batch files, as they stand in a folder of that name.

    A wheel holds them in the package; a checkout has them in its folder slurm/.
    """
    package = files("mgc_dist")
    packed = package / "batch_files"
    source = packed if packed.is_dir() else Path(str(package)).parent / "slurm"
    names = sorted(path.name for path in source.iterdir())
    texts = {name: (source / name).read_text(encoding="utf-8") for name in names}
    return {name: _FOLDER.sub(f"{folder}/", text) for name, text in texts.items()}


def main() -> None:
    """Entry of `python -m mgc_dist.slurm`."""
    cli.main("slurm", SlurmConfig, run)


if __name__ == "__main__":
    main()
