"""Tiny students, what transformers generates with them, and vLLM engines that serve them."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory

from lolcats_common.linearize_config import LinearizeConfig
from tests.core.tiny import tiny_student, tokens

# vLLM's kernels want heads of at least 32.
SHAPE = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 512}
# One token; within the window; beyond it, within and beyond a step of 64 tokens.
LENGTHS = (1, 5, 40, 129, 300)
NEW = 24


@dataclass(frozen=True)
class Text:
    """What came of one prompt: greedy tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random ones."""
    return [tokens(1, length, seed + i)[0].tolist() for i, length in enumerate(lengths)]


def student(folder: Path, family: str, settings: LinearizeConfig, **changes: Any) -> Any:
    """A random student, saved in `folder`."""
    model = tiny_student(family, settings, **{**SHAPE, **changes})
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def generated(model: Any, prompt: Sequence[int], new: int = NEW) -> Text:
    """By `generate` of transformers."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **options)
    logprobs = [float(logits[0].float().log_softmax(-1).max()) for logits in out.logits]
    return Text(out.sequences[0, len(prompt) :].tolist(), logprobs)


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """vLLM in this process, in float32, with steps of at most 64 tokens."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "skip_tokenizer_init": True,
    }
    llm = LLM(str(folder), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of vLLM's HTTP server, which compiles the model; ended with its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def sampling(new: int = NEW) -> SamplingParams:
    """Greedy, to the last token."""
    return SamplingParams(max_tokens=new, temperature=0, logprobs=1, ignore_eos=True, detokenize=False)


def text_of(output: Any) -> Text:
    """Of vLLM's output for one prompt."""
    (only,) = output.outputs
    logprobs = [max(each.logprob for each in step.values()) for step in only.logprobs]
    return Text(list(only.token_ids), logprobs)


def served(llm: LLM, given: Sequence[Sequence[int]], new: int = NEW) -> list[Any]:
    """vLLM's outputs for prompts that it gets at once."""
    return llm.generate([TokensPrompt(prompt_token_ids=list(each)) for each in given], sampling(new), use_tqdm=False)


def assert_same(found: Text, expected: Text, tolerance: float = 2e-4) -> None:
    """Equal tokens, and log-probabilities within `tolerance`."""
    assert found.tokens == expected.tokens
    worst = max(abs(a - b) for a, b in zip(found.logprobs, expected.logprobs, strict=True))
    assert worst < tolerance, worst
