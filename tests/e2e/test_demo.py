"""Both demos as a newcomer runs them, against the agent's own ledger, with controls that must not learn."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from millstream.deploy.kafka.local import LocalKafka

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.torch, pytest.mark.timeout(900)]
# A control has as many steps as the learning run needs to leave the rewards behind that it began with.
CONTROL_STEPS, FLAT = 6, 0.1
ROLES = {"sink", "adapter", "proxy", "runner-1", "runner-2", "trainer", "ui"}


class Demo:
    """One run of the demo in a process of its own."""

    def __init__(self, folder, *options):
        self.folder = folder
        self.ledger_file = folder / "ledger.jsonl"
        self.environment = os.environ | {
            "CALCULATOR_LEDGER": str(self.ledger_file),
            "MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{folder / 'run' / 'store'}",
        }
        self.output = ""
        self.ended = False
        self.printed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.calculator.demo", "--run-dir", folder / "run", *options],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background jobs ignore SIGINT, and their children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self.printed:
                self.output += line
                self.printed.notify_all()
        with self.printed:
            self.ended = True
            self.printed.notify_all()

    def wait_for_steps(self, count):
        with self.printed:
            self.printed.wait_for(lambda: self.ended or self.output.count("step ") >= count, timeout=300)
            assert self.output.count("step ") >= count, self.output[-5000:]

    def wait(self):
        code = self.process.wait()
        self.reader.join(10)
        if not (self.folder / "run" / "summary.json").exists():
            pytest.fail(f"the demo ended with {code}:\n{self.output[-5000:]}")
        return code

    @property
    def summary(self):
        return json.loads((self.folder / "run" / "summary.json").read_text())

    @property
    def trained(self):
        return json.loads((self.folder / "run" / "train.json").read_text())

    def sql(self, query, **variables):
        """The answer of ``millstream sql``."""
        command = [sys.executable, "-m", "millstream.pipeline", "sql", "--json", query]
        environment = self.environment | variables
        answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def ledger(self):
        """From the agent's own file: right answers by attempt and step, and the attempts of each rollout."""
        found, attempts = defaultdict(dict), defaultdict(set)
        for line in self.ledger_file.read_text().splitlines():
            entry = json.loads(line)
            assert entry["step"] not in found[entry["attempt"]], f"ran twice: {entry}"
            found[entry["attempt"]][entry["step"]] = entry["right"]
            attempts[entry["rollout"]].add(entry["attempt"])
        return found, attempts


def compare_store_with_ledger(demo):
    """The store agrees with what the agent did. Returns the rollouts that have succeeded, by id."""
    by_attempt, attempts = demo.ledger()
    succeeded = {r["rollout_id"]: r for r in demo.sql("SELECT * FROM rollouts WHERE status = 'succeeded'")}
    triplets = demo.sql("SELECT rollout_id, attempt_id, turn, reward, trainable FROM triplets")
    chosen = {row["rollout_id"]: row["attempt_id"] for row in triplets}
    assert chosen.keys() == succeeded.keys()
    assert all(chosen[rollout] in attempts[rollout] for rollout in succeeded)
    assert all(len(attempts[r]) <= row["attempts"] for r, row in succeeded.items()), "an attempt is not counted"
    ledger = {rollout: by_attempt[attempt] for rollout, attempt in chosen.items()}
    expected = {rollout: 0.5 * sum(ledger[rollout].values()) for rollout in succeeded}
    assert {rollout: row["reward"] for rollout, row in succeeded.items()} == expected

    counts = demo.sql(
        "SELECT AttemptId AS attempt, countIf(Kind = 'reward') AS rewards, "
        "countIf(Kind = 'llm' AND Source = 'proxy') AS calls FROM spans GROUP BY attempt"
    )
    counts = {row["attempt"]: (row["rewards"], row["calls"]) for row in counts}
    for rollout, attempt in chosen.items():
        assert counts[attempt] == (len(ledger[rollout]), len(ledger[rollout]))

    used = defaultdict(dict)
    for row in triplets:
        assert row["trainable"]
        used[row["rollout_id"]][row["turn"]] = row["reward"]
    assert used == {rollout: {step: 0.5 * right for step, right in steps.items()} for rollout, steps in ledger.items()}

    return succeeded


def compare_with_ledger(demo):
    """The store and the trainer, which was not interrupted, agree with what the agent did."""
    succeeded = compare_store_with_ledger(demo)
    assert all(row["attempts"] == row["lost_attempts"] + 1 for row in succeeded.values()), "retried without a loss"
    (ends,) = demo.sql("SELECT count() AS ended, uniqExact(rollout_id) AS ids FROM rollouts WHERE status != 'queued'")
    assert ends["ended"] == ends["ids"] == demo.summary["rollouts"] == demo.trained["rollouts"]

    by_version = defaultdict(list)
    for row in succeeded.values():
        if row["mode"] == "train":
            by_version[row["model_version"]].append(row["reward"])
    for step in demo.trained["steps"]:
        rewards = by_version[step["model_version"]]
        assert step["reward"] == pytest.approx(sum(rewards) / len(rewards))


