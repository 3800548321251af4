"""Between the stages: which layers or kv groups keep softmax attention, chosen by what stage 1 measured.

A candidate is what is kept or linearized as one: a layer, or a kv group, which is the smallest part whose keys and
values can stay in the cache alone.

# L layers, n kv groups of a layer, H linearized query heads of a layer
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig, local_layers
from lolcats_common.params import SelectParams
from lolcats_common.records import CandidateRecord, SelectionRecord
from lolcats_core.model.forward import rows_per_forward
from lolcats_core.model.map_files import restrict_maps
from lolcats_core.model.modeling import feature_maps, kv_heads, linearize, named_map_parameters
from lolcats_core.training.attention_transfer import Errors, head_errors
from lolcats_core.training.loop import Rows
from lolcats_core.training.losses import KL, summed_loss, teacher_hidden
from lolcats_core.training.perplexity import next_token_targets

Group = tuple[int, int]  # layer, kv head
# The student's KL to the teacher with softmax attention in these kv groups alone.
Divergence = Callable[[frozenset[Group]], float]
NEEDS_MODEL = ("logit_kl", "greedy_kl")


@dataclass(frozen=True)
class Candidate:
    """One kv group of a layer, or the whole layer (`group` None)."""

    layer: int
    group: int | None
    groups: frozenset[Group]


@dataclass(frozen=True)
class Selection:
    """What was chosen and why.

    Attributes:
        kept: chosen candidates, best first.
        scores: by candidate, the criterion's value; the larger, the sooner it keeps softmax. Empty for ``even``;
            without a budget the transfer error.
        settings: of the student that stage 2 gets.
        cache_ratio: share of the teacher's kv cache that its softmax attention keeps.
    """

    kept: tuple[Candidate, ...]
    scores: dict[Candidate, float]
    settings: LinearizeConfig
    cache_ratio: float

    def to_dict(self, params: SelectParams) -> SelectionRecord:
        """Readable JSON; its `linearize` makes `settings` again."""
        order = {candidate: place for place, candidate in enumerate(self.kept)}
        entries: list[CandidateRecord] = [
            {"layer": c.layer, "group": c.group, "score": self.scores.get(c), "kept": order.get(c)}
            for c in sorted({*self.scores, *self.kept}, key=lambda c: (c.layer, c.group or 0))
        ]
        chosen = params.softmax_budget is not None
        return {
            "softmax_budget": dict(params.softmax_budget) if params.softmax_budget is not None else None,
            "criterion": params.criterion if chosen else None,
            "candidates": entries,
            "cache_ratio": self.cache_ratio,
            "linearize": self.settings.to_dict(),
        }


def all_groups(config: PreTrainedConfig) -> list[Group]:
    """Every kv group whose keys and values grow with the tokens, in order; local layers (Gemma) are left alone."""
    layers = [layer for layer in range(config.num_hidden_layers) if layer not in local_layers(config)]
    return [(layer, group) for layer in layers for group in range(kv_heads(config))]


def candidates(params: SelectParams, config: PreTrainedConfig) -> list[Candidate]:
    """What the budget counts, in order."""
    groups = all_groups(config)
    if "layers" not in (params.softmax_budget or {}):
        return [Candidate(*each, frozenset([each])) for each in groups]
    layers = sorted({layer for layer, _ in groups})
    return [Candidate(layer, None, frozenset(each for each in groups if each[0] == layer)) for layer in layers]


def budget_count(params: SelectParams, settings: LinearizeConfig, config: PreTrainedConfig) -> int:
    """How many candidates the budget keeps.

    Raises:
        UserError: it keeps none or all of them, or `settings` name some already.
    """
    if params.softmax_budget is None:
        return 0
    if settings.softmax_layers or settings.softmax_heads:
        raise UserError("`select.softmax_budget` must be null where `linearize` names softmax layers or heads")
    total = len(candidates(params, config))
    (kind, value), *_ = params.softmax_budget.items()
    # A share written as a decimal fraction may lie a rounding error below what it means.
    count = {"layers": int(value), "heads": round(value * total), "cache_ratio": int(value * total + 1e-9)}[kind]
    if not 0 < count < total:
        raise UserError(
            f"`select.softmax_budget` must keep between 1 and {total - 1} of {total}"
            f" {'layers' if kind == 'layers' else 'kv groups'}, got {kind} {value:g}, which keeps {count}"
        )
    return count


def keeping(settings: LinearizeConfig, kept: Iterable[Group], config: PreTrainedConfig) -> LinearizeConfig:
    """`settings` with softmax attention in exactly these kv groups."""
    by_layer: dict[int, list[int]] = {}
    for layer, group in kept:
        by_layer.setdefault(layer, []).append(group)
    whole = [layer for layer, groups in by_layer.items() if len(groups) == kv_heads(config)]
    parts = {layer: tuple(groups) for layer, groups in by_layer.items() if layer not in whole}
    return dataclasses.replace(settings, softmax_layers=tuple(whole), softmax_heads=parts)


def kept_groups(settings: LinearizeConfig, config: PreTrainedConfig) -> frozenset[Group]:
    """The kv groups that keep softmax attention under `settings`; the inverse of `keeping`."""
    return frozenset(
        (layer, group)
        for layer, group in all_groups(config)
        if layer in settings.softmax_layers or group in settings.softmax_heads.get(layer, ())
    )


def select(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    rows: Rows,
    params: SelectParams,
    *,
    errors: Errors | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, Selection]:
    """Give softmax attention back to the layers or kv groups that the budget and the criterion choose.

    Args:
        teacher: the model that `student` was linearized from.
        student: a linearized model after `attention_transfer`; it is not changed.
        rows: validation rows, of which the first `params.rows` are measured.
        errors: transfer errors that are known already (`head_errors`).

    Returns:
        The student that stage 2 takes, which shares the teacher's weights and has its own copies of the maps, and the
        choice.

    Raises:
        UserError: the budget does not fit the model.
    """
    settings = LinearizeConfig.from_dict(student.config.linearize)
    if errors is None:
        errors = head_errors(student, rows, params.rows, params.rows) if feature_maps(student) else {}
    divergence = None
    if params.softmax_budget is not None and params.criterion in NEEDS_MODEL:
        batch_size = rows_per_forward(params.rows, rows.sequence_length, teacher.config.vocab_size)
        divergence = student_divergence(teacher, student, rows, params.rows, batch_size)
    selection = choose_softmax(params, settings, teacher.config, errors, seed=seed, divergence=divergence)
    selected = linearize(teacher, selection.settings, seed=seed)
    with torch.no_grad():
        for name, value in restrict_maps(named_map_parameters(student), student, selected).items():
            selected.get_parameter(name).copy_(value)
    return selected, selection


def choose_softmax(
    params: SelectParams,
    settings: LinearizeConfig,
    config: PreTrainedConfig,
    errors: Errors,
    *,
    seed: int = 0,
    divergence: Divergence | None = None,
) -> Selection:
    """Choose what keeps softmax attention; without a budget that is what `settings` name.

    Args:
        config: of the teacher. errors: of stage 1 (`head_errors`).
        divergence: for the KL criteria, as `student_divergence` makes it.

    Raises:
        UserError: the budget does not fit the model.
    """
    count = budget_count(params, settings, config)
    if not count:
        chosen: tuple[Candidate, ...] = ()
        kept = kept_groups(settings, config)
        # Worth seeing without a budget as well; errors say nothing of groups that were never linear.
        every = candidates(params, config) if errors and not kept else []
        scores = transfer_scores(every, errors, kv_heads(config), normalized=False)
    else:
        chosen, scores = _ranked(params, config, count, errors, seed, divergence)
        kept = frozenset(group for candidate in chosen for group in candidate.groups)
        settings = keeping(settings, kept, config)
    return Selection(chosen, scores, settings, len(kept) / len(all_groups(config)))


def _ranked(
    params: SelectParams,
    config: PreTrainedConfig,
    count: int,
    errors: Errors,
    seed: int,
    divergence: Divergence | None,
) -> tuple[tuple[Candidate, ...], dict[Candidate, float]]:
    every = candidates(params, config)
    if params.criterion == "even":
        return tuple(every[int((i + 0.5) * len(every) / count)] for i in range(count)), {}
    if params.criterion == "random":
        draws = random.Random(seed)
        scores = {candidate: draws.random() for candidate in every}
    elif params.criterion in NEEDS_MODEL:
        if divergence is None:
            raise ValueError(f"criterion {params.criterion} needs `divergence`")
        if params.criterion == "greedy_kl":
            return _greedy(every, count, divergence)
        # One candidate linear in the whole teacher: what that alone destroys. The opposite, softmax in one candidate
        # alone, measures little where a skill needs several of them.
        whole = frozenset(group for candidate in every for group in candidate.groups)
        scores = {candidate: divergence(whole - candidate.groups) for candidate in every}
    else:
        normalized = params.criterion == "normalized_transfer_error"
        scores = transfer_scores(every, errors, kv_heads(config), normalized=normalized)
    order = sorted(every, key=lambda candidate: -scores[candidate])
    return tuple(order[:count]), scores


def transfer_scores(
    every: Iterable[Candidate], errors: Errors, groups: int, *, normalized: bool
) -> dict[Candidate, float]:
    """Mean squared error of each candidate's heads, over the mean square of their softmax output with `normalized`.

    Args:
        errors: of a model without softmax heads. groups: kv groups of a layer.
    """

    def of(candidate: Candidate) -> float:
        means = []
        for name in ("error", "power"):
            by_group = np.array(errors[candidate.layer][name]).reshape(groups, -1)
            means.append(float((by_group if candidate.group is None else by_group[candidate.group]).mean()))
        return means[0] / max(means[1], 1e-12) if normalized else means[0]

    return {candidate: of(candidate) for candidate in every}


def _greedy(
    every: list[Candidate], count: int, divergence: Divergence
) -> tuple[tuple[Candidate, ...], dict[Candidate, float]]:
    """Lazy greedy (Minoux, 1978): a candidate's gain is taken to shrink as others are kept, so only the one that leads
    by its last known gain is measured again, until it still leads.

    Scores are each candidate's last known gain: how much its softmax lowered the KL.
    """
    kept: tuple[Candidate, ...] = ()
    held: frozenset[Group] = frozenset()
    current = divergence(held)
    gains = {candidate: float("inf") for candidate in every}
    while len(kept) < count:
        fresh: dict[Candidate, float] = {}
        left = [candidate for candidate in every if candidate not in kept]
        while (lead := max(left, key=lambda candidate: gains[candidate])) not in fresh:
            fresh[lead] = divergence(held | lead.groups)
            gains[lead] = current - fresh[lead]
        kept, held, current = (*kept, lead), held | lead.groups, fresh[lead]
    return kept, gains


def student_divergence(
    teacher: PreTrainedModel, student: PreTrainedModel, rows: Rows, count: int, batch_size: int
) -> Divergence:
    """A function of the kv groups that keep softmax: mean KL in nats of the teacher's next-token distribution from that
    of `student`, whose other groups stay linear, over the first `count` rows.

    Args:
        student: of `linearize(teacher, …)` after attention transfer, with every kv group linearized.
    """
    settings, device = LinearizeConfig.from_dict(student.config.linearize), student.device
    maps = {name: p.detach() for name, p in named_map_parameters(student).items()}
    batches: list[tuple[dict[str, Tensor], Tensor]] = []
    for start in range(0, min(count, len(rows)), batch_size):
        indices = np.arange(start, min(start + batch_size, count, len(rows)))
        batch = {name: value.to(device) for name, value in rows.batch(indices).items()}
        batches.append((batch, teacher_hidden(student, batch)[-1][:, :-1]))

    @torch.no_grad()
    def measure(kept: frozenset[Group]) -> float:
        model = linearize(teacher, keeping(settings, kept, teacher.config))
        for name, value in restrict_maps(maps, student, model).items():
            model.get_parameter(name).copy_(value)
        total, tokens = 0.0, 0
        for batch, wanted in batches:
            targets, counted = next_token_targets(batch)
            positions = batch.get("position_ids")
            out = model.base_model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False)
            hidden = out.last_hidden_state[:, :-1]
            total += float(summed_loss(model, hidden, targets, counted, KL, wanted))
            tokens += int(counted.sum())
        return total / max(tokens, 1)

    return measure
