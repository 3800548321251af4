"""What the layers of one forward pass share: the cache, padding, packed documents and who observes the layers.

`prepare_inputs`, a hook before the decoder, makes one `HybridContext` per pass; every layer's attention receives it.

# B batch, T new tokens, S tokens so far, H query heads, Hk key/value heads, D head dim
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.feature_maps import FeatureMaps, Scores
from lolcats_core.model.transformers_versions import CACHE, CACHE_NAMES, given_cache
from lolcats_kernels.hybrid_attention import HybridConfig, HybridWeights, attend, transfer_error

ATTENTION_NAME = "lolcats_hybrid"  # in config.json
T = TypeVar("T")


def function_name(name: str) -> str:
    """What transformers knows an attention function of ours by in this process.

    Two checkpoints with code of their own do not share one.
    """
    return name if __name__.startswith("lolcats_core.") else f"{name}_{zlib.crc32(__name__.encode()):08x}"


@dataclass(frozen=True)
class LayerCall:
    """The attention of one linearized layer in one forward pass, as an observer is shown it.

    Attributes:
        index: of the layer. `maps`: its feature maps.
        q: [B, T, H, D]; `k`, `v`: [B, T, Hk, D]; of the linearized heads alone, after rotary embeddings.
        y_true: [B, T, H, D], the same heads' softmax output.
        scores: how the layer scales and bounds q k^T. `context`: of the pass.
    """

    index: int
    maps: FeatureMaps
    q: Tensor
    k: Tensor
    v: Tensor
    y_true: Tensor
    scores: Scores
    context: HybridContext

    def as_packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and y_true, flattened to one row where rows hold documents (at `context.cu_seqlens`)."""
        tensors = self.q, self.k, self.v, self.y_true
        if self.context.cu_seqlens is None:
            return tensors
        q, k, v, y_true = (x.flatten(0, 1)[None] for x in tensors)
        return q, k, v, y_true

    def positions(self) -> Tensor:
        """[T] of `as_packed`: each token's position in its sequence."""
        column = torch.arange(self.as_packed()[0].shape[1], device=self.q.device)
        starts = self.context.cu_seqlens
        return column if starts is None else column - starts[torch.bucketize(column, starts, right=True) - 1]

    def real(self) -> Tensor | None:
        """[B, T] of `as_packed`, False at padding; None where nothing is padded."""
        return None

    def attended(self, weights: HybridWeights, config: HybridConfig) -> Tensor:
        """The student's output in place of `y_true` of `as_packed`."""
        q, k, v, _ = self.as_packed()
        return cast(Tensor, attend(q, k, v, weights, config, cu_seqlens=self.context.cu_seqlens))

    def error(self, weights: HybridWeights, config: HybridConfig) -> Tensor:
        """Mean squared error of `attended`, in at least float32."""
        return transfer_error(*self.as_packed(), weights, config, cu_seqlens=self.context.cu_seqlens)


LayerObserver = Callable[[LayerCall], None]


def ignore_layer(call: LayerCall) -> None:
    """The observer of a pass that only needs the teacher's outputs."""


class computed_once(Generic[T]):
    """`functools.cached_property` without the lock of Python 3.11's, which torch.compile cannot trace."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value = self.compute(instance)
        setattr(instance, self.compute.__name__, value)  # found before this descriptor from now on
        return value


@dataclass
class HybridContext:
    """What the layers of one forward pass share.

    Attributes:
        cache: state to continue and to leave behind, or None.
        padding_mask: [B, S] bool, False at padding; None when nothing is padded.
        document_ids: [B, T] int, number of each token's document in its row, -1 at padding; None when every row is one
            document.
        observer: stage 1: every layer computes its softmax output, shows it here and passes it on (teacher forcing).
        past_length: number of tokens before the new ones, S - T.
    """

    cache: HybridCache | None = None
    padding_mask: Tensor | None = None
    document_ids: Tensor | None = None
    observer: LayerObserver | None = None
    past_length: int = 0
    _elsewhere: dict[torch.device, HybridContext] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device | str | int, **_: Any) -> HybridContext:
        """The same pass for layers on another device; accelerate asks for it where a model lies on several."""
        device = torch.device(device)
        tensors = [x for x in (self.padding_mask, self.document_ids) if x is not None]
        if all(tensor.device == device for tensor in tensors):
            return self
        if device not in self._elsewhere:
            mask, ids = (None if x is None else x.to(device) for x in (self.padding_mask, self.document_ids))
            self._elsewhere[device] = replace(self, padding_mask=mask, document_ids=ids)
        return self._elsewhere[device]

    @staticmethod
    def observed(observer: LayerObserver, position_ids: Tensor | None) -> HybridContext:
        """The context of a pass over whole rows, packed where `position_ids` [B, T] start again inside a row."""
        return HybridContext(observer=observer, document_ids=document_numbers(position_ids))

    @computed_once
    def new_padding_mask(self) -> Tensor | None:
        """[B, T], `padding_mask` of the new tokens; None when none of them is padding."""
        new = None if self.padding_mask is None else self.padding_mask[:, self.past_length :]
        return None if new is None or bool(new.all()) else new

    @computed_once
    def _real_first(self) -> Tensor | None:
        """[B, T] columns of the new tokens, real ones first and in their order; None when none of them is padding."""
        return None if self.new_padding_mask is None else real_first(self.new_padding_mask)

    def to_front(self, x: Tensor) -> Tensor:
        """x [B, T, H, D] with each row's real tokens in front, so that padding enters no chunk and no state."""
        order = self._real_first
        return x if order is None else x.gather(1, order[:, :, None, None].expand_as(x))

    def to_places(self, x: Tensor) -> Tensor:
        """The inverse of `to_front`, zero at padding."""
        order, real = self._real_first, self.new_padding_mask
        if order is None or real is None:
            return x
        placed = torch.empty_like(x).scatter(1, order[:, :, None, None].expand_as(x), x)
        return placed.masked_fill(~real[:, :, None, None], 0)

    @computed_once
    def cu_seqlens(self) -> Tensor | None:
        """[n + 1] boundaries of the documents in the flattened batch, or None; one tensor for all layers.

        Of rows with their real tokens in front; the padding behind them counts as a document.
        """
        if self.document_ids is None:
            return None
        ids = self.document_ids if self._real_first is None else self.document_ids.gather(1, self._real_first)
        starts = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        first = starts.flatten().nonzero()[:, 0]
        return torch.cat([first, first.new_tensor([ids.numel()])])