def ends_in_the_log(folder):
    """How often each rollout has ended, read by a Kafka client that Millstream does not wrap."""
    from confluent_kafka import Consumer, KafkaError

    from millstream.schemas.wire import codec
    from millstream.schemas.wire.records import RolloutEnd

    broker = LocalKafka(folder, port=0)
    broker.up()
    options = {"group.id": "witness", "auto.offset.reset": "earliest", "enable.partition.eof": True}
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "isolation.level": "read_committed", **options})
    try:
        consumer.subscribe(["millstream.triplets"])
        ends, finished = Counter(), set()
        while len(finished) < 8:
            for message in consumer.consume(1000, 5.0):
                if message.error() is None:
                    record = codec.decode(message.value())
                    ends[record.rollout_id] += isinstance(record, RolloutEnd)
                else:
                    assert message.error().code() == KafkaError._PARTITION_EOF
                    finished.add(message.partition())
        return ends
    finally:
        consumer.close()
        broker.down()


def check_summary(demo):
    keys = {
        "first_reward",
        "validation_reward",
        "seconds",
        "rollouts",
        "rollouts_per_second",
        "spans",
        "by_version",
    }
    assert keys <= demo.summary.keys()


def test_the_agent_learns_in_one_process(tmp_path):
    demo = Demo(tmp_path)
    assert demo.wait() == 0, demo.output[-3000:]
    check_summary(demo)
    assert len(demo.summary["by_version"]) >= len(demo.trained["steps"])
    assert demo.summary["first_reward"] < 0.4
    assert demo.summary["validation_reward"] > 0.9
    assert max(step["reward"] for step in demo.trained["steps"][:CONTROL_STEPS]) > FLAT
    assert demo.trained["validation_failed"] == 0
    compare_with_ledger(demo)


@pytest.mark.kafka
@pytest.mark.chaos
@pytest.mark.slow
def test_the_agent_learns_over_kafka_although_each_process_is_killed(tmp_path):
    demo = Demo(tmp_path, "--kafka", "--max-staleness", "2")
    pids = tmp_path / "run" / "log" / "processes.json"
    demo.wait_for_steps(1)
    started = json.loads(pids.read_text())
    assert set(started) == ROLES
    address = re.search(r"MILLSTREAM_CLICKHOUSE_DSN=(\S+)", demo.output)[1]
    (meanwhile,) = demo.sql("SELECT count() AS spans FROM spans", MILLSTREAM_CLICKHOUSE_DSN=address)
    assert meanwhile["spans"] > 0
    for step, killed in enumerate(("sink", "runner-1", "adapter", "proxy", "broker", "trainer"), 2):
        demo.wait_for_steps(step)
        if killed == "broker":
            broker = LocalKafka(tmp_path / "run" / "kafka", port=0)
            broker.kill()
            broker.up()
        else:
            os.kill(started[killed], signal.SIGKILL)
    assert demo.wait() == 0, demo.output[-3000:]
    for killed in started.keys() - {"runner-2", "ui"}:
        assert demo.output.count(f"{killed} ended (killed by SIGKILL)") == 1
    assert "runner-2 ended" not in demo.output
    assert "ui ended" not in demo.output
    check_summary(demo)
    assert demo.summary["validation_reward"] > 0.9
    check_that_each_rollout_was_trained_on_once(demo, compare_store_with_ledger(demo))
    assert not any(Path(f"/proc/{pid}").exists() for pid in started.values())
    ends = ends_in_the_log(tmp_path / "run" / "kafka")
    assert len(ends) == demo.summary["rollouts"]
    assert set(ends.values()) == {1}


def check_that_each_rollout_was_trained_on_once(demo, succeeded):
    steps = demo.sql(
        "SELECT step, groups, staleness_max, trained FROM training_steps WHERE NOT abandoned ORDER BY step"
    )
    assert [step["step"] for step in steps] == list(range(1, 1 + len(demo.trained["steps"])))
    assert max(step["staleness_max"] for step in steps) <= 4
    trained = [rollout for step in steps for rollout in step["trained"]]
    assert len(set(trained)) == len(trained) == sum(8 * step["groups"] for step in steps)
    assert succeeded.keys() >= set(trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--lr", "0", "--kafka"), id="lr=0 over Kafka", marks=pytest.mark.kafka),
        pytest.param(("--adapter", "examples.calculator.controls:zero_rewards"), id="zero rewards"),
    ],
)
def test_controls_stay_flat(tmp_path, options):
    demo = Demo(tmp_path, "--max-steps", str(CONTROL_STEPS), *options)
    assert demo.wait() == 1
    assert demo.summary["validation_reward"] < FLAT
    assert all(step["reward"] < FLAT for step in demo.trained["steps"])


@pytest.mark.slow
@pytest.mark.frameworks
@pytest.mark.parametrize("agent", ["langgraph_agent", "autogen_team"])
@pytest.mark.parametrize("lr", [1e-3, 0], ids=["learns", "lr=0"])
def test_an_agent_of_another_framework_learns_and_not_without_a_learning_rate(tmp_path, agent, lr):
    path = f"examples.calculator.{agent}:agent"
    demo = Demo(tmp_path, "--agent", path, "--groups", "8", "--max-steps", "8" if lr else "4", "--lr", str(lr))
    demo.wait()
    rewards = [step["reward"] for step in demo.trained["steps"]]
    first, last = rewards[0], sum(rewards[-2:]) / 2
    assert first < 0.05
    assert last > 0.15 if lr else last < 0.05
    compare_with_ledger(demo)


@pytest.mark.kafka
@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    demo = Demo(tmp_path, "--kafka")
    pids = tmp_path / "run" / "log" / "processes.json"
    demo.wait_for_steps(1)
    started = json.loads(pids.read_text())
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(60) == 130
    assert set(started) == ROLES
    assert not any(Path(f"/proc/{pid}").exists() for pid in started.values())
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert left == ""
