"""Files and directories appear as a whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lolcats_common.files import atomic_directory


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_in_a_new_directory_may_be_read_by_whoever_the_umask_lets(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with atomic_directory(tmp_path / "model") as partial:
            save_file({"weight": torch.zeros(2)}, partial / "model.safetensors")
            (partial / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {mode}


def test_a_block_that_fails_leaves_the_earlier_directory(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with atomic_directory(tmp_path / "model") as partial:
            (partial / "a").write_text(text)
            if text != "1":
                raise ValueError("broken")

    write("1")
    with pytest.raises(ValueError, match="broken"):
        write("2")
    assert (tmp_path / "model" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
