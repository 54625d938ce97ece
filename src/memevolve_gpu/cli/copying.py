"""Moving a store to another backend: copy."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ..components.store.copying import CopyReport, copy_store
from ..components.store.opening import AnyStore
from ..utils.milvus_config import MilvusConfig, is_milvus_uri
from .codes import InputError
from .opening import KeptModel, MetricName, open_existing, open_or_make, remembered_model
from .options import AsJson
from .output import Output

__all__ = ["copy"]


def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Path prefix, or milvus://host:port/collection.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="The same; made when there is no store.")],
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace units of TO that have an id of FROM's and other content.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a store to another place or backend and verify the copy. Interrupted, the same command goes on."""
    output = Output(as_json)
    if _canonical(source) == _canonical(target):
        raise InputError(f"TO: it is the same store as FROM, {source!r}; name another")
    with (
        open_existing(source, None) as read,
        _opened_for(target, read, source) as written,
        output.progress("copying") as report,
    ):
        done = copy_store(read, written, replace=replace, progress=report)
    output.show(done.as_dict(), *_told(done, source, target))


def _opened_for(target: str, source: AnyStore, place: str) -> AnyStore:
    """The target: a new one has the source's dimension, metric and model."""
    model = KeptModel(remembered_model(place), source.embedding_dim)
    return open_or_make(target, model, metric=MetricName(source.metric))


def _canonical(place: str) -> str:
    return MilvusConfig.at(place).address if is_milvus_uri(place) else os.path.realpath(place)


def _told(done: CopyReport, source: str, target: str) -> list[str]:
    lines = [
        f"copied {done.copied} units from {source} to {target}, {done.present} were there already",
        f"verified: {done.count} units and ids, {done.vectors_compared} vectors bit by bit, in {done.seconds:.1f} s",
    ]
    if done.replaced or done.removed:
        lines.append(f"replaced {done.replaced} and removed {done.removed} that changed")
    if done.others:
        lines.append(f"{done.others} other units of {target} were left alone")
    if done.recall_before is not None and done.recall_after is not None:
        lines.append(f"recall@10 before {done.recall_before:.3f}, after {done.recall_after:.3f}")
    return lines
