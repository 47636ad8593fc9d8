"""``rankfit generate``: what a language model that was trained in a run writes."""

import sys
from typing import Annotated

import typer

from rankfit.cli.evaluate import Round, Run
from rankfit.configs.settings import ConfigError


def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="An instruction; - reads it from standard input.")],
    number: Round = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that are written at most.")
    ] = 128,
) -> None:
    """Answer one instruction, asked as in training; greedy."""
    from rankfit.server.saved import SavedRun
    from rankfit.tasks.answers import write
    from rankfit.tasks.language import LanguageTask

    saved = SavedRun.open(run, number, [f"task.max-new-tokens={max_new_tokens}"])
    if saved.settings.task.kind != "causal-lm":
        raise ConfigError(
            f"{saved.path} trained {saved.settings.task.kind}; only a causal-lm writes text"
        )
    task = saved.task
    assert isinstance(task, LanguageTask)
    evaluator = saved.evaluator()
    model = evaluator.hold(saved.adapter).eval()
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens = task.encoder.question(text, task.room)
    (answer,) = write(
        model,
        task.encoder.tokenizer,
        [tokens],
        evaluator.device,
        size=1,
        new_tokens=max_new_tokens,
    )
    typer.echo(answer)
