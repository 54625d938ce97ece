"""The page ``/ui``: static files, and the routes that only the page needs.

FastAPI reads the annotations of functions within functions, so they are not made strings here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, RedirectResponse
from starlette.exceptions import HTTPException

from ...components.store.base import StorageBackend
from ...types import JsonObject
from ...utils.config import namespace_path
from . import views

__all__ = ["router"]

_FILES = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}  # whatever the machine's own table says
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Space = Annotated[str, Query(alias="namespace", description="A path such as org/alice, below that of the key.")]


def router(store_of: Callable[[Request], StorageBackend]) -> APIRouter:
    """Make the routes of the page.

    Args:
        store_of: A dependency: the store as the caller of a request sees it. It raises 401 and 403. The files of the
            page need no key, because the page asks for one.

    Returns:
        The router, to be included in an application.
    """
    made = APIRouter(include_in_schema=False)
    _add_files(made)

    def read_from(store: Annotated[StorageBackend, Depends(store_of)], namespace: Space = "") -> StorageBackend:
        path = namespace_path(namespace)
        return store.namespace(*path) if path else store

    _add_views(made, read_from)
    return made


def _add_files(made: APIRouter) -> None:
    files = {path.name: path for path in _FILES.iterdir() if path.suffix in _TYPES}

    def answer(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}; open /ui")
        return FileResponse(files[name], headers=_HEADERS, media_type=_TYPES[files[name].suffix])

    @made.get("/ui")
    async def page() -> FileResponse:
        return answer("index.html")

    @made.get("/")
    async def root() -> RedirectResponse:
        return RedirectResponse("ui")

    @made.get("/ui/")
    async def slash() -> RedirectResponse:
        return RedirectResponse("../ui")  # relative, so that it holds behind a proxy with a prefix

    @made.get("/ui/{name}")
    async def file(name: str) -> FileResponse:
        return answer(name)


def _add_views(made: APIRouter, read_from: Callable[..., StorageBackend]) -> None:
    @made.get("/ui/api/map")
    def memory_map(
        store: Annotated[StorageBackend, Depends(read_from)],
        count: Annotated[int, Query(ge=1, le=views.MOST_POINTS)] = 1000,
        clusters: Annotated[int, Query(ge=1, le=10)] = 8,
    ) -> JsonObject:
        return views.memory_map(store, count, clusters)

    @made.get("/ui/api/neighbours")
    def neighbours(
        store: Annotated[StorageBackend, Depends(read_from)],
        unit_id: Annotated[str, Query(alias="id")],
        count: Annotated[int, Query(ge=1, le=50)] = 8,
    ) -> JsonObject:
        return {"neighbours": views.neighbours(store, unit_id, count)}

    @made.get("/ui/api/pairs")
    def pairs(
        store: Annotated[StorageBackend, Depends(read_from)],
        threshold: Annotated[float, Query(gt=0, le=1)] = 0.9,
        count: Annotated[int, Query(ge=2, le=views.MOST_COMPARED)] = 2000,
    ) -> JsonObject:
        return views.near_pairs(store, threshold, count)

    @made.get("/ui/api/why")
    def why(
        store: Annotated[StorageBackend, Depends(read_from)],
        query: str,
        ids: Annotated[list[str], Query(alias="id", max_length=views.MOST_EXPLAINED)],
    ) -> JsonObject:
        return {"why": views.why(store, query, ids)}
