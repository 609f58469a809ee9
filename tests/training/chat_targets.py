"""Small tokenizers and the kinds of chat template that targets come with."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from griffin_vllm.training.chat import ChatTarget

CORPUS = [
    "What is the capital of France? The capital of France is Paris.\n\nWhat else? Nothing else, thanks.",
    "<think>\nLet me see.\n</think>\n\nOne two three four five six seven eight nine ten, zehn, dix, десять.\n\n\n",
]
SPECIAL = ["<|end|>", "<|start|>", "<s>", "</s>"]

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|start|>system\nBe good.<|end|>\n{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ m.content }}<|end|>{% endgeneration %}", "{{ m.content }}{% endgeneration %}<|end|>"
)
# Like Llama 2: the answer follows a space, and the end of turn is the sequence's end.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% else %}{{ raise_exception('no system turns') }}"
    "{% endif %}{% endfor %}"
)
# Like Qwen 3: thinking is dropped from all answers but the last.
STRIPS_THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED_STRIPS_THINKING = STRIPS_THINKING.replace(
    "{% else %}{{ m.content }}{% endif %}<|end|>",
    "{% elif m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|end|>' if m.role == 'user' or not loop.last }}",
)
# Like Phi 3: a conversation that asks for nothing ends in the sequence's end, behind the end of its turn.
ENDS_TWICE = CHATML.removesuffix("{% endif %}") + "{% else %}</s>{% endif %}"
# Like DeepSeek R1: it asks with a word that is in no rendered answer.
ASKS_OTHERWISE = CHATML.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>\n{% endif %}")
# No token ends a turn.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with some merges: every text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, template)


def sentencepiece_like(template: str) -> PreTrainedTokenizerFast:
    """BPE that puts a space before each text, as Llama 2's tokenizer does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "[INST] [/INST]"], trainer)
    return _fast(tokenizer, template, eos="</s>")


def chat_target(template: str) -> ChatTarget:
    tokenizer = byte_level(template)
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["</s>"])]
    return ChatTarget(tokenizer, ends, len(tokenizer))


def write_target(folder: Path, template: str = CHATML) -> Path:
    """A target's folder as far as data preparation looks at it: tokenizer and config, no weights."""
    tokenizer = byte_level(template)
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "num_attention_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _fast(tokenizer: Tokenizer, template: str, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        additional_special_tokens=SPECIAL,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
