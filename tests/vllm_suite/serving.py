"""vLLM gives exactly what `generate` of transformers gives, whatever else it serves at the same time.

Not collected by `make test`: `make test-vllm` makes an environment with vLLM and runs it there.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_vllm.families import SERVED
from tests.core.tiny import BOUNDED, MIXED, MIXTURE, RINGS, SETTINGS
from tests.vllm_suite.engines import (
    LENGTHS,
    assert_same,
    engine,
    generated,
    prompts,
    sampling,
    served,
    student,
    text_of,
)

KINDS = {
    "published": SETTINGS,
    "kept layers and heads": MIXED,
    "bounded": BOUNDED,
    "rings": RINGS,
    "sliding": LinearizeConfig(window="sliding", window_size=8, feature_dim=8, window_sinks=2, softmax_heads={0: (0,)}),
    "no window": LinearizeConfig(window="none", feature_dim=8),
    "affine": LinearizeConfig(
        window_size=8, feature_dim=8, linear_factor="affine", feature_map="t2r", feature_map_bias=True
    ),
    "all but one layer": LinearizeConfig(window_size=8, feature_dim=8, softmax_layers=(0, 2)),
    "every layer": LinearizeConfig(softmax_layers=(0, 1, 2)),
}


def check(folder: Path, family: str, settings: LinearizeConfig, **changes: Any) -> None:
    model, given = student(folder, family, settings, **changes), prompts(LENGTHS)
    with engine(folder) as llm:
        outputs = served(llm, given)
    for prompt, output in zip(given, outputs, strict=True):
        assert_same(text_of(output), generated(model, prompt))


@pytest.mark.parametrize("family", SERVED)
def test_every_family_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    changes = {"attn_logit_softcapping": 5.0} if family == "gemma2" else {}
    check(tmp_path, family, MIXTURE, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_gives_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    check(tmp_path, "llama", KINDS[kind])


@pytest.mark.parametrize("settings", [MIXTURE, SETTINGS, RINGS], ids=["kept heads", "nothing kept", "rings"])
def test_a_prompt_from_the_prefix_cache_continues_as_one_that_was_read(settings: Any, tmp_path: Path) -> None:
    model = student(tmp_path, "llama", settings, max_position_embeddings=4096)
    (first,) = prompts([3000])
    other = first[:2900] + prompts([100], seed=7)[0]
    expected = {length: generated(model, each, 8) for length, each in (("first", first), ("other", other))}
    with engine(tmp_path, max_model_len=4096, max_num_batched_tokens=1024) as llm:
        for name, prompt, cached in (("first", first, False), ("first", first, True), ("other", other, True)):
            (output,) = served(llm, [prompt], 8)
            assert (output.num_cached_tokens > 0) == cached
            assert_same(text_of(output), expected[name])


def test_requests_that_are_aborted_leave_no_trace(tmp_path: Path) -> None:
    model, given = student(tmp_path, "llama", MIXTURE), prompts([40, 129, 90, 200, 33, 61])
    with engine(tmp_path, max_num_seqs=3) as llm:
        core, found = llm.llm_engine, {}
        for i, prompt in enumerate(given[:4]):
            core.add_request(str(i), {"prompt_token_ids": prompt}, sampling())
        steps = 0
        while core.has_unfinished_requests():
            found |= {each.request_id: text_of(each) for each in core.step() if each.finished}
            steps += 1
            if steps in (2, 7):
                # In the middle of its prompt, and of its answer; others take its pages.
                core.abort_request([str(1 if steps == 2 else 0)])
                core.add_request(str(2 + steps), {"prompt_token_ids": given[4 if steps == 2 else 5]}, sampling())
    whose = {"2": 2, "3": 3, "4": 4, "9": 5}
    assert found.keys() == whose.keys()
    for name, index in whose.items():
        assert_same(found[name], generated(model, given[index]))


def test_two_hundred_requests_each_get_their_own_answer(tmp_path: Path) -> None:
    draw = random.Random(0)
    model, given = student(tmp_path, "llama", MIXTURE), prompts([draw.randint(1, 150) for _ in range(200)])
    with engine(tmp_path, max_num_seqs=16, max_num_batched_tokens=256) as llm:
        outputs = served(llm, given, 8)
    for prompt, output in zip(given, outputs, strict=True):
        assert_same(text_of(output), generated(model, prompt, 8))


def test_a_model_in_bfloat16_keeps_its_sums_in_float32(tmp_path: Path) -> None:
    model, given = student(tmp_path, "llama", MIXTURE).to(torch.bfloat16), prompts(LENGTHS)
    with engine(tmp_path, dtype="bfloat16") as llm:
        outputs = served(llm, given, 1)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        states = [layer.kv_cache for layer in layers.values() if isinstance(layer.kv_cache, tuple)]
    assert {tuple(row.dtype for row in state) for state in states} == {(torch.float32, torch.bfloat16)}
    for prompt, output in zip(given, outputs, strict=True):
        found, expected = text_of(output), generated(model, prompt, 1)
        assert abs(found.logprobs[0] - expected.logprobs[0]) < 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_parallel_size": 2}, "`--tensor-parallel-size` of a linearized model must be 1"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "cannot take back the tokens"),
        ({"enable_lora": True}, "merge the adapters"),
        ({"kv_cache_dtype": "fp8"}, "`--kv-cache-dtype` of a linearized model must be auto"),
    ],
)
def test_options_that_do_not_go_with_a_state_are_refused_in_one_line(options: Any, reason: str, tmp_path: Path) -> None:
    student(tmp_path, "llama", SETTINGS)
    with pytest.raises((UserError, ValueError), match=reason), engine(tmp_path, **options):
        pass


def test_a_family_without_a_class_of_vllm_is_refused_by_name(tmp_path: Path) -> None:
    student(tmp_path, "glm", SETTINGS)
    with pytest.raises((UserError, ValueError), match="family 'glm' are not served"), engine(tmp_path):
        pass
