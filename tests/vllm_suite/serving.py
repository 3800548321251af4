"""vLLM gives exactly what `generate` of transformers gives, whatever else it serves at the same time.

Not collected by `make test`: `make test-vllm` makes an environment with vLLM and runs it there.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_vllm.families import SERVED
from tests.core.tiny import BOUNDED, MIXED, MIXTURE, RINGS, SETTINGS, tiny_tokenizer
from tests.vllm_suite.engines import (
    LENGTHS,
    NEW,
    assert_same,
    engine,
    generated,
    prompts,
    sampling,
    served,
    server,
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
}


def check(folder: Path, family: str, settings: LinearizeConfig, **changes: Any) -> None:
    model, given = student(folder, family, settings, **changes), prompts(LENGTHS)
    # Before vLLM changes classes of transformers.
    expected = [generated(model, prompt) for prompt in given]
    with engine(folder) as llm:
        outputs = served(llm, given)
    for output, text in zip(outputs, expected, strict=True):
        assert_same(text_of(output), text)


@pytest.mark.parametrize("family", SERVED)
def test_every_family_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    # Scores that are bounded where they are large; not so large that rounding shows.
    changes = {"gemma2": {"attn_logit_softcapping": 5.0}, "granite": {"attention_multiplier": 0.2}}
    check(tmp_path, family, MIXTURE, **changes.get(family, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_gives_the_tokens_of_transformers(kind: str, tmp_path: Path) -> None:
    check(tmp_path, "llama", KINDS[kind])


@pytest.mark.parametrize("settings", [MIXTURE, SETTINGS, RINGS], ids=["kept heads", "nothing kept", "rings"])
def test_a_prompt_from_the_prefix_cache_continues_as_one_that_was_read(settings: Any, tmp_path: Path) -> None:
    model = student(tmp_path, "llama", settings, max_position_embeddings=4096)
    (first,) = prompts([3000])
    other = first[:2900] + prompts([100], seed=7)[0]
    expected = {name: generated(model, each, 8) for name, each in (("first", first), ("other", other))}
    with engine(tmp_path, max_model_len=4096, max_num_batched_tokens=1024) as llm:
        for name, prompt in (("first", first), ("other", other)):
            # vLLM keeps a state where it has seen that prompts agree, so it may take a third time.
            outputs = [served(llm, [prompt], 8)[0] for _ in range(3)]
            assert outputs[2].num_cached_tokens > 2000
            for output in outputs:
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
    with engine(tmp_path, max_num_seqs=16, max_num_batched_tokens=256, enable_prefix_caching=False) as llm:
        outputs = served(llm, given, 8)
    for prompt, output in zip(given, outputs, strict=True):
        assert_same(text_of(output), generated(model, prompt, 8))


def test_requests_that_lose_their_pages_are_read_again(tmp_path: Path) -> None:
    model, given = student(tmp_path, "llama", MIXTURE), prompts([200] * 6)
    with engine(tmp_path, num_gpu_blocks_override=20, disable_log_stats=False) as llm:
        outputs = served(llm, given, 100)
        lost = sum(each.value for each in llm.get_metrics() if each.name == "vllm:num_preemptions")
    assert lost > 0
    for prompt, output in zip(given, outputs, strict=True):
        assert_same(text_of(output), generated(model, prompt, 100))


def test_without_the_plugin_a_student_is_refused_and_not_served_with_softmax(tmp_path: Path) -> None:
    student(tmp_path, "llama", SETTINGS)
    options = "skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, trust_remote_code=True"
    command = [sys.executable, "-c", f"from vllm import LLM; LLM({str(tmp_path)!r}, {options})"]
    run = subprocess.run(command, env={**os.environ, "VLLM_PLUGINS": ""}, capture_output=True, text=True)
    assert run.returncode != 0
    assert "lolcats_hybrid" in run.stderr


def test_the_server_answers_the_openai_client(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = student(tmp_path, "llama", MIXTURE, vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    with server(tmp_path) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        text = "def return import the quick brown fox " * 6
        options: Any = {"model": str(tmp_path), "max_tokens": NEW, "temperature": 0, "extra_body": {"ignore_eos": True}}
        answer = client.completions.create(prompt=text, **options)
        streamed = client.completions.create(prompt=text, stream=True, **options)
        pieces = "".join(each.choices[0].text for each in streamed)
        messages: Any = [{"role": "user", "content": "fox"}]
        chat = client.chat.completions.create(messages=messages, **options)

    def expected(ids: list[int]) -> str:
        return tokenizer.decode(generated(model, ids).tokens, skip_special_tokens=True)

    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    found = {answer.choices[0].text, pieces, expected(tokenizer(text).input_ids)}
    found_chat = {chat.choices[0].message.content, expected(ids)}
    # The server leaves out a character that is not complete at the end.
    assert len({each.rstrip("\N{REPLACEMENT CHARACTER}") for each in found}) == 1
    assert len({each.rstrip("\N{REPLACEMENT CHARACTER}") for each in found_chat}) == 1


def test_a_model_in_bfloat16_keeps_its_sums_in_float32(tmp_path: Path) -> None:
    model, given = student(tmp_path, "llama", MIXTURE), prompts(range(20, 140, 5))
    exact = [generated(model, prompt, 1).logprobs[0] for prompt in given]
    rounded = [generated(model.to(torch.bfloat16), prompt, 1).logprobs[0] for prompt in given]
    with engine(tmp_path, dtype="bfloat16") as llm:
        found = [text_of(output).logprobs[0] for output in served(llm, given, 1)]
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        states = [layer.kv_cache for layer in layers.values() if isinstance(layer.kv_cache, tuple)]
    assert {tuple(row.dtype for row in state) for state in states} == {(torch.float32, torch.bfloat16)}
    error, usual = (sum(abs(a - b) for a, b in zip(each, exact, strict=True)) for each in (found, rounded))
    assert error < 2 * usual


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
