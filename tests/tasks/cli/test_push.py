"""A pushed model is on the hub with its card, loads from there with transformers alone, and nothing else is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lolcats_common.errors import UserError
from tasks.cli.push import push
from tests.hub import Hub, hub

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/mine", trust_remote_code=True)
logits = model(torch.arange(8)[None]).logits
print(type(model).__module__.split(".")[0], logits.double().sum().item(), "lolcats_core" in sys.modules)
"""
SUM = "import torch; from transformers import AutoModelForCausalLM as A; import lolcats_core; "
SUM += "print(A.from_pretrained({path!r})(torch.arange(8)[None]).logits.double().sum().item())"


@pytest.fixture
def exported(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    ModelCard("---\nlicense: apache-2.0\n---\n# A student\n").save(folder / "README.md")
    return folder


def python(server: Hub, home: Path, *arguments: str, token: str | None = "hf_mine") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token or ""}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=home.parent, env=environment
    )


@pytest.mark.slow
def test_a_pushed_model_is_private_has_its_card_and_loads_with_its_own_code(exported: Path, tmp_path: Path) -> None:
    with hub() as server:
        server.files = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"kept"}
        program = ["-m", "tasks.cli.main", "push", str(exported), "me/mine"]
        dry = python(server, tmp_path / "home", *program, "--dry-run", token=None)
        assert dry.returncode == 0, dry.stderr
        assert "nothing was sent" in dry.stdout
        assert "model.safetensors" in dry.stdout
        assert server.private is None
        refused = python(server, tmp_path / "home", *program, token=None)
        assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
        assert "set HF_TOKEN" in refused.stderr

        done = python(server, tmp_path / "home", *program)
        assert done.returncode == 0, done.stderr
        assert f"{server.url}/me/mine/commit/" in done.stdout
        assert server.private is True
        assert server.tokens == {"Bearer hf_mine"}
        assert server.files.keys() == {file.name for file in exported.iterdir()} | {"notes.txt"}
        assert server.files["README.md"].startswith(b"---\nlicense: apache-2.0")

        loaded = python(server, tmp_path / "elsewhere", "-c", LOAD)
        assert loaded.returncode == 0, loaded.stderr
        here = python(server, tmp_path / "home", "-c", SUM.format(path=str(exported)))
        assert loaded.stdout.split() == ["transformers_modules", here.stdout.strip(), "False"]


@pytest.mark.parametrize("repo", ["mine", "me/mine/more", "me/..", "../mine", "https://hub/me/mine"])
def test_what_is_no_repository_is_refused_first(repo: str, exported: Path) -> None:
    with pytest.raises(UserError, match="REPO must be owner/name"):
        push(str(exported), repo)


def test_a_directory_without_a_card_is_no_export(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="is no export"):
        push(str(tiny_model), "me/mine", dry_run=True)
