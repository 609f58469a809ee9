"""The ``griffin`` command. Sub-commands import what they need when they run, so that ``--help`` is quick."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from griffin_vllm import __version__
from griffin_vllm.errors import GriffinError

# Of drafts by `griffin tune`: fewer would miss what pays on this machine, and each number takes its time to measure.
FEWEST_TRIED, MOST_TRIED = 5, 16


class _OneLineErrors(TyperGroup):
    """Bad input, or a package that is not there, ends in one red line on stderr and exit status 2, never in a
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (GriffinError, ModuleNotFoundError) as error:
            message = str(error)
            if isinstance(error, ModuleNotFoundError):
                part = "Install" if error.name == "vllm" else "Train a head"
                message = f"the package {error.name} is missing: see {part!r} in griffin-vllm's README"
            raise _refused(message) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # nobody reads on: click ends that quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise _refused(f"{where}{GriffinError.reason(error)}") from error


def _refused(message: str) -> typer.Exit:
    """The end of the command, after ``message`` on stderr."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    return typer.Exit(2)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"griffin-vllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """GRIFFIN speculative decoding for vLLM: serve, train and measure draft heads."""


@app.command("demo-model")
def demo_model(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint folder goes.")],
) -> None:
    """Write SmolLM2-135M-Instruct, a small real chat model, as a checkpoint folder (bf16)."""
    from griffin_vllm.demo import write_demo_model

    written = write_demo_model(folder)
    typer.echo(f"{folder}: {'written' if written else 'is already there'}")


data_app = typer.Typer(
    no_args_is_help=True, help="Make training data: render conversations, let the target answer prompts."
)
app.add_typer(data_app, name="data")


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Files (ShareGPT JSON, or JSON lines with `messages` or `conversations`; gzip too), folders "
            "written by save_to_disk (FOLDER[:split]), or Hub data sets org/name[[:configuration]:split].",
        ),
    ],
    target: Annotated[str, typer.Option(help="Checkpoint folder or Hub id of the target.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an old one is replaced when all went well.")],
    max_length: Annotated[int, typer.Option(help="Tokens a sample; what is longer is cut.")] = 2048,
    validation: Annotated[
        float,
        typer.Option(
            help="Share of conversations held out, by a hash of their id (of the first question where ids are numbers)."
        ),
    ] = 0.02,
    loops: Annotated[
        str,
        typer.Option(
            help="Conversations with an answer that loops: `flag` keeps and marks them, `drop` leaves them out."
        ),
    ] = "flag",
    loop_threshold: Annotated[
        float,
        typer.Option(help="An answer loops when fewer than this share of its token 4-grams are distinct."),
    ] = 0.6,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="Conversations never to use (kept for evaluation), fragments of them included."),
    ] = None,
) -> None:
    """Render conversations in the target's chat template into a token dataset for the trainer.

    Answers of the target itself train best: see `griffin data regenerate`. Records that cannot be used are
    skipped, counted in manifest.json and listed in skipped.jsonl.

    Example: griffin data prepare --target Qwen/Qwen2.5-0.5B-Instruct --out data/qwen answers.jsonl
    """
    from griffin_vllm.training.data import Loops, prepare

    if loops not in get_args(Loops):
        raise GriffinError.at("griffin data prepare", "--loops", loops, f"one of {get_args(Loops)}")
    manifest = prepare(
        target,
        sources,
        out,
        max_length=max_length,
        validation_share=validation,
        loops=cast(Loops, loops),
        loop_threshold=loop_threshold,
        exclude=exclude or (),
    )
    for split, counts in manifest.splits.items():
        typer.echo(
            f"{split}: {counts.samples} samples ({counts.looping_samples} loop), {counts.tokens} tokens, "
            f"{counts.answer_tokens} of them in answers"
        )
    for reason, count in manifest.skipped.items():
        typer.echo(f"skipped {count}: {reason}")
    typer.echo(f"written to {out}")


@data_app.command("regenerate")
def data_regenerate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPTS",
            help="Conversations in any form that `prepare` reads (their user turns are asked), or JSON lines "
            "with `turns` or `prompt`.",
        ),
    ],
    base_url: Annotated[
        list[str],
        typer.Option(help="OpenAI-compatible endpoint, such as http://localhost:8000/v1; repeatable."),
    ],
    model: Annotated[str, typer.Option(help="The target's name at the endpoint.")],
    out: Annotated[Path, typer.Option(help="JSON lines file to append to; the same command resumes.")],
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="Repeat for a mix; a conversation's id decides which it gets.", show_default="0.8"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens an answer.")] = 384,
    max_turns: Annotated[int, typer.Option(help="Answers a conversation.")] = 2,
    concurrency: Annotated[int, typer.Option(help="Conversations in flight, over all endpoints.")] = 64,
    attempts: Annotated[int, typer.Option(help="Tries of a request, with growing pauses.")] = 6,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first N conversations.", metavar="N", min=1)
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="Conversations never to ask (kept for evaluation), fragments of them included."),
    ] = None,
) -> None:
    """Let the target answer prompts itself, turn by turn, through any OpenAI-compatible endpoint.

    Token ids are kept where the endpoint gives them (vLLM does), so that training sees exactly what the
    target generated. An interrupted run goes on where it stopped. A key comes from OPENAI_API_KEY.

    Example: griffin data regenerate --base-url http://localhost:8000/v1 --model my-target --temperature 0
    --temperature 0.8 --out answers.jsonl prompts.jsonl
    """
    from griffin_vllm.training.regenerate import Settings, regenerate

    settings = Settings(
        model,
        temperatures=tuple(temperature or (0.8,)),
        max_tokens=max_tokens,
        max_turns=max_turns,
        concurrency=concurrency,
        attempts=attempts,
    )
    summary = regenerate(base_url, prompts, out, settings, limit=limit, exclude=exclude or ())
    typer.echo(
        f"{out}: {summary.written} conversations written ({summary.answer_tokens} answer tokens), "
        f"{summary.done_before} were done before"
    )
    for reason, count in summary.skipped.items():
        typer.echo(f"skipped {count}: {reason}")
    if summary.failed:
        typer.echo(f"{summary.failed} failed for now; the same command tries them again", err=True)
        raise typer.Exit(1)


class _TrainCommand(TyperCommand):
    """``griffin train --help`` also lists every setting, from the settings themselves."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        from griffin_vllm.training.config import describe_settings

        super().format_help(ctx, formatter)
        table = Table("setting", "default", "meaning", title="Settings", title_justify="left")
        for row in describe_settings():
            table.add_row(*row)
        Console().print(table)


