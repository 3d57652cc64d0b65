"""The search itself, step by step, without anything around it."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from millstream.pipeline.prompts.search import LONGEST, Beam, Proposal, Search, Work, unusable
from millstream.schemas.control import PromptTemplate

RULES = ("use units", "one line", "show work", "cite tools")
FIRST = {"system": PromptTemplate(template="Answer {question}.")}
OPTIONS = Beam(beam_width=2, branch_factor=2, rounds=3, batch=2, validation_batch=4)


def begin(options: Beam = OPTIONS, seed: int = 0, templates: Any = FIRST) -> Search:
    counted = itertools.count()
    return Search.begin(options, templates, tasks=8, val_tasks=8, seed=seed, new_id=lambda: f"id-{next(counted)}")


def text(search: Search, number: int, name: str = "system") -> str:
    return search.candidates[number].templates[name].template


def earned(prompt: str, tasks: Sequence[int]) -> list[float]:
    """Each task asks for one of the rules."""
    return [float(RULES[task % len(RULES)] in prompt) for task in tasks]


def good_edit(search: Search, work: Work) -> Proposal:
    parent = search.candidates[search.candidates[work.number].parent or 0]
    prompt = parent.templates["system"].template
    scores = earned(prompt, work.tasks)
    missing = [RULES[task % len(RULES)] for task, score in zip(work.tasks, scores, strict=True) if not score]
    rule = missing[0] if missing else "be kind"
    return Proposal(parent_scores=scores, critique=f"add: {rule}", text=f"{prompt} {rule}")


def advance(search: Search, work: Work, edit: Callable[[Search, Work], Proposal] = good_edit) -> None:
    if work.stage == "propose":
        search.proposed(work.number, edit(search, work))
    else:
        search.scored(work.number, work.stage, earned(text(search, work.number), work.tasks))


def run(search: Search, order: int = 1, steps: int | None = None) -> Search:
    """``order`` -1: what came last is done first."""
    for _ in itertools.count() if steps is None else range(steps):
        if search.ended:
            break
        work = search.work()
        if not work:
            search.next_round()
            continue
        advance(search, work[::order][0])
    return search


def decided(search: Search) -> Any:
    return [
        {**each.to_json(), "resources_id": ""} for each in sorted(search.candidates.values(), key=lambda c: c.number)
    ]


def test_a_round_step_by_step() -> None:
    """The critic's suggestions are scripted: each decision can be read off."""
    search = begin()
    assert [(w.number, w.stage) for w in search.work()] == [(0, "validate"), (1, "propose"), (2, "propose")]
    assert len({search.validation, *(w.tasks for w in search.work() if w.stage == "validate")}) == 1

    search.scored(0, "validate", [0.0, 0.0, 0.0, 1.0])
    assert search.best.score == 0.25
    made = search.proposed(1, Proposal(parent_scores=[1.0, 0.0], critique="too short", text="Answer {question} fully."))
    assert (made.stage, made.critique, made.parent, made.parent_score) == ("screen", "too short", 0, 0.5)
    worse = search.proposed(2, Proposal(parent_scores=[1.0, 0.0], critique="?", text="Say {question}."))
    assert search.scored(worse.number, "screen", [0.0, 0.0]).refused == "it earned 0 on its minibatch, its parent 0.5"
    assert search.scored(1, "screen", [0.0, 1.0]).stage == "validate"  # as good as its parent
    assert [(w.number, w.stage, w.tasks) for w in search.work()] == [(1, "validate", search.validation)]
    search.scored(1, "validate", [1.0, 1.0, 0.0, 0.0])
    assert search.work() == []
    search.next_round()
    assert search.beam == [1, 0]
    assert [(w.number, search.candidates[w.number].parent) for w in search.work()] == [(5, 1), (6, 1), (7, 0), (8, 0)]


def test_a_beam_keeps_the_best_of_all_rounds_the_older_among_equals() -> None:
    search = run(begin(Beam(beam_width=2, branch_factor=2, rounds=4, batch=4, validation_batch=4)))
    assert search.best.score == 1.0
    scores = sorted((each.score for each in search.candidates.values() if each.score is not None), reverse=True)
    assert [search.candidates[number].score for number in search.beam] == scores[:2]
    tied = begin()
    tied.scored(0, "validate", [1.0])
    for number in (1, 2):
        tied.proposed(number, Proposal(parent_scores=[1.0], text=f"{number} {{question}}"))
        tied.scored(number, "screen", [1.0])
        tied.scored(number, "validate", [1.0])
    tied.next_round()
    assert tied.beam == [0, 1]
    assert tied.best.number == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_order_in_which_results_come_decides_nothing(seed: int) -> None:
    first, last = run(begin(seed=seed)), run(begin(seed=seed), order=-1)
    assert decided(first) == decided(last)
    assert (first.best.score or 0.0) >= 0.75  # a rule a round


def test_seeds_draw_other_tasks() -> None:
    assert begin(seed=1).validation != begin(seed=2).validation
    assert begin(seed=1).validation == begin(seed=1).validation


