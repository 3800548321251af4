"""The JSON records that one part writes and others read: a shape for each, so that a renamed key fails in mypy.

Files hold exactly these keys. A file of an earlier version may lack some of them, and what was not measured is empty or
absent: what reads stored versions uses ``get``. `lolcats_common.files.read_json` reads them.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

Side = Literal["teacher", "finetuned"]
Step = Literal["teacher", "swapped", "transferred", "finetuned"]
# What pages call them.
SIDES: dict[Side, str] = {"teacher": "teacher", "finetuned": "student"}
STEPS: dict[Step, str] = {
    "teacher": "teacher",
    "swapped": "swapped, without transfer",
    "transferred": "after attention transfer",
    "finetuned": "after low-rank finetuning",
}
BIGRAM = "bigram model for scale"
CONTROL = "plain window"
# The student as it is, and without one of its branches.
BRANCHES: tuple[Literal["whole", "linear_off", "window_off"], ...] = ("whole", "linear_off", "window_off")


class Measured(TypedDict):
    """A mean and its standard error."""

    value: float
    stderr: float


class TaskScore(Measured):
    """One model's primary metric on a task, and every metric that lm-eval reports."""

    metrics: dict[str, float]


class Cell(Measured):
    """The score of a synthetic task at one length in tokens and one depth, the place of the answer in [0, 1]."""

    length: float
    depth: float


class Paired(TypedDict):
    """Student minus teacher, item by item; what scores of right and wrong alone have is not required."""

    difference: float
    stderr: float
    interval: list[float] | None
    items: int
    only_teacher: NotRequired[int]
    only_student: NotRequired[int]
    p_value: NotRequired[float]


class Recovery(TypedDict):
    """The share of the teacher's score that the student keeps; None where it would divide by zero."""

    value: float | None
    interval: list[float] | None
    chance: NotRequired[float]
    chance_corrected: NotRequired[float | None]
    chance_corrected_interval: NotRequired[list[float] | None]
    difference: NotRequired[float]
    difference_interval: NotRequired[list[float] | None]
    items: NotRequired[int]


class TaskRecord(TypedDict):
    """Both models on one lm-eval task."""

    metric: str
    items: int
    version: str
    chance: float | None
    higher_is_better: bool
    teacher: TaskScore
    finetuned: TaskScore
    paired: NotRequired[Paired]
    recovery: NotRequired[Recovery]
    cells: NotRequired[dict[Side, list[Cell]]]


class PositionRange(TypedDict):
    """Mean loss in nats of the positions from `start` up to `stop`."""

    start: int
    stop: int
    loss: float
    stderr: float
    tokens: int


class Positions(TypedDict):
    """Loss by position of one model in `rows` rows of `length` tokens."""

    rows: int
    length: int
    ranges: list[PositionRange]


class LossDifference(TypedDict):
    """One model's loss minus another's at positions `start` to `stop`, in nats, with its standard error."""

    start: int
    stop: int
    difference: float
    stderr: float


class Control(TypedDict):
    """The student's control, a plain window of its bytes (`lolcats_core.evaluation.control`).

    Attributes:
        window: newest tokens that it sees in place of the linearized groups, besides `sinks` first ones.
        tokens: length at which `bytes` and the student's `student_bytes` are counted.
        trained: whether it took stage 2 as the student did; older records, without it, did not.
        recall: by gap, as in `Evaluation`.
        positions: as the student's; None where no longer rows were asked for. differences: student minus control.
    """

    window: int
    sinks: int
    tokens: int
    bytes: int
    student_bytes: int
    trained: NotRequired[bool]
    perplexity: float
    recall: dict[str, Measured]
    positions: Positions | None
    differences: list[LossDifference]


def training_of(control: Control) -> str:
    """Whether the control was trained, in words."""
    return "trained alike" if control.get("trained") else "untrained"


def control_line(control: Control) -> str:
    """What the last column is."""
    return (
        f"plain window: the teacher with the newest {control['window']} and the first {control['sinks']} tokens in"
        f" place of linear attention, {training_of(control)}, in no more than the student's"
        f" {control['student_bytes']:,} bytes at {control['tokens']} tokens"
    )


