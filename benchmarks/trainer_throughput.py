"""Training throughput and peak memory against the GRIFFIN authors' model code, side by side.

Both sides train the same head (the target's sizes) with three draft steps on the same features, in bf16
autocast where the CPU multiplies in bf16 (else in float32), in a process each, taking turns. The features are
cached; with ``--target-in-loop`` the target computes them (and, for our side, its top-32 distributions) anew for
every batch. Ours is ``DraftSteps`` without an alignment mask, its draft distributions normalised over sampled
tokens (``--sampled-tokens``). The reference is its own model class from a checkout that you name, in a loop that
computes the losses as its training script does: every position, the whole vocabulary, one backward pass a step.

    python benchmarks/trainer_throughput.py --target models/smollm2-135m-instruct --reference ../GRIFFIN
"""

from __future__ import annotations

import datetime
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.records import machine
from griffin_vllm.bf16 import multiplies_bf16
from griffin_vllm.config import HeadConfig
from griffin_vllm.training.attention import choose_attention
from griffin_vllm.training.batches import Batch
from griffin_vllm.training.head import GriffinHead
from griffin_vllm.training.sizes import sizes_like
from griffin_vllm.training.steps import DraftSteps, StepWeights
from griffin_vllm.training.target import SharedWeights, SoftTargets, Target, soft_targets

