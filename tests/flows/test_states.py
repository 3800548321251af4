"""What Prefect keeps of an error tells no secret, and what a flow decides by is the error itself."""

from __future__ import annotations

import inspect

import pytest

from flows import without_secrets
from lolcats_common.errors import Unavailable

TOKEN = "hf_averysecrettoken"


@without_secrets
def work(error: Exception, times: int = 1) -> None:
    raise error


def test_the_message_of_a_state_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(RuntimeError) as caught:
        work(OSError(f"no answer of https://bob:password@host with {TOKEN}"))
    assert str(caught.value) == "OSError: no answer of https://***@host with ***"


def test_an_error_without_secrets_stays_what_it_is() -> None:
    error = Unavailable("MLflow does not answer")  # tried again by its type
    with pytest.raises(Unavailable) as caught:
        work(error)
    assert caught.value is error
    assert list(inspect.signature(work, eval_str=True).parameters) == ["error", "times"]
