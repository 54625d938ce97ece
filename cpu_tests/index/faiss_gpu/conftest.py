"""A card for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fake_faiss_gpu import Card, gpu_faiss
from support import inside_in_another_thread

from memevolve_gpu.index import device_failover, faiss_support
from memevolve_gpu.index.faiss_gpu import resources


@contextmanager
def installed(card: Card) -> Iterator[Card]:
    """Put the stand-in behind the loader of faiss; nobody may have met anybody on the card."""
    before = faiss_support.load_faiss()
    faiss_support._module = gpu_faiss(card)
    resources._by_device.clear()
    device_failover._lost.clear()
    resources.use_free_bytes(card.free)
    try:
        yield card
    finally:
        faiss_support._module = before
        resources.use_free_bytes(None)
        resources._by_device.clear()
        device_failover._lost.clear()
    assert card.violations == 0, "two threads were on the device at once"


@pytest.fixture
def card() -> Iterator[Card]:
    """A card with much memory."""
    with installed(Card()) as made:
        yield made


@pytest.fixture(scope="module")
def shared_card() -> Iterator[Card]:
    """The same for indexes that several tests use."""
    with installed(Card()) as made:
        yield made


@contextmanager
def others_on(device: str) -> Iterator[None]:
    """Another thread is on the device for the time of the block."""
    with inside_in_another_thread(resources.resources_of(device).using("holding")):
        yield
