"""The versions of transformers that linearized models run on, and the one name that differs between them.

A linearized model runs inside transformers' own layers, caches and `generate`, which change from version to version. So
every version in the range is tested (`make test-transformers`), and outside it the first import says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from lolcats_common.errors import UserError

# The oldest and the newest tested minor version; pyproject.toml asks pip for the same range.
OLDEST, NEWEST = (5, 17), (5, 24)
REQUIREMENT = f"transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"


def minor_version(version: str) -> tuple[int, ...]:
    """(5, 24) of "5.24.1"."""
    return tuple(int(part) for part in version.split(".")[:2])


def check_version(version: str = transformers.__version__) -> None:
    """Refuse a version of transformers that linearized models were not tested with.

    Raises:
        UserError: naming the version and the range.
    """
    if not OLDEST <= minor_version(version) <= NEWEST:
        raise UserError(
            f"linearized models need {REQUIREMENT}, and transformers {version} is installed; install one of that range:"
            f" pip install '{REQUIREMENT}'"
        )


check_version()

# What calls and outputs name the cache; transformers takes the older name for some versions more.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = CACHE_NAMES[0] if minor_version(transformers.__version__) >= (5, 24) else CACHE_NAMES[1]


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, by either name, or None."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
