"""Commands that show what the store holds: rollouts, their spans, triplets and rewards, and how two of them differ."""

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from millstream.pipeline.cli.open import open_settings, open_store, whole_id
from millstream.pipeline.cli.output import (
    Json,
    Mode,
    Status,
    Watch,
    bar_of,
    bar_range,
    check_watch,
    date,
    note,
    out,
    print_json,
    print_rows,
    say,
    show_again,
)
from millstream.pipeline.cli.questions.experiments import known_experiment
from millstream.pipeline.cli.tables import Grid, short_id
from millstream.pipeline.store.results import RolloutOrder

if TYPE_CHECKING:
    from rich.tree import Tree

    from millstream.pipeline.store.clickhouse import ClickHouseStore
    from millstream.pipeline.store.results import Attempt, Rollout
    from millstream.pipeline.store.rollout_diff import Step
    from millstream.schemas.wire.records import Span

app = typer.Typer()

ID = "01890a5d-ac96-774b-bcce-b302099a8057"  # in examples

SHOWN_TEXT = 60
SHOWN_STEPS = 8
WIDE = 100  # columns, for two whole ids
TOKENS = {"prompt_token_ids": "i", "response_token_ids": "i", "response_logprobs": "f"}  # little-endian, 4 bytes each

RolloutId = Annotated[str, typer.Argument(help="Id, or the end or beginning of one, as `millstream rollouts` has it.")]
Experiment = Annotated[str | None, typer.Option(help="Only of this experiment: its id, or the name of its run.")]
OfMode = Annotated[Mode | None, typer.Option("--mode", help="Only of this mode.")]
Limit = Annotated[int, typer.Option(min=1, help="Maximum number of rows.")]


