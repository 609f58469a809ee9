"""From trained weights to a folder that vLLM serves as it is, with a card that says how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from griffin_vllm.config import HeadConfig, HeadKind
from griffin_vllm.training.config import TrainConfig, shown_stages
from griffin_vllm.training.data import Manifest, SplitCounts
from griffin_vllm.training.simulate import Acceptance

CURVE_ROWS = 16


def exported_config(kind: HeadKind, config: HeadConfig) -> dict[str, Any]:
    """The ``config.json`` of the served layout (GRIFFIN), or of vLLM's own ``eagle`` method (EAGLE, HASS)."""
    return config.to_served() if kind == "griffin" else eagle_config(config)


def eagle_config(config: HeadConfig) -> dict[str, Any]:
    """What vLLM's ``eagle`` method expects: a plain one-layer llama config.

    It ignores the recommended K and the trained context length, which are there for people and tools.
    """
    return {
        **config.layer_config("llama"),
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "num_speculative_tokens": config.num_speculative_tokens,
        "trained_context_length": config.trained_context_length,
    }


def model_card(
    config: HeadConfig,
    train: TrainConfig,
    manifest: Manifest,
    log: Sequence[dict[str, Any]],
    acceptance: Acceptance | None,
    trained_tokens: int,
) -> str:
    """Markdown: what the head is for, its data, its settings and what validation measured.

    ``log``: rows of the run's log; ``acceptance``: at the end, None without validation answers.
    """
    losses = [(row["step"], row["loss"]) for row in log if row["kind"] == "train"]
    curve = [row for row in log if row["kind"] == "validation"]
    stages = shown_stages(train.stages)
    lines = [
        "---",
        "library_name: vllm",
        f"base_model: {config.target}",
        "tags: [speculative-decoding, griffin]",
        "---",
        f"# {train.method.upper()} draft head for {config.target}",
        "",
        f"Head: {train.head_kind.upper()}; alignment mask: `{train.alignment_rule}`; trained by griffin-vllm.",
        "",
        "| | |",
        "| --- | --- |",
        f"| recommended K | {config.num_speculative_tokens} |",
        f"| trained context length | {config.trained_context_length} tokens |",
        f"| sizes | d {config.hidden_size}, I {config.intermediate_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads |",
        f"| draft vocabulary | {config.draft_vocab_size} of {config.vocab_size} tokens |",
        f"| continued from | {Path(train.init_from).name if train.init_from else 'nothing'} |",
        f"| stages | {stages} |",
        f"| positions trained on | {trained_tokens:,} |",
        *(f"| {split} data | {_counts(counts)} |" for split, counts in manifest.splits.items()),
    ]
    if losses:
        lines.append(f"| last training loss | {losses[-1][1]:.3f} at step {losses[-1][0]} |")
    if acceptance is not None:
        accuracy = ", ".join(f"{value:.3f}" for value in acceptance.accuracy)
        lines += [
            f"| simulated acceptance length, K={config.num_speculative_tokens} | "
            f"{acceptance.acceptance_length:.3f} (greedy chains on held-out answers) |",
            f"| top-1 accuracy by draft step | {accuracy} |",
        ]
    lines += ["", "## Data", "", "| source | SHA-256 | records | skipped |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {source.name} | {source.sha256 or 'a data set'} | {source.records:,} | {source.skipped:,} |"
        for source in manifest.sources
    ]
    skipped = {"target", "data", "output", "features", "init_from"}
    settings = yaml.safe_dump(train.model_dump(mode="json", exclude=skipped), sort_keys=False)
    lines += ["", "## Settings", "", "```yaml", settings.rstrip(), "```"]
    if curve:
        lines += [
            "",
            "## Validation",
            "",
            "| step | training loss | acceptance length | accuracy by draft step |",
            "| --- | --- | --- | --- |",
        ]
    for row in _thinned(curve):
        loss = next((f"{loss:.3f}" for step, loss in reversed(losses) if step <= row["step"]), "")
        accuracy = ", ".join(f"{value:.3f}" for value in row["accuracy"])
        lines.append(f"| {row['step']} | {loss} | {row['acceptance_length']:.3f} | {accuracy} |")
    return "\n".join(lines) + "\n"


def _counts(counts: SplitCounts) -> str:
    share = counts.looping_samples / max(1, counts.samples)
    return (
        f"{counts.samples:,} samples, {counts.tokens:,} tokens, {counts.answer_tokens:,} of them answers; "
        f"{share:.1%} of the samples loop"
    )


def _thinned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ``CURVE_ROWS`` of ``rows``, evenly apart, the last one among them."""
    step = max(1, -(-len(rows) // CURVE_ROWS))
    return list(rows[::-1][::step][::-1])
