"""What each part of GRIFFIN's training is worth: one short run a variant and seed, at equal tokens.

    python benchmarks/ablation.py CONFIG.yaml --out runs/ablation --json benchmarks/results/ablation.json

Every variant trains with CONFIG's data, stages and rates and differs in one thing; it is judged by the
simulated acceptance length on the target's own held-out greedy answers. Runs take turns seed by seed, go on
where they were stopped when the same command is given again, and the record grows with each; runs that a former command
put into it under the same settings stay.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import options, records
from griffin_vllm.checkpoint import Head, find_head, open_head
from griffin_vllm.errors import GriffinError
from griffin_vllm.files import check_same, read_json, write_whole
from griffin_vllm.training.attention import dense_stream_attention, visible_positions
from griffin_vllm.training.batches import Batch
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import TokenDataset
from griffin_vllm.training.head import DraftHead, GriffinHead, Streams
from griffin_vllm.training.loop import Trainer
from griffin_vllm.training.run_folder import input_digests, with_precision
from griffin_vllm.training.simulate import Acceptance


class LeakySoftmax:
    """The reference's attention from stage 2 on: each position that a query may not see still adds
    ``exp(0)`` to the softmax's denominator, and nothing to its numerator."""

    def __init__(self) -> None:
        self.leaks = False

    def __call__(self, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        if not self.leaks:
            return dense_stream_attention(q, keys, values)
        T = q.shape[2]
        visible = visible_positions(len(keys), T, q.device)
        # a zero key gives the score 0, a zero value gives nothing: the leak, once for each later position
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        nothing = torch.zeros_like(keys[0])
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            torch.cat([*keys, nothing], 2),
            torch.cat([*values, nothing], 2),
            torch.cat([visible, later], 1),
        )


class LeakyTrainer(Trainer):
    """Trains stages 2 and later with the leak; validates, as decoding does, without it."""

    def _new_head(self) -> DraftHead:
        # what the trainer builds its head with
        self._attention = self.leaky = LeakySoftmax()
        return super()._new_head()

    def _optimise(self, model: Any, optimizer: Any, index: int) -> dict[str, float]:
        self.leaky.leaks = self.plan[index].stage.draft_steps > 1
        return super()._optimise(model, optimizer, index)

    def validate(self) -> Acceptance:
        self.leaky.leaks = False
        return super().validate()


class PredictFedBack(GriffinHead):
    """A GRIFFIN head without its second output: predict is also the feature of the next draft step."""

    def forward(self, embeddings: Tensor, features: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        predict, _ = super().forward(embeddings, features, streams)
        return predict, predict


class PredictFeedbackTrainer(Trainer):
    def _new_head(self) -> DraftHead:
        head = super()._new_head()
        head.__class__ = PredictFedBack
        return head


class RenormalisedTrainer(Trainer):
    """The probabilities of the tokens that are kept of the target's distribution (the most likely ones, those of the
    draft vocabulary) are scaled to sum to one; with all tokens kept they already do."""

    def _restricted(self, batch: Batch) -> Batch:
        batch = super()._restricted(batch)
        kept = batch.soft.probabilities
        # at a position with nothing kept there is nothing to scale
        scaled = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)
        return replace(batch, soft=replace(batch.soft, probabilities=scaled))


@dataclass(frozen=True)
class Variant:
    description: str
    settings: dict[str, Any]
    trainer: type[Trainer] = Trainer


# What each variant differs from.
BASE = {"method": "griffin", "head": None, "alignment": None, "detach": True}
VARIANTS = {
    "griffin": Variant("GRIFFIN head, reference's mask, proper softmax, detached steps", {}),
    "griffin-no-mask": Variant("GRIFFIN head, no mask", {"alignment": "off"}),
    "eagle-mask": Variant("EAGLE head, reference's mask", {"head": "eagle"}),
    "eagle-no-mask": Variant("EAGLE head, no mask (HASS)", {"head": "eagle", "alignment": "off"}),
    "causal-mask": Variant("the mask read causally", {"alignment": "causal"}),
    "not-detached": Variant("gradients flow between draft steps", {"detach": False}),
    "leaky-softmax": Variant("the reference's softmax in stages 2 and later", {}, LeakyTrainer),
    "predict-fed-back": Variant("predict, not regress, feeds the next step", {}, PredictFeedbackTrainer),
    "renormalised": Variant(
        "soft targets renormalised over the tokens that are kept", {}, RenormalisedTrainer
    ),
}


