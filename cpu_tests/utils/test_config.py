"""Settings: where they come from, what is refused and in which words."""

from __future__ import annotations

import logging
import os
import stat
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from pydantic import SecretStr

from memevolve_gpu.errors import ConfigurationError, MemEvolveError
from memevolve_gpu.utils.config import EmbeddingConfig, MilvusConfig, StorageConfig

DEFAULTS = {
    "max_memory_units": 50_000,
    "warning_threshold": 0.8,
    "prune_threshold": 0.9,
    "prune_target": 0.7,
    "auto_prune": "off",
    "max_memory_mb": 2048,
    "performance_threshold": 10_000,
    "adaptive_nlist": True,
    "vectors_per_centroid": 39,
    "nlist_min": 10,
    "nlist_max": 256,
    "min_training_units": 1_000,
    "index_type": "ivf",
    "metric": "l2",
    "target_recall": 0.95,
    "precision": "auto",
    "device": "auto",
    "gpu_engine": "auto",
    "gpu_max_memory_mb": "auto",
    "gpu_memory_fraction": 0.8,
    "gpu_graphs": False,
    "indexed_fields": None,
    "filter_unicode": "nfc",
    "keyword_stemming": None,
    "durability": "full",
    "lock_timeout": 30.0,
    "history_days": 7.0,
    "file_mode": "0600",
    "background": True,
    "sample_queries": True,
    "backend_type": "vector",
    "namespace": (),
}
"""The users' own list; a default changes only together with them."""

OTHERS = {
    "max_memory_units": "200",
    "warning_threshold": "0.5",
    "prune_threshold": "1",
    "prune_target": "0.4",
    "auto_prune": "LFU",
    "max_memory_mb": "auto",
    "performance_threshold": "7",
    "adaptive_nlist": "no",
    "vectors_per_centroid": "64",
    "nlist_min": "4",
    "nlist_max": "1024",
    "min_training_units": "100",
    "index_type": "AUTO",
    "metric": "cosine",
    "target_recall": "0.99",
    "precision": "float16",
    "device": "cuda:1",
    "gpu_engine": "Torch",
    "gpu_max_memory_mb": "512",
    "gpu_memory_fraction": "0.5",
    "gpu_graphs": "true",
    "indexed_fields": "metadata.score:number, metadata.user",
    "filter_unicode": "Exact",
    "keyword_stemming": "none",
    "durability": "normal",
    "lock_timeout": "2.5",
    "history_days": "1.5",
    "file_mode": "0o660",
    "background": "0",
    "sample_queries": "no",
    "backend_type": "MILVUS",
    "namespace": "org/alice",
}
"""An allowed value, as a variable gives it, that is not the default."""

BAD = {
    "max_memory_units": ["0", "-1", "2.5", "many", "1e999"],
    "warning_threshold": ["0", "1.01", "nan", "high"],
    "prune_threshold": ["0", "-0.1", "inf"],
    "prune_target": ["0", "1.1", "nan"],
    "auto_prune": ["on", "random", "true"],
    "max_memory_mb": ["0", "-5", "nan", "inf", "2 GB"],
    "performance_threshold": ["0", "x"],
    "adaptive_nlist": ["maybe", "2"],
    "vectors_per_centroid": ["0"],
    "nlist_min": ["0"],
    "nlist_max": ["0"],
    "min_training_units": ["1.5", "-3"],
    "index_type": ["ivfpq", "IVF,Flat"],
    "metric": ["euclidean"],
    "target_recall": ["0", "1.5", "nan"],
    "precision": ["fp16", "float64"],
    "device": ["gpu", "cuda:", "cuda:x", "cuda:-1"],
    "gpu_engine": ["cuvs", "cpu"],
    "gpu_max_memory_mb": ["0", "-1", "all"],
    "gpu_memory_fraction": ["0", "1.2", "nan"],
    "gpu_graphs": ["sometimes"],
    "indexed_fields": ["a:b", "a,,b", ",", "a:number:text", "a,"],
    "filter_unicode": ["nfd"],
    "keyword_stemming": ["de-DE", "1"],
    "durability": ["off"],
    "lock_timeout": ["0", "-1", "nan"],
    "history_days": ["-1", "36501", "nan"],
    "file_mode": ["0400", "777", "66", "rw", "-600"],
    "background": ["sometimes"],
    "sample_queries": ["sometimes"],
}


def variable(name: str) -> str:
    return "MEMEVOLVE_STORAGE_" + name.upper()


