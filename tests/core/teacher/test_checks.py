"""A teacher whose files are hostile or broken is refused in one line, before memory or time is spent."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lolcats_common.errors import UserError
from lolcats_common.params import TeacherParams
from lolcats_core.teacher.checks import INDEX, SMALL_FILES, WEIGHTS
from lolcats_core.teacher.pin import examine_teacher
from tests.core.teacher.test_pin import make_teacher


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("whole") / "teacher")


def refusal(whole: Path, folder: Path, change: Callable[[Path], object]) -> str:
    shutil.copytree(whole, folder / "teacher")
    change(folder / "teacher")
    with pytest.raises(UserError) as caught:
        examine_teacher(TeacherParams(source="teacher"), folder)
    message = str(caught.value)
    assert message.startswith("teacher teacher: ")
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` in config.json must be a whole number from 1 to 1024"),
        ({"num_key_value_heads": -1}, "`num_key_value_heads` in config.json must be a whole number from 1"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` in config.json must be a whole number from 1"),
        ({"hidden_size": 10**30}, "`hidden_size` in config.json must be a whole number from 1"),
        ({"hidden_act": "nosuch"}, "config.json"),
        ({"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1.0}}, "config.json"),
        ({"attn_implementation": "someone/kernel"}, "`attn_implementation` in config.json must be one of eager, sdpa"),
        (
            {"_attn_implementation": "someone/kernel"},
            "`_attn_implementation` in config.json must be one of",
        ),
        ({"head_dim": 32}, "config.json says"),
        ({"intermediate_size": 48}, "config.json says [32, 48]"),
        ({"model_type": "dinov2"}, "architecture 'dinov2' takes images and the stages read text"),
    ],
    ids=str,
)
def test_a_configuration_that_describes_no_model_or_another_one_is_refused(
    whole: Path, tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    assert expected in refusal(whole, tmp_path, change)


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = min(
        (e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][0]
    )
    return entry


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: e.update(dtype="F7"), "the dtype of"),
        (lambda e: e.update(dtype=["F32"]), "the dtype of"),
        (lambda e: e.update(shape=[2**40, 2**40]), "are not those of its shape"),
        (lambda e: e.update(shape=[-1, 4]), "malformed"),
        (lambda e: e.update(data_offsets=[-8, e["data_offsets"][1]]), "are not those of its shape"),
        (lambda e: e.update(data_offsets=[4, e["data_offsets"][1]]), "are not those of its shape"),
        (lambda e: e.update(data_offsets="ab"), "are not those of its shape"),
    ],
)
def test_a_header_that_does_not_say_where_each_tensor_lies_is_refused(
    whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(first(header))
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    message = refusal(whole, tmp_path, rewrite)
    assert f"{WEIGHTS} is damaged" in message
    assert expected in message


def test_json_that_is_nested_too_deeply_is_refused(whole: Path, tmp_path: Path) -> None:
    deep = "[" * 100_000
    for name in ("config.json", "tokenizer.json"):
        change = lambda folder, name=name: (folder / name).write_text('{"a": ' + deep)  # noqa: E731
        assert f"{name} is nested too deeply" in refusal(whole, tmp_path / name, change)
    header = b'{"a": ' + deep.encode()
    broken = lambda folder: (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)  # noqa: E731
    assert f"{WEIGHTS} is damaged" in refusal(whole, tmp_path / "weights", broken)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "added_tokens.json", "chat_template.jinja"])
def test_a_file_that_is_read_whole_is_not_read_where_it_is_huge(whole: Path, tmp_path: Path, name: str) -> None:
    def change(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(2**40)  # takes no space

    assert f"{name} must have at most {2**28} bytes, got {2**40}" in refusal(whole, tmp_path, change)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "special_tokens_map.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(whole: Path, tmp_path: Path, name: str) -> None:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    assert f"{name} must be a file" in refusal(whole, tmp_path, change)


def test_nothing_in_a_teacher_s_directory_leads_to_other_weights_or_code(whole: Path, tmp_path: Path) -> None:
    def config(**values: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            for name in ("config.json", "tokenizer_config.json"):
                if name in values:
                    known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
                    (folder / name).write_text(json.dumps({**known, **values[name]}))

        return change

    def index(folder: Path) -> None:
        shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))

    elsewhere = {"auto_map": {"AutoModelForCausalLM": "someone/else--modeling.Model"}}
    cases: dict[str, Callable[[Path], object]] = {
        "`transformers_weights` in config.json must be absent, got 'other.safetensors'": config(
            **{"config.json": {"transformers_weights": "other.safetensors"}}
        ),
        "`auto_map` in config.json must name the teacher's own files, got 'someone/else--modeling.Model'": config(
            **{"config.json": elsewhere}
        ),
        "`auto_map` in tokenizer_config.json must name the teacher's own files": config(
            **{"tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "a/b--c.D"]}}}
        ),
        "adapter_config.json says that an adapter belongs onto the weights": lambda folder: (
            folder / "adapter_config.json"
        ).write_text("{}"),
        f"{WEIGHTS} and {INDEX}, which names other files, cannot both be the weights": index,
    }
    for number, (expected, change) in enumerate(cases.items()):
        assert expected in refusal(whole, tmp_path / str(number), change)


@pytest.mark.parametrize("protocol", [0, 2])
def test_a_pickle_in_a_teacher_s_directory_never_runs(whole: Path, tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(str(ran)), protocol)
    for name in (*SMALL_FILES, WEIGHTS, "pytorch_model.bin", "vocab.pkl", "original/consolidated.00.pt"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(whole, folder / "teacher")
        (folder / "teacher" / name).parent.mkdir(exist_ok=True)
        (folder / "teacher" / name).write_bytes(bomb)
        with contextlib.suppress(UserError):
            examine_teacher(TeacherParams(source="teacher"), folder)
        assert not ran.exists(), name


class Bomb:
    """What would make a directory when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)