@app.command(epilog="Example: millstream rollouts --status failed --sort duration_s --limit 20")
def rollouts(
    status: Annotated[Status | None, typer.Option(help="Only with this status.")] = None,
    experiment: Experiment = None,
    mode: OfMode = None,
    group: Annotated[str | None, typer.Option(help="Only of this group.")] = None,
    version: Annotated[str | None, typer.Option(help="Only of this model version.")] = None,
    sort: Annotated[RolloutOrder, typer.Option(help="Sort by this, largest first.")] = "created_at",
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest first.")] = False,
    limit: Limit = 50,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """List rollouts, newest first."""
    check_watch(watch, as_json)
    with open_store(open_settings()) as store:
        experiment = experiment and known_experiment(store, experiment)
        group = group and whole_id(store, group, "group")

        def ask() -> "list[Rollout]":
            return store.rollouts(
                status=status,
                experiment_id=experiment,
                mode=mode,
                group_id=group,
                model_version=version,
                sort_by=sort,
                descending=not ascending,
                limit=limit,
            )

        if not watch and not (found := ask()):
            asked = {"status": status, "experiment": experiment, "mode": mode, "group": group, "version": version}
            _note_nothing("rollouts", asked)
        if as_json:
            print_json([asdict(r) | {"queued_s": r.queued_s, "duration_s": r.duration_s} for r in found])
        elif watch:
            show_again(lambda: _rollouts(ask()))
        elif found:
            out.print(_rollouts(found))


def _rollouts(found: "Sequence[Rollout]") -> Grid:
    columns = ["rollout_id", "experiment", "mode", "status", "attempts", "reward", "version", "seconds", "created"]
    return Grid(
        [*columns, "error"],
        [
            [
                *(r.rollout_id, r.experiment_id, r.mode, r.status, r.attempts, _short(r.reward), r.model_version),
                *(_short(r.duration_s), date(r.created_at)),
                "" if r.status == "succeeded" else r.error_message or r.reason,
            ]
            for r in found
        ],
        main=("rollout_id", "status", "attempts", "reward", "seconds", "error"),
        texts=("error", "version"),
    )


@app.command(epilog=f"Example: millstream spans {ID}")
def spans(
    rollout: RolloutId,
    as_json: Json = False,
    full: Annotated[bool, typer.Option(help="With --json: include contents of more than 256 KB.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Each span as it comes, until the rollout ends.")] = False,
) -> None:
    """Show a rollout's spans as a tree per attempt, with durations, tokens, rewards and errors."""
    from rich.tree import Tree

    from millstream.pipeline.store.rollout_diff import children
    from millstream.schemas.spans.dialects import normalised

    if follow:
        if as_json or full:
            raise typer.BadParameter("--follow prints a line for each span: leave out --json and --full")
        _follow(rollout)
        return
    with open_store(open_settings()) as store:
        rollout = _known(store, rollout).rollout_id
        attempts, found = store.attempts(rollout), store.spans(rollout)
    if full:
        from millstream.producers.blob_store import Blobs

        blobs = Blobs(open_settings().blob_url)
        found = [
            replace(span, attributes={n: blobs.whole(value) for n, value in span.attributes.items()}) for span in found
        ]
    if as_json:
        print_json([_with_numbers(asdict(span)) | {"duration_s": (span.end - span.start) / 1e9} for span in found])
        return
    if not attempts:
        out.print(f"rollout {rollout} is waiting for its first attempt")
    for attempt in attempts:
        tree = Tree(_attempt_line(attempt))
        below = children([normalised(span) for span in found if span.attempt_id == attempt.attempt_id])
        _grow(tree, below.get("", ()), below)
        out.print(tree)


def _follow(wanted: str) -> None:
    import asyncio

    from millstream.schemas.spans.dialects import normalised

    with open_store(open_settings()) as store:
        rollout = _known(store, wanted).rollout_id

        async def show() -> None:
            async for span in store.follow(rollout):
                out.print(f"[dim]{date(span.start)}[/dim] {_span_line(normalised(span))}")

        with suppress(KeyboardInterrupt):
            asyncio.run(show())


def _grow(tree: "Tree", level: "Sequence[Span]", below: Any) -> None:
    for span in level:
        _grow(tree.add(_span_line(span)), below.get(span.span_id, ()), below)


def _attempt_line(attempt: "Attempt") -> str:
    seconds = "" if attempt.ended_at is None else f" · {(attempt.ended_at - attempt.started_at) / 1e9:.3f} s"
    error = f" [red]{escape(f'{attempt.error_type}: {attempt.error_message}')}[/red]" if attempt.error_type else ""
    return f"attempt {attempt.attempt} · {attempt.status}{seconds} · {escape(attempt.worker_id)}{error}"


def _span_line(span: "Span") -> str:
    from millstream.pipeline.store.rollout_diff import error_of, token_counts

    line = f"[bold]{escape(span.name)}[/bold] [dim]{span.kind} · {span.source}[/dim]"
    line += f" {(span.end - span.start) / 1e6:.1f} ms"
    prompt, response = token_counts(span)
    if prompt is not None or response is not None:
        line += f" · {prompt or 0} → {response or 0} tokens"
    if span.reward is not None:
        line += f" · [green]reward {span.reward:g}[/green]"
    error = error_of(span)
    return line + (f" · [red]{escape(error)}[/red]" if error else "")


@app.command(epilog=f"Example: millstream rollout {ID}")
def rollout(rollout: RolloutId, as_json: Json = False) -> None:
    """Show a rollout: its conversation with the model, tools and rewards, what it printed, and the error with its
    stack, per attempt."""
    from millstream.pipeline.store.conversation import conversation, printed

    with open_store(open_settings()) as store:
        found = _known(store, rollout)
        rollout, attempts = found.rollout_id, store.attempts(found.rollout_id)
        spans = {a.attempt_id: store.spans(rollout, attempt_id=a.attempt_id) for a in attempts}
    if as_json:
        tried = [
            asdict(attempt)
            | {"conversation": [asdict(line) for line in conversation(spans[attempt.attempt_id])]}
            | {"printed": [asdict(line) for line in printed(spans[attempt.attempt_id])]}
            for attempt in attempts
        ]
        print_json([asdict(found) | {"attempts": tried}])
        return
    say(f"rollout {found.rollout_id} · {found.status} · reward {_short(found.reward) or 'none'}")
    say(f"group {found.group_id} · experiment {found.experiment_id or 'none'} · {found.mode}")
    say(f"created {date(found.created_at)} · queued {_seconds(found.queued_s)} · ran {_seconds(found.duration_s)}")
    say(f"input: {found.input}")
    if found.reason:
        say(f"reason: {found.reason}")
    for attempt in attempts:
        say(f"\nattempt {attempt.attempt} · {attempt.status} · {attempt.worker_id}")
        for line in conversation(spans[attempt.attempt_id]):
            say(indent(f"{line.who}: {line.text}", "  ", lambda text: True))
        if lines := printed(spans[attempt.attempt_id]):
            say("  printed:")
        for line in lines:
            say(
                f"    {line.text}" if line.who == "stdout" else f"    {line.who}: {line.text}".replace("    : ", "    ")
            )
        if attempt.output is not None:
            say(f"  returned: {attempt.output}")
        if attempt.error_type:
            stack = attempt.error_stack.rstrip() or f"{attempt.error_type}: {attempt.error_message}"
            say(indent(stack, "  ", lambda text: True))
    if not attempts:
        say("it waits for its first attempt: `millstream lag` shows why")


@app.command(epilog="Example: millstream triplets --experiment demo --untrainable")
def triplets(
    rollout: Annotated[str | None, typer.Option(help="Only of this rollout.")] = None,
    experiment: Experiment = None,
    mode: OfMode = None,
    version: Annotated[str | None, typer.Option(help="Only of this model version.")] = None,
    trainable: Annotated[bool | None, typer.Option("--trainable/--untrainable", help="Only those.")] = None,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """List triplets: the prompt, answer and reward of each model call."""
    with open_store(open_settings()) as store:
        if rollout is not None:
            rollout = _known(store, rollout).rollout_id
        experiment = experiment and known_experiment(store, experiment)
        found = store.triplets(
            None if rollout is None else [rollout],
            experiment_id=experiment,
            mode=mode,
            model_version=version,
            trainable=trainable,
            limit=limit,
        )
    if not found:
        asked = {"rollout": rollout, "experiment": experiment, "mode": mode, "version": version}
        _note_nothing("triplets", asked | {"trainable": None if trainable is None else str(trainable).lower()})
    if as_json:
        print_json([_with_numbers(asdict(triplet)) for triplet in found])
        return
    if not found:
        return
    print_rows(
        ["rollout_id", "turn", "reward", "version", "prompt", "tokens", "response", "untrainable because"],
        [
            [
                *(t.rollout_id, t.turn, _short(t.reward), t.model_version, len(t.prompt_token_ids or b"") // 4),
                *(len(t.response_token_ids or b"") // 4, _cut(t.response), t.reason),
            ]
            for t in found
        ],
        False,
        main=("rollout_id", "turn", "reward", "tokens", "response", "untrainable because"),
        texts=("response", "untrainable because", "version"),
    )


@app.command(epilog="Example: millstream rewards --experiment demo --mode train")
def rewards(
    rollout: Annotated[str | None, typer.Option(help="List the single rewards of this rollout.")] = None,
    experiment: Experiment = None,
    mode: OfMode = None,
    as_json: Json = False,
) -> None:
    """Plot the reward by model version."""
    from millstream.pipeline.store.queries import REWARDS_BY_VERSION

    with open_store(open_settings()) as store:
        if rollout is not None:
            rollout = _known(store, rollout).rollout_id
            rows = [[r.attempt_id, date(r.time), r.name, r.value] for r in store.rewards([rollout])]
            if not rows:
                _note_nothing("rewards", {"rollout": rollout})
            print_rows(["attempt_id", "time", "name", "value"], rows, as_json)
            return
        experiment = experiment and known_experiment(store, experiment)
        found = store.sql(REWARDS_BY_VERSION, {"experiment_id": experiment or "", "mode": mode or ""})
    if not found.rows:
        _note_nothing("rewards", {"experiment": experiment, "mode": mode})
    if as_json:
        print_json(found.records())
        return
    if not found.rows:
        return
    low, size = bar_range(row["mean"] for row in found.records())
    rows = [
        [
            *(row["model_version"], row["rollouts"], *(_short(row[name]) for name in ("mean", "p10", "p50", "p90"))),
            bar_of(row["mean"], low, size),
        ]
        for row in found.records()
    ]
    out.print(Grid([*found.columns, ""], rows, main=("model_version", "rollouts", "mean", "")))


@app.command(
    epilog="Example: millstream diff 01890a5d-ac96-774b-bcce-b302099a8057 01890a5d-ac97-774b-a2b1-aa0d56b6a3c1"
)
def diff(a: RolloutId, b: RolloutId, as_json: Json = False) -> None:
    """Show where two rollouts of a group diverge: the same prompt, but another answer."""
    from rich.table import Table

    from millstream.pipeline.store.rollout_diff import rollout_diff

    with open_store(open_settings()) as store:
        sides = [_known(store, a), _known(store, b)]
        walks, same = rollout_diff(store, *sides)
    if as_json:
        print_json(
            {
                "same_steps": same,
                "rollouts": [
                    {"rollout_id": r.rollout_id, "status": r.status, "reward": r.reward}
                    | {"steps": [{"kind": s.kind, "name": s.name, "text": s.text} for s in walk[same:]]}
                    for r, walk in zip(sides, walks, strict=True)
                ],
            }
        )
        return
    whole = same == len(walks[0]) == len(walks[1])
    out.print("All steps are the same." if whole else f"The first {same} steps are the same.")
    ids = [r.rollout_id if out.width >= WIDE else short_id(r.rollout_id) for r in sides]
    heads = [f"{i}\n{r.status}, reward {_short(r.reward) or 'none'}" for i, r in zip(ids, sides, strict=True)]
    table = Table("step", *heads)
    longest = max(map(len, walks))
    for n in range(max(same - 1, 0), min(longest, same + SHOWN_STEPS)):  # from the last one in common
        table.add_row(str(n + 1), *(_step_line(walk[n]) if n < len(walk) else "[dim]ended[/dim]" for walk in walks))
    out.print(table)
    if longest > same + SHOWN_STEPS:
        out.print(f"… and {longest - same - SHOWN_STEPS} more")


def _step_line(step: "Step") -> str:
    return f"[bold]{step.kind} {escape(step.name)}[/bold]\n{escape(step.text)}"


# --- shared


def _known(store: "ClickHouseStore", wanted: str) -> "Rollout":
    """Of an id or a part of it. Raises as `whole_id` does."""
    found = store.rollouts([wanted]) or store.rollouts([whole_id(store, wanted)])
    return found[0]


def _note_nothing(what: str, asked: dict[str, str | None]) -> None:
    """On stderr, so that output for programs stays as it is. The command succeeds."""
    given = ", ".join(f"{name} {value}" for name, value in asked.items() if value)
    said = f"the store has no {what}{f' with {given}' if given else ' yet'}"
    note(said)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} s"


def _with_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Token bytes as numbers."""
    return {
        name: [number for (number,) in struct.iter_unpack(f"<{TOKENS[name]}", value)]
        if name in TOKENS and value is not None
        else value
        for name, value in record.items()
    }


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}…"