def test_defaults_are_the_documented_ones() -> None:
    assert StorageConfig().model_dump() == DEFAULTS


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_each_setting_is_read_from_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable(name), f" {OTHERS[name]} ")
    config = StorageConfig().model_dump()
    assert config.pop(name) != DEFAULTS[name]
    assert config == {key: value for key, value in DEFAULTS.items() if key != name}


@pytest.mark.parametrize("source", ["environment", ".env", "keyword"])
def test_a_bad_value_names_variable_value_and_what_is_allowed(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in [(name, value) for name, values in BAD.items() for value in values]:
        keywords = {}
        if source == ".env":
            Path(".env").write_text(f"{variable(name)}='{value}'\n", encoding="utf-8")
        elif source == "keyword":
            keywords[name] = value
        with monkeypatch.context() as patch:
            if source == "environment":
                patch.setenv(variable(name), value)
            with pytest.raises(ConfigurationError) as caught:
                StorageConfig(**keywords)
        text = str(caught.value)
        assert variable(name) in text
        assert repr(value) in text
        assert StorageConfig.allowed(name) in text
        assert "pydantic" not in text
        assert source in text or source == "keyword"


@pytest.mark.parametrize("cls", [StorageConfig, EmbeddingConfig])
def test_each_setting_says_what_is_allowed(cls: type[StorageConfig | EmbeddingConfig]) -> None:
    assert all(cls.allowed(name) for name in cls.model_fields)


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_memory_units": True},
        {"target_recall": True},
        {"max_memory_mb": False},
        {"max_memory_units": None},
        {"max_memory_units": [5]},
        {"max_memory_units": float("nan")},
        {"index_type": 3},
        {"device": None},
        {"background": "on and off"},
    ],
)
def test_a_keyword_of_the_wrong_kind_is_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(keywords))):
        StorageConfig(**keywords)


def test_a_configuration_error_is_a_value_error_of_ours() -> None:
    with pytest.raises(ValueError, match="target_recall") as caught:
        StorageConfig(target_recall=2)
    assert isinstance(caught.value, MemEvolveError)


def test_every_bad_value_is_reported_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)nlist_min=0.*metric='x'"):
        StorageConfig(nlist_min=0, metric="x")


@pytest.mark.parametrize(
    ("low", "high"), [("warning_threshold", "prune_threshold"), ("nlist_min", "nlist_max")], ids=["thresholds", "nlist"]
)
def test_values_that_contradict_each_other_name_both(low: str, high: str) -> None:
    given = {"warning_threshold": 0.95, "prune_threshold": 0.9, "nlist_min": 300, "nlist_max": 256}
    with pytest.raises(ConfigurationError) as caught:
        StorageConfig(**{name: given[name] for name in (low, high)})
    assert f"{variable(low)}={given[low]}" in str(caught.value)
    assert f"{variable(high)}={given[high]}" in str(caught.value)


def test_equal_thresholds_and_bounds_are_fine() -> None:
    config = StorageConfig(warning_threshold=1, prune_threshold=1, nlist_min=8, nlist_max=8)
    assert (config.warning_threshold, config.nlist_max) == (1.0, 8)


