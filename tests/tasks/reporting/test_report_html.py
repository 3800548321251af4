"""The report's page: every table and note, with figures in their places."""

from __future__ import annotations

from typing import Any

from tasks.reporting.report_html import CAPTIONS, Facts, page
from tests import golden
from tests.tasks.test_report import EVALUATION

COST: Any = {"prefill_tokens_per_second": 2000.0, "decode_tokens_per_second": 50.5, "cache_bytes": 777.0}


def facts(**changed: Any) -> Facts:
    return Facts(
        made="2026-11-29",
        evaluation={**EVALUATION, **changed},  # type: ignore[typeddict-item]
        speed={"teacher": COST, "finetuned": {**COST, "peak_bytes": 2.0**30}},
        metrics={"transfer": {"tokens": 4321, "stage_seconds": 12.5, "peak_memory_bytes": 1.5 * 2**30}},
        runs={"transfer": {"run_id": "run-of-transfer", "key": "k"}},
        teacher={"source": "<builtin>", "revision": None, "files": {"a": "b"}},
        recipe={"seed": 1, "select": {"criterion": "transfer_error"}},
    )


def test_the_page_is_the_golden_one() -> None:
    golden.check(page(facts(), dict.fromkeys(CAPTIONS, "<svg/>")), "report.html")


def test_the_page_names_what_models_that_do_not_fit_leave_out() -> None:
    assert "these were left out: tasks, long_rows." in page(facts(left_out=["tasks", "long_rows"]), {})
    assert "left out" not in page(facts(left_out=[]), {})