def main(
    config: Annotated[Path, typer.Argument(help="Settings of `griffin train`; output and seed are ignored.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs.")],
    json_path: Annotated[Path, typer.Option("--json", help="The record to write.")],
    variants: Annotated[str, typer.Option(help="Names, with commas between them.")] = ",".join(VARIANTS),
    seeds: Annotated[str, typer.Option(help="Numbers, with commas between them.")] = "1,2,3",
) -> None:
    """Train the variants and print what each is worth."""
    names = chosen_variants(variants)
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise GriffinError.at("ablation.py", "--seeds", seeds, "whole numbers like 1,2,3") from error
    settings = settings_of(config)
    for name in names:
        settings_of_run(name, numbers[0], config, out)
    runs = recorded(json_path, settings)
    for seed in numbers:
        for name in names:
            runs[name, seed] = run(name, seed, config, out)
            ordered = [
                runs[key] for key in sorted(runs, key=lambda key: (list(VARIANTS).index(key[0]), key[1]))
            ]
            record = {"settings": settings, "runs": ordered}
            write_whole(json_path, json.dumps(record, indent=1) + "\n")
    Console().print(table(ordered))


def recorded(path: Path, settings: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs of an existing record by variant and seed.

    Raises:
        GriffinError: they were made with other settings, or another torch.
    """
    if not path.is_file():
        return {}
    record = read_json(path)
    check_same(path, record.get("settings", {}), settings, "name another --json")
    return {(one["variant"], one["seed"]): one for one in record["runs"]}


def chosen_variants(text: str) -> list[str]:
    """Names in a comma-separated list.

    Raises:
        GriffinError: one of them is no variant.
    """
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VARIANTS)}"
            raise GriffinError(f"ablation.py: --variants: unknown variant {name!r}; {hint}")
    return names


def run(name: str, seed: int, config: Path, out: Path) -> dict[str, Any]:
    """One run, or what is left of it; its last validation.

    Raises:
        GriffinError: what is there was trained with other settings or from other data.
    """
    settings = settings_of_run(name, seed, config, out)
    VARIANTS[name].trainer(settings).run()
    log = records.read_lines(settings.output / "log.jsonl")
    last = [row for row in log if row["kind"] == "validation"][-1]
    return {
        "variant": name,
        "seed": seed,
        "steps": last["step"],
        "acceptance_length": last["acceptance_length"],
        "accuracy": last["accuracy"],
    }


def settings_of_run(name: str, seed: int, config: Path, out: Path) -> TrainConfig:
    """Raises GriffinError where the variant does not go with ``config``."""
    overrides = {**VARIANTS[name].settings, "output": str(out / f"{name}-{seed}"), "seed": seed}
    return TrainConfig.load(config, [f"--{key}={value}" for key, value in overrides.items()])


def settings_of(config: Path) -> dict[str, Any]:
    """The common settings; for the folders of this machine the digests of what is in them.

    Raises:
        GriffinError: something cannot be read, the data have nothing to validate on, or the settings are not of the
            method that the variants differ from.
    """
    settings = with_precision(TrainConfig.load(config, ["--output", "ablation"]), torch.device("cpu"))
    for name, value in BASE.items():
        if getattr(settings, name) != value:
            raise GriffinError.at(config, name, getattr(settings, name), f"{value!r}, which variants change")
    if not len(TokenDataset(settings.data, "validation")):
        raise GriffinError.at(
            settings.data, "validation samples", 0, "1 or more, which the variants are judged by"
        )
    folders = {"target", "data", "features", "output", "target_name", "init_from"}
    return {
        **settings.model_dump(mode="json", exclude=folders),
        "inputs": input_digests(settings, _start(settings)),
        "torch": torch.__version__,
    }


def _start(settings: TrainConfig) -> Head | None:
    """The head of ``init_from``."""
    return open_head(find_head(settings.init_from), settings.head_kind) if settings.init_from else None


def table(runs: list[dict[str, Any]]) -> Table:
    by_variant: dict[str, list[float]] = {}
    for one in runs:
        by_variant.setdefault(one["variant"], []).append(one["acceptance_length"])
    base = mean(by_variant.get("griffin", next(iter(by_variant.values()))))
    shown = Table("variant", "what it is", "tau, mean", "lowest to highest", "ratio to the first", "seeds")
    for name, lengths in by_variant.items():
        shown.add_row(
            name,
            VARIANTS[name].description,
            f"{mean(lengths):.3f}",
            f"{min(lengths):.3f} to {max(lengths):.3f}",
            f"{mean(lengths) / base:.3f}",
            str(len(lengths)),
        )
    return shown


if __name__ == "__main__":
    options.execute(lambda _: typer.run(main))
