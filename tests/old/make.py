"""Make v0_1_0.tar.xz: what version 0.1.0 wrote, for the test that it is still read.

Run with the code of that version on the path (commit ae7d1da) and a folder to work in:

    PYTHONPATH=CHECKOUT_OF_ae7d1da python tests/old/make.py WORK tests/old/v0_1_0.tar.xz
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import soundfile

GENRES = ("blues", "jazz", "rock")
KEPT = ("shards", "runs", "tiny.json")
TINY = {
    "model_type": "wav2vec2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
}


def call(*words: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


def tracks(folder: Path) -> None:
    rng, lines = np.random.default_rng(0), ["track,artist"]
    for k, genre in enumerate(GENRES):
        (folder / genre).mkdir(parents=True)
        for number in range(5):
            time = np.arange(8000) / 16_000
            wave = 0.3 * np.sin(2 * np.pi * (200 + 150 * k + 7 * number) * time)
            wave += 0.01 * rng.normal(size=8000)
            soundfile.write(folder / genre / f"{genre}.{number:05d}.wav", wave, 16_000)
            lines.append(f"{genre}.{number:05d},{genre} artist {number}")
    (folder.parent / "artists.csv").write_text("\n".join(lines) + "\n")


def main() -> None:
    work, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    work.mkdir(parents=True)
    os.chdir(work)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    tracks(work / "tracks")
    Path("tiny.json").write_text(json.dumps(TINY))
    cut = ("--segment-s", 0.25, "--hop-s", 0.25, "--split", "stratified")
    groups = ("--groups", "artists.csv")
    call("mgc_dist.shard", "--data", "tracks", "--out", "shards", *cut, *groups)
    call("mgc_dist.bias", "--shards", "shards", "--backbone", "logmel", "--folds", 2)
    flags = ("--shards", "shards", "--global-batch", 4, "--micro-batch", 4, "--device", "cpu")
    flags += ("--zero-stage", 2, "--keep-checkpoints", 1, "--log-every-steps", 1)
    wav2vec2 = ("--model", "tiny.json", "--freeze", "feature_encoder", "--cache", "cnn")
    call("mgc_dist.train", *flags, *wav2vec2, "--epochs", 2, "--run", "runs/done")
    # a run that its time limit ends after a step or two, and that can go on
    stopped = ("--freeze", "none", "--model", "logmel-cnn", "--epochs", 3)
    call("mgc_dist.train", *flags, *stopped, "--run", "runs/stopped", "--time-limit-s", 0.1)
    call("mgc_dist.evaluate", "runs/done", "--device", "cpu")
    with tarfile.open(out, "w:xz") as tar:
        for name in KEPT:
            tar.add(name, filter=kept)


def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what is only looked at."""
    is_view = member.name.endswith((".png", ".html")) or "tensorboard" in member.name
    return None if is_view else member


if __name__ == "__main__":
    main()
