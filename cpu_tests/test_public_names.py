"""The names that ``memevolve_gpu`` exports: all of them load, complete in a shell, and cost nothing at import."""

from __future__ import annotations

import inspect

import pytest
from forks import Forks
from support import each

import memevolve_gpu


def test_dir_lists_the_public_names_before_they_are_loaded(fresh: Forks) -> None:
    program = "import memevolve_gpu; print(*dir(memevolve_gpu))"
    done = fresh(program)
    listed = done.stdout.split()
    assert [name for name in listed if not name.startswith("__")] == sorted(memevolve_gpu.__all__)
    assert {"__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"} <= set(listed)


def test_dir_stays_the_same_after_every_name_is_loaded() -> None:
    before = dir(memevolve_gpu)
    for name in memevolve_gpu.__all__:
        getattr(memevolve_gpu, name)
    assert dir(memevolve_gpu) == before


@each("name", sorted(set(memevolve_gpu.__all__) - {"MemoryUnit"}))  # an alias of dict
def test_every_public_name_loads_and_has_a_docstring(name: str) -> None:
    found = getattr(memevolve_gpu, name)
    assert found.__name__ == name
    assert inspect.getdoc(found)


def test_the_embedders_load_without_the_libraries_that_they_use(fresh: Forks) -> None:
    program = (
        "import sys\n"
        "from memevolve_gpu import HashingEmbedder, LocalEmbedder, OpenAIEmbedder\n"
        "print([n for n in ('faiss', 'torch', 'openai', 'sentence_transformers') if n in sys.modules])\n"
    )
    done = fresh(program)
    assert done.stdout.strip() == "[]"


def test_the_exported_embedders_are_those_of_the_embeddings_package() -> None:
    from memevolve_gpu.utils import embeddings

    for name in ("HashingEmbedder", "LocalEmbedder", "OpenAIEmbedder"):
        assert getattr(memevolve_gpu, name) is getattr(embeddings, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'memevolve_gpu' has no attribute 'VectorStor'"):
        memevolve_gpu.VectorStor  # noqa: B018 - the access is what is tested


def test_star_import_brings_every_public_name(fresh: Forks) -> None:
    program = "from memevolve_gpu import *; import memevolve_gpu; assert set(memevolve_gpu.__all__) <= set(globals())"
    done = fresh(program)
    assert done.returncode == 0, done.stderr
