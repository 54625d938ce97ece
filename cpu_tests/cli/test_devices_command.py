"""``memevolve-store devices``, and the settings that lead to a machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_kit import line, on_disk

from memevolve_gpu.cli import options
from memevolve_gpu.cli.read_commands import devices, health, stats
from memevolve_gpu.components.store.session import _prober, this_machine
from memevolve_gpu.devices import engine_probe
from memevolve_gpu.utils.config import StorageConfig, visible_gpus
from memevolve_gpu.utils.embeddings import HashingEmbedder

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Gives what the command says, with settings, where the test's folder comes first on the path."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def run(as_json: bool = False, **environment: str) -> str:
        with pytest.MonkeyPatch.context() as settings:
            for name, value in environment.items():
                settings.setenv(name, value)
            _prober.cache_clear()  # as a new process has it
            devices(as_json=as_json)
        return capsys.readouterr().out

    yield run
    _prober.cache_clear()


def listed(run: Run, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(as_json=True, **environment))
    return found


@pytest.fixture
def two_cards(tmp_path: Path) -> None:
    lines = [line(0, "First GPU", 10_000, 1_000), line(1, "Second GPU", 10_000, 9_000)]
    on_disk(tmp_path, "nvidia-smi", "#!/bin/sh\n" + "".join(f"echo '{each}'\n" for each in lines))


@pytest.mark.usefixtures("two_cards")
def test_cards_engines_and_the_choice_are_listed(run: Run) -> None:
    found = listed(run)
    assert [(gpu["device"], gpu["name"], gpu["free_mb"]) for gpu in found["gpus"]] == [
        ("cuda:0", "First GPU", 1_000),
        ("cuda:1", "Second GPU", 9_000),
    ]
    assert found["chosen"] == "cuda:1"
    assert found["driver"] == "580.65.06"
    assert set(found["engines"]) == {"torch", "faiss"}
    assert found["budget"]["limit"] == int(0.8 * (9_000 << 20))
    text = run()
    for said in ("Second GPU", "cuda:1", "7200 MB of 10000 MB", "engine torch"):
        assert said in text


def test_doubt_about_the_numbers_is_shown_and_can_be_removed(run: Run, tmp_path: Path) -> None:
    lines = [line(0, "Slow GPU", free=100), line(1, "Fast GPU")]
    on_disk(tmp_path, "nvidia-smi", "#!/bin/sh\n" + "".join(f"echo '{each}'\n" for each in lines))
    remedy = "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    assert remedy in listed(run)["reason"]
    assert f"{remedy}\n" in run(), "in full"
    assert remedy not in run(CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert remedy not in run(CUDA_VISIBLE_DEVICES="GPU-1aaaa")


@pytest.mark.usefixtures("two_cards")
def test_settings_and_visible_devices_are_respected(run: Run) -> None:
    found = listed(
        run,
        CUDA_VISIBLE_DEVICES="1",
        MEMEVOLVE_STORAGE_DEVICE="cuda:0",
        MEMEVOLVE_STORAGE_GPU_MEMORY_FRACTION="0.5",
    )
    assert [gpu["name"] for gpu in found["gpus"]] == ["Second GPU"]
    assert found["budget"]["limit"] == int(0.5 * (9_000 << 20))
    missing = listed(run, MEMEVOLVE_STORAGE_DEVICE="cuda:2")
    assert missing["chosen"] == "cpu"
    assert "no such GPU" in missing["reason"]


@pytest.mark.usefixtures("two_cards")
def test_commands_stay_on_the_cpu_and_stats_shows_the_plan(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_probe, "_version", lambda name: "2.11.0" if name == "torch" else "")
    run()
    prefix = str(tmp_path / "memory")
    with options.open_or_create(prefix, HashingEmbedder(16)) as store:
        store.store_batch([{"content": f"number {i}"} for i in range(1500)])
        done = store.run_maintenance()
        found: Any = store.statistics()
        assert found["index"]["engine"] == "cpu", done
    with options.open_existing(prefix, None) as store:
        assert not store.get_storage_health()["needs_retraining"]
    with options.open_existing(prefix, None, as_served=True) as store:
        found = store.statistics()
        assert found["plan"]["engine"] == "torch"
        assert "Second GPU (cuda:1)" in found["plan"]["reason"]
        assert "engine torch" in found["plan"]["reason"]


NO_DRIVER = "echo 'the driver is not loaded' >&2; exit 9"
ROOMY, FULL = (f"echo '{line(total=80_000, free=free)}'" for free in (70_000, 300))


@pytest.mark.parametrize(
    ("driver", "settings", "said"),
    [
        (NO_DRIVER, {}, ["plan: ivf on cpu: index_type is ivf", "device: the GPU driver gives no answer"]),
        (NO_DRIVER, {"MIN_TRAINING_UNITS": "1501"}, ["plan: exact on cpu: ", "it is tried from 1501 units on"]),
        (
            NO_DRIVER,
            {"DEVICE": "cuda"},
            [
                "plan: ivf on cpu: ",
                "by the rule; the GPU driver gives no answer",
                "the GPU is not used: the GPU driver",
            ],
        ),
        (
            ROOMY,
            {"DEVICE": "cuda"},
            [
                "plan: ivf on cuda:0 by torch: 38 lists",
                "in use until the next build: ivf on cpu",
            ],
        ),
        (ROOMY, {}, ["plan: ivf on cuda:0 by torch: ", "engine torch"]),
        (
            FULL,
            {"DEVICE": "cuda"},
            ["plan: ivf on cpu: ", "MB do not fit the 0 MB allowed there", "the GPU is not used: Test GPU (cuda:0): "],
        ),
        (FULL, {}, ["plan: ivf on cpu: ", "do not fit the 0 MB", "the GPU is not used: Test GPU"]),
        (
            ROOMY,
            {"DEVICE": "cuda", "GPU_ENGINE": "faiss"},
            ["GPU_ENGINE=faiss cannot be used", "the GPU is not used: GPU_ENGINE=faiss", "engines: GPU_ENGINE=faiss"],
        ),
    ],
)
def test_stats_prints_the_plan_and_why(
    driver: str,
    settings: dict[str, Any],
    said: list[str],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(engine_probe, "_version", lambda name: "2.11.0" if name in ("torch", "faiss-cpu") else "")
    prefix = str(tmp_path / "memory")
    with options.open_or_create(prefix, HashingEmbedder(16)) as store:
        store.store_batch([{"content": f"number {i}"} for i in range(1500)])
        store.run_maintenance()
    on_disk(tmp_path, "nvidia-smi", f"#!/bin/sh\n{driver}\n")
    for name, value in settings.items():
        monkeypatch.setenv(f"MEMEVOLVE_STORAGE_{name}", value)
    run()
    stats(store=prefix, every=True)
    text = capsys.readouterr().out
    for sentence in said:
        assert sentence in text
    stats(store=prefix, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["reason"] in text
    assert document["device"]["reason"] in text
    assert (document["device"]["problem"] or "") in text
    assert bool(document["device"]["problem"]) == ("the GPU is not used" in text)
    health(store=prefix, as_json=True)
    problem = json.loads(capsys.readouterr().out)["device"]["problem"]
    health(store=prefix)
    assert (f"the GPU is not used: {problem}" in capsys.readouterr().out) == bool(problem)


def test_without_a_gpu_the_reason_is_given(run: Run, tmp_path: Path) -> None:
    on_disk(tmp_path, "nvidia-smi", "#!/bin/sh\necho 'the driver is not loaded' >&2; exit 9\n")
    found = listed(run)
    assert (found["gpus"], found["chosen"], found["budget"]["device"]) == ([], "cpu", "cpu")
    assert "the driver is not loaded" in found["problem"]
    assert "no GPU: the GPU driver gives no answer" in run()


def test_the_settings_make_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine(StorageConfig(device="cuda:1", gpu_memory_fraction=0.3))
    assert (machine.request, machine.fraction) == ("cuda:1", 0.3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ""
