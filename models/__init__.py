"""The nouns: types, config, zoo, block, lm; mixers, channels, memories; hf for exchange."""

from models.config import ModelConfig, model_config
from models.errors import UserError
from models.lm import LM, LMState, Output, build, meta_model
from models.types import Batch

__all__ = ["LM", "Batch", "LMState", "ModelConfig", "Output", "UserError", "build", "meta_model", "model_config"]
