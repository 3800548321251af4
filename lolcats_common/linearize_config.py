"""What a linearized model is made of: the settings that decide its parameters and its function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lolcats_common.errors import UserError

Window = Literal["terraced", "sliding", "tiled", "none"]
FeatureMap = Literal["hedgehog", "t2r", "elu"]
Combine = Literal["sum", "mixture"]
FeaturePositions = Literal["rotated", "unrotated"]
WINDOWS: tuple[str, ...] = ("terraced", "sliding", "none")
IMAGE_WINDOWS: tuple[str, ...] = ("tiled", "none")
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)
CHOICES: dict[str, tuple[str, ...]] = {
    "window": get_args(Window),
    "feature_map": FEATURE_MAPS,
    "combine": get_args(Combine),
    "feature_positions": get_args(FeaturePositions),
    "k_map_per": ("query_head", "kv_head"),
    "linear_factor": ("one", "affine"),
}
# Settings of earlier versions and the only value that still means what it did then.
RETIRED = {"feature_map_skip": False, "tie_qk": False}


@dataclass(frozen=True)
class LinearizeConfig:
    """Shape and initial values of the learnable linear attention (arXiv 2410.10254, sections 3.1 and 3.2).

    Attributes:
        window: which keys the softmax part sees. ``terraced``: own chunk (causal) and the whole previous chunk,
            counted from the start of the sequence. ``sliding``: the ``window_size`` newest tokens. ``tiled`` (images
            alone): a patch's own tile and the tokens before the patches. ``none``: pure linear attention.
        window_size: tokens in a chunk (terraced) or in the window (sliding), patches along a side of a tile (tiled); a
            power of two or a multiple of 64.
        window_sinks: first tokens of the sequence that the softmax part of linearized heads sees besides its window
            (arXiv 2309.17453); the linear part does not.
        combine: how window and linear part are joined. ``sum``: one denominator (published). ``mixture``: two means of
            values, mixed by a learned share that follows the query (docs/method.md, 4); needs a terraced window.
        feature_positions: whether features read q and k after their rotary embeddings (``rotated``, published) or
            before (``unrotated``).
        feature_map: activation of the learned map.
        feature_dim: columns F of each map; ``hedgehog`` has 2F features.
        k_map_per: one key map per ``query_head`` (published) or per ``kv_head`` (state H/Hk times smaller).
        softmax_layers: layers that keep softmax attention.
        softmax_heads: kv groups that keep softmax attention inside a layer whose other groups are linearized: layer
            to kv heads, each with the query heads it serves. Text keys, as JSON makes them, count as numbers.
        softmax_window: newest tokens that those layers and heads see; their cache is then bounded, and with it the
            whole state, whatever the length of the sequence. None: all tokens.
        softmax_windows: windows of single kv groups of those layers and heads, in place of `softmax_window`: layer to
            kv head to newest tokens. Groups without an entry see `softmax_window`, or all tokens.
        softmax_sinks: first tokens of the sequence that groups with a window see besides (arXiv 2309.17453).
        init_window_factor: initial share gamma of the softmax part, in (0, 1).
        linear_factor: weight alpha of the linear part, ``one`` or ``affine`` (1 - gamma).
        linear_decay: initial factor by which a token's weight in the linear part shrinks with each later token, learned
            per map of the keys; None: no decay (published). The fused kernels do not have it.
        feature_map_init: ``kaiming`` (published), ``identity`` (needs feature_dim equal to the head dim) or
            ``calibrated``: centres of clusters of the teacher's keys, and window factors by their error, which
            attention transfer sets from its first rows before it trains.
        feature_map_bias: add a learned bias before the activation (t2r of the paper has one).

    Raises:
        UserError: a value breaks its constraint; the message names both.
    """

    window: Window = "terraced"
    window_size: int = 64
    window_sinks: int = 0
    combine: Combine = "sum"
    feature_positions: FeaturePositions = "rotated"
    feature_map: FeatureMap = "hedgehog"
    feature_dim: int = 64
    k_map_per: Literal["query_head", "kv_head"] = "query_head"
    softmax_layers: tuple[int, ...] = ()
    softmax_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)
    softmax_window: int | None = None
    softmax_windows: Mapping[int, Mapping[int, int]] = field(default_factory=dict, hash=False)
    softmax_sinks: int = 0
    init_window_factor: float = 0.1
    linear_factor: Literal["one", "affine"] = "one"
    linear_decay: float | None = None
    feature_map_init: Literal["kaiming", "identity", "calibrated"] = "kaiming"
    feature_map_bias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "softmax_layers", tuple(sorted(set(self.softmax_layers))))
        object.__setattr__(self, "softmax_heads", _kept_heads(self.softmax_heads))
        object.__setattr__(self, "softmax_windows", _windows(self.softmax_windows))
        size = self.window_size
        if size < 4 or (size & (size - 1) and size % 64):
            raise UserError(f"`window_size` must be a power of two of at least 4 or a multiple of 64, got {size}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        most = 0 if self.window == "none" else size
        if not 0 <= self.window_sinks <= most:
            raise UserError(
                f"`window_sinks` must be from 0 to {most} with `window` {self.window} and `window_size` {size},"
                f" got {self.window_sinks}"
            )
        if self.combine == "mixture" and (self.window != "terraced" or self.linear_factor != "one"):
            raise UserError(
                "`combine: mixture` needs `window` terraced and `linear_factor` one, got"
                f" {self.window} and {self.linear_factor}"
            )
        if self.feature_dim < 1:
            raise UserError(f"`feature_dim` must be at least 1, got {self.feature_dim}")
        if not 0.0 < self.init_window_factor < 1.0:
            raise UserError(f"`init_window_factor` must lie strictly between 0 and 1, got {self.init_window_factor}")
        if self.linear_decay is not None and not 0.0 < self.linear_decay < 1.0:
            raise UserError(f"`linear_decay` must be null or lie strictly between 0 and 1, got {self.linear_decay}")
        if any(layer < 0 for layer in self.softmax_layers):
            raise UserError(f"`softmax_layers` must be layer indices of at least 0, got {self.softmax_layers}")
        twice = sorted(self.softmax_heads.keys() & set(self.softmax_layers))
        if twice:
            raise UserError(f"layer {twice[0]} is in `softmax_layers` and in `softmax_heads`; name it in one of them")
        if self.softmax_window is not None and self.softmax_window < 2:
            raise UserError(f"`softmax_window` must be null or at least 2, got {self.softmax_window}")
        self._check_windows()

    def _check_windows(self) -> None:
        for layer, windows in self.softmax_windows.items():
            for head, size in windows.items():
                name = f"`softmax_windows` of layer {layer}, kv head {head}"
                if layer not in self.softmax_layers and head not in self.softmax_heads.get(layer, ()):
                    raise UserError(f"{name}, must be of a group in `softmax_layers` or `softmax_heads`")
                if size < 2:
                    raise UserError(f"{name}, must be at least 2, got {size}")
        sizes = [size for windows in self.softmax_windows.values() for size in windows.values()]
        sizes += [] if self.softmax_window is None else [self.softmax_window]
        if not 0 <= self.softmax_sinks < min(sizes, default=1):
            name = "`softmax_window`" if min(sizes, default=None) == self.softmax_window else "all `softmax_windows`"
            raise UserError(
                f"`softmax_sinks` must be at least 0 and below {name} ({min(sizes, default=None)}),"
                f" got {self.softmax_sinks}"
            )

    def softmax_parts(self, layer: int, groups: int) -> dict[int | None, tuple[int, ...]]:
        """The kv groups of a layer of `groups` that keep softmax attention, by the newest tokens they see (None: all).

        Local layers (`local_layers`) are the caller's to tell: they stay as they are.
        """
        parts: dict[int | None, tuple[int, ...]] = {}
        kept = range(groups) if layer in self.softmax_layers else self.softmax_heads.get(layer, ())
        for head in kept:
            size = self.softmax_windows.get(layer, {}).get(head, self.softmax_window)
            parts[size] = (*parts.get(size, ()), head)
        return parts

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearizeConfig:
        """The settings in a saved model's config.json or beside saved maps, of earlier versions too.

        Raises:
            UserError: a value breaks its constraint, or needs an option that is gone (`RETIRED`).
            TypeError: a setting is unknown.
        """
        for name, value in RETIRED.items():
            if values.get(name, value) != value:
                raise UserError(
                    f"`{name}: {values[name]!r}` is an option of an earlier version, which this one does not have;"
                    " load the model with the code that is saved beside it (`trust_remote_code=True`)"
                )
        return cls(**{name: value for name, value in values.items() if name not in RETIRED})

    @property
    def window_reach(self) -> int:
        """The longest sequence, in tokens, of which the window alone sees all: up to it nothing is linear."""
        return {"terraced": 2 * self.window_size, "sliding": self.window_size}.get(self.window, 0)

    def check_text(self) -> None:
        """Refuse what a causal decoder cannot have.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.window not in WINDOWS:
            raise UserError(f"`window` of a text model must be one of {', '.join(WINDOWS)}, got {self.window!r}")

    def check_images(self) -> None:
        """Refuse what a vision transformer cannot have: its tokens have no order, and there is no cache.

        Raises:
            UserError: naming the setting and its value.
        """
        if self.window not in IMAGE_WINDOWS:
            known = " or ".join(IMAGE_WINDOWS)
            raise UserError(f"`window` of a vision transformer must be {known}, got {self.window!r}")
        plain = LinearizeConfig()
        causal = ("window_sinks", "combine", "feature_positions", "softmax_window", "softmax_windows", "softmax_sinks")
        for name in (*causal, "linear_decay"):
            value, only = getattr(self, name), getattr(plain, name)
            if value != only:
                raise UserError(f"`{name}` of a vision transformer must be {only!r}, got {value!r}")

    def check_length(self, name: str, tokens: int) -> None:
        """Refuse training sequences in which nothing is linear.

        Raises:
            UserError: `tokens`, the length of what `name` names, is not above `window_reach`.
        """
        if tokens <= self.window_reach:
            raise UserError(
                f"{name} must be above {self.window_reach} tokens, all of which a {self.window} window of"
                f" `linearize.window_size` {self.window_size} sees (nothing would be linear), got {tokens}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a model's config.json."""
        heads = {str(layer): list(kept) for layer, kept in self.softmax_heads.items()}
        windows = {
            str(layer): {str(head): size for head, size in sizes.items()}
            for layer, sizes in self.softmax_windows.items()
        }
        values = {**asdict(self), "softmax_layers": list(self.softmax_layers), "softmax_heads": heads}
        return {**values, "softmax_windows": windows}


def _kept_heads(given: Mapping[Any, Any]) -> dict[int, tuple[int, ...]]:
    """`softmax_heads` in order, with numbers as keys and without layers that keep nothing."""
    kept = _by_layer("softmax_heads", given)
    for layer, heads in kept.items():
        if any(head < 0 for head in heads):
            raise UserError(f"`softmax_heads` of layer {layer} must be kv heads of at least 0, got {min(heads)}")
    return {layer: tuple(sorted(set(heads))) for layer, heads in kept.items() if heads}


def _windows(given: Mapping[Any, Any]) -> dict[int, dict[int, int]]:
    """`softmax_windows` in order, with numbers as keys and without layers that name none."""
    windows: dict[int, dict[int, int]] = {}
    for layer, sizes in _by_layer("softmax_windows", given).items():
        by_head = {int(head) if str(head).isdecimal() else -1: size for head, size in sizes.items()}
        if -1 in by_head or len(by_head) < len(sizes):
            keys = ", ".join(map(repr, sizes))
            raise UserError(f"`softmax_windows` of layer {layer} must have kv heads as keys, each once, got {keys}")
        windows[layer] = {head: by_head[head] for head in sorted(by_head)}
    return {layer: sizes for layer, sizes in windows.items() if sizes}


def _by_layer(name: str, given: Mapping[Any, Any]) -> dict[int, Any]:
    """A mapping of layers in order, with numbers as keys."""
    found: dict[int, Any] = {}
    for key, value in given.items():
        layer = int(key) if str(key).isdecimal() else -1
        if layer < 0:
            raise UserError(f"`{name}` must have layer indices of at least 0 as keys, got {key!r}")
        if layer in found:
            raise UserError(f"`{name}` names layer {layer} twice")
        found[layer] = value
    return {layer: found[layer] for layer in sorted(found)}


def local_layers(config: Any) -> tuple[int, ...]:
    """Layers of a transformers config that attend within a short window while others see everything (Gemma).

    They are cheap already and stay as they are. Where every layer has the same window (Mistral), none is local.
    """
    kinds = getattr(config, "layer_types", None) or []
    if "full_attention" not in kinds:
        return ()
    return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def kv_heads(config: Any) -> int:
    """Key/value heads of each layer of a transformers config."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
