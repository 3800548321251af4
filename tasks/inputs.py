"""Stage `inputs`: what the run reads from outside the project, by content, so that DVC sees a file that changed.

params.yaml names the teacher and the text, and DVC cannot know what lies behind a name. The flow runs this stage every
time (`dvc repro` alone trusts the last hashes; `dvc repro -f -s inputs` takes new ones); the stages that read the files
depend on what it writes. Hashes are remembered with each file's size,
time and inode, so that a large teacher is not read again every time.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tasks.runner.stage import main

    main("inputs", tracked=False)  # before the imports below, which take seconds

import json
import time
from collections.abc import Mapping
from pathlib import Path

from lolcats_common.files import sha256_file, write_json
from lolcats_core.data import sources
from lolcats_core.teacher.pin import describe as describe_teacher
from tasks.runner.stage import Stage

MEMORY = Path(".scratch") / "hashes.json"


class Hashes:
    """SHA-256 of files, taken from memory for a file that has the same inode, size and times as before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new: dict[str, list[object]] = {}
        try:
            self.old = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self.old = {}

    def __call__(self, file: Path) -> str:
        state = file.stat()
        key = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        kept = self.old.get(str(file))
        # A file that changed within the clock's last tick could change again without a new time.
        settled = abs(time.time_ns() - state.st_mtime_ns) > 2_000_000_000
        known = settled and isinstance(kept, list) and kept[:-1] == key
        digest = str(self.old[str(file)][-1]) if known else sha256_file(file)
        self.new[str(file)] = [*key, digest]
        return digest

    def save(self) -> None:
        """Remember what was asked for this time."""
        write_json(self.path, self.new)


def run(stage: Stage) -> Mapping[str, float]:
    """Write teacher.json and data.json (kind, revision, SHA-256 by file); metrics of how many files there are.

    Raises:
        UserError: the teacher or the text is not there.
    """
    hashes = Hashes(stage.root / MEMORY)
    teacher = describe_teacher(stage.params.teacher, stage.root, hashes)
    data = sources.describe(stage.params.data, stage.root, hashes)
    write_json(stage.out / "teacher.json", teacher)
    write_json(stage.out / "data.json", data)
    hashes.save()
    return {"teacher_files": len(teacher["files"]), "data_files": len(data["files"])}