class Generation(TypedDict, total=False):
    """Measures of greedy continuations; empty where none were asked for."""

    exact_prefix: Measured
    token_f1: Measured
    same_stop: Measured
    repetition_teacher: Measured
    repetition_finetuned: Measured
    stopped_teacher: Measured
    stopped_finetuned: Measured
    prompts: int
    prompt_tokens: int
    new_tokens: int


class StateBytes(TypedDict):
    """Bytes that decoding holds for one sequence (`lolcats_core.model.decoding.state_size.state_facts`)."""

    linear: int
    exact: int
    per_token: int
    published: int
    teacher_per_token: int


class LayerAblation(TypedDict, total=False):
    """Perplexity with a part of one layer off; None where the loss is not finite."""

    linear_off: float | None
    softmax_off: float | None


class Audit(TypedDict, total=False):
    """What the student leans on, layers by their number; empty where no audit was asked for."""

    whole: float | None
    linear_off: float | None
    window_off: float | None
    layers: dict[str, LayerAblation]
    entropy: dict[str, list[float]]
    head_errors: dict[str, list[float]]
    linear_mass: dict[str, list[float]]


class Evaluation(TypedDict, total=False):
    """evaluation.json of stage `evaluate`.

    Attributes:
        perplexity: by `Step`, and of the ``bigram`` baseline.
        recall: by side, and by the gap in tokens as text.
        control: None where there is none: nothing is linearized, or its bytes hold no window.
        left_out: the parameters of what needs a whole model where the models do not fit the device.
        task_hashes: equal hashes were the same questions.
    """

    perplexity: dict[str, float]
    perplexity_tokens: int
    recall: dict[Side, dict[str, Measured]]
    recall_samples: int
    tasks: dict[str, TaskRecord]
    positions: dict[Side, Positions]
    control: Control | None
    generation: Generation
    state: StateBytes
    audit: Audit
    left_out: list[str]
    lm_eval_version: str
    task_hashes: dict[str, str]


class Cost(TypedDict):
    """What generating cost one model on this machine; `peak_bytes` on a GPU alone."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    cache_bytes: float
    peak_bytes: NotRequired[float]


Speed = dict[Side, Cost]  # speed.json of stage `evaluate`


class CandidateRecord(TypedDict):
    """A layer, or one kv group of it, with its score and its rank among those that keep softmax attention."""

    layer: int
    group: int | None
    score: float | None
    kept: int | None
    losses: NotRequired[dict[str, float]]  # of criterion ``retrieval``, in nats by probe


class AllocationRecord(TypedDict):
    """What `select.cache_budget` bought.

    Attributes:
        length: tokens at which the bytes of one sequence are counted.
        layers: by number, what each kv group sees: ``all``, so many of the newest tokens, or ``linear``.
    """

    length: int
    bytes: int
    teacher_bytes: int
    layers: dict[str, list[int | str]]


class SelectionRecord(TypedDict):
    """selection.json of stage `select`; `linearize` makes the student's settings again."""

    softmax_budget: dict[str, float] | None
    criterion: str | None
    candidates: list[CandidateRecord]
    cache_ratio: float
    linearize: dict[str, Any]
    allocation: NotRequired[AllocationRecord]


class StageRecord(TypedDict):
    """One stage in the summary: what became of it, and what it cost."""

    state: str
    seconds: float | None
    wall_seconds: float
    tokens: NotRequired[float]
    trainable_parameters: NotRequired[float]
    total_parameters: NotRequired[float]
    trainable_share: NotRequired[float]


class RegisteredRecord(TypedDict):
    """The registered version in the summary."""

    name: str
    version: str
    alias: str
    created: bool
    uri: str


class GatesRecord(TypedDict):
    """Gate result and aliases of the registered version in the summary; `passed` is None before its gates ran."""

    passed: bool | None
    reasons: str
    aliases: list[str]


class Summary(TypedDict):
    """reports/summary.json."""

    perplexity: dict[str, float]
    perplexity_ratio: dict[str, float]
    recall: dict[Side, dict[str, Measured]]
    positions: dict[Side, Positions]
    control: Control | None
    tasks: dict[str, TaskRecord]
    lm_eval_version: str | None
    stages: dict[str, StageRecord]
    registered: RegisteredRecord | None
    gates: GatesRecord | None
    mlflow_run_id: str | None
    experiment: str | None
