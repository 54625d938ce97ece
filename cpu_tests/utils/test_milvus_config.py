"""Settings of the store on Milvus: where they come from, and what is refused."""

from __future__ import annotations

import pytest

from memevolve_gpu import ConfigurationError, StorageConfig
from memevolve_gpu.utils.config import MilvusConfig

DEFAULTS = {
    "uri": "http://localhost:19530",
    "token": None,
    "database": None,
    "collection": "memevolve",
    "consistency": "session",
    "shards": 1,
    "replicas": 1,
    "timeout": 30.0,
}
OTHERS = {
    "uri": "https://db.test:443",
    "token": "root:sesame",
    "database": "agents",
    "collection": "notes_2",
    "consistency": "STRONG",
    "shards": "4",
    "replicas": "2",
    "timeout": "2.5",
}
BAD = {
    "uri": ["db.test:19530", "http://me:sesame@db.test", "tcp://db.test"],
    "collection": ["a-b", "1a", "a b", "x" * 256, 'a"'],
    "consistency": ["sometimes"],
    "shards": ["0", "many"],
    "replicas": ["0", "1.5"],
    "timeout": ["0", "-1", "inf", "soon"],
}


def test_defaults() -> None:
    assert MilvusConfig().model_dump() == DEFAULTS
    assert set(OTHERS) == set(MilvusConfig.model_fields)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_each_setting_is_read_from_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MEMEVOLVE_MILVUS_{name.upper()}", OTHERS[name])
    config = MilvusConfig()
    assert [one for one in DEFAULTS if config.model_dump()[one] != DEFAULTS[one]] == [name]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_named_and_secrets_are_not(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MEMEVOLVE_MILVUS_{name.upper()}", value)
    with pytest.raises(ConfigurationError, match=f"^MEMEVOLVE_MILVUS_{name.upper()}=.*must be ") as caught:
        MilvusConfig()
    assert "sesame" not in str(caught.value)


def test_the_token_is_never_shown() -> None:
    config = MilvusConfig(token="root:sesame")
    assert "sesame" not in f"{config!r} {config} {config.model_dump()} {config.address}"
    assert config.secret_token == "root:sesame"
    assert MilvusConfig().secret_token == ""


@pytest.mark.parametrize(
    ("value", "meant"), [("milvus", "milvus"), (" MILVUS ", "milvus"), ("vector", "vector"), ("json", "vector")]
)
def test_words_of_memevolve_for_other_backends_mean_files(
    value: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMEVOLVE_STORAGE_BACKEND_TYPE", value)
    assert StorageConfig().backend_type == meant
