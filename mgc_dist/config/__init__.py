"""Every knob of every command, typed; nothing here imports torch, so `--help` is quick.

A configuration is read-only after parsing. Flags are the field names without their section
(`--global-batch`, not `--optim.global-batch`), so a field name is used once per command.
"""

from mgc_dist.config.audit import AuditConfig
from mgc_dist.config.augment import AugmentConfig
from mgc_dist.config.bias import BiasConfig
from mgc_dist.config.exam import ExamConfig
from mgc_dist.config.losses import LossConfig, LossName
from mgc_dist.config.packing import ArtefactName, InfoConfig, ShardConfig, SynthConfig, VerifyConfig
from mgc_dist.config.probe import HeadName, ProbeConfig
from mgc_dist.config.scoring import (
    Aggregate,
    CompareConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
)
from mgc_dist.config.source import FOREIGN_TABLES, Device, SourceConfig, SplitName
from mgc_dist.config.train import (
    Cache,
    CacheDtype,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    RunConfig,
    Select,
    TrainConfig,
)

__all__ = [
    "FOREIGN_TABLES",
    "Aggregate",
    "ArtefactName",
    "AuditConfig",
    "AugmentConfig",
    "BiasConfig",
    "Cache",
    "CacheDtype",
    "CompareConfig",
    "DataConfig",
    "Device",
    "DoctorConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExamConfig",
    "ExportConfig",
    "HeadName",
    "InfoConfig",
    "LossConfig",
    "LossName",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "PredictConfig",
    "ProbeConfig",
    "RunConfig",
    "Select",
    "ShardConfig",
    "SourceConfig",
    "SplitName",
    "SynthConfig",
    "TrainConfig",
    "VerifyConfig",
]
