"""LoLCATs as a library: linearize a pretrained decoder or vision transformer, train it, save it, load it.

Importing this package registers the linearized model types with transformers' Auto classes.
"""

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.training_params import FinetuneParams, ImageFinetuneParams, SelectParams, TransferParams
from lolcats_core.export.delta import load_delta, save_delta
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.decoding.decode_graph import graphed_decoding
from lolcats_core.model.map_files import load_feature_maps, save_feature_maps
from lolcats_core.model.modeling import linearize, supported_architectures
from lolcats_core.model.vision.modeling import image_rows
from lolcats_core.training.attention_transfer import attention_transfer
from lolcats_core.training.image_finetune import image_finetune
from lolcats_core.training.low_rank_finetune import low_rank_finetune
from lolcats_core.training.selection import select

__all__ = [
    "FinetuneParams",
    "HybridCache",
    "ImageFinetuneParams",
    "LinearizeConfig",
    "SelectParams",
    "TransferParams",
    "attention_transfer",
    "graphed_decoding",
    "image_finetune",
    "image_rows",
    "linearize",
    "load_delta",
    "load_feature_maps",
    "low_rank_finetune",
    "save_delta",
    "save_feature_maps",
    "select",
    "supported_architectures",
]
