"""From trained weights to a folder that vLLM serves as it is, with a card that says how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from griffin_vllm.checkpoint import save_head
from griffin_vllm.config import HeadConfig
from griffin_vllm.training.config import HeadName, TrainConfig
from griffin_vllm.training.simulate import Acceptance


def export_head(
    folder: Path,
    name: HeadName,
    config: HeadConfig,
    weights: dict[str, Tensor],
    card: str,
) -> None:
    """Write the served layout (GRIFFIN) or the layout of vLLM's own ``eagle`` method (EAGLE, HASS)."""
    save_head(folder, config.to_served() if name == "griffin" else eagle_config(config), weights, card)


def eagle_config(config: HeadConfig) -> dict[str, Any]:
    """What vLLM's ``eagle`` method expects: a plain one-layer llama config."""
    return {**config.layer_config("llama"), "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}


def model_card(
    config: HeadConfig,
    train: TrainConfig,
    manifest: dict[str, Any],
    history: list[dict[str, Any]],
    acceptance: Acceptance | None,
    trained_tokens: int,
) -> str:
    """Markdown: what the head is for, its data, its settings and what validation measured."""
    stages = "; ".join(f"{s.draft_steps} draft step(s), {s.epochs:g} epoch(s)" for s in train.stages)
    lines = [
        "---",
        "library_name: vllm",
        "license: apache-2.0",
        f"base_model: {config.target}",
        "tags: [speculative-decoding, griffin]",
        "---",
        f"# {train.method.upper()} draft head for {config.target}",
        "",
        f"Head: {train.head_name.upper()}; alignment mask: `{train.alignment_rule}`; trained by griffin-vllm.",
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
        f"| data | {', '.join(str(s.get('name', s)) for s in manifest.get('sources', []))} |",
    ]
    if acceptance is not None:
        accuracy = ", ".join(f"{value:.3f}" for value in acceptance.accuracy)
        lines += [
            f"| simulated acceptance length, K={config.num_speculative_tokens} | "
            f"{acceptance.acceptance_length:.3f} (greedy chains on held-out answers) |",
            f"| top-1 accuracy by draft step | {accuracy} |",
        ]
    skipped = {"target", "data", "output", "features", "init_from"}
    settings = yaml.safe_dump(train.model_dump(mode="json", exclude=skipped), sort_keys=False)
    lines += ["", "## Settings", "", "```yaml", settings.rstrip()]
    lines += [
        "```",
        "",
        "## Validation",
        "",
        "| step | acceptance length | accuracy by step |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {row['step']} | {row['acceptance_length']:.3f} | {', '.join(f'{a:.3f}' for a in row['accuracy'])} |"
        for row in history
    ]
    return "\n".join(lines) + "\n"
