"""TLS on a real broker: logins by SCRAM and by certificate, and what a wrong file or password says."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import LOOPBACK, free_port
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError

MAKE = Path(__file__).parents[2] / "deploy" / "tls" / "make-certs.sh"
pytestmark = [
    pytest.mark.kafka,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl: apt-get install openssl"),
]

Given = dict[str, Any]  # settings of a client


def certificates(folder: Path) -> Path:
    subprocess.run(["sh", MAKE, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def logins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Given]]:
    """Settings of a right client, by login; a broker listens for both. Beside `tls` lie the files of `other`, an
    authority that the broker does not know, and in `tls` a certificate that has expired."""
    folder = tmp_path_factory.mktemp("tls")
    tls = certificates(folder / "tls")
    certificates(folder / "other")
    expired = (
        "openssl req -newkey rsa:2048 -nodes -subj /CN=client -keyout expired.key -out expired.csr && "
        "openssl x509 -req -in expired.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 0 -out expired.crt"
    )
    subprocess.run(["sh", "-c", expired], cwd=tls, check=True, capture_output=True)
    plain, scram, mutual, controller = (f"{LOOPBACK}:{free_port()}" for _ in range(4))
    listeners = f"PLAINTEXT://{plain},SASL_SSL://{scram},MTLS://{mutual},CONTROLLER://{controller}"
    properties = {
        "listeners": listeners,
        "advertised.listeners": listeners,
        "controller.quorum.bootstrap.servers": controller,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,MTLS:SSL",
        "listener.name.mtls.ssl.client.auth": "required",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(tls / "broker.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(tls / "ca.crt"),
    }
    broker = LocalKafka(folder / "kafka", port=int(plain.partition(":")[2]), properties=properties)
    broker.up(120)
    user = UserScramCredentialUpsertion("millstream", ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), b"right")
    admin = AdminClient({"bootstrap.servers": plain})
    for created in admin.alter_user_scram_credentials([user]).values():
        created.result(30)
    both: Given = {"kafka_security_ca_file": tls / "ca.crt", "kafka_partitions": 1, "proxy_url": ""}
    yield {
        "scram": both
        | {
            "kafka_bootstrap_servers": scram,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_security_username": "millstream",
            "kafka_security_password": "right",
        },
        "mtls": both
        | {
            "kafka_bootstrap_servers": mutual,
            "kafka_security_protocol": "SSL",
            "kafka_security_cert_file": tls / "client.crt",
            "kafka_security_key_file": tls / "client.key",
        },
    }
    broker.down()


@pytest.mark.parametrize("login", ["scram", "mtls"])
def test_a_rollout_goes_through_all_roles_over_tls(logins: dict[str, Given], login: str, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("def agent(number):\n    return 2.0 * number\n")
    (tmp_path / "tasks.jsonl").write_text('{"input": 3}\n')
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLSTREAM_")}
    environment |= {f"MILLSTREAM_{name.upper()}": str(value) for name, value in logins[login].items()}
    environment |= {"MILLSTREAM_TOPIC_PREFIX": login, "MILLSTREAM_CLICKHOUSE_DSN": f"chdb://{tmp_path / 'store'}"}
    millstream = (sys.executable, "-m", "millstream.pipeline")

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [*millstream, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("topics", "create")
    with ExitStack() as stack:
        for role in (["adapter"], ["sink"], ["runner", "agent:agent"]):
            process = subprocess.Popen([*millstream, *role], cwd=tmp_path, env=environment)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
        printed = command("publish", "tasks.jsonl", "--wait-s", "120")
        assert "succeeded" in printed
        assert "6.0" in printed


@pytest.mark.parametrize(
    ("login", "wrong", "said"),
    [
        ("scram", {"kafka_security_password": "wrong"}, "refuses user 'millstream': check kafka_security_username"),
        ("scram", {"kafka_security_username": "other"}, "refuses user 'other': check kafka_security_username"),
        ("scram", {"kafka_security_mechanism": "PLAIN"}, "kafka_security_mechanism (PLAIN)"),
        ("scram", {"kafka_security_ca_file": None}, "check kafka_security_ca_file (not set"),
        ("scram", {"kafka_security_ca_file": "other/ca.crt"}, "check kafka_security_ca_file (.*other/ca.crt)"),
        ("mtls", {"kafka_security_ca_file": "other/ca.crt"}, "check kafka_security_ca_file (.*other/ca.crt)"),
        (
            "mtls",
            {"kafka_security_cert_file": None, "kafka_security_key_file": None},
            "client's certificate .*check kafka_security_cert_file (not set)",
        ),
        ("mtls", {"kafka_security_key_file": None}, "client's certificate .*kafka_security_key_file (not set)"),
        (
            "mtls",
            {"kafka_security_cert_file": "other/client.crt", "kafka_security_key_file": "other/client.key"},
            "another authority .*check kafka_security_cert_file (.*other/client.crt)",
        ),
        (
            "mtls",
            {"kafka_security_cert_file": "tls/expired.crt", "kafka_security_key_file": "tls/expired.key"},
            "expired.*check kafka_security_cert_file (.*expired.crt)",
        ),
        ("mtls", {"kafka_security_key_file": "other/client.key"}, "setting kafka_security_key_file (.*) can't be used"),
        ("mtls", {"kafka_security_ca_file": "none.crt"}, "setting kafka_security_ca_file (.*none.crt) can't be used"),
        ("mtls", {"kafka_security_cert_file": "tls/ca.key"}, "setting kafka_security_cert_file (.*) can't be used"),
    ],
)
async def test_a_wrong_login_names_the_setting(logins: dict[str, Given], login: str, wrong: Given, said: str) -> None:
    folder = logins["mtls"]["kafka_security_ca_file"].parents[1]
    files = {name: folder / value if name.endswith("_file") and value else value for name, value in wrong.items()}
    log = KafkaLog(load_settings(**logins[login] | files))
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        await log.check_connection()
