from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each request and step: tokens of its context, and of the drafts that the scheduler got for it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    found: list[tuple[int, int]] = []
    update = Scheduler.update_draft_token_ids

    def noted(self: Any, drafts: Any) -> None:
        for request, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
            if request in self.requests:
                found.append((self.requests[request].num_tokens, len(tokens)))
        update(self, drafts)

    monkeypatch.setattr(Scheduler, "update_draft_token_ids", noted)
    return found
