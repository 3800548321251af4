"""Running a model one layer at a time, each as the model's own decoder loop would call it.

Every family calls its layers in its own way (masks by layer type, rotary embeddings by layer type, scaled embeddings).
So the family's own forward runs with stubs in the place of its layers, and says with what it calls the one that is
wanted. Where every row is one document that depends on the shape of the batch alone, so it is asked once per layer.

# B batch, T tokens, d hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.model.forward_context import HybridContext
from lolcats_core.model.map_files import read_feature_maps
from lolcats_core.model.modeling import LinearizedMixin, empty_student
from lolcats_core.streaming.weights import Prefetcher, WeightFiles, drop, names_in, put, without_weights

# Positional and keyword arguments.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):
    """A forward pass has come to the layer that it was to reach, which would get `hidden` and the rest of `call`."""

    def __init__(self, hidden: Tensor, call: Arguments) -> None:
        self.hidden, self.call = hidden, call


class StopForward(Exception):
    """Raised by an observer that has what it wants: the rest of the forward pass is not computed."""


class _Stub(nn.Module):
    """Stands in for a layer: hands on `inject`, or what it got."""

    inject: Tensor | None = None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden if self.inject is None else self.inject


class _End(nn.Module):
    """Stands in for the layer at which a forward pass ends."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden, (args, kwargs))


class LayerwiseModel:
    """A model without weights (`without_weights`) whose parts get theirs when they run.

    Args:
        model: any supported softmax decoder or linearized model. Feature maps that `files` lacks are left to the
            caller, who fills them inside `layer`.
    """

    def __init__(self, model: PreTrainedModel, files: WeightFiles, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.files, self.device, self.dtype = model, files, device, dtype
        self.decoder: Any = cast(Any, model).base_model
        self.layers: list[nn.Module] = list(self.decoder.layers)
        self.names = [self._stored(names_in(model, layer)) for layer in self.layers]
        self.stubs = nn.ModuleList(_Stub() for _ in self.layers)
        table = cast(nn.Module, model.get_input_embeddings())
        behind = [m for m in self.decoder.children() if m not in (table, self.decoder.layers)]
        behind = [m for m in (*behind, model.get_output_embeddings()) if any(True for _ in m.parameters())]
        # Tied embeddings have one name; each end reads it for itself.
        self.ends = {"embedding": [(table, names_in(model, table))]}
        self.ends["head"] = [(m, names_in(model, m)) for m in behind]
        self.prefetcher = Prefetcher(files, device)
        # By layer and shape of the batch, while the layer has its weights.
        self.calls: dict[tuple[int, torch.Size], Arguments] = {}
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(device))

    @classmethod
    def open(
        cls,
        folder: Path | str,
        config: PreTrainedConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        settings: LinearizeConfig | None = None,
        maps: Path | None = None,
    ) -> LayerwiseModel:
        """The model in `folder`, softmax or linearized.

        Args:
            settings: linearize the softmax model in `folder` with these. maps: file of its feature maps.

        Raises:
            UserError: the weights are missing or damaged, or the settings do not fit the model or the maps.
        """
        if settings is not None and maps is not None:
            read_feature_maps(maps, settings.to_dict())

        def make() -> PreTrainedModel:
            if settings is not None:
                return empty_student(config, settings)
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))

        return cls(without_weights(make), WeightFiles(folder, extra=[maps] if maps else []), device, dtype)

    def _stored(self, names: dict[str, str]) -> dict[str, str]:
        return {name: stored for name, stored in names.items() if "feature_maps." not in name or stored in self.files}

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Layer `index` with its weights on the device; the next one's are read meanwhile."""
        layer = self.layers[index]
        put(layer, self.prefetcher.take(self.names[index]), self.device, self.dtype)
        if index + 1 < len(self.layers):
            self.prefetcher.start(self.names[index + 1])
        try:
            yield layer
        finally:
            self.calls.clear()
            drop(layer)

    @contextmanager
    def end(self, which: Literal["embedding", "head"]) -> Iterator[None]:
        """The input embedding on the device, or the final norm and the output embedding."""
        try:
            for module, names in self.ends[which]:
                put(module, self.prefetcher.take(names), self.device, self.dtype)
            yield
        finally:
            for module, _ in self.ends[which]:
                drop(module)

    @torch.no_grad()
    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Inputs of the first layer, [B, T, d]; inside `end("embedding")`."""
        hidden, _ = self._until(0, batch, input_ids=batch["input_ids"])
        return hidden

    @torch.no_grad()
    def forward_layer(
        self, index: int, hidden: Tensor, batch: dict[str, Tensor], observer: Any = None
    ) -> Tensor | None:
        """Outputs [B, T, d] of layer `index` on `hidden`; inside `layer(index)`.

        Args:
            batch: position_ids [B, T] for packed documents. observer: as in `HybridContext`; when it raises
                `StopForward` the answer is None.
        """
        positions = batch.get("position_ids")
        own: dict[str, Any] = {}
        if isinstance(self.model, LinearizedMixin):
            own["hybrid"] = HybridContext.observed(observer, positions)
        call = self.calls.get((index, hidden.shape)) if positions is None else None
        if call is None:
            _, call = self._until(index, batch, inputs_embeds=hidden, **own)
        if positions is None:
            self.calls[index, hidden.shape] = call
        args, kwargs = call
        try:
            out = self.layers[index](hidden, *args, **{**kwargs, **own})
        except StopForward:
            return None
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def logits(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Logits [B, T, V] of the last layer's outputs; inside `end("head")`."""
        last = _Stub()
        last.inject = hidden
        with self._in_place_of_layers(*self.stubs[:-1], last):
            positions = batch.get("position_ids")
            return self.model(inputs_embeds=hidden, position_ids=positions, use_cache=False).logits

    def _until(self, index: int, batch: dict[str, Tensor], **given: Any) -> tuple[Tensor, Arguments]:
        """What the decoder brings to layer `index` from the inputs `given`: hidden states, and the rest of the call."""
        with self._in_place_of_layers(*self.stubs[:index], _End(), *self.stubs[index + 1 :]):
            try:
                self.decoder(position_ids=batch.get("position_ids"), use_cache=False, **given)
            except _Reached as reached:
                return reached.hidden, reached.call
        raise AssertionError("a decoder's loop did not reach the layer")

    @contextmanager
    def _in_place_of_layers(self, *stubs: nn.Module) -> Iterator[None]:
        layers, self.decoder.layers = self.decoder.layers, nn.ModuleList(stubs)
        try:
            yield
        finally:
            self.decoder.layers = layers

    def close(self) -> None:
        self.prefetcher.close()
        self.files.close()