@app.command(
    "train",
    cls=_TrainCommand,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of settings.", metavar="CONFIG.yaml")],
) -> None:
    """Train a GRIFFIN, HASS or EAGLE head offline; the result is a folder that vLLM serves as it is.

    Every setting of CONFIG.yaml can be given on the command line too, nested ones with dots.
    The same command continues a run that was stopped. `preset: small` or `preset: reference` starts from
    known settings. Several processes: `accelerate launch -m griffin_vllm.cli train ...`.

    Example: griffin train small.yaml --method hass --stages.0.epochs 2 --output runs/hass
    """
    from griffin_vllm.training.config import TrainConfig
    from griffin_vllm.training.loop import Interrupted, Trainer

    if str(config).startswith("--"):
        raise GriffinError(f"griffin train: {config} stands where CONFIG.yaml belongs, which comes first")
    try:
        trainer = Trainer(TrainConfig.load(config, ctx.args))
        folder = trainer.run()
    except Interrupted as stopped:
        typer.echo(stopped, err=True)
        raise typer.Exit(128 + stopped.signal) from stopped
    if trainer.accelerator.is_main_process:
        typer.echo(folder)


@app.command("convert")
def convert_head(
    source: Annotated[str, typer.Argument(help="Bundled name, folder or Hub id of a head.", metavar="SRC")],
    destination: Annotated[Path, typer.Argument(help="Where the converted head goes.", metavar="DST")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of its target, which `vllm serve DST` serves then; a relative folder is found from "
            "where it is given now."
        ),
    ] = None,
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Draft only the N tokens that the answers in --corpus use most; needs a target."
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="What `griffin data prepare` reads, repeatable, or one folder that it wrote."),
    ] = None,
) -> None:
    """Write a GRIFFIN head in the layout that vLLM reads by itself (safetensors, same dtype).

    With --draft-vocab its draft steps get cheaper, and tokens outside of the draft vocabulary are never drafted.
    Answers do not change.

    Example: griffin convert runs/head/head heads/8k --draft-vocab 8192 --corpus answers.jsonl
    --target models/smollm2-135m-instruct
    """
    from griffin_vllm.checkpoint import find_head
    from griffin_vllm.convert import check_destination, convert, open_for

    folder = find_head(source)
    head, target_config = open_for(folder, target)
    named = target or head.config.target
    check_destination(destination)
    vocabulary = None
    if (draft_vocab is None) != (corpus is None):
        raise GriffinError("griffin convert: --draft-vocab and --corpus go together, one of them is missing")
    if draft_vocab is not None and corpus is not None:
        from griffin_vllm.training.vocabulary import choose_from_corpus

        if named is None:
            raise GriffinError(
                f"{folder}: names no target, whose tokenizer --draft-vocab needs; give --target"
            )
        vocabulary, covered = choose_from_corpus(corpus, named, draft_vocab)
        typer.echo(f"{draft_vocab} tokens cover {covered:.2%} of the answers in {', '.join(corpus)}")
    written = convert(folder, destination, target, vocabulary)
    if named and not target_config:
        typer.echo(f"{named}: is not on this machine, so it was not checked that the head fits it")
    typer.echo(f"{written.folder}: written")


