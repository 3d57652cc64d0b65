"""An agent that can't tell how good its answer is: plain code with the OpenAI SDK, and a judge that rewards it."""

import millstream as ms


def agent(task: dict[str, str]) -> str:
    """Names the tool that a question needs."""
    answer = ms.openai_client().chat.completions.create(
        model="policy", messages=[{"role": "user", "content": task["question"]}], max_tokens=1
    )
    return (answer.choices[0].message.content or "").strip()


judged = ms.Tracer(agent)
judged.on_completion(ms.Judge(model="judge"))


@judged.on_completion
def one_word(result: str) -> None:
    """A reward function may also only record something: it returns no reward."""
    ms.emit_annotation({"words": len(result.split())})
