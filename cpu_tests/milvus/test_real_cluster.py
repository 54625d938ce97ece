"""A cluster of processes that loses a query node under load. Runs where one was asked for: scripts/test-milvus."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from milvus_kit import Cluster, milvus_folder, running
from milvus_scenarios import query_node_killed

FOLDER = milvus_folder()
if FOLDER is None:
    pytest.skip("no real Milvus was asked for: scripts/test-milvus", allow_module_level=True)
if not (FOLDER / "etcd").exists():
    pytest.skip("etcd could not be had: install Debian's etcd-server", allow_module_level=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    with running(made):
        yield made


def test_a_query_node_killed_under_load_makes_no_answer_wrong(cluster: Cluster) -> None:
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((3_000, 32)).astype("float32")
    queries = rng.standard_normal((50, 32)).astype("float32")
    figures = query_node_killed(cluster, vectors, queries, seconds=(5.0, 40.0))
    print(figures)
    assert (figures["wrong_answers"], figures["units_missing"]) == (0, 0), figures["first_wrong"]
    assert figures["errors_that_reached_the_caller"] == 0, figures["first_error"]
    assert figures["answers_before"] > 20
    assert figures["answers_after"] > 20
    assert figures["recovered_after_s"] < 40