def document_numbers(position_ids: Tensor | None, real: Tensor | None = None) -> Tensor | None:
    """[B, T] number of each token's document where positions start again inside a row; None where none does.

    Args:
        position_ids: [B or 1, T], or None. real: [B, T], False at padding, whose positions say nothing and whose number
            is -1; None when nothing is padded.
    """
    if position_ids is None:
        return None
    if real is None:
        jumps = position_ids.diff(dim=-1) != 1
        return F.pad(jumps.cumsum(-1), (1, 0)) if bool(jumps.any()) else None
    order = real_first(real)
    ordered, present = position_ids.expand_as(real).gather(1, order), real.gather(1, order)
    jumps = (ordered.diff(dim=-1) != 1) & present[:, 1:]
    if not bool(jumps.any()):
        return None
    numbers = F.pad(jumps.cumsum(-1), (1, 0)).masked_fill(~present, -1)
    return torch.empty_like(numbers).scatter(1, order, numbers)


def real_first(real: Tensor) -> Tensor:
    """[B, T] columns of each row, those where `real` [B, T] is True first, in their order."""
    return (~real).to(torch.int8).argsort(dim=1, stable=True)


def check_attention(name: str | dict[str, str], own: str = ATTENTION_NAME) -> None:
    """Refuse every attention function but the one that a linearized model has.

    Raises:
        UserError: it is another one.
    """
    if name not in (own, function_name(own)):
        raise UserError(f"`attn_implementation` of a linearized model must be {own}, got {name!r}")


def checkpoints(decoder: Any) -> bool:
    """Whether a forward pass keeps the layers' inputs alone, for its backward pass to run them again."""
    return decoder.training and getattr(decoder, "gradient_checkpointing", False)


def _wants_cache(decoder: Any, asked: bool | None) -> bool:
    trains = decoder.training and torch.is_grad_enabled()
    return decoder.config.use_cache and not trains if asked is None else asked


@lru_cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments that a decoder's method takes by position; they differ between families."""
    return tuple(inspect.signature(forward).parameters)[1:]


def prepare_inputs(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the decoder: positions, cache and the `HybridContext` of the pass.

    A cache is made where one is asked for, and where `use_cache` is not given but in training, which needs none.

    Raises:
        UserError: a mask that is not [B, S], a foreign cache or attention function, attention weights are asked for, or
            a cache together with packed rows or with gradient checkpointing.
    """
    if kwargs.get("hybrid") is not None:
        return args, kwargs
    if args:
        args, kwargs = (), dict(zip(_positional(type(decoder).forward), args, strict=False)) | kwargs
    check_attention(decoder.config._attn_implementation)  # anyone who holds the configuration can change it
    if kwargs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise UserError("`output_attentions` of a linearized model must be False: it never builds attention weights")
    cache, kwargs = given_cache(kwargs), {name: x for name, x in kwargs.items() if name not in CACHE_NAMES}
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if cache is not None and not isinstance(cache, HybridCache):
        raise UserError(
            f"`{CACHE}` of a linearized model must be a HybridCache, got {type(cache).__name__}; leave it out, and"
            " `generate` or `use_cache=True` makes one"
        )
    if mask is not None and mask.dim() != 2:
        raise UserError(f"`attention_mask` of a linearized model must be [B, S], got {tuple(mask.shape)}")
    padding_mask = None if mask is None or bool(mask.bool().all()) else mask.bool()
    past_length = 0 if cache is None else cache.get_seq_length()
    document_ids = None
    if positions is None and padding_mask is not None:
        # Features depend on absolute positions, so padding must not count.
        kwargs["position_ids"] = (padding_mask.cumsum(1) - 1).clamp(min=0)[:, past_length:]
    elif positions is not None and past_length == 0 and positions.shape[-1] > 1:
        document_ids = document_numbers(positions, padding_mask)
    if document_ids is not None:
        rows = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        document_ids = document_ids.expand(len(rows), -1)
    obstacle = None
    if document_ids is not None:
        obstacle = "packed rows (`position_ids` start again inside a row), which leave no single state behind"
    elif checkpoints(decoder):
        obstacle = "gradient checkpointing, which runs every layer twice"
    if cache is not None and obstacle is not None:
        raise UserError(f"`{CACHE}` must be None with {obstacle}")
    if cache is None and obstacle is None and _wants_cache(decoder, kwargs.get("use_cache")):
        cache = HybridCache(decoder.config)
    kwargs[CACHE], kwargs["use_cache"] = cache, cache is not None
    kwargs["hybrid"] = HybridContext(cache, padding_mask, document_ids, past_length=past_length)
    return args, kwargs
