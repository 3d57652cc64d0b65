"""``python -m examples.hooks``: three rollouts in this process, with all hooks around them."""

import millstream as ms
from examples.hooks.agent import agent
from examples.hooks.around import Greeter, backup, errors, index, monitor

trainer = ms.Trainer(agent=agent, hooks=[index, monitor, errors, backup, Greeter()], run_dir="runs/hooks")
for finished in trainer.dev(["France", "Atlantis", ""]):
    print(finished.end.status, finished.end.rollout_id)
