"""Between the stages: which layers or kv groups keep softmax attention, chosen by what stage 1 measured.

A candidate is what is kept or linearized as one: a layer, or a kv group, which is the smallest part whose keys and
values can stay in the cache alone.

# L layers, n kv groups of a layer, H linearized query heads of a layer
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lolcats_common.errors import UserError
from lolcats_common.linearize_config import LinearizeConfig
from lolcats_common.params import SelectParams
from lolcats_common.records import AllocationRecord, CandidateRecord, SelectionRecord
from lolcats_core.model.families import takes_images
from lolcats_core.model.forward import rows_per_forward
from lolcats_core.model.kv_groups import Group
from lolcats_core.model.map_files import restrict_maps
from lolcats_core.model.modeling import feature_maps, kv_heads, linearize, named_map_parameters
from lolcats_core.training.allocation import Allocation, all_groups, allocate, keeping
from lolcats_core.training.attention_transfer import Errors, head_errors
from lolcats_core.training.loop import Rows
from lolcats_core.training.losses import KL, summed_loss, teacher_hidden
from lolcats_core.training.perplexity import next_token_targets
from lolcats_core.training.ranking.criteria import (
    CRITERIA,
    NEEDS_STUDENT,
    NEEDS_TEACHER,
    Candidate,
    Divergence,
    Evidence,
    Retrieval,
    rank,
    transfer_scores,
)


@dataclass(frozen=True)
class Selection:
    """What was chosen and why.

    Attributes:
        kept: chosen candidates, best first.
        scores: by candidate, the criterion's value; the larger, the sooner it keeps softmax. Empty for ``even``;
            without a budget the transfer error.
        settings: of the student that stage 2 gets.
        cache_ratio: share of the teacher's kv cache that its softmax attention keeps; with an allocation, the share of
            the teacher's bytes that the student has.
        parts: by candidate, what its score was made of. allocation: with `cache_budget`.
    """

    kept: tuple[Candidate, ...]
    scores: dict[Candidate, float]
    settings: LinearizeConfig
    cache_ratio: float
    parts: dict[Candidate, dict[str, float]] = field(default_factory=dict)
    allocation: Allocation | None = None

    def to_dict(self, params: SelectParams) -> SelectionRecord:
        """Readable JSON; its `linearize` makes `settings` again."""
        order = {candidate: place for place, candidate in enumerate(self.kept)}
        entries: list[CandidateRecord] = [
            {"layer": c.layer, "group": c.group, "score": self.scores.get(c), "kept": order.get(c)}
            for c in sorted({*self.scores, *self.kept}, key=lambda c: (c.layer, c.group or 0))
        ]
        parts = {(candidate.layer, candidate.group): each for candidate, each in self.parts.items()}
        for entry in entries:
            if (entry["layer"], entry["group"]) in parts:
                entry["losses"] = parts[entry["layer"], entry["group"]]
        record: SelectionRecord = {
            "softmax_budget": dict(params.softmax_budget) if params.softmax_budget is not None else None,
            "criterion": params.criterion if params.chooses else None,
            "candidates": entries,
            "cache_ratio": self.cache_ratio,
            "linearize": self.settings.to_dict(),
        }
        if self.allocation is not None:
            record["allocation"] = self._allocation_record(self.allocation)
        return record

    def _allocation_record(self, allocation: Allocation) -> AllocationRecord:
        layers: dict[str, list[int | str]] = {}
        for layer, group in sorted(allocation.groups):
            seen = allocation.sizes.get((layer, group), "linear")
            layers.setdefault(str(layer), []).append("all" if seen is None else seen)
        return {
            "length": allocation.length,
            "bytes": allocation.bytes,
            "teacher_bytes": allocation.teacher_bytes,
            "layers": layers,
        }


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


def check_budget(params: SelectParams, settings: LinearizeConfig, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """How many candidates have to be ranked, of whichever budget there is; `allocate` may need fewer bytes than here,
    where its groups come in their own order.

    Raises:
        UserError: the budget does not fit the model.
    """
    if params.cache_budget is None:
        return budget_count(params, settings, config)
    return len(allocate(all_groups(config), params, settings, config, dtype).groups)


def check_image_budget(params: SelectParams) -> None:
    """Refuse what only a text model has: a cache, and logits of next tokens.

    Raises:
        UserError: naming the setting and its value.
    """
    if params.cache_budget is not None or "cache_ratio" in (params.softmax_budget or {}):
        raise UserError("`softmax_budget` of a vision transformer must count layers or heads: it has no cache")
    if params.chooses and params.criterion in (*NEEDS_STUDENT, *NEEDS_TEACHER):
        known = ", ".join(name for name in CRITERIA if name not in (*NEEDS_STUDENT, *NEEDS_TEACHER))
        raise UserError(f"`criterion` of a vision transformer must be one of {known}, got {params.criterion!r}")


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
    retrieval: Retrieval | None = None,
) -> tuple[PreTrainedModel, Selection]:
    """Give softmax attention back to the layers or kv groups that the budget and the criterion choose.

    Args:
        teacher: the model that `student` was linearized from.
        student: a linearized model after `attention_transfer`; it is not changed.
        rows: validation rows, of which the first `params.rows` are measured.
        errors: transfer errors that are known already (`head_errors`).
        retrieval: for that criterion, as `retrieval_of` makes it.

    Returns:
        The student that stage 2 takes, which shares the teacher's weights and has its own copies of the maps, and the
        choice.

    Raises:
        UserError: the budget does not fit the model.
    """
    if takes_images(student.config):
        check_image_budget(params)
    settings = LinearizeConfig.from_dict(student.config.linearize)
    if errors is None:
        errors = head_errors(student, rows, params.rows, params.rows) if feature_maps(student) else {}
    divergence = None
    if params.chooses and params.criterion in NEEDS_STUDENT:
        batch_size = rows_per_forward(params.rows, rows.sequence_length, teacher.config.vocab_size)
        divergence = student_divergence(teacher, student, rows, params.rows, batch_size)
    selection = choose_softmax(
        params,
        settings,
        teacher.config,
        errors,
        seed=seed,
        divergence=divergence,
        retrieval=retrieval,
        dtype=teacher.dtype,
    )
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
    retrieval: Retrieval | None = None,
    dtype: torch.dtype = torch.float32,
) -> Selection:
    """Choose what keeps softmax attention; without a budget that is what `settings` name.

    Args:
        config: of the teacher. errors: of stage 1 (`head_errors`).
        divergence: for the KL criteria, as `student_divergence` makes it.
        retrieval: for that criterion, as `retrieval_of` makes it. dtype: in which `cache_budget` counts keys.

    Raises:
        UserError: the budget does not fit the model.
    """
    count = check_budget(params, settings, config, dtype)
    groups = kv_heads(config)
    every = candidates(params, config)
    if not params.chooses:
        kept = kept_groups(settings, config)
        # Worth seeing without a budget as well; errors say nothing of groups that were never linear.
        scores = transfer_scores(every if errors and not kept else [], errors, groups, normalized=False)
        return Selection((), scores, settings, len(kept) / len(all_groups(config)))
    found = rank(params.criterion, Evidence(every, count, errors, groups, seed, divergence, retrieval))
    if params.cache_budget is not None:
        by_group = {group: candidate for candidate in found.order for group in candidate.groups}
        allocation = allocate(tuple(by_group), params, settings, config, dtype)
        chosen = tuple(by_group[group] for group in allocation.sizes)
        return Selection(chosen, found.scores, allocation.settings, allocation.share, found.parts, allocation)
    chosen = found.order[:count]
    kept = frozenset(group for candidate in chosen for group in candidate.groups)
    return Selection(
        chosen, found.scores, keeping(settings, kept, config), len(kept) / len(all_groups(config)), found.parts
    )


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
