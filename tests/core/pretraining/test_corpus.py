"""What may be trained on: permissively licensed, nobody else's copy, and nothing of the standard library."""

from __future__ import annotations

import importlib.metadata
from email.message import Message
from pathlib import Path

import pytest

from lolcats_common.errors import UserError
from lolcats_core.pretraining import corpus
from lolcats_core.pretraining.corpus import installed_corpus, permissive_licence, standard_library_files


def code(name: str, functions: int = 12) -> str:
    """A module that shares no three lines with the module of another name."""
    bodies = (f"def {name}_{i}(value):\n    {name} = value + {i}\n    return {name} * {i}\n" for i in range(functions))
    return "\n\n".join(bodies)


# Stands for the standard library: its own files take seconds to read.
LIBRARY = code("library", 60)


@pytest.fixture(autouse=True)
def _small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "library" / "library.py"
    file.parent.mkdir()
    file.write_text(LIBRARY)
    monkeypatch.setattr(corpus, "standard_library_files", lambda: [file])


def install(site: Path, name: str, files: dict[str, str | bytes], licence: str = "License-Expression: MIT") -> None:
    """A distribution as an installer leaves it."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}\n")
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content.encode() if isinstance(content, str) else content)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def collect(site: Path, **options: object) -> corpus.Corpus:
    return installed_corpus(search_paths=[str(site)], **options)  # type: ignore[arg-type]


def names(found: corpus.Corpus) -> set[str]:
    return {source.name for source in (*found.train, *found.validation)}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    install(site, "first", {"first/a.py": code("first"), "first/b.py": code("other")})
    install(site, "second", {"second.py": code("second")})
    return site


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"License-Expression": "MIT"}, True),
        ({"License-Expression": "BSD-3-Clause AND (Apache-2.0 OR MIT)"}, True),
        ({"License-Expression": "Apache-2.0 WITH LLVM-exception"}, True),
        ({"License-Expression": "MIT AND GPL-3.0-only"}, False),
        ({"License-Expression": "MPL-2.0"}, False),
        ({"License-Expression": "PSF-2.0"}, False),
        ({"License-Expression": "LicenseRef-NVIDIA-Proprietary", "License": "MIT"}, False),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, True),
        ({"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "License": "MIT"}, False),
        ({"Classifier": "License :: Other/Proprietary License"}, False),
        ({"Classifier": "Programming Language :: Python", "License": "BSD 3-Clause License"}, True),
        ({"License": "Apache License 2.0"}, True),
        ({"License": "Apache 2.0"}, True),
        ({"License": "BSD-3-Clause"}, True),
        ({"License": "GPL"}, False),
        ({"License": "MIT or later negotiated with the owner"}, False),
        ({"License": "NVIDIA Proprietary Software"}, False),
        ({"License": "UNKNOWN"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_only_clearly_permissive_licences_are_taken(headers: dict[str, str], allowed: bool) -> None:
    metadata = Message()
    for name, value in headers.items():
        metadata[name] = value
    assert (permissive_licence(metadata) is not None) == allowed


def test_one_forbidden_classifier_among_permissive_ones_forbids() -> None:
    metadata = Message()
    metadata["Classifier"] = "License :: OSI Approved :: MIT License"
    metadata["Classifier"] = "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)"
    assert permissive_licence(metadata) is None


def test_the_corpus_says_where_each_byte_came_from(site: Path) -> None:
    record = collect(site).record()
    rows = {row["name"]: row for row in [*record["train"], *record["validation"]]}  # type: ignore[misc]
    assert set(rows) == {"first", "second"}
    assert rows["first"]["files"] == 2
    assert rows["first"]["licence"] == "MIT"
    assert rows["first"]["bytes"] == len(code("first")) + len(code("other"))


def test_train_and_validation_share_no_distribution(site: Path) -> None:
    for i in range(8):
        install(site, f"more-{i}", {f"more_{i}.py": code(f"more_{i}")})
    found = collect(site, validation_share=0.3)
    train, validation = ({s.name for s in part} for part in (found.train, found.validation))
    assert train
    assert validation
    assert not train & validation
    assert len(train | validation) == 10


def test_the_same_files_give_the_same_corpus_with_any_number_of_workers(site: Path) -> None:
    assert collect(site) == collect(site, workers=2)


@pytest.mark.parametrize("licence", ["License-Expression: GPL-3.0-only", "License: Proprietary", ""])
def test_other_licences_stay_out(site: Path, licence: str) -> None:
    install(site, "closed", {"closed.py": code("closed")}, licence)
    assert names(collect(site)) == {"first", "second"}


@pytest.mark.parametrize(
    "name", ["importlib-metadata", "importlib_resources", "typing_extensions", "backports.zoneinfo"]
)
def test_backports_of_the_standard_library_stay_out_by_name(site: Path, name: str) -> None:
    install(site, name, {"module.py": code("module")})
    assert names(collect(site)) == {"first", "second"}


LIBRARY_LINES = LIBRARY.split("\n")
DROPPED: dict[str, tuple[str, str | bytes, str]] = {
    "the library's file": ("x/a.py", LIBRARY, "standard library content"),
    "the library's file, indented and with blank lines": (
        "x/a.py",
        "class X:\n" + "\n".join(f"    {line}\n" for line in LIBRARY_LINES),
        "standard library content",
    ),
    "a large part of the library in a larger file": (
        "x/a.py",
        code("mine", 100) + "\n\n" + "\n".join(LIBRARY_LINES[:100]),
        "standard library content",
    ),
    "half of a small file": (
        "x/a.py",
        code("mine", 6) + "\n\n" + "\n".join(LIBRARY_LINES[:30]),
        "standard library content",
    ),
    "a duplicate": ("x/a.py", code("first"), "repeats another file"),
    "generated": ("x/a.py", "# Automatically generated, do not edit\n" + code("mine"), "generated"),
    "generated, beside a notice": (
        "x/a.py",
        "# Copyright someone\n# This file was automatically generated\n" + code("mine"),
        "generated",
    ),
    "other licence inside": ("x/a.py", "# GNU General Public License v2\n" + code("mine"), "other licence in the file"),
    "not UTF-8": ("x/a.py", code("mine").encode() + b"\xff\xfe", "not UTF-8"),
    "minified": ("x/a.py", code("mine") + "x = [" + "1,a" * 400 + "]\n", "long lines"),
    "a table": ("x/a.py", "x = [\n" + "    8241, 9917, 1203,\n" * 100 + "]\n", "data table"),
    "too small": ("x/a.py", "import os\n", "size"),
    "too large": ("x/a.py", code("mine", 8000), "size"),
    "special token": ("x/a.py", code("mine") + "# <|endoftext|>\n", "special content"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_a_file_that_may_not_be_used_is_dropped_and_counted(site: Path, case: str) -> None:
    path, content, reason = DROPPED[case]
    install(site, "zz-last", {path: content})
    found = collect(site)
    assert found.dropped == {reason: 1}
    assert names(found) == {"first", "second"}


@pytest.mark.parametrize("folder", ["_vendor", "vendored", "third_party", "_distutils", "externals"])
def test_vendored_copies_stay_out(site: Path, folder: str) -> None:
    install(site, "third", {f"third/{folder}/a.py": code("a"), "third/b.py": code("b")})
    found = {source.name: source for source in (*collect(site).train, *collect(site).validation)}
    assert [path.name for path in found["third"].paths] == ["b.py"]


def test_further_directories_can_be_held_out(site: Path, tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "second.py").write_text(code("second"))
    with pytest.raises(UserError, match="at least 2 permissively licensed distributions"):
        collect(site, held_out=[tmp_path / "older"])


def test_a_file_of_record_that_is_gone_is_counted_not_fatal(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As where another package has imported the backport.
    monkeypatch.setattr(importlib.metadata.Distribution, "files", [])
    (site / "first" / "b.py").unlink()
    assert collect(site).dropped == {"unreadable": 1}


def test_opening_licence_comments_are_not_trained_on(site: Path) -> None:
    notice = "#!/usr/bin/env python\n# Copyright someone\n# Licensed under the Apache License\n\n"
    install(site, "noticed", {"noticed.py": notice + code("noticed")})
    texts = {s.name: s.texts for s in (*collect(site).train, *collect(site).validation)}
    assert texts["noticed"] == (code("noticed"),)


def test_too_few_distributions_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 0; install more packages or name their directory with --search-paths"):
        collect(tmp_path / "empty")


def test_the_standard_library_is_found_without_installed_packages() -> None:
    files = standard_library_files()
    assert {"os.py", "json"} <= {part for file in files for part in file.parts}
    assert not any("site-packages" in file.parts for file in files)
