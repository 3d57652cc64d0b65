import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

TASK = {"question": "add 3 to 8 then times 2", "numbers": [8, 3, 2], "tools": ["add", "multiply"]}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    return pytest.importorskip("examples.calculator.agent", reason="needs the openai extra")


class Model:
    """Answers with the given words, and keeps the requests."""

    def __init__(self, *words: str | None) -> None:
        self.words = list(words)
        self.asked: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **request: Any) -> Any:
        self.asked.append({**request, "messages": list(request["messages"])})
        message = SimpleNamespace(role="assistant", content=self.words.pop(0))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


@pytest.mark.parametrize(
    ("words", "result", "right"),
    [
        (("add", "multiply"), 22, [True, True]),
        (("add", "subtract"), 9, [True, False]),
        (("subtract", "multiply"), 10, [False, True]),
        (("the", "multiply"), 16, [False, True]),  # no tool: nothing happens, the second step can still be right
        ((None, ""), 8, [False, False]),
    ],
)
def test_each_step_is_scored_by_itself(
    agent: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str | None, ...],
    result: int,
    right: list[bool],
) -> None:
    rewards: list[tuple[float, str]] = []
    monkeypatch.setattr("millstream.emit_reward", lambda value, name: rewards.append((value, name)), raising=False)
    monkeypatch.setattr(agent, "client", Model(*words))
    monkeypatch.setenv("CALCULATOR_LEDGER", str(tmp_path / "ledger"))
    assert agent.agent(TASK, rollout=SimpleNamespace(rollout_id="r-1", attempt_id="a-1")) == result
    assert rewards == [(0.5 if correct else 0.0, f"step-{i}") for i, correct in enumerate(right)]
    ledger = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    who = {"rollout": "r-1", "attempt": "a-1"}
    assert ledger == [who | {"step": i, "right": correct} for i, correct in enumerate(right)]


def test_the_model_gets_the_result_of_the_tool(agent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("add", "multiply")
    monkeypatch.setattr(agent, "client", model)
    agent.agent(TASK)
    first, second = model.asked
    assert first["max_tokens"] == 1
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == "add"
    assert "11" in second["messages"][2]["content"]


def test_tool_calls_say_whether_the_tool_exists(agent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[dict[str, str]] = []
    monkeypatch.setattr("millstream.emit_span", lambda name, attributes: spans.append(attributes), raising=False)
    monkeypatch.setattr(agent, "client", Model("add", "fold"))
    agent.agent(TASK)
    assert [(span["gen_ai.tool.name"], span.get("error.type")) for span in spans] == [
        ("add", None),
        ("fold", "unknown_tool"),
    ]


@pytest.mark.torch
def test_every_word_of_a_conversation_is_in_the_vocabulary(
    agent: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from examples.calculator import model
    from examples.calculator.tasks import make_tasks
    from millstream.pipeline.models.policy import load_tokenizer

    model.create(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for word in ("add", "subtract", "multiply", "times"):
        for task in make_tasks(300) + make_tasks(300, "val"):
            served = Model(word, word)
            monkeypatch.setattr(agent, "client", served)
            agent.agent(task)
            ids = tokenizer.apply_chat_template(
                served.asked[1]["messages"], add_generation_prompt=True, return_dict=False
            )
            assert tokenizer.unk_token_id not in ids, served.asked[1]["messages"]


@pytest.mark.torch
def test_the_model_is_small_and_its_seed_decides(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from examples.calculator import model
    from millstream.pipeline.models.policy import load_model, parameters

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model.create(tmp_path / name, seed)
    a, b, c = (parameters(load_model(tmp_path / name)) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert 150_000 <= sum(tensor.numel() for tensor in a.values()) <= 200_000
    assert "lm_head.weight" not in a  # tied
    assert 50 <= a["model.embed_tokens.weight"].shape[0] <= 60
