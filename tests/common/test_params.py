"""params.yaml: every wrong key or value is refused with its name, the constraint and the value given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lolcats_common.params import (
    PRESETS,
    Params,
    ParamsError,
    apply_overrides,
    load_params,
    params_from_dict,
    presets,
    read_assignments,
    read_preset,
    read_yaml,
)

ROOT = Path(__file__).parents[2]
SHIPPED = read_yaml(ROOT / "params.yaml")


def test_the_shipped_file_names_every_parameter() -> None:
    def keys(values: Any, prefix: str = "") -> set[str]:
        nested = (keys(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}"} for k, v in values.items())
        return set().union(*nested)

    budget = {"select.softmax_budget": None}  # a mapping, of one key or another
    assert keys(apply_overrides(SHIPPED, budget)) == keys(dataclasses.asdict(Params()))


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_are_valid_overrides_with_the_published_recipe(name: str) -> None:
    params = params_from_dict(apply_overrides(SHIPPED, read_preset(name)), name)
    assert (params.transfer.lr, params.finetune.lr) == (1e-2, 1e-4)
    assert (params.linearize.window, params.linearize.window_size, params.linearize.feature_dim) == ("terraced", 64, 64)
    assert params.data.sequence_length == 1024
    assert params.transfer.batch_size * params.transfer.gradient_accumulation == 8
    assert params.register.name != Params().register.name


def test_a_preset_states_only_what_differs_from_the_published_recipe() -> None:
    recipe = read_yaml(PRESETS / "published.yaml")
    for name, path in presets().items():
        stated = read_yaml(path)
        assert stated.pop("extends") == "published"
        assert set(stated) >= {"teacher", "register"}, name
        for section, values in stated.items():
            same = {key for key, value in values.items() if recipe.get(section, {}).get(key, ...) == value}
            assert same == set(), f"{name}: {section} repeats the recipe"
        assert read_preset(name) == apply_overrides(recipe, stated)


def test_the_largest_models_take_more_steps_and_smaller_updates() -> None:
    def resolved(name: str) -> Params:
        return params_from_dict(apply_overrides(SHIPPED, read_preset(name)), name)

    small, large, largest = (resolved(f"llama3_1_{size}") for size in ("8b", "70b", "405b"))
    assert [each.transfer.max_steps for each in (small, large, largest)] == [None, 2500, 2500]
    assert [each.compute.gradient_checkpointing for each in (small, large, largest)] == [False, True, True]
    assert [each.finetune.lora_rank for each in (small, large, largest)] == [8, 8, 4]
    assert [each.teacher.revision is None for each in (small, large, largest)] == [False, False, True]


def test_presets_for_llama3_and_mistral_ship() -> None:
    assert set(presets()) == {"llama3_8b", "llama3_1_8b", "llama3_1_70b", "llama3_1_405b", "mistral_7b"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"transfer.lrr": 1}, r"unknown key `transfer\.lrr` \(did you mean `transfer\.lr`\?\)"),
        ({"transfer.learning_rate": 1}, r"unknown key `transfer\.learning_rate` \(did you mean `transfer\.lr`\?\)"),
        ({"finetune.num_train_epochs": 1}, r"did you mean `finetune\.epochs`\?"),
        ({"finetune.per_device_train_batch_size": 1}, r"did you mean `finetune\.batch_size`\?"),
        ({"tranfer.lr": 1}, r"unknown key `tranfer` \(did you mean `transfer`\?\)"),
        ({"linearize": {"window_sise": 8}}, r"unknown key `linearize\.window_sise` .*`linearize\.window_size`"),
        ({"transfer.lr": "fast"}, r"`transfer\.lr` must be a finite number, got 'fast'"),
        ({"data.position_range": 100}, r"`position_range` must be null or at least `sequence_length` 512, got 100"),
        ({"transfer.lr": float("nan")}, r"`transfer\.lr` must be a finite number"),
        ({"transfer.lr": True}, r"`transfer\.lr` must be a finite number, got True"),
        ({"transfer.lr": -1}, r"`lr` must be greater than 0, got -1"),
        ({"transfer.epochs": 1.5}, r"`transfer\.epochs` must be a whole number, got 1\.5"),
        ({"transfer.enabled": "yes"}, r"`transfer\.enabled` must be true or false, got 'yes'"),
        ({"transfer.schedule": "step"}, r"`transfer\.schedule` must be one of .*, got 'step'"),
        (
            {"linearize.window_size": 48},
            r"`window_size` must be a power of two of at least 4 or a multiple of 64, got 48",
        ),
        ({"linearize.init_window_factor": 1.0}, r"`init_window_factor` must lie strictly between 0 and 1, got 1\.0"),
        ({"linearize.softmax_layers": 3}, r"`linearize\.softmax_layers` must be a list, got 3"),
        ({"linearize.softmax_layers": ["a"]}, r"`linearize\.softmax_layers\[0\]` must be a whole number, got 'a'"),
        ({"data.validation_share": 1}, r"`validation_share` must lie in \(0, 1\), got 1"),
        ({"data.source": " "}, r"`source` must be builtin, a path or a dataset id"),
        ({"data": [1]}, r"`data` must be a mapping, got \[1\]"),
        ({"compute.device": "tpu"}, r"`device` must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"register.name": "a/b"}, r"`name` must be a name of at most 100 letters, .*, got 'a/b'"),
        ({"register.name": "it's"}, r"`name` must be a name of at most 100 letters"),
        ({"register.name": "~me"}, r"`name` must be a name of at most 100 letters"),
        ({"register.alias": "a`b"}, r"`alias` must be a name of at most 100 letters"),
        ({"register.alias": "a" * 101}, r"`alias` must be a name of at most 100 letters"),
        ({"register.name": "a\n# heading"}, r"`register\.name` must be text of at most 4096 .*without line breaks"),
        ({"data.source": "a\0b"}, r"`data\.source` must be text .*without line breaks and control characters"),
        ({"data.source": "\udcff.txt"}, r"`data\.source` must be text .* in UTF-8"),
        ({"data.source": "a" * 5000}, r"`data\.source` must be text of at most 4096 characters"),
        (
            {"data.source": "https://bob:pw@host/x"},
            r"`data\.source` must hold no login, .* got 'https://\*\*\*@host/x'",
        ),
        ({"relinearize.drift_source": "https://host/x?token=abc"}, r"`relinearize\.drift_source` must hold no login"),
        ({"register.alias": "ch\u0430mpion"}, r"`alias` must be of ASCII letters"),
        ({"register.alias": "\uff11"}, r"`alias` must be of ASCII letters"),
        ({"compute.processes": 10**6}, r"`processes` must be from 1 to 128, got 1000000"),
        ({"transfer.lr": 16**400}, r"`transfer\.lr` must be a finite number"),
        ({"transfer.lr": 16**5000}, r"`transfer\.lr` must be a finite number, got a value of type int that is too"),
        ({"seed": 2**63}, r"`seed` must be a whole number of at most 64 bits"),
        ({"seed.a.b": 1}, r"`seed` must be a whole number"),
        ({".".join("a" * 40): 1}, r"nested at most 32 deep"),
        ({"seed": "x"}, r"`seed` must be a whole number, got 'x'"),
    ],
)
def test_broken_values_are_named(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message) as caught:
        params_from_dict(apply_overrides(SHIPPED, override), "params.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold a mapping"),
        (b"- 1\n", "must hold a mapping of sections, got list"),
        (b"a: [1\n", "not valid YAML"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"seed: " + b"9" * 5000, "holds a value that cannot be read: Exceeds the limit"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "must be nested at most 32 deep"),
        (b"a: " + b"[" * 40 + b"]" * 40, "must be nested at most 32 deep"),
        (b"a: &a [*a]\n", "must be nested at most 32 deep"),
        (
            b"a0: &a0 [1, 1]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 30)),
            "must stand for at most 100000 values",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=message):
        load_params(path)


def test_what_looks_like_a_date_is_text() -> None:
    for text in ("2024-13-45", "2024-01-02"):
        given = read_assignments([f"teacher.revision={text}"])
        assert params_from_dict(apply_overrides(SHIPPED, given)).teacher.revision == text


def test_a_section_without_values_is_that_of_the_defaults() -> None:
    assert params_from_dict(apply_overrides(SHIPPED, {"data": None})).data == Params().data


def test_absent_files_and_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="no such file"):
        load_params(tmp_path / "none.yaml")
    with pytest.raises(ParamsError, match="is a directory"):
        load_params(tmp_path)


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ParamsError, match=r"unknown preset 'llama3' .*mistral_7b"):
        read_preset("llama3")


def test_exponents_without_a_dot_are_numbers() -> None:
    assert params_from_dict(yaml.safe_load("transfer: {lr: 1e-3}")).transfer.lr == 1e-3


def test_overrides_leave_the_original_alone() -> None:
    before = yaml.safe_dump(SHIPPED)
    merged = apply_overrides(SHIPPED, {"transfer.lr": 0.5, "linearize": {"window": "none"}})
    assert merged["transfer"]["lr"] == 0.5
    assert merged["transfer"]["epochs"] == SHIPPED["transfer"]["epochs"]
    assert merged["linearize"]["window"] == "none"
    assert yaml.safe_dump(SHIPPED) == before


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([*SHIPPED, *(f"{s}.{k}" for s, v in SHIPPED.items() if isinstance(v, dict) for k in v)]), junk)
def test_any_value_is_taken_or_refused_in_one_line(key: str, value: Any) -> None:
    refusal = ""
    try:
        params_from_dict(apply_overrides(SHIPPED, {key: value}))
    except ParamsError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1


@pytest.mark.parametrize("alias", ["champion", "Challenger", "previous", "latest", "1", "v12"])
def test_a_new_version_cannot_be_given_an_alias_that_the_gates_decide(alias: str) -> None:
    with pytest.raises(ParamsError, match="`alias` must be another name than challenger, champion"):
        params_from_dict({"register": {"alias": alias}}, "params.yaml")
