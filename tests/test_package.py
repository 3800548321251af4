"""The wheel, in an environment that has it and the libraries and no checkout: what a person does there first."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from lolcats_common import project
from lolcats_common.params import load_params
from tasks.versioning import new_project, package
from tests.conftest import ROOT, run_git

PARTS = ("flows", "kernels", "lolcats_common", "lolcats_core", "presets", "tasks")
FILES = (
    ".dvcignore",
    ".gitignore",
    "LICENSE",
    "README.md",
    "dvc.yaml",
    "params.yaml",
    "prefect.yaml",
    "pyproject.toml",
)
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (*PARTS, *FILES):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """A virtual environment with the wheel; its libraries are those that run this test."""
    folder = wheel.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "--no-index",
        "--no-deps",
    ]
    subprocess.run([*pip, "--quiet", "--disable-pip-version-check", str(wheel)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    libraries = {sysconfig.get_path("purelib"), *(entry for entry in sys.path if entry.endswith("site-packages"))}
    (site / "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(libraries)))
    return folder


def lolcats(environment: Path, folder: Path, *arguments: str, code: int = 0) -> str:
    """What the installed program says in `folder`, on both channels."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LOLCATS_ROOT")}
    command = [str(environment / "bin" / "lolcats"), *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_wheel_takes_no_name_that_others_use_and_holds_every_module_preset_and_template(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "lolcats_common",
        "lolcats_core",
        "lolcats_kernels",
        "lolcats_pipeline",
    }
    for part in PARTS:
        place = {
            "kernels": "lolcats_kernels",
            **{name: f"lolcats_pipeline/{name}" for name in ("flows", "presets", "tasks")},
        }
        for file in [path for path in (ROOT / part).rglob("*") if path.suffix in (".py", ".yaml", ".j2", ".json")]:
            assert f"{place.get(part, part)}/{file.relative_to(ROOT / part).as_posix()}" in names
    assert {f"lolcats_pipeline/{name}" for name in FILES if name.endswith(("yaml", "ignore"))} <= names


@pytest.mark.slow
def test_outside_a_checkout_a_person_gets_a_project_a_plan_and_text(environment: Path, tmp_path: Path) -> None:
    version = lolcats(environment, tmp_path, "--version").removeprefix("lolcats ").strip()
    assert f"lolcats_linearize-{version}-" in next(environment.parent.glob("*.whl")).name
    assert "llama3_1_8b" in lolcats(environment, tmp_path, "plan", "--preset", "nothing", code=1)
    assert "best" in lolcats(environment, tmp_path, "plan", "--preset", "llama3_1_8b")
    assert "`lolcats init DIR`" in lolcats(environment, tmp_path, "status", code=1)
    assert "`lolcats init DIR`" in lolcats(environment, tmp_path, "export", code=1)
    assert "cd mine && lolcats run" in lolcats(environment, tmp_path, "init", "mine")
    root = tmp_path / "mine"
    # A folder of one's own may be called as one of ours.
    (root / "tasks").mkdir()
    (root / "tasks" / "__init__.py").write_text("raise RuntimeError('not ours')")
    assert run_git(root, "status", "--porcelain", "--untracked-files=no") == ""
    assert lolcats(environment, root, "status").count("would run") == 8
    lolcats(environment, root, "stage", "inputs")
    assert (root / "outputs" / "inputs" / "teacher.json").is_file()
    (teacher,) = environment.glob("lib/python3*/site-packages/lolcats_core/teacher/builtin")
    said = lolcats(environment, tmp_path, "generate", "import os", "--model", str(teacher), "--max-new-tokens", "2")
    assert said.startswith("import os")


def test_a_library_of_the_pipeline_that_is_not_there_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tasks.cli.main.main", lambda: __import__("no_such_library.part"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit):
        project.main()
    assert capsys.readouterr().err == (
        "Error: no_such_library is not installed; pip install 'lolcats-linearize[pipeline]' has it\n"
    )


def test_a_project_s_stages_depend_on_the_code_that_the_checkout_s_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_project.init(tmp_path / "mine")
    root = tmp_path / "mine"
    assert load_params(root / "params.yaml") == load_params(ROOT / "params.yaml")
    ours, theirs = (yaml.safe_load((folder / "dvc.yaml").read_text())["stages"] for folder in (ROOT, root))
    assert list(ours) == list(theirs)
    before = yaml.safe_load((root / "package.yaml").read_text())["code"]
    for name, stage in theirs.items():
        assert stage["params"] == [*ours[name]["params"], {"package.yaml": [f"code.{name}"]}]
        assert stage.get("deps", []) == [dep for dep in ours[name]["deps"] if dep.startswith("outputs/")]
        assert stage["outs"] == ours[name]["outs"]
    monkeypatch.setattr(package, "sha256_file", lambda path: path.name)
    package.follow(root)
    after = yaml.safe_load((root / "package.yaml").read_text())["code"]
    single = {name for name, stage in ours.items() if any((ROOT / dep).is_file() for dep in stage["deps"])}
    assert {name for name in before if before[name] != after[name]} == single


def test_a_directory_with_files_of_a_project_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 3\n")
    with pytest.raises(ValueError, match=r"has params\.yaml already; give an empty directory"):
        new_project.init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
    run_git(tmp_path, "init", "--quiet")
    with pytest.raises(ValueError, match="lies in the git repository"):
        new_project.init(tmp_path / "below")
    assert not (tmp_path / "below").exists()
