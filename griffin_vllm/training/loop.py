"""The training loop: optimiser steps, checkpoints, validation, export; resumable at any step.

Everything random is drawn from (seed, step) or (seed, sample), never from a running generator, so a
resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from griffin_vllm.checkpoint import (
    check_values,
    draft_vocabulary,
    draft_vocabulary_tensors,
    find_head,
    load_tensors,
    open_head,
    save_head,
)
from griffin_vllm.errors import GriffinError
from griffin_vllm.training.attention import choose_attention
from griffin_vllm.training.batches import Batch, make_batch
from griffin_vllm.training.chat import ChatTarget
from griffin_vllm.training.config import TrainConfig
from griffin_vllm.training.data import TokenDataset, length_buckets
from griffin_vllm.training.export import exported_config, model_card
from griffin_vllm.training.head import DraftHead, EagleHead, GriffinHead
from griffin_vllm.training.plan import PlannedStep, plan_steps
from griffin_vllm.training.run_folder import (
    CHECKPOINTS,
    HEAD,
    check_output,
    claim_output,
    only_run_in,
    with_precision,
)
from griffin_vllm.training.run_log import RunLog
from griffin_vllm.training.simulate import Acceptance, simulate
from griffin_vllm.training.sizes import head_config
from griffin_vllm.training.sources import open_sources
from griffin_vllm.training.steps import DraftSteps, StepWeights
from griffin_vllm.training.target import target_config
from griffin_vllm.training.training_state import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from griffin_vllm.training.vocabulary import DraftVocabulary, choose, coverage

LOG_EVERY = 10
# An answer counts as greedy when the target's first choice is the token at this share of its positions.
GREEDY_SHARE = 0.97
# Validation answers that are looked at for each one that is wanted: every start of a run waits for that.
GREEDY_CANDIDATES = 4


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """SIGTERM or Ctrl-C arrived and the state is on disk; end the process with 128 + ``signal``."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}; run the same command again to continue")
        self.signal = number


