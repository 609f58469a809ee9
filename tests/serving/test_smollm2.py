"""A sample of the losslessness sweep on the real target with its bundled head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from griffin_vllm.checkpoint import bundled_heads
from tests.serving.engines import engine, spec_counters

if TYPE_CHECKING:
    from vllm import LLM

REPOSITORY = Path(__file__).parents[2]
HEAD = "smollm2-135m-instruct"
PROMPTS = REPOSITORY.parent / "shared/data/prompts/mt_bench.jsonl"
TOKENS = 32


@pytest.mark.skipif(HEAD not in bundled_heads(), reason=f"no bundled head {HEAD}")
@pytest.mark.skipif(not PROMPTS.exists(), reason=f"no prompts in {PROMPTS}")
def test_smollm2_answers_as_without_speculation_and_faster_than_a_token_a_step_as_shipped_and_by_its_head_alone(
    demo_target: Path,
) -> None:
    from vllm import SamplingParams

    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[::16]
    chats = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)

    def answers(llm: LLM, at_a_time: int) -> list[list[int]]:
        parts = [chats[start : start + at_a_time] for start in range(0, len(chats), at_a_time)]
        outputs = [output for part in parts for output in llm.chat(part, greedy, use_tqdm=False)]
        return [list(output.outputs[0].token_ids) for output in outputs]

    with engine(model=str(demo_target), max_model_len=1024) as llm:
        expected = answers(llm, len(chats))
    # lookup needs no head
    alone = {"num_speculative_tokens": 3, "prompt_lookup_min": 0}
    # as shipped one by one: untuned, a CPU drafts nothing for five requests
    for speculation, at_a_time, least in (({}, 1, 1.2), (alone, len(chats), 1.5)):
        with engine(
            model=str(demo_target),
            max_model_len=1024,
            spec_model=f"griffin:{HEAD}",
            speculative_config=speculation,
        ) as llm:
            found = answers(llm, at_a_time)
            counters = spec_counters(llm)
        assert found == expected
        assert 1 + counters["num_accepted_tokens"] / counters["num_drafts"] > least
