"""`millstream dataset messages` for TRL: its `SFTTrainer` makes the tokens and labels of it that ours learns."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from datasets import load_dataset
from factories import finished
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen2_5_chat_template

from millstream.pipeline.algorithms.recorded.imitation import ImitationLearner
from millstream.pipeline.training.datasets import Choice, messages, with_object_arguments

pytestmark = pytest.mark.torch

IGNORED = -100
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKED = (  # an answer is what follows the generation prompt, up to the token that ends it
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% for call in message.tool_calls %}{{ call.function | tojson }}"
    "{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def called(tool: str, **arguments: int) -> dict[str, Any]:
    function = {"name": tool, "arguments": json.dumps(arguments, separators=(",", ":"))}
    return said("assistant", "", tool_calls=[{"id": tool, "type": "function", "function": function}])


def tool(name: str, *parameters: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {each: {"type": "integer"} for each in parameters}}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


TOOLS = json.dumps([tool("add", "a", "b"), tool("double", "x")])
ADDS = [said("user", "add 3 to 8, then double it"), called("add", a=3, b=8)]
DOUBLES = [*ADDS, said("tool", "11", tool_call_id="add"), called("double", x=11)]
ANSWERS = [*DOUBLES, said("tool", "22", tool_call_id="double"), said("assistant", "It is 22.")]
GREETS = [said("system", "Be brief."), said("user", "Hello?"), said("assistant", "Hello.")]


def turn(conversation: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {"prompt": json.dumps(conversation[:-1]), "response": json.dumps(conversation[-1]), **fields}


ROLLOUTS = [
    list(finished("a", [turn(each, tools=TOOLS, reward=1.0) for each in (ADDS, DOUBLES, ANSWERS)]).triplets),
    list(finished("b", [turn(GREETS, reward=0.5)]).triplets),
]


def create(folder: Path, template: str) -> PreTrainedTokenizerFast:
    """A model of which each byte is a token."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=template,
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes, **heads, **special)).save_pretrained(folder)
    return tokenizer


def both(tmp_path: Path, merge_turns: bool) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """Of each row TRL's ids and labels, and ours. TRL's are cut where ours end: after the last answer's end."""
    lines = tmp_path / "sft.jsonl"
    examples = map(with_object_arguments, messages(ROLLOUTS, merge_turns=merge_turns))
    if not merge_turns:  # TRL knows no weights: with a prompt and a completion it learns the completion
        examples = ({**e, "prompt": e["messages"][:-1], "completion": e.pop("messages")[-1:]} for e in examples)
    lines.write_text("".join(json.dumps(example) + "\n" for example in examples))
    dataset = load_dataset("json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache"))
    config = SFTConfig(
        str(tmp_path / "out"), assistant_only_loss=merge_turns, max_length=None, use_cpu=True, bf16=False, report_to=[]
    )
    theirs = SFTTrainer(str(tmp_path / "model"), args=config, train_dataset=dataset).train_dataset
    rows, refused = ImitationLearner(tmp_path / "model", choice=Choice(), merge_turns=merge_turns).rows(ROLLOUTS)
    assert not refused
    assert len(theirs) == len(rows) == (2 if merge_turns else 4)
    found = []
    for their, row in zip(theirs, rows, strict=True):
        ids = [*row.prompt, *row.response]
        learnt = [*[0.0] * len(row.prompt), *row.ce]
        labels = [token if weight else IGNORED for token, weight in zip(ids, learnt, strict=True)]
        found.append((their["input_ids"][: len(ids)], their["labels"][: len(ids)], ids, labels))
    return found


@pytest.mark.parametrize("merge_turns", [True, False])
def test_it_makes_the_same_tokens_and_labels(tmp_path: Path, merge_turns: bool) -> None:
    create(tmp_path / "model", MARKED)
    for their_ids, their_labels, ids, labels in both(tmp_path, merge_turns):
        assert their_ids == ids
        assert their_labels == labels


def test_its_template_for_qwen_learns_line_breaks_besides(tmp_path: Path) -> None:
    tokenizer = create(tmp_path / "model", qwen2_5_chat_template)
    for their_ids, their_labels, ids, labels in both(tmp_path, merge_turns=True):
        assert their_ids == ids
        differ = [pair for pair in zip(their_labels, labels, strict=True) if len(set(pair)) > 1]
        assert set(differ) == {(tokenizer.encode("\n")[0], IGNORED)}
