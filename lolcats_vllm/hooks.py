"""What vLLM calls between reading a linearized model's configuration and making its engine."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from lolcats_vllm.families import teacher_family
from lolcats_vllm.refusals import check_model, check_options, check_version


class Hooks(VerifyAndUpdateConfig):
    """Refuses what would be served wrongly; called in this order."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        check_version(vllm.__version__)
        config = model_config.hf_config
        check_model(config)
        # vLLM takes a model whose layers are all called "full_attention" for one without states (`is_hybrid`).
        config.layer_kinds = getattr(config, "layer_types", None)
        if set(config.layer_kinds or ()) == {"full_attention"}:
            config.layer_types = None

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        check_version(vllm.__version__)
        check_options(engine_options(vllm_config))


def engine_options(vllm_config: Any) -> dict[str, Any]:
    """What `check_options` looks at, by the names of vLLM's flags."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    return {
        "--tensor-parallel-size": parallel.tensor_parallel_size,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size or 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size or 1,
        "--speculative-config": None
        if vllm_config.speculative_config is None
        else vllm_config.speculative_config.method,
        "--enable-lora": vllm_config.lora_config is not None,
        "--kv-transfer-config": None
        if vllm_config.kv_transfer_config is None
        else vllm_config.kv_transfer_config.kv_connector,
        "--kv-cache-dtype": cache.cache_dtype,
        "--quantization": model.quantization,
        "--runner": model.runner_type,
        "--mamba-cache-mode": cache.mamba_cache_mode,
        "graphs": current_platform.is_cuda_alike() and not model.enforce_eager,
        "dtype": str(model.dtype).removeprefix("torch."),
        "family": teacher_family(model.hf_config),
    }
