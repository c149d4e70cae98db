"""Encoders of real size from random weights, each in a process of its own, within a memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import shard_config, write_tracks
from metrics import read_metrics
from test_adapters import MERT_2
from test_launcher import ROOT
from transformers import ASTConfig

from mgc_dist import shard
from mgc_dist.models.folder import load_exported

WHISPER_SMALL = {  # openai/whisper-small's config.json, but for the decoder, which is not built
    **{"model_type": "whisper", "d_model": 768, "encoder_layers": 12},
    **{"encoder_attention_heads": 12, "encoder_ffn_dim": 3072},
}
LORA = ("--lora", "r=16", "--precision", "bf16-weights")


@pytest.mark.slow
@pytest.mark.grid  # CI has test_slow.py, and memory for one of them at a time
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("settings", "sample_rate", "flags", "millions", "most_gib"),
    [
        pytest.param(MERT_2, 24_000, LORA, 632, 8.0, id="mert-2"),
        # AST's configuration is that of its base: MIT/ast-finetuned-audioset-10-10-0.4593
        pytest.param(ASTConfig().to_diff_dict(), 16_000, (), 86, 8.0, id="ast"),
        pytest.param(WHISPER_SMALL, 16_000, (), 88, 8.0, id="whisper-small"),
    ],
)
def test_a_real_size_takes_two_steps_on_one_rank(
    settings: dict[str, Any],
    sample_rate: int,
    flags: tuple[str, ...],
    millions: int,
    most_gib: float,
    tmp_path: Path,
) -> None:
    write_tracks(tmp_path / "tracks", duration_s=3.1)
    packing = {"segment_s": 3.0, "hop_s": 1.5, "sample_rate": sample_rate}
    shard.run(shard_config(tmp_path / "tracks", tmp_path / "shards", **packing))
    (tmp_path / "model.json").write_text(json.dumps(settings))
    words = [sys.executable, "launch/train.py", "--loss", "ce", "--run", str(tmp_path / "run")]
    words += ["--shards", str(tmp_path / "shards"), "--model", str(tmp_path / "model.json")]
    words += ["--global-batch", "1", "--micro-batch", "1", "--eval-batch", "1", "--epochs", "0.34"]
    words += ["--device", "cpu", "--log-every-steps", "1", *flags]
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=said)
        _, code, used = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(code)
    assert job.returncode == 0, (tmp_path / "said").read_text()
    steps = read_metrics(tmp_path / "run", "step")
    assert len(steps) == 2
    assert all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in steps)
    peak_gib, cpu_s = used.ru_maxrss / 2**20, used.ru_utime + used.ru_stime
    print(f"peak {peak_gib:.2f} GiB, {cpu_s:.0f} CPU seconds, {steps}")
    assert peak_gib < most_gib
    best = load_exported(tmp_path / "run" / "best").net
    assert sum(p.numel() for p in best.parameters()) == pytest.approx(millions * 1e6, rel=0.03)
