"""A real Milvus for tests: one standalone server, or a cluster of processes, in the network namespace of the caller.

``scripts/test-milvus`` prepares what is needed and says where it is in ``MEMEVOLVE_TEST_MILVUS``: a folder with
``bin`` (the server's program and libraries), ``milvus.yaml`` and ``glog.conf`` as the server's package makes them,
``broker-python`` (an interpreter that has confluent_kafka) and, where it could be had, ``etcd``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["URI", "Cluster", "Standalone", "milvus_folder"]

URI = "http://127.0.0.1:19530"
VARIABLE = "TEST_MILVUS_FOLDER"
STARTED_WITHIN = 120.0

BROKER = """
import sys, time
from confluent_kafka import Producer
producer = Producer({"bootstrap.servers": "", "test.mock.num.brokers": 1})
address = next(iter(producer.list_topics(timeout=10).brokers.values()))
print(f"{address.host}:{address.port}", flush=True)
sys.stdin.read()
"""


def milvus_folder() -> Path | None:
    """Where the server's files are; None when nobody asked for a real server."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


class Node:
    """One process of the server."""

    def __init__(
        self, folder: Path, name: str, arguments: list[str], port: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.name, self.arguments, self.port = folder, name, arguments, port
        self.environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        source = milvus_folder()
        assert source is not None
        run = self.folder / f"run-{self.name}"
        run.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "DEPLOY_MODE"} | {
            "METRICS_PORT": str(self.port),
            "LD_LIBRARY_PATH": str(source / "bin"),
            "MILVUSCONF": str(self.folder / "configs"),
            "MILVUS_RUN_DIR": str(run),
            **self.environment,
        }
        with (self.folder / f"{self.name}.log").open("ab") as log:
            command = ["nice", "-n", "5", str(source / "bin" / "milvus"), "run", *self.arguments]
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=2) as answer:
                return b"OK" in answer.read()
        except (urllib.error.URLError, OSError):
            return False

    def wait(self) -> None:
        until = time.monotonic() + STARTED_WITHIN
        while not self.is_healthy():
            assert self.process is not None
            assert self.process.poll() is None, f"{self.name} ended by itself; see {self.folder / self.name}.log"
            assert time.monotonic() < until, f"{self.name} is not healthy after {STARTED_WITHIN:.0f} s"
            time.sleep(0.2)

    def kill(self, how: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(60)
        self.process = None


class Standalone:
    """One process that is the whole server; what it acknowledged survives ``kill``."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        _configure(folder, {})
        self.node = Node(folder, "standalone", ["standalone"], 9091, {"DEPLOY_MODE": "STANDALONE"})

    def start(self) -> None:
        self.node.start()
        self.node.wait()

    def kill(self) -> None:
        """kill -9."""
        self.node.kill()

    def pause(self) -> None:
        """The server hangs: it takes connections and answers nothing."""
        assert self.node.process is not None
        self.node.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.node.process is not None
        self.node.process.send_signal(signal.SIGCONT)


class Cluster:
    """Coordinators, data node, index node, proxy and two query nodes as processes, with etcd and a mock broker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self.others: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, Node] = {}

    def start(self) -> None:
        self._etcd()
        _configure(self.folder, {"broker": self._broker()})
        coordinators = [f"-{name}=true" for name in ("rootcoord", "querycoord", "datacoord", "indexcoord")]
        roles = {"coordinators": ["mixture", *coordinators], "datanode": ["datanode"], "indexnode": ["indexnode"]}
        roles |= {"proxy": ["proxy"], "query1": ["querynode"], "query2": ["querynode"]}
        for number, (name, arguments) in enumerate(roles.items()):
            ports = {"QUERYNODE_PORT": str(21123 + number)} if arguments == ["querynode"] else {}
            self.nodes[name] = Node(self.folder, name, arguments, 9100 + number, ports)
            self.nodes[name].start()
        for node in self.nodes.values():
            node.wait()

    def stop(self) -> None:
        for node in self.nodes.values():
            node.kill()
        for process in self.others:
            process.kill()
            process.wait(30)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _etcd(self) -> None:
        source = milvus_folder()
        assert source is not None
        with (self.folder / "etcd.log").open("ab") as log:
            process = subprocess.Popen(
                [str(source / "etcd"), "--data-dir", str(self.folder / "etcd.data")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.others.append(process)
        time.sleep(2)
        assert process.poll() is None, f"etcd ended by itself; see {self.folder}/etcd.log"

    def _broker(self) -> str:
        source = milvus_folder()
        assert source is not None
        python = (source / "broker-python").read_text().strip()
        process = subprocess.Popen([python, "-c", BROKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.others.append(process)
        assert process.stdout is not None
        return process.stdout.readline().decode().strip()


def _configure(folder: Path, cluster: Mapping[str, str]) -> None:
    """Write the server's configuration: everything below ``folder``, leases of 5 s, a quick end."""
    source = milvus_folder()
    assert source is not None
    configs = folder / "configs"
    for made in (configs, folder / "logs", folder / "data"):
        made.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "glog.conf", configs / "glog.conf")
    text = (source / "milvus.yaml").read_text().replace(str(source), str(folder))
    text = re.sub(r"(?m)^(    ttl: )\d+", r"\g<1>5", text)
    text = re.sub(r"(?m)^(\s*gracefulStopTimeout: )\d+", r"\g<1>3", text)
    if cluster:
        text = re.sub(r"(?m)^(    embed: )true", r"\g<1>false", text)
        text = re.sub(r"(?m)^(  type: )rocksmq", r"\g<1>kafka", text)
        text += f"\nkafka:\n  brokerList: {cluster['broker']}\n"
    (configs / "milvus.yaml").write_text(text)


@contextlib.contextmanager
def running(server: Standalone | Cluster) -> Iterator[None]:
    """The server, started; whatever happens, none of its processes is left."""
    try:
        server.start()
        yield
    finally:
        if isinstance(server, Cluster):
            server.stop()
        else:
            server.kill()
