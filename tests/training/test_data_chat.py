"""Which tokens of a rendered conversation the target generated."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from griffin_vllm.errors import GriffinError
from griffin_vllm.training.chat import ChatTarget, Sample, distinct_share
from griffin_vllm.training.conversations import Conversation, RecordError, Turn
from tests.training import chat_targets as targets

BYTE_LEVEL_TEMPLATES = {
    "chatml": targets.CHATML,
    "marked": targets.MARKED,
    "marked_without_end": targets.MARKED_WITHOUT_END,
    "ends_twice": targets.ENDS_TWICE,
}
TARGETS = {name: targets.chat_target(template) for name, template in BYTE_LEVEL_TEMPLATES.items()}


def talk(*contents: str, system: str | None = None, last: Turn | None = None) -> Conversation:
    turns = [Turn("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    if last:
        turns.append(last)
    if system:
        turns.insert(0, Turn("system", system))
    return Conversation("id", "family", tuple(turns))


def samples(target: ChatTarget, conversation: Conversation) -> list[Sample]:
    (found,) = target.samples([conversation])
    if isinstance(found, RecordError):
        raise found
    return found


def answers(target: ChatTarget, sample: Sample) -> list[str]:
    """Texts of the runs of generated tokens."""
    runs: list[list[int]] = []
    for i, (token, generated) in enumerate(zip(sample.tokens, sample.mask, strict=True)):
        if generated:
            if i == 0 or not sample.mask[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [target.tokenizer.decode(run) for run in runs]


def texts(min_size: int = 1) -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), min_size=min_size, max_size=30).filter(
        lambda text: text.strip() and "<" not in text
    )


@pytest.mark.parametrize("name", BYTE_LEVEL_TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(texts(), min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0), system=texts())
def test_masked_tokens_are_exactly_the_answers_with_their_end_of_turn(
    name: str, contents: list[str], system: str
) -> None:
    target = TARGETS[name]
    (sample,) = samples(target, talk(*contents, system=system))
    rendered = target.tokenizer.apply_chat_template(
        [{"role": "system", "content": system}]
        + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)],
        tokenize=False,
    )
    assert answers(target, sample) == [answer + "<|end|>" for answer in contents[1::2]]
    assert rendered.startswith(target.tokenizer.decode(sample.tokens))


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(texts(), min_size=3, max_size=5).filter(lambda c: len(c) % 2 == 1),
    token_ids=st.lists(st.integers(4, 250), min_size=1, max_size=20),
    cut=st.booleans(),
)
def test_token_ids_of_an_answer_are_never_tokenised_again(
    contents: list[str], token_ids: list[int], cut: bool
) -> None:
    target = TARGETS["chatml"]
    ids = tuple(token_ids if cut else [*token_ids, target.eos_token_ids[0]])
    (sample,) = samples(target, talk(*contents, last=Turn("assistant", "text", ids, cut)))
    start = len(sample.tokens) - len(ids)
    assert tuple(sample.tokens[start:]) == ids
    assert sample.mask[start - 1 :] == [0] + [1] * len(ids)
    assert target.tokenizer.decode(sample.tokens[:start]).endswith(
        f"<|start|>user\n{contents[-1]}<|end|>\n<|start|>assistant\n"
    )


def test_prompt_of_a_token_exact_answer_is_tokenised_as_the_server_does() -> None:
    target = TARGETS["chatml"]
    (sample,) = samples(target, talk("Hi", last=Turn("assistant", "\n\nYes", (9, 10, 0))))
    prompt = target.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert sample.tokens == [*prompt, 9, 10, 0]


@pytest.mark.parametrize("name", ["chatml", "ends_twice"])
def test_answer_cut_by_length_has_no_end_of_turn_but_the_conversation_goes_on(name: str) -> None:
    target = TARGETS[name]
    turns = (
        Turn("user", "a"),
        Turn("assistant", "cut text", cut=True),
        Turn("user", "b"),
        Turn("assistant", "ids", (9, 10), cut=True),
        Turn("user", "c"),
        Turn("assistant", "whole"),
    )
    (sample,) = samples(target, Conversation("id", "family", turns))
    assert answers(target, sample) == ["cut text", target.tokenizer.decode([9, 10]), "whole<|end|>"]
    text = target.tokenizer.decode(sample.tokens)
    assert "cut text<|end|>\n<|start|>user\nb" in text
    assert f"{target.tokenizer.decode([9, 10])}<|end|>\n<|start|>user\nc" in text


def test_generation_block_decides_where_the_generation_prompt_would_not() -> None:
    asks_otherwise = targets.MARKED.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    target = targets.chat_target(asks_otherwise)
    (sample,) = samples(target, talk("a", "one", "b", "two"))
    assert answers(target, sample) == ["one<|end|>", "two<|end|>"]


def test_end_of_turn_text_inside_an_answer_does_not_end_it() -> None:
    target = TARGETS["chatml"]
    (sample,) = samples(target, talk("a", "write <|end|> here", "b", "done"))
    assert answers(target, sample) == ["write <|end|> here<|end|>", "done<|end|>"]


def test_default_system_turn_of_the_template_is_not_masked() -> None:
    (sample,) = samples(TARGETS["chatml"], talk("Hi", "Yes"))
    assert TARGETS["chatml"].tokenizer.decode(sample.tokens).startswith("<|start|>system\nBe good.<|end|>")
    assert answers(TARGETS["chatml"], sample) == ["Yes<|end|>"]


@pytest.mark.parametrize("template", [targets.STRIPS_THINKING, targets.MARKED_STRIPS_THINKING])
def test_template_that_rewrites_history_gives_one_sample_an_answer(template: str) -> None:
    target = targets.chat_target(template)
    first, second = "<think>\nx\n</think>\n\nOne", "<think>\ny\n</think>\n\nTwo"
    one, two = samples(target, talk("a", first, "b", second))
    assert answers(target, one) == [first + "<|end|>"]
    assert answers(target, two) == [second + "<|end|>"]
    assert "\nx\n" not in target.tokenizer.decode(two.tokens)


def test_answer_behind_another_generation_prompt_is_skipped_unless_token_exact() -> None:
    target = targets.chat_target(targets.ASKS_OTHERWISE)
    with pytest.raises(RecordError, match="differently"):
        samples(target, talk("a", "b"))
    (sample,) = samples(target, talk("a", last=Turn("assistant", "b", (9, 10, 0))))
    assert target.tokenizer.decode(sample.tokens[:-3]).endswith("<|start|>assistant\n<think>\n")
    assert sample.mask[-4:] == [0, 1, 1, 1]


def test_several_templates_without_a_default_one_are_refused() -> None:
    tokenizer = targets.byte_level("")
    tokenizer.chat_template = {"rag": targets.CHATML, "tools": targets.CHATML}
    with pytest.raises(GriffinError, match="none of its chat templates is the default"):
        ChatTarget(tokenizer, [0], len(tokenizer))


def test_template_without_end_of_turn_masks_the_text_alone() -> None:
    target = targets.chat_target(targets.PLAIN)
    (sample,) = samples(target, talk("a", "one", "b", "two"))
    assert answers(target, sample) == ["one", "two"]


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(st.text("abcdefi t.", min_size=1), min_size=2, max_size=4).filter(
        lambda c: len(c) % 2 == 0
    )
)
def test_sentencepiece_tokenizer_sees_the_conversation_as_a_whole(contents: list[str]) -> None:
    tokenizer = targets.sentencepiece_like(targets.INSTRUCT)
    target = ChatTarget(tokenizer, [tokenizer.eos_token_id], len(tokenizer))
    contents = [f"x{content.strip()}" for content in contents]
    (sample,) = samples(target, talk(*contents))
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    assert sample.tokens == whole
    assert [a.strip() for a in answers(target, sample)] == [f"{c} </s>" for c in contents[1::2]]


def test_template_that_refuses_a_conversation_skips_it_alone() -> None:
    target = targets.chat_target(targets.INSTRUCT.replace("</s>", "<|end|>"))
    refused, fine = target.samples([talk("a", "b", system="s"), talk("a", "b")])
    assert isinstance(refused, RecordError)
    assert str(refused) == "the chat template refuses the conversation (no system turns)"
    assert isinstance(fine, list)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("1 / 0", "division by zero"),
        ("messages.index(0)", "not in list"),
        ("'{}'.format()", "out of range"),
        ("none.x.y", "is undefined|has no attribute"),
    ],
)
def test_template_that_breaks_in_any_way_skips_the_conversation_in_the_errors_own_words(
    expression: str, words: str
) -> None:
    broken = f"{{% if messages[0].content == 'break' %}}{{{{ {expression} }}}}{{% endif %}}{targets.CHATML}"
    target = targets.chat_target(broken)
    first, second, fine = target.samples([talk("break", "b"), talk("break", "c"), talk("a", "b")])
    assert isinstance(first, RecordError)
    assert re.fullmatch(rf"the chat template refuses the conversation \(.*({words}).*\)", str(first))
    # so they are counted together
    assert str(first) == str(second)
    assert isinstance(fine, list)


def test_end_of_turn_that_the_tokenizer_has_no_token_for_is_no_text() -> None:
    tokenizer = targets.byte_level(targets.PLAIN)
    target = ChatTarget(tokenizer, [tokenizer.eos_token_id, len(tokenizer) + 5], len(tokenizer) + 64)
    (sample,) = samples(target, talk("a", "None"))
    assert answers(target, sample) == ["None"]
    assert target._eos_texts == ["<|end|>"]


@pytest.mark.parametrize("ids", [(-1,), (4000,)])
def test_token_ids_outside_the_vocabulary_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(RecordError, match="vocabulary"):
        samples(TARGETS["chatml"], talk("a", last=Turn("assistant", "b", ids)))


def test_distinct_share_tells_loops_from_text() -> None:
    assert distinct_share([1, 2, 3] * 20) < 0.1
    assert distinct_share(range(60)) == 1.0
    assert distinct_share([1, 1, 1]) == 1.0
