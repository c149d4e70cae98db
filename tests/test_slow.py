"""The real size without the real weights: wav2vec2-large, two ranks, ZeRO-2. 13 GB of memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import shard_config, write_tracks
from metrics import read_metrics
from test_launcher import call
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from mgc_dist import shard
from mgc_dist.journal import read_status
from mgc_dist.models.folder import load_exported

LARGE = {  # facebook/wav2vec2-large-960h-lv60-self's config.json, layerdrop and dropouts included
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_bias": True,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "layerdrop": 0.1,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.1,
    "mask_time_prob": 0.05,
    "vocab_size": 32,
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_large_model_trains_two_steps_on_two_ranks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = tmp_path / "wav2vec2-large"
    source = Wav2Vec2ForCTC(Wav2Vec2Config(**LARGE))
    assert sum(p.numel() for p in source.wav2vec2.parameters()) == 315_438_720
    source.save_pretrained(saved)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(saved)
    del source
    write_tracks(tmp_path / "tracks", duration_s=3.1)
    shards = tmp_path / "shards"
    shard.run(shard_config(tmp_path / "tracks", shards, segment_s=3.0, hop_s=1.5))

    run = tmp_path / "run"
    bias = call("launch/bias.py", "--shards", shards, "--backbone", "logmel", "--folds", "2")
    assert bias.returncode == 0, bias.stderr
    flags = ["--shards", shards, "--run", run, "--model", saved, "--epochs", "0.66"]
    flags += ["--global-batch", "2", "--micro-batch", "1", "--log-every-steps", "1"]
    done = call("launch/train.py", "--preset", "gtzan", *flags, ranks=2, timeout_s=1200)
    assert done.returncode == 0, done.stdout + done.stderr

    steps = read_metrics(run, "step")
    assert [step["samples_seen"] for step in steps] == [2, 4]
    assert all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in steps)
    assert max(step["peak_memory_gib"] for step in steps) < 10
    assert read_status(run)["state"] == "done"
    manifest = json.loads(next(run.glob("checkpoints/step-*/MANIFEST.json")).read_text())
    assert (manifest["world"], manifest["zero_stage"]) == (2, 2)
    trained = load_exported(run / "best").net.wav2vec2.state_dict()
    started = Wav2Vec2ForCTC.from_pretrained(saved).wav2vec2.state_dict()
    for name, value in trained.items():
        frozen = name.startswith("feature_extractor.")
        if frozen:
            assert value.equal(started[name]), name
    moved = "encoder.layers.23.feed_forward.output_dense.weight"
    assert not trained[moved].equal(started[moved])
    shutil.rmtree(run)
