"""What setup.cfg cannot say: a wheel holds the batch files, which lie in slurm/ of the checkout."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithBatchFiles(build_py):
    """The package, and slurm/ as mgc_dist/batch_files."""

    def run(self) -> None:
        """Copy modules, data, batch files; an editable install leaves these where they are."""
        super().run()
        if not getattr(self, "editable_mode", False):
            folder = Path(self.build_lib, "mgc_dist", "batch_files")
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(Path("slurm").iterdir()):
                self.copy_file(str(file), str(folder / file.name))


setup(cmdclass={"build_py": BuildWithBatchFiles})