@app.command("inspect")
def inspect_head(
    name: Annotated[str, typer.Argument(help="Bundled name, folder or Hub id.", metavar="HEAD")],
    target: Annotated[str | None, typer.Option(help="Folder or Hub id of a target to fit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a head is and, with --target, whether it fits (exit status 1 if it does not)."""
    import json

    from griffin_vllm.checkpoint import find_head, open_head
    from griffin_vllm.describe import describe, misfit

    head = open_head(find_head(name))
    facts = describe(head)
    reason = misfit(head, target) if target else None
    if target:
        facts |= {"fits": reason is None, "misfit": reason}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        training = facts.pop("training")
        for key, value in facts.items():
            typer.echo(f"{key:24} {value}")
        for key, value in training.items():
            typer.echo(f"card: {key:18} {value}")
    raise typer.Exit(reason is not None)


@app.command("tune", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def tune_head(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(help="Folder or Hub id of the target.", metavar="TARGET")],
    name: Annotated[str, typer.Argument(help="Bundled name, folder or Hub id.", metavar="HEAD")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, for servers whose environment names it as GRIFFIN_TUNING; by default what that names "
            "here, else tuning.json in the head's folder, where it needs no naming."
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file of prompts like yours, one a line.")] = None,
    max_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TRIED,
            help=f"Most draft tokens to try; by default what the head recommends, {FEWEST_TRIED} at least.",
        ),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "1,2,4,8,16",
    tokens: Annotated[
        int,
        typer.Option(
            min=8,
            help="Output tokens of each measured request, beyond the end of its answer, too: no more than answers to "
            "your prompts have.",
        ),
    ] = 64,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the cost model against the measured speed.")
    ] = False,
) -> None:
    """Measure how many tokens to draft on this machine, from one request at a time to many.

    The result stands beside the head, and the plugin uses it for this head, machine, vLLM version and precision
    when no number of draft tokens is given. Run it on a machine that does nothing else, with the engine's options
    of `vllm serve` that you serve with: what is not listed below goes to vLLM.

    Example: griffin tune models/smollm2-135m-instruct griffin:smollm2-135m-instruct --enforce-eager
    """
    from rich.console import Console

    from griffin_vllm.checkpoint import find_head, open_head
    from griffin_vllm.serving import tune as tuner
    from griffin_vllm.serving.tuning import check_writable, tuning_file, write_tuning

    try:
        sizes = sorted({int(size) for size in batch_sizes.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise GriffinError.at("griffin tune", "--batch-sizes", batch_sizes, "whole numbers like 1,2,4")
    asked = tuner.read_prompts(prompts) if prompts else tuner.PROMPTS
    head = open_head(find_head(name))
    path = out or tuning_file(head)
    check_writable(path)
    tuning = tuner.tune(
        target,
        head,
        asked,
        max_k=max_k or min(max(head.config.num_speculative_tokens, FEWEST_TRIED), MOST_TRIED),
        batch_sizes=sizes,
        tokens=tokens,
        engine_options=ctx.args,
    )
    try:
        write_tuning(path, tuning)
    except GriffinError:
        # minutes of measuring; whoever sees this can save it by hand
        typer.echo(tuning.model_dump_json(indent=2))
        raise
    if explain:
        Console().print(tuner.explain(tuning))
    for first, last, k in tuning.schedule:
        requests = f"{first}" if first == last else f"{first} to {last}"
        typer.echo(f"{requests} requests at once: {f'{k} draft tokens' if k else 'no drafting'}")
    if tuning.draft_stop_probability and any(k for _, _, k in tuning.schedule):
        typer.echo(f"drafting stops once a chain is less likely than {tuning.draft_stop_probability:g}")
    typer.echo(f"{path}: written")


if __name__ == "__main__":
    app()