def test_keyword_beats_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text(
        "MEMEVOLVE_STORAGE_NLIST_MIN=2  # a remark\n"
        "MEMEVOLVE_STORAGE_NLIST_MAX=20\n"
        "export MEMEVOLVE_STORAGE_METRIC=ip\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("MEMEVOLVE_STORAGE_NLIST_MAX", "30")
    monkeypatch.setenv("MEMEVOLVE_STORAGE_METRIC", "cosine")
    config = StorageConfig(metric="l2")
    assert (config.nlist_min, config.nlist_max, config.metric, config.max_memory_units) == (2, 30, "l2", 50_000)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("MEMEVOLVE_STORAGE_NLIST_MIN=3\nMEMEVOLVE_STORAGE_NLIST_MAX=\n", encoding="utf-8")
    monkeypatch.setenv("MEMEVOLVE_STORAGE_NLIST_MIN", "  ")
    assert (StorageConfig().nlist_min, StorageConfig().nlist_max) == (3, 256)


def test_variable_names_are_compared_without_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("memevolve_storage_nlist_min", "4")
    assert StorageConfig().nlist_min == 4


def test_another_file_or_none_takes_the_place_of_dot_env(tmp_path: Path) -> None:
    Path(".env").write_text("MEMEVOLVE_STORAGE_NLIST_MIN=3\n", encoding="utf-8")
    other = tmp_path / "other.env"
    other.write_text("MEMEVOLVE_STORAGE_NLIST_MIN=5\n", encoding="utf-8")
    assert StorageConfig(_env_file=None).nlist_min == 10
    assert StorageConfig(_env_file=other).nlist_min == 5


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    Path(".env").write_bytes(b"MEMEVOLVE_STORAGE_NLIST_MIN=\xff\xfe\n")
    with pytest.raises(ConfigurationError, match=r"^\.env: .*UTF-8"):
        StorageConfig()


def test_a_folder_called_dot_env_is_no_settings_file() -> None:
    Path(".env").mkdir()
    assert StorageConfig().nlist_min == 10


@pytest.mark.parametrize("door", ["environment", ".env", "keyword"])
def test_max_units_is_a_second_name(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keywords = {}
    if door == "environment":
        Path(".env").write_text("MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS=4\n", encoding="utf-8")
        monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_UNITS", "77")
    elif door == ".env":
        Path(".env").write_text("MEMEVOLVE_STORAGE_MAX_UNITS=77\n", encoding="utf-8")
    else:
        monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS", "4")
        keywords["max_units"] = 77
    assert StorageConfig(**keywords).max_memory_units == 77


def test_of_two_names_in_one_place_the_first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_UNITS", "77")
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_MEMORY_UNITS", "78")
    assert StorageConfig().max_memory_units == 78
    with pytest.raises(ConfigurationError, match="max_units"):
        StorageConfig(max_units=1, max_memory_units=1)


def test_a_bad_second_name_is_reported_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MAX_UNITS", "-2")
    with pytest.raises(ConfigurationError, match=r"^MEMEVOLVE_STORAGE_MAX_UNITS='-2' \(in the environment\)"):
        StorageConfig()


def test_an_unknown_keyword_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigurationError, match=r"target_recal: .* did you mean target_recall\?"):
        StorageConfig(target_recal=0.9)


@pytest.mark.parametrize("door", ["environment", ".env"])
def test_an_unknown_variable_is_logged_once_with_the_nearest_name(
    door: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = f"MEMEVOLVE_STORAGE_NLIST_{'MAXX' if door == '.env' else 'MAXIMUM'}"
    if door == "environment":
        monkeypatch.setenv(unknown, "9")
    else:
        Path(".env").write_text(f"{unknown}=9\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert StorageConfig().nlist_max == 256
        StorageConfig()
    assert len(caplog.records) == 1
    assert unknown in caplog.text
    assert door in caplog.text
    assert "did you mean MEMEVOLVE_STORAGE_NLIST_MAX?" in caplog.text


def test_foreign_names_are_ignored_in_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = ["STORAGE_PATH", "STORAGE_BACKEND_TYPE", "STORAGE_VECTOR_DIM", "UPSTREAM_BASE_URL", "EMBEDDING_ENABLED"]
    Path(".env").write_text(
        "DATABASE_URL=x\nMEMEVOLVE_API_PORT=11436\nTARGET_RECALL=2\nMAX_UNITS=1\n", encoding="utf-8"
    )
    for name in theirs:
        monkeypatch.setenv(f"MEMEVOLVE_{name}", "x")
    monkeypatch.setenv("NLIST_MIN", "99")
    with caplog.at_level(logging.DEBUG):
        assert StorageConfig().model_dump() == DEFAULTS
        EmbeddingConfig()
    assert not caplog.records


def test_a_configuration_cannot_be_changed_but_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    config = StorageConfig(nlist_min=5)
    with pytest.raises(ValueError, match="frozen"):
        config.nlist_min = 6
    monkeypatch.setenv("MEMEVOLVE_STORAGE_METRIC", "ip")
    changed = config.replace(max_units=9)
    assert (changed.nlist_min, changed.max_memory_units, changed.metric) == (5, 9, "l2")
    assert config.max_memory_units == 50_000
    with pytest.raises(ConfigurationError, match="metric"):
        config.replace(metric="x")


def test_a_configuration_knows_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_METRIC", "l2")
    config = StorageConfig(nlist_min=10)
    assert config.model_fields_set == {"metric", "nlist_min"}
    assert config.replace(device="cpu").model_fields_set == {"metric", "nlist_min", "device"}


class Kind(str, Enum):
    HNSW = "hnsw"


def test_adopt_takes_the_attributes_of_a_foreign_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_NLIST_MIN", "11")
    theirs = SimpleNamespace(
        max_units=np.int64(500),
        warning_threshold=np.float64(0.7),
        vectors_per_centroid=64,
        index_type=Kind.HNSW,
        metric=None,
        path="./data",
        device=object(),
    )
    config = StorageConfig.adopt(theirs)
    assert (config.max_memory_units, config.warning_threshold, config.vectors_per_centroid) == (500, 0.7, 64)
    assert (config.index_type, config.metric, config.nlist_min, config.device) == ("hnsw", "l2", 11, "auto")


class Theirs:
    """A storage configuration as MemEvolve makes it: class defaults, and attributes where something was set."""

    max_units = 50_000
    warning_threshold = 0.8
    enable_auto_retrain = True
    min_training_vectors = 100

    def __init__(self, **chosen: Any) -> None:
        vars(self).update(chosen)


def test_adopt_honours_what_was_set_under_memevolve_s_names_and_not_its_defaults() -> None:
    held = StorageConfig.adopt(Theirs())
    assert (held.background, held.min_training_units) == (True, 1_000)
    assert not {"background", "min_training_units"} & held.model_fields_set
    held = StorageConfig.adopt(Theirs(enable_auto_retrain=False, min_training_vectors=250))
    assert (held.background, held.min_training_units) == (False, 250)
    mapped = StorageConfig.adopt({"enable_auto_retrain": False, "min_training_vectors": 100})
    assert (mapped.background, mapped.min_training_units) == (False, 100), "a mapping holds no defaults"


def test_memevolve_s_variables_are_honoured_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path(".env").write_text("MEMEVOLVE_STORAGE_MIN_TRAINING_VECTORS=100\n", encoding="utf-8")
    monkeypatch.setenv("MEMEVOLVE_STORAGE_ENABLE_AUTO_RETRAIN", "off")
    held = StorageConfig.adopt(Theirs(enable_auto_retrain=True))
    assert (held.background, held.min_training_units) == (False, 100)
    monkeypatch.setenv("MEMEVOLVE_STORAGE_MIN_TRAINING_UNITS", "300")
    assert StorageConfig().min_training_units == 300, "the environment goes before the file"
    assert caplog.records == []


@pytest.mark.parametrize("threshold", [0.81, 0.9, 0.95, 1.0])
def test_a_prune_threshold_that_nobody_chose_rises_with_the_warning(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (threshold, max(0.9, threshold))
    chosen = StorageConfig().replace(warning_threshold=threshold)
    monkeypatch.setenv("MEMEVOLVE_STORAGE_WARNING_THRESHOLD", str(threshold))
    for held in (StorageConfig.adopt(Theirs(warning_threshold=threshold)), StorageConfig(), chosen):
        assert (held.warning_threshold, held.prune_threshold) == expected
        assert "prune_threshold" not in held.model_fields_set
        lowered = held.replace(warning_threshold=0.5)
        assert (lowered.warning_threshold, lowered.prune_threshold) == (0.5, 0.9)
    with pytest.raises(ConfigurationError, match="must not exceed"):
        StorageConfig(warning_threshold=threshold, prune_threshold=0.8)


def test_a_prune_target_that_nobody_chose_does_not_exceed_a_low_prune_threshold() -> None:
    held = StorageConfig(warning_threshold=0.4, prune_threshold=0.5)
    assert held.prune_target == 0.5
    assert held.replace(prune_threshold=0.8).prune_target == 0.7
    with pytest.raises(ConfigurationError, match=r"PRUNE_TARGET=0.8 must not exceed MEMEVOLVE_STORAGE_PRUNE_THRESHOLD"):
        StorageConfig(prune_target=0.8, prune_threshold=0.7, warning_threshold=0.5)


def test_adopt_of_a_foreign_object_reports_its_bad_value() -> None:
    with pytest.raises(ConfigurationError, match=r"max_memory_units=-1 .*at least 1"):
        StorageConfig.adopt(SimpleNamespace(max_units=-1))


def test_adopt_leaves_an_object_that_answers_everything_alone() -> None:
    assert StorageConfig.adopt(MagicMock()).model_dump() == DEFAULTS


def test_adopt_of_a_mapping_warns_about_what_it_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    config = StorageConfig.adopt({"max_units": 5, "path": "x", "nlist_mix": 3})
    assert (config.max_memory_units, config.nlist_min) == (5, 10)
    assert [record.getMessage() for record in caplog.records] == [
        "nlist_mix (the given mapping) is no known setting and is ignored; did you mean nlist_min?"
    ]


def test_adopt_returns_our_own_as_it_is_and_makes_one_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = StorageConfig(nlist_min=3)
    assert StorageConfig.adopt(config) is config
    monkeypatch.setenv("MEMEVOLVE_STORAGE_NLIST_MIN", "12")
    assert StorageConfig.adopt(None).nlist_min == 12


def test_adopt_of_a_mapping_reports_its_bad_value() -> None:
    with pytest.raises(ConfigurationError, match="max_memory_units"):
        StorageConfig.adopt({"max_units": [5]})
    assert StorageConfig.adopt({"max_units": None}).max_memory_units == 50_000


@pytest.mark.parametrize("source", ["ivf", 5, [1], StorageConfig])
def test_adopt_refuses_what_cannot_hold_settings(source: object) -> None:
    with pytest.raises(ConfigurationError, match="give a StorageConfig, a mapping, or an object"):
        StorageConfig.adopt(source)


def test_embedding_settings_are_read_and_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("MEMEVOLVE_EMBEDDING_BASE_URL=https://models.test/v1/\n", encoding="utf-8")
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_API_KEY", "sk-sesame")
    monkeypatch.setenv("MEMEVOLVE_EMBEDDING_DIMENSION", "768")
    config = EmbeddingConfig(model="minilm", timeout=5)
    assert (config.provider, config.base_url, config.model) == ("auto", "https://models.test/v1", "minilm")
    assert (config.timeout, config.dimension) == (5.0, 768)
    assert config.api_key == SecretStr("sk-sesame")
    assert EmbeddingConfig(_env_file=None).base_url is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROVIDER", "azure"),
        ("BASE_URL", "models.test/v1"),
        ("BASE_URL", "ftp://models.test"),
        ("BASE_URL", "http://"),
        ("BASE_URL", "http://[::1"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "inf"),
        ("DIMENSION", "-1"),
        ("DIMENSION", "wide"),
    ],
)
def test_a_bad_embedding_setting_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MEMEVOLVE_EMBEDDING_{name}", value)
    with pytest.raises(ConfigurationError, match=f"^MEMEVOLVE_EMBEDDING_{name}=.*must be "):
        EmbeddingConfig()


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EmbeddingConfig(api_key="sk-sesame")
    for text in (repr(config), str(config), repr(config.model_dump())):
        assert "sesame" not in text
    for bad in (
        {"api_key": ["sk-sesame"]},
        {"base_url": "http://me:sesame@models.test/"},
        {"base_url": "x?key=sesame"},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(bad))) as caught:
            EmbeddingConfig(**bad)
        assert "sesame" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_a_settings_file_of_another_user_is_ignored_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path(".env").write_text("MEMEVOLVE_EMBEDDING_BASE_URL=http://elsewhere.example/v1\n", encoding="utf-8")
    assert EmbeddingConfig().base_url == "http://elsewhere.example/v1"
    real = Path.stat

    def another(path: Path, **named: Any) -> os.stat_result:
        found = list(real(path, **named))
        found[stat.ST_UID] = os.geteuid() + 4711
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", another)
    with caplog.at_level(logging.WARNING):
        assert EmbeddingConfig().base_url is None
        assert EmbeddingConfig().base_url is None
    assert [record.getMessage().count("belongs to another user") for record in caplog.records] == [1]
    assert EmbeddingConfig(_env_file=".env").base_url == "http://elsewhere.example/v1"


def test_a_pipe_in_place_of_the_settings_file_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(".env")
    assert StorageConfig() == StorageConfig(_env_file=None)
    assert "no regular file" in caplog.text


SECRET = "s3cr3t-k3y"


@pytest.mark.parametrize(("config", "name"), [(EmbeddingConfig, "api_key"), (MilvusConfig, "token")])
def test_a_secret_is_never_shown(config: Any, name: str) -> None:
    made = config(**{name: SECRET})
    for said in (repr(made), str(made), str(made.model_dump()), made.model_dump_json(), repr(getattr(made, name))):
        assert SECRET not in said
    for bad in ([SECRET], {SECRET: SECRET}, SECRET.encode() + b"\xff"):
        with pytest.raises(ConfigurationError) as caught:
            config(**{name: bad})
        assert SECRET not in str(caught.value)
    for other in sorted(set(config.model_fields) - {name}):
        if "url" in other or other == "uri":
            with pytest.raises(ConfigurationError) as caught:
                config(**{other: f"http://user:{SECRET}@host/"})
            assert SECRET not in str(caught.value)


def test_a_warning_about_an_odd_name_stays_one_line(caplog: pytest.LogCaptureFixture) -> None:
    StorageConfig.adopt({"odd\nname": 1, "odd\ud800name": 1})
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert all(text.isprintable() and "odd\\" in text for text in texts)
