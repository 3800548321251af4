"""The controls of a trial: which there are, that they train as the trial does, and how far a student is from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lolcats_common.linearize_config import LinearizeConfig
from lolcats_core.experiments.controls import TEACHER, WINDOW, margins
from lolcats_core.experiments.trials import controls_of, finished_with_controls, run_trials
from lolcats_core.model.decoding.state_size import state_size
from tests.core.experiments.test_trials import KEPT, study, trial

WIDE = {"linearize": {"window_size": 8, "feature_dim": 24}}


def test_every_trial_stands_beside_a_plain_window_of_its_bytes_and_its_tuned_teacher(tmp_path: Path) -> None:
    shared = study(tmp_path)
    kept, plain = trial("kept", {**WIDE, **KEPT}), trial("plain", WIDE)
    results = run_trials([kept, plain], shared)
    config = shared.teacher.config
    for each, result in zip((kept, plain), results, strict=True):
        settings = LinearizeConfig.from_dict(result["selection"]["linearize"])
        controls = controls_of(each, result, shared)
        control = controls[WINDOW].linearize
        sizes = [state_size(config, s, shared.teacher.dtype).at(shared.settings.context) for s in (control, settings)]
        assert 0 <= sizes[1] - sizes[0] < 0.15 * sizes[1]
        assert controls[WINDOW].finetune == controls[TEACHER].finetune == each.finetune
        window = result["controls"][WINDOW]
        assert window["layer_errors"] == {}
        assert window["finetuned"]["state"]["bytes"] == sizes[0]
        assert window["tokens"] == result["tokens"] / 2  # stage 2 alone: there are no maps to train
        assert window["finetuned"]["perplexity"] != result["finetuned"]["perplexity"]
        assert result["controls"][TEACHER]["finetuned"]["state"]["share"] == 1
        assert finished_with_controls(each, shared) == result
    # One tuned teacher serves both.
    first, second = (result["controls"][TEACHER] for result in results)
    assert first["finetuned"] == second["finetuned"]
    assert first["seconds"] == second["seconds"]
    assert first["transferred"]["perplexity"] == pytest.approx(shared.teacher_row["perplexity"], rel=1e-6)


def test_no_control_stands_beside_a_teacher_that_follows_itself_or_where_nothing_is_linear(tmp_path: Path) -> None:
    shared = study(tmp_path)
    follows = trial("follows", {**WIDE, "finetune": {"loss": "logit_kl"}})
    settings = follows.linearize.to_dict()
    assert set(controls_of(follows, {"selection": {"linearize": settings}}, shared)) == {WINDOW}
    layers = list(range(shared.teacher.config.num_hidden_layers))
    everything = {"selection": {"linearize": {**settings, "softmax_layers": layers}}}
    assert controls_of(follows, everything, shared) == {}
    assert controls_of(follows, {"selection": None}, shared) == {}


def measured(loss: float, hits: list[bool]) -> dict[str, Any]:
    return {"row_losses": [loss, loss + 1], "needles": {"64": hits}}


def test_margins_are_paired_by_item_and_hold_the_spread_of_seeds() -> None:
    def row(student: float, control: float, hits: list[bool]) -> dict[str, Any]:
        beside = {WINDOW: {"finetuned": measured(control, [False, False])}}
        return {"finetuned": measured(student, hits), "controls": beside}

    alone = margins([row(2.0, 2.5, [True, False])])
    assert alone["loss"] == (pytest.approx(0.5), pytest.approx(0.0))  # items are alike, rows are not
    assert alone["needle 64"] == (pytest.approx(0.5), pytest.approx(0.5))
    seeds = margins([row(2.0, 2.5, [True, False]), row(2.0, 2.7, [True, False])])
    assert seeds["loss"] == (pytest.approx(0.6), pytest.approx(0.1))
    assert margins([{"finetuned": None, "controls": {}}]) == {}
