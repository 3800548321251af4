"""Commits that hold dvc.lock and params.yaml of a finished run, made without touching index, HEAD or working tree.

A commit appears as a whole or not at all, whenever the process that makes it is killed. A ref keeps it and, through
it, what `dvc gc` must not remove.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lolcats_common.errors import UserError
from tasks.runner.git import KEPT, git, identity

ATTEMPTS = 5


def keep_lock(root: Path, ref: str, message: str = "Results of a run") -> str | None:
    """Commit HEAD's tree with the files `KEPT` as they are here and point `ref` at it; the commit's id.

    What `ref` pointed at before becomes a second parent. None outside a git checkout with a commit.
    """
    head = _commit_of(root, "HEAD")
    if head is None:
        return None
    with tempfile.TemporaryDirectory(prefix="lolcats-index-") as temporary:
        index = {"GIT_INDEX_FILE": str(Path(temporary) / "index")}
        git(root, "read-tree", head, env=index)
        for name in (name for name in KEPT if (root / name).is_file()):  # a checkout has no package.yaml
            blob = git(root, "hash-object", "-w", "--no-filters", "--", name)
            git(root, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", env=index)
        tree = git(root, "write-tree", env=index)
    for attempt in range(ATTEMPTS):
        before = _commit_of(root, ref)
        if before:
            same = git(root, "rev-parse", f"{before}^{{tree}}") == tree
            if same and git(root, "merge-base", head, before) == head:
                return before
        parents = [part for parent in (head, before) if parent for part in ("-p", parent)]
        commit = git(root, "commit-tree", tree, *parents, "-m", message, env=identity(root))
        try:
            git(root, "update-ref", ref, commit, before or "0" * 40)
            return commit
        except UserError:  # another process moved it in the meantime
            if attempt == ATTEMPTS - 1:
                raise
    return None


def _commit_of(root: Path, ref: str) -> str | None:
    try:
        return git(root, "rev-parse", "--verify", f"{ref}^{{commit}}")
    except UserError:
        return None