@pytest.mark.parametrize("steps", range(0, 40, 3))
def test_a_search_goes_on_from_its_json_anywhere(steps: int) -> None:
    whole = run(begin(seed=3))
    saved = json.loads(json.dumps(run(begin(seed=3), steps=steps).to_json()))
    assert decided(run(Search.from_json(saved, OPTIONS, tasks=8, val_tasks=8, seed=3))) == decided(whole)


@pytest.mark.parametrize(
    ("engine", "first", "edited", "why"),
    [
        ("f-string", "Answer {question}.", "Answer.", "it lost {question}"),
        ("f-string", "Answer {question}.", "{question} {hint}", "it invented {hint}"),
        ("f-string", "{question}", "{question.__class__}", "it lost {question}; it invented {question.__class__}"),
        ("f-string", "{question}", "{question:>999999999}", "it lost {question}; it invented {question:>999999999}"),
        ("f-string", "Answer {question}.", 'As JSON {"a": 1}: {question}', 'it invented {"a": 1}'),
        ("f-string", "Answer {question}.", "{question} {", "it is no f-string template: Single '{' encountered"),
        ("f-string", "Answer {question}.", " \n", "it is empty"),
        ("f-string", "Answer {question}.", "{question}" + "x" * LONGEST, "it has 32,778 characters, 32,768"),
        ("f-string", "Answer {question}.", 'As JSON {{"a": 1}}: {question} {question}', ""),
        ("f-string", "No names.", "None at all.", ""),
        ("jinja2", "Hi {{ name }}.", "Hello {{name}}, {{  name  }}!", ""),
        ("jinja2", "Hi {{ name }}.", "Hi.", "it lost {{ name }}"),
        ("jinja2", "Hi {{ name }}.", "{{ name.__class__ }}{{ name }}", "it invented {{ name . __class__ }}"),
        ("jinja2", "Hi {{ name }}.", "{% for i in range(10) %}{{ name }}{% endfor %}", "it invented {%"),
        ("jinja2", "Hi {{ name }}.", "{{ name }} {% if %}", "it is no jinja2 template: line 1: Expected an expression"),
        ("jinja2", "{% for x in xs %}- {{ x }}\n{% endfor %}", "{%- for x in xs -%} * {{ x }} {% endfor %}", ""),
    ],
)  # fmt: skip
def test_a_template_must_keep_its_placeholders(engine: Any, first: str, edited: str, why: str) -> None:
    """Nothing of the agent's data may be missing, and nothing may be asked for that nobody gives."""
    found = unusable(PromptTemplate(template=edited, engine=engine), PromptTemplate(template=first, engine=engine))
    assert found.startswith(why) if why else not found


def test_what_is_refused_is_not_run_and_says_why() -> None:
    search = begin()
    search.proposed(1, Proposal(parent_scores=[0.0], critique="c", text="No names."))
    search.proposed(2, Proposal(parent_scores=[0.0], failed="the critic did not answer"))
    assert [(each.number, each.refused) for each in search.refused] == [
        (1, "it lost {question}"),
        (2, "the critic did not answer"),
    ]
    assert [w.number for w in search.work()] == [0]
    same = begin()
    assert (
        same.proposed(1, Proposal(parent_scores=[0.0], text="Answer {question}.")).refused
        == "candidate 0 has the same text"
    )


def test_a_search_that_is_over_finishes_its_round_and_may_go_on_later() -> None:
    search = begin()
    search.over = "the budget is used up"
    run(search)
    assert (search.ended, search.round, len(search.candidates)) == (True, 1, 3)
    search.go_on("the budget is used up")
    assert (search.ended, search.over) == (True, "the budget is used up")
    search.go_on("")
    assert [w.stage for w in search.work()] == ["propose"] * len(search.beam) * 2
    assert run(search).round == 3
    search.go_on("")
    assert search.ended
    assert begin(Beam(rounds=0)).ended


def test_two_candidates_of_one_text_take_one_place_of_the_beam() -> None:
    search = begin()
    search.scored(0, "validate", [0.0])
    for number in (2, 1):
        search.proposed(number, Proposal(parent_scores=[0.0], text="{question}?"))
        search.scored(number, "screen", [1.0])
        search.scored(number, "validate", [1.0])
    search.next_round()
    assert search.beam == [1, 0]
    assert (
        search.proposed(5, Proposal(parent_scores=[0.0], text="{question}?")).refused == "candidate 1 has the same text"
    )


def test_several_templates_are_edited_in_turn() -> None:
    templates = {"a": PromptTemplate(template="{x}"), "b": PromptTemplate(template="{y}")}
    search = begin(templates=templates)
    assert [search.candidates[number].edited for number in (1, 2)] == ["a", "b"]
    made = search.proposed(2, Proposal(parent_scores=[0.0], text="b {y}"))
    assert made.templates == {"a": templates["a"], "b": PromptTemplate(template="b {y}")}
