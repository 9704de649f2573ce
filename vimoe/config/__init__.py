"""Settings of a run: model, MoE layers, data and training. Nothing here imports torch."""

from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig

__all__ = ["DataConfig", "LayerBench", "MoEConfig", "ModelBench", "ModelConfig", "TrainConfig"]
