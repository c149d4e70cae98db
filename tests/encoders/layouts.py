"""Public code layouts of music models, in words of our own: a folder each, as the hub has them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2FeatureExtractor,
)

RATE = 24_000
SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 32, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 8},
    **{"num_conv_pos_embedding_groups": 2, "apply_spec_augment": False},
}
MERT_CONFIG = """from transformers import HubertConfig
class MERTConfig(HubertConfig):
    model_type = "mert_model"
    def __init__(self, feature_extractor_cqt=False, **settings):
        super().__init__(**settings)
        self.feature_extractor_cqt = feature_extractor_cqt
"""
MERT_MODEL = """import torch
from torch import nn
from transformers import HubertModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_MERT import MERTConfig
class Bands(nn.Module):
    def forward(self, wave):
        spectrum = torch.stft(wave, 320, 320, window=torch.ones(320, device=wave.device),
                              return_complex=True)
        return spectrum.abs()[:, :4].transpose(1, 2).log1p()
class MERTModel(HubertModel):
    config_class = MERTConfig
    base_model_prefix = "mert_model"
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.arange(1.0, 5.0), persistent=False)
        if config.feature_extractor_cqt:
            self.feature_extractor_cqt = Bands()
            self.join = nn.Linear(config.conv_dim[-1] + 4, config.conv_dim[-1])
        self.final_proj = nn.Linear(config.hidden_size, 8)
    def forward(self, input_values, output_hidden_states=False, **more):
        features = self.feature_extractor(input_values).transpose(1, 2)
        if self.config.feature_extractor_cqt:
            bands = self.feature_extractor_cqt(input_values)[:, : features.shape[1]]
            features = self.join(torch.cat([features, bands], dim=2))
        hidden = self._mask_hidden_states(self.feature_projection(features))
        found = self.encoder(hidden, output_hidden_states=output_hidden_states)
        states = getattr(found, "hidden_states", None)
        return BaseModelOutput(found[0] * self.table.sum(), states)
"""
"""As MERT-v1: HuBERT with a forward pass of its own, a layer that only pretraining uses, and where
the configuration says so a second reading of the waves."""
MERT_MAP = {"AutoConfig": "configuration_MERT.MERTConfig", "AutoModel": "modeling_MERT.MERTModel"}
MERT2_CONFIG = """from transformers import PretrainedConfig
class MERT2Config(PretrainedConfig):
    model_type = "mert_v2"
    def __init__(self, hidden_size=1280, num_hidden_layers=32, num_attention_heads=16,
                 num_bands=128, hidden_dropout=0.0, **settings):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_bands = num_attention_heads, num_bands
        self.hidden_dropout = hidden_dropout
        super().__init__(**settings)
"""
MERT2_MODEL = """import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_mert2 import MERT2Config
class Rotary(nn.Module):
    def __init__(self, width):
        super().__init__()
        rates = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
        self.register_buffer("rates", rates, persistent=False)
        self.seen, self.table = 0, None
    def forward(self, x):
        if x.shape[2] != self.seen:
            angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), self.rates)
            self.seen, self.table = x.shape[2], torch.cat([angles, angles], dim=1)
        half = x.shape[3] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=3)
        return x * self.table.cos().to(x.dtype) + turned * self.table.sin().to(x.dtype)
class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm, self.wide_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.rotary = Rotary(width // self.heads)
        self.dropout = nn.Dropout(config.hidden_dropout)
        wide = 4 * width
        self.wide = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))
    def forward(self, x):
        rows, frames, width = x.shape
        each = [p(self.norm(x)).view(rows, frames, self.heads, -1).transpose(1, 2)
                for p in (self.q_proj, self.k_proj, self.v_proj)]
        heard = nn.functional.scaled_dot_product_attention(
            self.rotary(each[0]), self.rotary(each[1]), each[2])
        x = x + self.dropout(self.out_proj(heard.transpose(1, 2).reshape(rows, frames, width)))
        return x + self.wide(self.wide_norm(x))
class Encoder(nn.Module):
    gradient_checkpointing = False
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
    def forward(self, x):
        states = [x]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x)
            else:
                x = layer(x)
            states.append(x)
        return self.norm(x), tuple(states)
class MERT2Model(PreTrainedModel):
    config_class = MERT2Config
    base_model_prefix = "mert2"
    supports_gradient_checkpointing = True
    def __init__(self, config):
        super().__init__(config)
        bands = config.num_bands
        self.register_buffer("window", torch.hann_window(960), persistent=False)
        self.front = nn.Sequential(nn.Conv1d(bands, config.hidden_size, 3, 2, 1), nn.GELU())
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.encoder = Encoder(config)
        self.predictor = nn.Linear(config.hidden_size, 32)
        self.post_init()
    def forward(self, input_values, attention_mask=None, output_hidden_states=False):
        spectrum = torch.stft(input_values.float(), 960, 240, window=self.window.float(),
                              return_complex=True).abs()
        bands = (spectrum[:, : self.config.num_bands] + 1e-3).log()
        last, states = self.encoder(self.front(bands.to(input_values.dtype)).transpose(1, 2))
        return BaseModelOutput(last, states if output_hidden_states else None)
"""
"""As MERT-v2: waves at 24 kHz, bands of its own, rotary positions in buffers that no checkpoint
holds, weights that only pretraining uses."""
MERT2_MAP = {
    "AutoConfig": "configuration_mert2.MERT2Config",
    "AutoModel": "modeling_mert2.MERT2Model",
}


def write_mert(folder: Path, before: str = "", seed: int = 0, **changes: Any) -> Path:
    """MERT v1; `before` runs when its code is imported."""
    torch.manual_seed(seed)
    net = HubertModel(HubertConfig(**SMALL))
    net.final_proj = nn.Linear(16, 8)
    if changes.get("feature_extractor_cqt"):
        net.join = nn.Linear(16 + 4, 16)
    net.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()) | changes
    written |= {"model_type": "mert_model", "architectures": ["MERTModel"], "auto_map": MERT_MAP}
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "configuration_MERT.py").write_text(before + MERT_CONFIG)
    (folder / "modeling_MERT.py").write_text(before + MERT_MODEL)
    return folder


def write_mert2(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """MERT v2."""
    folder.mkdir()
    (folder / "configuration_mert2.py").write_text(MERT2_CONFIG)
    (folder / "modeling_mert2.py").write_text(MERT2_MODEL)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_bands": 8}
    written = {"model_type": "mert_v2", "auto_map": MERT2_MAP} | sizes | changes
    (folder / "config.json").write_text(json.dumps(written))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    net = AutoModel.from_config(config, trust_remote_code=True)
    save_file(net.state_dict(), folder / "model.safetensors", {"format": "pt"})
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True).save_pretrained(folder)
    return folder


def write_muq(folder: Path, seed: int = 0) -> Path:
    """MuQ with random weights, saved by its own package."""
    from muq import MuQ, MuQConfig

    conformer = {
        **{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
        **{"num_hidden_layers": 2, "position_embeddings_type": "rotary"},
    }
    plain = json.loads(Wav2Vec2ConformerConfig(**conformer).to_json_string(use_diff=False))
    torch.manual_seed(seed)
    config = MuQConfig(
        encoder_dim=16,
        encoder_depth=2,
        conv_dim=8,
        stat={"melspec_2048_mean": 6.8, "melspec_2048_std": 18.4},
        w2v2_config=plain,
    )
    MuQ(config).save_pretrained(folder)
    return folder
