"""The wheel, built from the sdist, in an environment and a folder that know no checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import _free_port, build_tiny

from mgc_dist import __version__, cli
from mgc_dist.models import folder as exported

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def call(words: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that finds only what is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty folder to work in."""

    python: Path
    folder: Path

    def mgc(self, *words: str | Path) -> str:
        """What `mgc` prints; it must succeed."""
        return self.printed(self.python.with_name("mgc"), *words)

    def printed(self, *words: str | Path) -> str:
        """What a program prints; it must succeed."""
        done = call(list(words), self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an sdist and of the wheel that was built from it; nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("mgc_dist", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    done = call(words, source)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a fresh environment, beside what is installed here."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(call([python, "-c", show], home).stdout.strip())
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "present.pth").write_text("\n".join(here) + "\n")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    done = call([*pip, wheel], home)
    assert done.returncode == 0, done.stdout + done.stderr
    return Installed(python, tmp_path_factory.mktemp("empty"))


def test_wheel_and_sdist_hold_the_checkout(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        packed = {n: file.read(n) for n in file.namelist() if ".dist-info/" not in n}
    paths = [*(ROOT / "mgc_dist").rglob("*"), *(ROOT / "slurm").rglob("*")]
    ours = {
        str(path.relative_to(ROOT)): path.read_bytes()
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }
    moved = {n.replace("mgc_dist/batch_files/", "slurm/"): text for n, text in packed.items()}
    assert moved == ours
    assert {"mgc_dist/presets/gtzan.yaml", "slurm/train.sbatch", "slurm/pipeline.sh"} <= set(ours)
    with tarfile.open(sdist) as file:
        top = f"mgc_dist-{__version__}/"
        held = {m.name.removeprefix(top) for m in file.getmembers() if m.isfile()}
    assert held >= set(ours)


def test_mgc_lists_its_commands(installed: Installed) -> None:
    shown = installed.mgc()
    assert shown.startswith("usage: mgc COMMAND")
    assert all(f"  {verb} " in shown for verb in cli.COMMANDS)
    assert installed.mgc("--help") == shown
    through_python = installed.printed(installed.python, "-m", "mgc_dist")
    assert through_python.splitlines()[2:-1] == shown.splitlines()[2:-1]
    assert through_python.startswith("usage: python -m mgc_dist COMMAND")
    assert installed.mgc("--version") == f"mgc_dist {__version__}\n"
    assert "usage: mgc shard verify " in installed.mgc("shard", "verify", "--help")
    by_module = installed.printed(installed.python, "-m", "mgc_dist.train", "--help")
    assert by_module.replace("python -m mgc_dist.train", "mgc train") == installed.mgc(
        "train", "--help"
    )
    done = call([installed.python.with_name("mgc"), "trian"], installed.folder)
    assert (done.returncode, "did you mean train?" in done.stderr) == (2, True)


def test_from_tracks_to_a_dry_run_with_the_packages_preset(installed: Installed) -> None:
    installed.mgc("synth", "data/smoke", "--preset", "smoke", "--duration-s", "2")
    assert "Packed 180 segments" in installed.mgc("shard", "--preset", "smoke")
    words = ("--preset", "smoke", "--dry-run", "--loss", "ce", "--device", "cpu")
    assert "32 = 1 ranks x micro batch 16" in installed.mgc("train", *words)
    launcher = (installed.python, "-m", "deepspeed.launcher.runner", "--num_gpus", "2")
    launcher += ("--master_port", str(_free_port()))
    said = installed.printed(*launcher, "--module", "mgc_dist.train", *words)
    assert "32 = 2 ranks x micro batch 16" in said


def test_a_model_predicts(installed: Installed, tmp_path: Path) -> None:
    classifier = build_tiny("logmel-cnn").eval()
    exported.save_exported(classifier, classifier.state_dict(), tmp_path / "model", 16_000)
    wave = torch.randn(24_000, generator=torch.Generator().manual_seed(0)) * 0.1
    soundfile.write(tmp_path / "song.wav", wave.numpy(), 16_000)
    said = installed.mgc("predict", tmp_path / "model", tmp_path / "song.wav", "--json")
    assert len(json.loads(said)[0]["probabilities"]) == 3


def test_the_batch_files_are_written(installed: Installed) -> None:
    assert "sbatch slurm/train.sbatch" in installed.mgc("slurm", "slurm")
    written = {path.name: path.read_bytes() for path in (installed.folder / "slurm").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (ROOT / "slurm").iterdir()}
    assert os.access(installed.folder / "slurm" / "pipeline.sh", os.X_OK)


def test_a_checkout_that_is_only_on_the_path_has_a_version() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mgc_dist; print(*sys.modules)"
    code += "; print(mgc_dist.__version__)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    modules, version = done.stdout.splitlines()
    assert version == __version__ == "0.1.0"
    assert "torch" not in modules.split()
