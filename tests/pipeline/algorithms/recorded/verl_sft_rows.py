"""Runs in verl's environment: the token ids and loss masks that verl's data set makes of a JSONL file of messages."""

import json
import sys
from pathlib import Path

import pandas
from transformers import PreTrainedTokenizerFast
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

lines, model, parquet, out = sys.argv[1:]
pandas.DataFrame(list(map(json.loads, Path(lines).read_text().splitlines()))).to_parquet(parquet)
tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
rows = MultiTurnSFTDataset(parquet, tokenizer, {"pad_mode": "no_padding", "max_length": 512})
found = [{name: rows[i][name].tolist() for name in ("input_ids", "loss_mask")} for i in range(len(rows))]
Path(out).write_text(json.dumps(found))
