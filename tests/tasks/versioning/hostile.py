"""Overrides that a user of Prefect's API may try, and what each is told."""

from __future__ import annotations

from typing import Any

LEADS_OUT = "leads out of the project's open folders and of LOLCATS_SOURCES"
PASSWORD = "SUPERSECRETPW"
DEEP: Any = 1
for _ in range(60):
    DEEP = {"a": DEEP}
# What is given as `set`, and what is said; None where Prefect's server itself does not take it.
HOSTILE: list[tuple[Any, str | None]] = [
    ({"data.source": "~/secret.txt"}, LEADS_OUT),
    ({"data.source": "~root"}, LEADS_OUT),
    ({"data.source": "~nosuchuser/x"}, "no user ~nosuchuser"),
    ({"data.source": "../secret.txt"}, LEADS_OUT),
    ({"data": {"source": "a/../../secret.txt"}}, LEADS_OUT),
    ({"data.source": "/etc/passwd"}, LEADS_OUT),
    ({"data.source": "link"}, LEADS_OUT),
    ({"data.source": "li*/*.txt"}, LEADS_OUT),
    ({"data.source": ".prefect/login.txt"}, LEADS_OUT),
    ({"data.source": "a/.."}, LEADS_OUT),
    ({"data.source": "file:///etc/passwd"}, "no Hugging Face dataset id"),
    ({"data.source": "https://example.com/x.jsonl"}, "no Hugging Face dataset id"),
    ({"data.source": f"https://bob:{PASSWORD}@host/x"}, "must hold no login"),
    ({"data.source": "a\0b"}, "without line breaks and control characters"),
    ({"data.source": ["a.txt"]}, "`data.source` must be text, got"),
    ({"data.source": "a" * 5000}, "text of at most 4096 characters"),
    ({"data.source": "!!python/object/apply:os.system ['true']"}, "nothing matches !!python"),
    ({"data": "&a [*a]"}, "`data` must be a mapping"),
    ({"teacher.source": "/root"}, LEADS_OUT),
    ({"teacher.source": "link"}, LEADS_OUT),
    ({"teacher.source": "owner/model", "teacher.revision": "main"}, "must be a commit of 40 hexadecimal digits"),
    ({"teacher.source": "a/..", "teacher.revision": "a" * 40}, LEADS_OUT),
    ({"teacher.trust_remote_code": True}, "must stand with this source and revision"),
    ({"teacher": {"source": "o/m", "revision": "a" * 40, "trust_remote_code": True}}, "of o/m at aaaa"),
    ({"register.alias": "champion"}, "`alias` must be another name than challenger, champion"),
    ({"register": {"alias": "prod"}}, "`register.alias` must stay as params.yaml"),
    ({"register.name": "production"}, "`register.name` must stay as params.yaml"),
    ({"gates.perplexity": "disabled"}, "`gates.perplexity` must stay as params.yaml"),
    ({"relinearize.follow_hub": True}, "`relinearize.follow_hub` must stay as params.yaml"),
    ({"relinearize.drift_source": "/var/log/*"}, "`relinearize.drift_source` must stay as params.yaml"),
    ({"seed": 2**63}, "whole number of at most 64 bits"),
    ({"seed": True}, "`seed` must be a whole number, got True"),
    ({"transfer.lr": [0.1]}, "`transfer.lr` must be a finite number"),
    ({"evaluate.tasks": "code_continuation"}, "`evaluate.tasks` must be a list"),
    ({"compute.processes": 10**6}, "`processes` must be"),
    ({"__class__.x": 1}, "unknown key `__class__`"),
    ({".".join("a" * 40): 1}, "nested at most 32 deep"),
    ({"data": DEEP}, "nested at most 32 deep"),
    ("data.source=x", None),
    ([{"data.source": "x"}], None),
    ({"seed": 10**400}, "whole number of at most 64 bits"),
]