class Wish(IntEnum):
    """What a process wants after a step; the strongest wish of all of them is everybody's."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class Trainer:
    """One run, from a validated config to an exported head."""

    def __init__(self, config: TrainConfig) -> None:
        """Load data and features and build the head; of a finished run only what tells that it is this one.

        Raises:
            GriffinError: data, target and settings do not fit each other, or ``output`` holds another run.
        """
        # the first to ask accelerate for its state decides for all whether CPU processes work together
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.config = config = with_precision(config, state.device)
        self.console = Console(stderr=True, quiet=not state.is_main_process)
        self.accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
        self.device = self.accelerator.device
        self.train_data = TokenDataset(config.data, "train")
        self.validation_data = TokenDataset(config.data, "validation")
        self.plan = plan_steps(self.train_data, config)
        self._attention = choose_attention(config.attention, self.device)
        self.hf_config = target_config(config.target)
        chat = ChatTarget.load(str(config.target))
        self.train_data.check_target(chat.tokenizer, chat.vocab_size)
        vocab_size = self.hf_config.vocab_size
        self.soft_target_tokens = min(config.soft_target_tokens or vocab_size, vocab_size)
        self.start = None
        if config.init_from is not None:
            self.start = open_head(find_head(config.init_from), config.head_kind)
            check_values(self.start)
        self.head_config = head_config(config, self.hf_config, int(self.train_data.lengths.max()), self.start)
        self.vocabulary = self._draft_vocabulary(chat)
        check_output(config, self.start)
        if self.exported.is_dir():
            return
        self.train_source, self.validation_source, shared = open_sources(
            config,
            self.hf_config,
            self.train_data,
            self.validation_data,
            self.soft_target_tokens,
            self.accelerator,
            self.console,
        )
        self.shared = shared.to(self.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        if self.vocabulary is not None:
            self.shared = self.vocabulary.restrict_weights(self.shared)
        self.head = self._new_head()
        self.answers = self._greedy_answers()

    @property
    def checkpoints(self) -> Path:
        return self.config.output / CHECKPOINTS

    @property
    def exported(self) -> Path:
        """The finished head's folder."""
        return self.config.output / HEAD

    def run(self) -> Path:
        """Train to the end, or on from the latest checkpoint, and export; returns the finished head's folder.

        A run that is finished is left as it is: beside its head may stand what was measured of it.

        Raises:
            Interrupted: a signal arrived.
            GriffinError: the loss is not finite, a checkpoint cannot be written, or another process trains there.
        """
        if self.exported.is_dir():
            # it may have been finished by another process since this one began
            check_output(self.config, self.start)
            self.console.print(f"the run is finished; head in {self.exported}")
            return self.exported
        with self._alone_in_output():
            return self._train()

    @contextmanager
    def _alone_in_output(self) -> Iterator[None]:
        if not self.accelerator.is_main_process:
            yield
            return
        with only_run_in(self.config.output):
            # what another process has made of the folder since this one looked at it is seen now
            claim_output(self.config, self.start)
            yield

    def _train(self) -> Path:
        config = self.config
        steps = DraftSteps(
            self.head,
            self.shared,
            alignment=config.alignment_rule,
            align_top_k=config.align_top_k,
            sampled_tokens=config.sampled_tokens,
            detach=config.detach,
            mean_over_processes=lambda count: self.accelerator.reduce(count, "mean"),
            any_of_processes=lambda flags: self.accelerator.reduce(flags.int(), "sum").bool(),
        )
        optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        model, optimizer = self.accelerator.prepare(steps, optimizer)
        done = self._resume(optimizer)
        log = RunLog(config.output, done, writes=self.accelerator.is_main_process)
        saved_at = time.monotonic()
        with stop_signals() as stop, self._progress(done) as progress:
            while done < len(self.plan):
                # at the head of the loop: a launcher kills processes that do not end within seconds of its signal, and
                # a run that was stopped before it could validate does so when it goes on
                if (
                    self.answers
                    and done
                    and done % config.validate_every == 0
                    and not log.has("validation", done)
                ):
                    log.write("validation", done, acceptance_row(self.validate()))
                losses = self._optimise(model, optimizer, done)
                done += 1
                speed = progress(done, losses)
                if done % LOG_EVERY == 0 or done == len(self.plan):
                    log.write("train", done, losses | {"tokens_per_second": speed})
                due = time.monotonic() - saved_at > 60 * config.checkpoint_minutes
                wish = self._strongest(Wish.STOP if stop else Wish.SAVE if due else Wish.GO_ON)
                if wish is not Wish.GO_ON or done == len(self.plan):
                    saved_at = time.monotonic()
                    self._save(optimizer, done)
                if wish is Wish.STOP:
                    raise Interrupted(stop[0] if stop else signal.SIGTERM, done)
            if stop:
                # while the last checkpoint was written
                raise Interrupted(stop[0], done)
        acceptance = self.validate() if self.answers else None
        # a run that was killed before its head was written has its last row
        if acceptance is not None and not log.has("validation", done):
            log.write("validation", done, acceptance_row(acceptance))
        return self._export(acceptance, log)

    def validate(self) -> Acceptance:
        """Greedy chains simulated on the first greedy answers of the validation split."""
        with self.accelerator.autocast():
            batches = self._validation_batches()
            return simulate(self.head, self.shared, batches, self.head_config.num_speculative_tokens)

    def _validation_batches(self) -> Iterator[Batch]:
        for samples in self.answers:
            # a target in the loop has a precision of its own
            with torch.autocast(self.device.type, enabled=False):
                batch = make_batch(self.validation_data, self.validation_source, samples, noise=0.0, seed=0)
            yield self._restricted(batch)

    def _optimise(self, model: Any, optimizer: Any, index: int) -> dict[str, float]:
        """Optimiser step ``index`` of the plan; returns its losses, averaged over micro-batches.

        Raises:
            GriffinError: loss or gradient are not finite; the weights are as they were.
        """
        config, accelerator, planned = self.config, self.accelerator, self.plan[index]
        weights = StepWeights(config.v_weight, config.p_weight, planned.stage.k_weight, config.step_decay)
        for group in optimizer.param_groups:
            group["lr"] = planned.learning_rate
        optimizer.zero_grad()
        losses = torch.zeros(planned.stage.draft_steps, 3, device=self.device)
        shares = self._shares(planned)
        for number, (samples, share) in enumerate(zip(planned.micro_batches, shares, strict=True), start=1):
            batch = self._batch(samples, config.seed + index)
            with nullcontext() if number == len(shares) else accelerator.no_sync(model):
                surrogate, parts = model(batch, planned.stage.draft_steps, weights, config.seed + index)
                accelerator.backward(share * surrogate)
            losses += share * parts
        named = self._named(accelerator.reduce(losses, "mean"), weights)
        self._check_finite("loss", named["loss"], index)
        # before a clipped value makes a number of an infinite one
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._check_finite("gradient's norm", float(torch.nn.utils.get_total_norm(gradients)), index)
        if config.clip_value is not None:
            accelerator.clip_grad_value_(model.parameters(), config.clip_value)
        if config.clip_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        return named | {"learning_rate": planned.learning_rate}

    def _check_finite(self, what: str, value: float, index: int) -> None:
        if not math.isfinite(value):
            kept = latest_checkpoint(self.checkpoints)
            raise GriffinError(
                f"{self.config.output}: the {what} is {value} at step {index + 1}; "
                + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
            )

    def _shares(self, planned: PlannedStep) -> list[float]:
        """What each micro-batch adds to a step: its share of the positions that the loss counts.

        So the sum of their mean losses is the mean over all positions, as if they had been one batch. Where
        an alignment mask takes more from one micro-batch than from another, it is so up to that difference:
        the mask of a later draft step is not known before its micro-batch has run.
        """
        counts = [
            sum(int(self.train_data[i][1][2:].sum()) for i in samples) for samples in planned.micro_batches
        ]
        return [count / max(1, sum(counts)) for count in counts]

    def _named(self, losses: Tensor, weights: StepWeights) -> dict[str, float]:
        rows = losses.tolist()
        named = {f"{name}{n}": row[i] for n, row in enumerate(rows, 1) for i, name in enumerate("vpk")}
        joint = ((weights.v * v + weights.p * p + weights.k * k) for v, p, k in rows)
        return {"loss": sum(weights.decay**n * loss for n, loss in enumerate(joint)), **named}

    def _batch(self, samples: list[int], seed: int) -> Batch:
        """This process's part of a batch; a process without a sample learns nothing from the first one."""
        mine = samples[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = make_batch(
            self.train_data,
            self.train_source,
            mine or samples[:1],
            self.config.noise,
            seed,
            positions=int(self.train_data.lengths[samples].max()) - 1,
        )
        return self._restricted(batch if mine else batch.without_loss())

    def _restricted(self, batch: Batch) -> Batch:
        """``batch`` on this process's device, in draft ids where the draft vocabulary is reduced."""
        batch = batch.to(self.device)
        return batch if self.vocabulary is None else self.vocabulary.restrict_batch(batch)

    def _tokens(self, planned: PlannedStep) -> int:
        return sum(int(self.train_data.lengths[i]) for part in planned.micro_batches for i in part)

    def _strongest(self, wish: Wish) -> Wish:
        wishes = self.accelerator.gather(torch.tensor([int(wish)], device=self.device))
        return Wish(int(wishes.max()))

    def _draft_vocabulary(self, chat: ChatTarget) -> DraftVocabulary | None:
        config, chosen = self.config, None
        if config.draft_vocab is not None:
            chosen = choose(self.train_data, chat, config.draft_vocab)
            covered = coverage(self.train_data, chosen)
            self.console.print(f"{len(chosen)} draft tokens cover {covered:.2%} of the answers")
        elif self.start is not None:
            chosen = draft_vocabulary(self.start)
        if chosen is None:
            return None
        return DraftVocabulary.of(chosen.to(self.device), self.hf_config.vocab_size)

    def _new_head(self) -> DraftHead:
        config = self.config
        torch.manual_seed(config.seed)
        kind = GriffinHead if config.head_kind == "griffin" else EagleHead
        head = kind(self.head_config, self._attention)
        if self.start is None:
            sample, _ = self.train_source.features([0], [self.train_data[0][0]])[0]
            head.reset_parameters(rms(self.shared.embed_tokens), rms(sample))
        else:
            tensors = load_tensors(self.start.weights, head.state_dict())
            head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return head.to(self.device)

    def _greedy_answers(self) -> list[list[int]]:
        """Batches of validation samples whose answers the target would give at temperature 0, or of the first samples
        where none of the ``GREEDY_CANDIDATES`` are."""
        wanted = self.config.validation_samples
        chosen: list[int] = []
        for sample in range(min(len(self.validation_data), GREEDY_CANDIDATES * wanted)):
            if len(chosen) == wanted:
                break
            tokens, mask = self.validation_data[sample]
            _, soft = self.validation_source.features([sample], [tokens])[0]
            greedy = soft.ids[:-1, 0].cpu() == tokens[1:]
            if mask[1:].any() and greedy[mask[1:]].float().mean() >= GREEDY_SHARE:
                chosen.append(sample)
        chosen = chosen or list(range(min(len(self.validation_data), wanted)))
        lengths = self.validation_data.lengths[chosen]
        buckets = length_buckets(lengths, self.config.batch_tokens, self.config.seed, 0)
        return [[chosen[i] for i in bucket] for bucket in buckets]

    def _resume(self, optimizer: Any) -> int:
        """Steps done so far, after loading the latest checkpoint if there is one."""
        path = latest_checkpoint(self.checkpoints)
        if path is None:
            return 0
        state = load_checkpoint(path)
        self.head.load_state_dict(state.weights)
        optimizer.load_state_dict(state.optimizer)
        self.console.print(f"continuing from {path}")
        return state.step

    def _save(self, optimizer: Any, done: int) -> None:
        if self.accelerator.is_main_process:
            state = TrainingState(done, self.head.state_dict(), optimizer.state_dict())
            save_checkpoint(self.checkpoints, state)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _progress(self, done: int) -> Iterator[Callable[[int, dict[str, float]], float]]:
        """A progress bar over optimiser steps with loss, tokens/s (which it returns) and time left."""
        tokens_until = list(itertools.accumulate(map(self._tokens, self.plan), initial=0))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
            TimeRemainingColumn(),
        )
        start, first = time.monotonic(), done
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("training", total=len(self.plan), completed=done, loss=math.nan, speed=0.0)

            def show(done: int, losses: dict[str, float]) -> float:
                speed = (tokens_until[done] - tokens_until[first]) / (time.monotonic() - start)
                steps = self.plan[done - 1].stage.draft_steps
                bar.update(
                    task,
                    completed=done,
                    loss=losses["loss"],
                    speed=speed,
                    description=f"training, {steps} draft step{'s' * (steps > 1)}",
                )
                return speed

            yield show

    def _export(self, acceptance: Acceptance | None, log: RunLog) -> Path:
        folder = self.exported
        if self.accelerator.is_main_process:
            positions = sum(map(self._tokens, self.plan))
            manifest = self.train_data.manifest
            card = model_card(self.head_config, self.config, manifest, log.rows(), acceptance, positions)
            tensors = self.head.state_dict()
            if self.vocabulary is not None:
                tensors |= draft_vocabulary_tensors(self.vocabulary.target_ids, self.head_config.vocab_size)
            save_head(folder, exported_config(self.config.head_kind, self.head_config), tensors, card)
            measured = (
                f"acceptance length {acceptance.acceptance_length:.3f} (simulated)"
                if acceptance
                else "no validation answers"
            )
            self.console.print(f"{measured}; head in {folder}")
        self.accelerator.wait_for_everyone()
        return folder


def acceptance_row(acceptance: Acceptance) -> dict[str, Any]:
    return {"acceptance_length": acceptance.acceptance_length, "accuracy": acceptance.accuracy}


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C add their number to, instead of ending the process in mid-step."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
