"""The cost model: what fits, what is best, and how costs scale."""

from __future__ import annotations

from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import Params, presets
from lolcats_core.estimation.cost import GPUS, HOST_SECONDS, WEIGHT_RATE, parse_gpus, parse_tokens, plan
from lolcats_core.estimation.memory import GIB, KNOWN_MODELS, ModelShape, streamed_memory, train_memory, transfer_mode
from lolcats_core.model.families import FAMILIES
from tests.core.estimation.test_doctor import preset
from tests.core.tiny import tiny_teacher

SHAPES = {name: KNOWN_MODELS[preset(name).teacher.source] for name in presets()}


def modes(params: Params, shape: ModelShape, *gpus: Any, tokens: int = 20_000_000) -> dict[tuple[str, str], Any]:
    return {(choice.stage, choice.mode): choice for choice in plan(params, shape, tokens, *gpus)}


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_has_a_plan_for_stage_1_on_one_gpu(name: str) -> None:
    best = {c.stage: c for c in plan(preset(name), SHAPES[name], 20_000_000, 1, "h200") if c.best}
    assert best["transfer"].mode in ("joint", "streamed")
    assert best["transfer"].memory < 0.9 * 139 * GIB


def test_streamed_stage_1_of_405b_needs_one_layer_and_a_buffer() -> None:
    params, shape = preset("llama3_1_405b"), SHAPES["llama3_1_405b"]
    choices = modes(params, shape, 1, "h200")
    streamed = choices["transfer", "streamed"]
    assert streamed.fits
    assert streamed.memory < 40 * GIB
    assert streamed.disk == 10_000_000 * shape.hidden * 2  # two epochs of ten million tokens
    assert not choices["transfer", "joint"].fits
    assert streamed.memory == streamed_memory(params, ModelShape(**{**vars(shape), "layers": 1000}))


def test_more_gpus_take_less_time_and_less_of_the_weights() -> None:
    params, shape = preset("llama3_1_70b"), SHAPES["llama3_1_70b"]
    two, eight = modes(params, shape, 2, "h200"), modes(params, shape, 8, "h200")
    for key in (("transfer", "joint, divided"), ("finetune", "divided, checkpointing")):
        if key in two:
            # A rank of eight gathers seven eighths of the weights in a quarter of the steps, one of two a half.
            assert two[key].seconds / 4 < eight[key].seconds < two[key].seconds
            assert eight[key].memory < two[key].memory


@pytest.mark.parametrize(("stage", "mode", "gathers"), [("transfer", "joint", 1), ("finetune", "whole", 2)])
def test_dividing_the_weights_costs_the_time_of_gathering_them_in_every_pass(
    stage: str, mode: str, gathers: int
) -> None:
    params = preset("llama3_1_8b", **{"transfer.batch_size": 32, "finetune.batch_size": 32})
    shape = SHAPES["llama3_1_8b"]
    divided = modes(params, shape, 2, "h100")[stage, "joint, divided" if stage == "transfer" else "divided"]
    alone = modes(params, shape, 1, "h100")[stage, mode]
    passes = 20_000_000 / (32 * params.data.sequence_length)
    half = shape.layers * shape.layer_parameters * 2 / 2
    assert divided.seconds == pytest.approx(alone.seconds / 2 + gathers * passes * half / GPUS["h100"].link)


def test_several_gpus_divide_the_layers_and_the_rows_but_not_the_embeddings() -> None:
    params, shape = preset("llama3_1_8b", **{"finetune.batch_size": 8}), SHAPES["llama3_1_8b"]
    layers, own = 2 * shape.layers * shape.layer_parameters, 2 * shape.parameters
    one, four = (modes(params, shape, gpus, "h200") for gpus in (1, 4))
    graph = one["finetune", "whole, checkpointing"].memory - own
    found = four["finetune", "divided, checkpointing"].memory
    held = layers / 4 + 2 * 2 * shape.layer_parameters + own - layers
    assert held + graph / 8 < found < held + graph  # the graph is that of two rows instead of eight


def test_a_quantized_base_makes_70b_fit_where_the_whole_does_not() -> None:
    choices = modes(preset("llama3_1_70b"), SHAPES["llama3_1_70b"], 1, "h200")
    assert not choices["finetune", "whole, checkpointing"].fits
    assert choices["finetune", "quantized, checkpointing"].best
    assert choices["finetune", "quantized, checkpointing"].memory < 60 * GIB


@pytest.mark.parametrize(
    ("stage", "mode"), [("transfer", "joint"), ("transfer", "streamed"), ("finetune", "whole, checkpointing")]
)
def test_few_rows_a_step_cost_the_hosts_time_and_many_do_not(stage: str, mode: str) -> None:
    shape = SHAPES["llama3_1_8b"]

    def hours(rows: int) -> float:
        params = preset("llama3_1_8b", **{"transfer.batch_size": rows, "finetune.batch_size": rows})
        return modes(params, shape, 1, "h200")[stage, mode].seconds / 3600

    steps = 20_000_000 / preset("llama3_1_8b").data.sequence_length
    assert hours(1) >= steps * shape.layers * HOST_SECONDS[stage] / 3600
    assert hours(1) > 1.5 * hours(2)
    assert hours(64) == hours(128)


def test_a_streamed_run_of_few_tokens_takes_the_time_of_reading_the_weights() -> None:
    shape = SHAPES["llama3_1_405b"]
    weights = 2 * shape.layers * shape.layer_parameters
    few = modes(preset("llama3_1_405b"), shape, 1, "h200", tokens=10_000)["transfer", "streamed"]
    assert weights / WEIGHT_RATE < few.seconds < 1.2 * weights / WEIGHT_RATE


def test_the_mode_is_chosen_by_what_fits_unless_it_is_given() -> None:
    params, shape = preset("llama3_1_8b"), SHAPES["llama3_1_8b"]
    need = train_memory(params, shape)["transfer"]
    assert transfer_mode(params, shape, 2 * need) == "joint"
    assert transfer_mode(params, shape, need) == "streamed"
    assert transfer_mode(preset("llama3_1_8b", **{"compute.processes": 4}), shape, need) == "joint"  # weights divided
    assert transfer_mode(preset("llama3_1_8b", **{"transfer.mode": "joint"}), shape, 1.0) == "joint"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_can_be_told_for_every_family(family: str) -> None:
    model = tiny_teacher(family)
    shape = ModelShape.from_config(model.config)
    assert (shape.layers, shape.heads, shape.hidden) == (3, 4, 32)
    assert transfer_mode(Params(), shape, 1e12) == "joint"


def test_gpus_and_tokens_are_read_and_refused_by_name() -> None:
    assert (parse_gpus("8xH100"), parse_gpus("h200")) == ((8, "h100"), (1, "h200"))
    assert [parse_tokens(text) for text in ("20M", "1.5k", "7", "2B")] == [20_000_000, 1500, 7, 2_000_000_000]
    for text in ("0xh100", "3xtpu", "many"):
        with pytest.raises(UserError, match=r"takes such as 1xh200 .*got"):
            parse_gpus(text)
    with pytest.raises(UserError, match="takes such as 20M, got '0M'"):
        parse_tokens("0M")