WEIGHTS = StepWeights(v=1.0, p=0.1, k=0.5, decay=1.0)
SIDES = ("ours", "reference")
BF16 = multiplies_bf16(torch.device("cpu"))


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target: sizes, embeddings and lm_head.")],
    reference: Annotated[Path, typer.Option(help="A checkout of the reference implementation.")],
    tokens: Annotated[int, typer.Option(help="Positions a sequence.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences a batch.")] = 2,
    draft_steps: Annotated[int, typer.Option(help="Draft steps (the stage).")] = 3,
    batches: Annotated[int, typer.Option(help="Timed batches a run, after one of warm-up.")] = 3,
    repeats: Annotated[int, typer.Option(help="Runs of each side, taking turns.")] = 3,
    sampled_tokens: Annotated[int, typer.Option(help="Ours: sampled vocabulary; 0 for all of it.")] = 4096,
    target_in_loop: Annotated[bool, typer.Option(help="Compute the features for every batch.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare training throughput with the reference's model code."""
    if side is not None:
        sampled = sampled_tokens or None
        run = measure(
            side, target, reference, tokens, batch, draft_steps, batches, sampled, in_loop=target_in_loop
        )
        print(json.dumps(run))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(repeats):
        for name in SIDES:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--side", name], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    summary = {
        name: {key: median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(*runs.values(), strict=True)]
    memory = summary["ours"]["peak_gib"] / summary["reference"]["peak_gib"]
    table = Table(
        "side", "tokens/s", "peak memory, GiB", title=f"{draft_steps} draft steps, {batch} x {tokens}"
    )
    for name, values in summary.items():
        table.add_row(name, f"{values['tokens_per_second']:.0f}", f"{values['peak_gib']:.2f}")
    Console().print(table)
    print(
        f"speed ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), memory ratio {memory:.2f}"
    )
    if json_path is not None:
        settings = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "target": target.name,
            "tokens": tokens,
            "batch": batch,
            "draft_steps": draft_steps,
            "sampled_tokens": sampled_tokens,
            "target_in_loop": target_in_loop,
            "precision": "bf16" if BF16 else "fp32",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        record = {"settings": settings, "runs": runs, "speed_ratios": ratios, "memory_ratio": memory}
        json_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(
    side: str,
    target: Path,
    reference: Path,
    tokens: int,
    batch: int,
    draft_steps: int,
    batches: int,
    sampled_tokens: int | None,
    *,
    in_loop: bool,
) -> dict[str, float]:
    """Train one side for a few batches; tokens/s and the process's peak resident memory."""
    loaded = Target(target, torch.device("cpu"))
    ids, cached = make_data(loaded, tokens, batch)
    config, shared = sizes(loaded, tokens), loaded.shared

    def data() -> Batch:
        if not in_loop:
            return cached
        hidden = loaded.hidden_states(ids).float()
        # the reference's loop makes its soft targets itself, over the whole vocabulary
        soft = top_targets(hidden[:, 1:], shared.lm_head) if side == "ours" else cached.soft
        return replace(cached, features=hidden[:, :-1], feature_targets=hidden[:, 1:], soft=soft)

    if side == "ours":
        step = our_step(data, shared, config, draft_steps, sampled_tokens)
    else:
        step = reference_step(data, shared, config, draft_steps, reference)
    step()
    start = time.perf_counter()
    for _ in range(batches):
        step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"tokens_per_second": batches * batch * tokens / seconds, "peak_gib": peak}


def make_data(loaded: Target, tokens: int, batch: int) -> tuple[Tensor, Batch]:
    """Random tokens (batch, tokens + 1), and features at the scale of the target's with their top-32
    distributions, as a cache would give them."""
    torch.manual_seed(0)
    ids = torch.randint(0, loaded.config.vocab_size, (batch, tokens + 1))
    features = torch.randn(batch, tokens + 1, loaded.config.hidden_size) * 1.8
    soft = top_targets(features[:, 1:], loaded.shared.lm_head)
    loss_mask = torch.ones(batch, tokens, dtype=torch.bool)
    loss_mask[:, -1] = False
    # The target's own choice: drafts then stay aligned about as often as in training.
    next_tokens = soft.ids[..., 0]
    return ids, Batch(features[:, :-1], features[:, 1:], ids[:, :-1], next_tokens, soft, loss_mask)


def top_targets(features: Tensor, lm_head: Tensor) -> SoftTargets:
    """The target's 32 most likely tokens after each of ``features`` (B, T, d)."""
    soft = soft_targets(features.flatten(0, 1).to(lm_head.dtype), lm_head, 32)
    shape = (*features.shape[:2], 32)
    return SoftTargets(soft.ids.view(shape), soft.probabilities.view(shape))


def sizes(loaded: Target, tokens: int) -> HeadConfig:
    return HeadConfig(**sizes_like(loaded.config) | {"max_position_embeddings": max(2048, tokens)})


def our_step(
    data: Callable[[], Batch], shared: SharedWeights, config: HeadConfig, steps: int, sampled: int | None
) -> Callable[[], None]:
    head = GriffinHead(config, choose_attention("auto", torch.device("cpu")))
    head.reset_parameters(0.136, 1.8)
    # Every position stays in the loss, as on the reference's side: the mask would only help us.
    module = DraftSteps(
        head,
        shared,
        alignment="off",
        align_top_k=3,
        sampled_tokens=sampled,
        detach=True,
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-5)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            surrogate, _ = module(data(), steps, WEIGHTS, 0)
        surrogate.backward()
        optimizer.step()

    return step


def reference_step(
    source: Callable[[], Batch], shared: SharedWeights, config: HeadConfig, steps: int, checkout: Path
) -> Callable[[], None]:
    model, lm_head = reference_model(config, checkout), shared.lm_head
    model.embed_tokens.weight.data = shared.embed_tokens.float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5)

    def step() -> None:
        optimizer.zero_grad()
        data = source()
        mask = data.loss_mask[..., None].float()
        count = mask.sum() + 1e-5
        streams: Tensor | None = None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            soft = F.linear(data.feature_targets, lm_head).float().softmax(-1)
            best = soft.topk(10).indices
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
                predict, regress = model(data.features, data.tokens, q_hidden_states=streams)
                log_q = F.linear(predict, lm_head).float().log_softmax(-1)
                cross = mask * soft * log_q
                v = (mask * F.smooth_l1_loss(regress.float(), data.feature_targets, reduction="none")).mean(
                    -1
                )
                p, k = -cross.sum() / count, -cross.gather(-1, best).sum() / count
                loss = WEIGHTS.v * v.sum() / count + WEIGHTS.p * p + WEIGHTS.k * k
            loss.backward()
            last = data.features if streams is None else streams[-1]
            newest = torch.cat([last[:, :1], regress[:, :-1].detach().float()], 1)[None]
            streams = newest if streams is None else torch.cat([streams, newest])
        optimizer.step()

    return step


def reference_model(config: HeadConfig, checkout: Path) -> Any:
    """The reference's stage-2 training model, from its checkout, on today's transformers."""
    import transformers.pytorch_utils
    import transformers.utils

    def no_decorator(*_: Any, **__: Any) -> Callable[[Any], Any]:
        return lambda decorated: decorated

    for name in (
        "add_start_docstrings",
        "add_start_docstrings_to_model_forward",
        "replace_return_docstrings",
    ):
        if not hasattr(transformers.utils, name):
            setattr(transformers.utils, name, no_decorator)
    if not hasattr(transformers.pytorch_utils, "ALL_LAYERNORM_LAYERS"):
        transformers.pytorch_utils.ALL_LAYERNORM_LAYERS = []
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("model.cnets_griffin_2")
    layer = {**config.layer_config("llama"), "rope_scaling": None, "rope_theta": config.rope_theta}
    fields = {**layer, "pretraining_tp": 1, "pad_token_id": 0}
    reference_config = type("ReferenceConfig", (), fields)()
    return module.Model(reference_config).train()


if __name__ == "__main__":
    typer.run(main)
