"""One range of transformers versions: written down once, refused outside, and either name of the cache inside."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats_common.errors import UserError
from lolcats_core.model.decoding.cache import HybridCache
from lolcats_core.model.decoding.decode_graph import _Steps
from lolcats_core.model.transformers_versions import (
    CACHE,
    CACHE_NAMES,
    NEWEST,
    OLDEST,
    REQUIREMENT,
    check_version,
    minor_version,
)
from tests.core.tiny import tiny_student, tokens

ROOT = Path(__file__).parents[3]


def test_what_is_installed_and_what_is_tested_is_the_same_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert REQUIREMENT in project["dependencies"]
    ends = re.search(r"^VERSION \?= (\S+) (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert ends is not None
    assert [minor_version(version) for version in ends.groups()] == [OLDEST, NEWEST]
    assert REQUIREMENT in (ROOT / "docs" / "guide.md").read_text()


def test_another_version_is_refused_in_one_line_that_names_both() -> None:
    for version in ("5.17.0", "5.23.1", "5.24.0.dev0"):
        check_version(version)
    for version in ("4.57.1", "5.8.0", "5.25.0", "6.0.0"):
        with pytest.raises(UserError, match=re.escape(f"{REQUIREMENT}, and transformers {version} is installed")):
            check_version(version)


def test_exported_code_checks_the_version_first_and_names_every_file_for_versions_that_copy_no_others(
    tmp_path: Path,
) -> None:
    tiny_student().save_pretrained(tmp_path)
    tree = ast.parse((tmp_path / "modeling_lolcats.py").read_text())
    named = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    assert named[0] == "lolcats_core_model_transformers_versions"
    assert {f"{name}.py" for name in named} == {path.name for path in tmp_path.glob("lolcats_*.py")}
    check = ast.parse((tmp_path / f"{named[0]}.py").read_text())
    imported = [node.module for node in ast.walk(check) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if name and name.startswith("lolcats_core_")]


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_the_cache_has_either_name_in_calls_and_outputs(name: str) -> None:
    model, ids = tiny_student(), tokens(2, 20)
    expected = model(ids, use_cache=False).logits
    for module in (model, model.base_model):
        cache = HybridCache(model.config)
        first = module(input_ids=ids[:, :15], **{name: cache})
        assert first[CACHE] is cache
        assert cache.get_seq_length() == 15
    cache = HybridCache(model.config)
    logits = [model(ids[:, part], **{name: cache}).logits for part in (slice(0, 15), slice(15, 20))]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_a_step_of_the_decode_graph_takes_either_name(name: str) -> None:
    model, ids = tiny_student(), tokens(2, 1)
    steps, cache = _Steps(model), HybridCache(model.config)
    model(tokens(2, 9), **{CACHE: cache})
    call: dict[str, Any] = {"input_ids": ids, name: cache, "use_cache": True}
    assert not steps.take(call)
    assert steps.take(call)
