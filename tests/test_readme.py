"""Every command that pages and presets show parses, and every place that they link exists."""

import re
import shlex
from pathlib import Path

import pytest

from mgc_dist import cache, cli, config, slurm

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ("log.md", "design.md", "benchmarks.md", "performance.md", "exactness.md", "faults.md")
"""Pages that tell of experiments: what they show was run once, with the code of that day."""
PAGES = (
    ROOT / "README.md",
    ROOT / "slurm" / "README.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in RECORDS),
)
CONFIGS = {
    "synth": config.SynthConfig,
    "shard": config.ShardConfig,
    "shard verify": config.VerifyConfig,
    "shard info": config.InfoConfig,
    "audit": config.AuditConfig,
    "bias": config.BiasConfig,
    "probe": config.ProbeConfig,
    "train": config.TrainConfig,
    "evaluate": config.EvaluateConfig,
    "exam": config.ExamConfig,
    "compare": config.CompareConfig,
    "predict": config.PredictConfig,
    "export": config.ExportConfig,
    "doctor": config.DoctorConfig,
    "cache": cache.CacheConfig,
    "slurm": slurm.SlurmConfig,
}
OTHERS = ("python3 -m venv ", ".venv/bin/pip ", ". .venv/bin/", "squeue ", "printf ", "#")
"""Beginnings of lines that are not ours to check."""
LOOP = re.compile(r"\s*(for|done)\b")


def shown_commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"```bash\n(.*?)```", text.replace("\\\n", " "), re.S)
    kinds = "mgc|deepspeed|python -m mgc_dist|python launch|make|sbatch"
    inline = re.findall(rf"`((?:{kinds}) [^`]+)`", text)
    inline = [" ".join(command.split()) for command in inline]
    lines = [line for block in blocks for line in block.splitlines() if line.strip()] + inline
    for preset in cli.PRESETS.glob("*.yaml"):
        head = preset.read_text().split("\n\n")[0].split("# Command: ")[1]
        joined = head.replace("\n#  ", "").split("  (")[0]
        lines += [part.strip() for part in joined.split("&&")]
    lines = [line for line in lines if not LOOP.match(line) and not line.startswith(OTHERS)]
    lines = [
        line for line in lines if line != "mgc" and not re.fullmatch(r"deepspeed --\S+ \S+", line)
    ]
    return list(dict.fromkeys(map(unrolled, lines)))


def unrolled(line: str) -> str:
    """A line of a loop, as its first turn runs it."""
    for name, value in (("$loss", "ce"), ("$seed", "0"), ("$N", "0"), ("%a", "1")):
        line = line.replace(name, value)
    return line.strip()


@pytest.mark.parametrize("line", shown_commands())
def test_command_parses(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] == "slurm/pipeline.sh":
        usage = (ROOT / words[0]).read_text().split("set -e")[0]
        assert all(
            f"#   {w}" in usage or f" | {w}" in usage or f", {w}" in usage for w in words[1::2]
        )
        return
    if words[0] == "sbatch":
        (script,) = [n for n, word in enumerate(words) if word.endswith(".sbatch")]
        assert (ROOT / words[script]).is_file()
        if words[script].endswith("train.sbatch"):
            cli.parse("train", config.TrainConfig, words[script + 1 :])
            return
        words = words[script + 1 :]
    if words[0] == "mgc":
        words = [f"mgc_dist.{words[1]}", *words[2:]]
    (place,) = [n for n, w in enumerate(words) if w.startswith(("launch/", "mgc_dist."))]
    verb = Path(words[place]).stem if "/" in words[place] else words[place].split(".")[1]
    if "/" in words[place]:
        assert (ROOT / words[place]).is_file()
    needs_out = {
        "evaluate": ["RUN"],
        "exam": ["RUN"],
        "compare": ["RUN", "RUN"],
        "predict": ["RUN", "x"],
        "export": ["RUN", "OUT"],
    }
    rest = [each for word in words[place + 1 :] for each in [word] * (1 + ("*" in word))]
    if verb == "shard" and rest[:1] in (["verify"], ["info"]):
        verb = f"shard {rest.pop(0)}"
    if verb != "demo":
        cli.parse(verb, CONFIGS[verb], rest or needs_out.get(verb, []))


def test_there_are_commands_of_every_kind() -> None:
    text = "\n".join(shown_commands())
    for verb in (
        "shard",
        "verify",
        "bias",
        "probe",
        "train",
        "evaluate",
        "exam",
        "compare",
        "predict",
        "export",
        "sbatch",
        "doctor",
        "make demo",
    ):
        assert verb in text


def anchors(page: Path) -> set[str]:
    """What headings of a page can be linked by."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "docs" / name for name in RECORDS)], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}"


def test_every_page_is_linked_from_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        linked = f"](docs/{page.name}" in text
        assert linked or page.name in ("log.md", "formats.md"), page.name


def test_the_tree_names_every_module() -> None:
    tree = (ROOT / "docs" / "house.md").read_text().split("## The tree")[1]
    modules = {path.stem for path in (ROOT / "mgc_dist").rglob("*.py")} - {"__init__"}
    modules |= {path.name for path in (ROOT / "mgc_dist").iterdir() if path.is_dir()} - {
        "__pycache__"
    }
    assert {name for name in modules if not re.search(rf"\b{name}\b", tree)} == set()
