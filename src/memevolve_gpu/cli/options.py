"""The options that commands share."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .opening import DEFAULT_STORE, EmbedderName, IndexTypeName, MetricName

__all__ = ["AsJson", "Conditions", "Embedder", "FilterJson", "IndexType", "Metric", "Prefix"]

# typer reads these at run time, and its older versions know Optional only.
Prefix = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--store",
        "-s",
        show_default=False,
        metavar="PREFIX",
        help=f"Path prefix of the store's files.  \\[default: {DEFAULT_STORE}]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Embedder = Annotated[
    EmbedderName,
    typer.Option("--embedder", "-e", help="Who embeds; auto follows the settings and what filled the store."),
]
Metric = Annotated[
    Optional[MetricName],  # noqa: UP045
    typer.Option(
        "--metric",
        show_default=False,
        help="Distance of a new store; a store keeps its own.  \\[default: the setting's]",
    ),
]
IndexType = Annotated[
    Optional[IndexTypeName],  # noqa: UP045
    typer.Option("--index-type", show_default=False, help="Kind of index to build.  \\[default: the setting's]"),
]
Conditions = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--filter",
        "-f",
        show_default=False,
        metavar="KEY=VALUE",
        help="Only units of which this is true: type=skill, 'metadata.score>=0.5'. May be repeated; one key with "
        "several values means any of them.",
    ),
]
FilterJson = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--filters", show_default=False, metavar="JSON", help='The same as JSON: {"tags": ["git", "linux"]}.'),
]
