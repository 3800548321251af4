"""The registered model's code: loads the linearized model that was logged beside it and completes prompts.

MLflow stores this file with the model ("models from code") and runs it where the model is loaded, with `lolcats_core`
and `lolcats_kernels` from the model's own ``code`` directory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

# Prompts that are completed at once, and tokens of theirs, padding included: one of them is always allowed.
ROWS, TOKENS = 32, 16_384


class LinearizedModel(PythonModel):
    """Completes text. Input: a list of prompts or a data frame whose first column holds them; output: one completion
    per prompt, without the prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load tokenizer and weights (safetensors only) from the artifact ``model``."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import lolcats_core  # noqa: F401  (registers the model type)

        path = context.artifacts["model"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
        self.model = model.to(device).eval()
        self.lock = threading.Lock()  # a server may ask from several threads, and a model decodes for one at a time

    # MLflow reads this hint and would warn about a union; lists arrive too, as the signature says.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Parameters: `max_new_tokens` (64), `temperature` (0 decodes greedily) and `seed` for sampling."""
        import torch

        options = {"max_new_tokens": 64, "temperature": 0.0, "seed": 0, **(params or {})}
        rows = [self.tokenizer(prompt).input_ids for prompt in _prompts(model_input)]
        if not all(rows):
            raise ValueError("a prompt must hold at least one token, got an empty one")
        size, heat = int(options["max_new_tokens"]), float(options["temperature"])
        texts = [""] * len(rows)
        with self.lock:
            torch.manual_seed(int(options["seed"]))
            for batch in batches(list(map(len, rows))):
                for index, text in zip(batch, self._complete([rows[i] for i in batch], size, heat), strict=True):
                    texts[index] = text
        return texts

    def _complete(self, rows: list[list[int]], max_new_tokens: int, temperature: float) -> list[str]:
        import torch

        from lolcats_core import graphed_decoding
        from lolcats_core.evaluation.generation import end_tokens, until_end

        ends = end_tokens(self.model, self.tokenizer)
        padding = self.tokenizer.pad_token_id
        padding = min(ends, default=0) if padding is None else padding
        longest = max(map(len, rows))
        ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        with graphed_decoding(self.model):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                **({"do_sample": False} | sampling),
            )
        # A row that ends before the others is filled up behind its end.
        written = [row[: len(until_end(row, ends)) + 1] for row in out[:, longest:].tolist()]
        return [str(text) for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]


def batches(lengths: list[int]) -> list[list[int]]:
    """Places of prompts by batch, those of like length together."""
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        # The newest is the longest.
        if found and len(found[-1]) < ROWS and (len(found[-1]) + 1) * lengths[place] <= TOKENS:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def _prompts(model_input: Any) -> Iterable[str]:
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "iloc"):  # a pandas data frame or series
        column = model_input.iloc[:, 0] if model_input.ndim == 2 else model_input
        return [str(value) for value in column]
    return [str(value["prompt"] if isinstance(value, dict) else value) for value in model_input]


mlflow.models.set_model(LinearizedModel())
