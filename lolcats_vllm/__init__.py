"""Linearized models in vLLM: the plugin behind the entry point `vllm.general_plugins`.

vLLM does the batching, the paging and the HTTP server; this package gives it the attention of a linearized model
(docs/serving.md).
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM which architectures there are; vLLM calls it in each of its processes.

    What cannot be served is registered as well and refused by its hooks, in one line and before weights are loaded.
    Nothing is refused here: vLLM calls this for models of others, too.
    """
    import vllm
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import lolcats_core.model.modeling  # noqa: F401  registers the configurations with transformers
    from lolcats_core.model.families import FAMILIES
    from lolcats_vllm.families import SERVED, architecture
    from lolcats_vllm.hooks import Hooks
    from lolcats_vllm.refusals import is_tested

    for name in FAMILIES:
        # A class that exists wherever nothing of it will be used.
        place = "vllm.model_executor.models.llama:LlamaForCausalLM"
        if name in SERVED and is_tested(vllm.__version__):
            place = f"lolcats_vllm.models:{architecture(name)}"
        vllm.ModelRegistry.register_model(architecture(name), place)
        MODELS_CONFIG_MAP[architecture(name)] = Hooks
