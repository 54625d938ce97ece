"""LangChain's public conformance suite on a real Milvus. Runs where one was asked for: scripts/test-milvus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
from milvus_kit import URI, Standalone, milvus_folder, running

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: pip install 'memevolve-gpu[dev]'")
if milvus_folder() is None:
    pytest.skip("no real Milvus was asked for: scripts/test-milvus", allow_module_level=True)

from integrations import test_langchain_store as beyond
from langchain_kit import Words
from langchain_tests.integration_tests.vectorstores import VectorStoreIntegrationTests

from memevolve_gpu.integrations.langchain import EmbeddingsFunction, MemEvolveVectorStore
from memevolve_gpu.milvus.store import MilvusStore


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(Standalone(tmp_path_factory.mktemp("milvus"))):
        yield URI


@pytest.fixture(scope="class")
def backend(server: str, request: pytest.FixtureRequest) -> Iterator[MilvusStore]:
    asking: type[Conformance] = request.cls
    with MilvusStore(
        EmbeddingsFunction(asking.get_embeddings()),
        storage_config={"metric": asking.metric},
        milvus_config={"uri": server, "collection": f"conformance_{asking.metric}"},
    ) as opened:
        yield opened


class Conformance(VectorStoreIntegrationTests):
    """The suite, asked of one collection that is emptied between the tests."""

    metric: ClassVar[str]

    @pytest.fixture
    def vectorstore(self, backend: MilvusStore) -> Iterator[MemEvolveVectorStore]:
        store = MemEvolveVectorStore(backend, self.get_embeddings())
        yield store
        store.delete_collection()


class TestConformanceUnderL2(Conformance):
    metric: ClassVar = "l2"


class TestConformanceUnderCosine(Conformance):
    metric: ClassVar = "cosine"


@pytest.fixture(scope="module")
def sixteen(server: str) -> Iterator[MilvusStore]:
    place = {"uri": server, "collection": "beyond"}
    with MilvusStore(EmbeddingsFunction(Words(16)), storage_config={"metric": "l2"}, milvus_config=place) as opened:
        yield opened


@pytest.mark.parametrize(
    "question",
    [
        beyond.test_every_id_that_can_be_one_is_kept,
        beyond.test_ids_given_win_over_the_documents_own_and_none_means_no_wish,
        beyond.test_of_an_id_given_twice_the_later_document_stays,
        beyond.test_lists_of_different_lengths_are_refused,
        beyond.test_ids_that_nothing_has_are_passed_over,
        beyond.test_a_generator_of_texts_is_taken_whole,
        beyond.test_vectors_can_be_given,
        beyond.test_vectors_can_be_given_without_texts,
        beyond.test_deleting_by_filter,
        beyond.test_nothing_some_and_everything_can_be_deleted,
        beyond.test_an_option_that_nobody_knows_is_refused,
        beyond.test_the_indexing_interface_keeps_the_store_in_step_with_its_source,
    ],
    ids=lambda question: question.__name__.removeprefix("test_"),
)
def test_what_the_suite_does_not_ask(sixteen: MilvusStore, question: Callable[[MemEvolveVectorStore], None]) -> None:
    store = MemEvolveVectorStore(sixteen, Words(16))
    store.delete_collection()
    question(store)
