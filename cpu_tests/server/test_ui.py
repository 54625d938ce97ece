"""The page /ui in headless Chromium. UI_PICTURES=FOLDER writes pictures of the views."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for _module in ("fastapi", "uvicorn", "playwright", "axe_playwright_python"):
    pytest.importorskip(_module, reason=f"{_module} is not installed; the tests of the page need it")

from playwright.sync_api import expect
from ui_kit import CHROMIUM, MARKUP, chromium, served, units

from memevolve_gpu import HashingEmbedder, LocalEmbedder, VectorStore
from memevolve_gpu.components.manage import SimpleManagementStrategy
from memevolve_gpu.errors import InvalidUnitError
from memevolve_gpu.server.app import create_app
from memevolve_gpu.server.keys import Keys

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM} (apt install chromium)")

VIEWS = {
    "overview": "overview", "search": "search?query=retry+the+payment+call&top_k=4", "browse": "browse",
    "unit": "unit?id=git-1", "map": "map", "duplicates": "duplicates", "manage": "manage", "activity": "activity",
    "backup": "backup",
}  # fmt: skip
PICTURES = Path(os.environ["UI_PICTURES"]).resolve() if "UI_PICTURES" in os.environ else None


def embedder() -> Any:
    """The ONNX model in the folder UI_MODEL, for pictures; else one that needs no model."""
    if "UI_MODEL" in os.environ:
        return LocalEmbedder(path=os.environ["UI_MODEL"])
    return HashingEmbedder(64)


def picture(page: Any, name: str) -> None:
    """Write a picture of few colours."""
    from PIL import Image

    assert PICTURES is not None
    PICTURES.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(160).save(PICTURES / f"{name}.png", optimize=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with VectorStore(tmp_path / "memory", embedder(), storage_config={"background": False}) as opened:
        opened.store_batch(units())
        opened.update(
            "git-1", {**units()[1], "content": "Rebase onto main before you push; the history stays straight."}
        )
        opened.namespace("org", "alice").store({"id": "hers", "type": "lesson", "content": "Alice wants tables"})
        yield opened


@pytest.fixture
def base(store: VectorStore, tmp_path: Path) -> Iterator[str]:
    with served(create_app(store, backups=tmp_path / "backups")) as address:
        yield address


class Tab:
    """A page, what it asked for elsewhere, and what went wrong on it."""

    def __init__(self, browser: Any, base: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1180, "height": 800}, **options)
        self.page, self.base = self.context.new_page(), base
        self.page.set_default_timeout(20_000)
        self.elsewhere, self.errors = list[str](), list[str]()
        self.context.on("request", self._asked)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.base, "data:", f"blob:{self.base}")):
            self.elsewhere.append(request.url)

    def open(self, view: str) -> Any:
        self.page.goto("about:blank")
        self.page.goto(f"{self.base}/ui#/{view}")
        self.settle()
        return self.page

    def settle(self) -> None:
        self.page.wait_for_load_state("networkidle")
        self.page.locator("main .view").wait_for()
        expect(self.page.locator("[aria-busy]")).to_have_count(0, timeout=20_000)

    def close(self) -> None:
        self.context.close()
        assert (self.elsewhere, self.errors) == ([], [])


@pytest.fixture
def tab(browser: Any, base: str) -> Iterator[Tab]:
    opened = Tab(browser, base)
    yield opened
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_accessible_and_asks_no_other_host(
    browser: Any, base: str, store: VectorStore, scheme: str
) -> None:
    Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe  # noqa: N806 - a class
    for _ in range(50):
        store.search_units("retry the payment call")
    tab = Tab(browser, base, color_scheme=scheme)
    for name, address in VIEWS.items():
        page = tab.open(address)
        assert page.locator("main [role=alert]").count() == 0, page.locator("main [role=alert]").all_inner_texts()
        if name == "search":
            page.locator("summary").first.click()
        if name == "map":
            page.locator("circle.dot").nth(3).click(force=True)
        if name == "manage":
            page.get_by_role("button", name="Dry run: deduplicate").click()
            tab.settle()
        found = Axe().run(page)
        assert found.violations_count == 0, f"{name}, {scheme}: {found.generate_report()}"
        if PICTURES and (scheme == "dark") == (name == "overview"):
            picture(page, name)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    tab.close()


def test_the_theme_can_be_switched_and_is_kept(tab: Tab) -> None:
    page = tab.open("overview")
    for name in ("light", "dark"):
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == name
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert tab.open("map").evaluate("document.documentElement.dataset.theme") == "dark"


def test_every_view_fits_a_narrow_screen(tab: Tab) -> None:
    tab.page.set_viewport_size({"width": 360, "height": 700})
    for address in VIEWS.values():
        page = tab.open(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, address
        if PICTURES and address == "overview":
            picture(page, "narrow")


def test_texts_are_never_markup(tab: Tab, store: VectorStore) -> None:
    odd = units()[0]["id"]
    for address in (
        "unit?id=odd%2F%3Cb%3Eid%3C%2Fb%3E%3F%26%23",
        "browse",
        "search?query=script+window",
        "map",
        "activity",
    ):
        page = tab.open(address)
        assert page.evaluate("window.broken") is None
        assert page.locator("main script, main img, main b, main i").count() == 0
    page = tab.open("unit?id=odd%2F%3Cb%3Eid%3C%2Fb%3E%3F%26%23")
    assert page.locator("h1").inner_text() == odd
    assert page.locator(".content").inner_text() == MARKUP


def test_the_policy_forbids_what_the_page_does_not_need(tab: Tab) -> None:
    answer = tab.page.goto(f"{tab.base}/ui")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert tab.page.request.get(f"{tab.base}/ui/../keys.py").status == 404
    assert tab.page.request.get(f"{tab.base}/ui/__init__.py").status == 404
    assert tab.page.request.get(f"{tab.base}/ui/").url == f"{tab.base}/ui"


def test_the_keyboard_is_enough(tab: Tab) -> None:
    page = tab.open("overview")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_role("link", name="Map").focus()
    page.keyboard.press("Enter")
    expect(page.locator("nav [aria-current]")).to_have_text("Map")  # the address changes before the view does
    tab.settle()
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_role("application").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
    chosen = page.locator(".about a.id").inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(chosen)
    tab.settle()
    page.get_by_role("button", name="Delete").press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    assert page.locator("h1").inner_text() == chosen


def test_three_searches_stand_side_by_side_and_say_why(tab: Tab) -> None:
    page = tab.open("search")
    page.get_by_label("Question or words").fill("retry the payment call")
    page.keyboard.press("Enter")
    tab.settle()
    assert page.locator(".columns h2").all_inner_texts() == ["By meaning", "By words", "Both"]
    card = page.get_by_role("region", name="By words").locator("li").filter(has_text="Never retry")
    assert {"retry", "payment", "call"} <= {text.lower() for text in card.locator("mark").all_inner_texts()}
    card.locator("summary").click()
    told = card.locator("dl").inner_text()
    assert "Cosine with the question" in told
    assert "Common words" in told
    assert "by meaning #" in told


def test_a_unit_is_edited_deleted_and_brought_back(tab: Tab, store: VectorStore) -> None:
    page = tab.open("unit?id=git-2")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Content").fill("Ask before you rebase a shared branch.")
    page.get_by_label("Tags").fill("git, team")
    page.get_by_label("Metadata").fill('{"score": 0.9}')
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved git-2.").wait_for()
    changed = store.retrieve("git-2")
    assert changed is not None
    assert (changed["content"], changed["tags"]) == ("Ask before you rebase a shared branch.", ["git", "team"])
    assert changed["metadata"]["score"] == 0.9
    page.locator("#toast").get_by_role("button", name="Undo").click()
    page.get_by_text("Undone.").wait_for()
    assert store.retrieve("git-2") == units()[2]
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("Deleted git-2.").wait_for()
    assert not store.exists("git-2")
    page.locator("main [role=alert]").wait_for()  # the view says that it is gone, and still shows its history
    tab.errors = [error for error in tab.errors if "404" not in error]
    page.get_by_role("button", name="Undo this change").click()
    page.get_by_text("Undone.").wait_for()
    assert store.exists("git-2")


def test_an_edit_sends_only_what_was_changed(tab: Tab, store: VectorStore) -> None:
    store.store({"id": "mine", "content": "one\r\ntwo", "tags": "single", "metadata": {"a": {"b": 1, "c": 2}, "d": 3}})
    page = tab.open("unit?id=mine")
    page.get_by_role("button", name="Edit").click()
    store.patch("mine", {"content": "three", "metadata": {"d": 4}})  # by another
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Nothing was changed.").wait_for()
    page.get_by_label("Metadata").fill('{"a": {"b": 1}, "d": 3, "e": [null]}')
    page.get_by_role("button", name="Save").click()
    page.get_by_text("Saved mine.").wait_for()
    held = store.retrieve("mine")
    assert held is not None
    assert (held["content"], held["tags"]) == ("three", "single")
    assert {name: held["metadata"][name] for name in ("a", "d", "e")} == {"a": {"b": 1}, "d": 4, "e": [None]}


def test_units_of_any_shape_are_shown(tab: Tab, store: VectorStore) -> None:
    odd: list[dict[str, Any]] = [
        {
            "id": "list",
            "content": {"a": ["one", 2]},
            "tags": [1, {"a": 2}],
            "type": ["x"],
            "metadata": {"created_at": 5},
        },
        {"id": "bare"},
        {"id": "query", "query": "why?", "tags": "text", "type": 7},
    ]
    for unit in odd:
        with contextlib.suppress(InvalidUnitError):
            store.store(unit)
    for address in [*VIEWS.values(), *(f"unit?id={unit['id']}" for unit in odd if store.exists(unit["id"]))]:
        page = tab.open(address)
        assert page.locator("main [role=alert]").count() == 0, page.locator("main [role=alert]").all_inner_texts()
    assert store.exists("list")


def test_an_undo_never_takes_back_what_came_later(tab: Tab, store: VectorStore) -> None:
    page = tab.open("unit?id=git-2")
    page.get_by_role("button", name="Delete").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("Deleted git-2.").wait_for()
    store.store({"id": "git-2", "content": "stored again by another"})
    page.locator("#toast").get_by_role("button", name="Undo").click()
    expect(page.locator("#toast")).to_contain_text("git-2")
    expect(page.locator("#toast")).not_to_contain_text("Deleted")
    held = store.retrieve("git-2")
    assert held is not None
    assert held["content"] == "stored again by another"
    tab.errors = [error for error in tab.errors if "404" not in error and "409" not in error]


def test_an_edit_that_is_no_json_is_explained_and_changes_nothing(tab: Tab, store: VectorStore) -> None:
    page = tab.open("unit?id=git-2")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Metadata").fill("{oops")
    page.get_by_role("button", name="Save").click()
    assert "Metadata is no JSON" in page.get_by_role("alert").inner_text()
    assert store.retrieve("git-2") == units()[2]


def test_units_are_filtered_and_paged(tab: Tab) -> None:
    page = tab.open("browse?type=lesson")
    total = sum(unit["type"] == "lesson" for unit in units())
    assert page.get_by_role("status").filter(has_text=" of ").inner_text() == f"1 to 25 of {total} units"
    page.get_by_role("button", name="Next").click()
    page.get_by_text(f"26 to {total} of {total} units").wait_for()
    page.get_by_label("Text contains").fill("100%")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("No unit matches.").wait_for()
    page.get_by_label("Text contains").fill("RETRY the")
    page.get_by_role("button", name="Show").click()
    page.get_by_text("1 to 2 of 2 units").wait_for()


def test_a_conflict_is_settled_with_a_preview(tab: Tab, store: VectorStore) -> None:
    page = tab.open("duplicates")
    page.get_by_label("Least cosine").fill("0.8")
    page.get_by_role("button", name="Find pairs").click()
    tab.settle()
    pair = page.locator(".pairs > li").filter(has_text="Never retry")
    assert pair.locator(".badge.conflict").inner_text() == "contradict each other"
    assert "opposite" in pair.locator(".muted").first.inner_text()
    ids = [unit["id"] for unit in store.units({"id": ["operations-1", "operations-2"]})]
    left = SimpleManagementStrategy().deduplicate(store, 0.8, dry_run=True)
    assert ids in [sorted(one["ids"]) for one in left.notes["conflicts"]]  # the page shows what the store decides
    assert "Never" in pair.locator("mark").all_inner_texts()
    pair.get_by_role("button", name="Keep operations-2 only").click()
    preview = page.locator("dialog").inner_text()
    assert "Is deleted" in preview
    assert "Always retry" in preview
    page.locator("dialog").get_by_role("button", name="Cancel").click()
    assert store.exists("operations-1")
    pair.get_by_role("button", name="Keep operations-2 only").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    page.get_by_text("Deleted operations-1.").wait_for()
    assert not store.exists("operations-1")
    tab.settle()
    pair = page.locator(".pairs > li").filter(has_text="The user likes")
    pair.get_by_role("button", name="Merge").click()
    assert "consolidated_from" in page.locator("dialog pre").inner_text()
    assert store.exists("user-1")
    page.locator("dialog").get_by_role("button", name="Merge").click()
    page.get_by_text("Merged into").wait_for()
    assert not store.exists("user-1")
    page.locator("#toast").get_by_role("button", name="Undo").click()
    page.get_by_text("Undone.").wait_for()
    assert store.exists("user-1")


def test_management_is_tried_done_and_undone(tab: Tab, store: VectorStore) -> None:
    before = store.count()
    page = tab.open("manage")
    panel = page.get_by_role("region", name="Prune", exact=True)
    panel.get_by_label("Only this type").fill("tool")
    panel.get_by_role("button", name="Dry run").click()
    panel.get_by_text("Would delete 10 units.").wait_for()
    assert store.count() == before
    panel.get_by_label("Only this type").fill("too")  # what was shown no longer holds
    assert panel.get_by_role("button", name="Prune: delete").count() == 0
    panel.get_by_label("Only this type").fill("tool")
    panel.get_by_role("button", name="Dry run").click()
    panel.get_by_role("button", name="Prune: delete 10 units").click()
    page.locator("dialog").get_by_role("button", name="Prune").click()
    page.get_by_text("Prune: 10 units.").wait_for()
    assert store.count() == before - 10
    page.locator("#toast").get_by_role("button", name="Undo").click()
    page.get_by_text("Undone.").wait_for()
    assert store.count() == before


def test_a_merge_names_what_it_joins_and_contradictions_are_left_alone(tab: Tab, store: VectorStore) -> None:
    store.store({**store.data["git-3"], "id": "twin"})
    page = tab.open("manage")
    panel = page.get_by_role("region", name="Consolidate", exact=True)
    panel.get_by_role("button", name="Dry run").click()
    row = panel.locator("tr").filter(has_text="A merge commit")
    row.wait_for()
    assert sorted(row.locator("a.id").all_inner_texts()) == ["git-3", "twin"]
    panel = page.get_by_role("region", name="Deduplicate", exact=True)
    panel.get_by_role("button", name="Dry run").click()
    panel.get_by_text("Would delete 1 units.").wait_for()
    assert "contradictions are left alone" in panel.inner_text()
    assert panel.locator("tbody a.id").all_inner_texts() == ["git-3"]


def test_the_root_leads_to_the_page_and_a_unit_that_is_gone_is_explained(tab: Tab) -> None:
    tab.page.goto(tab.base)
    tab.page.wait_for_url("**/ui")
    page = tab.open("unit?id=gone")
    assert "There is no such unit here now" in page.locator("main").inner_text()
    tab.errors = [error for error in tab.errors if "404" not in error]


def test_a_backup_is_made_and_the_units_are_exported(tab: Tab, store: VectorStore, tmp_path: Path) -> None:
    page = tab.open("backup")
    page.get_by_label("Name", exact=True).fill("before-friday")
    page.get_by_role("button", name="Make a backup").click()
    page.get_by_role("cell", name="before-friday").wait_for()
    assert VectorStore.restore(tmp_path / "backups" / "before-friday.db", tmp_path / "again") is None
    with page.expect_download() as saved:
        page.get_by_role("button", name="Export").click()
    assert len(Path(saved.value.path()).read_text("utf-8").splitlines()) == store.count()


def test_a_namespace_is_chosen(tab: Tab) -> None:
    page = tab.open("browse")
    page.get_by_label("Namespace").fill("org/alice")
    page.keyboard.press("Enter")
    page.get_by_text("1 to 1 of 1 units").wait_for()
    assert page.locator("td a.id").inner_text() == "hers"
    for view in ("map", "duplicates", "search?query=tables", "unit?id=hers", "activity", "manage"):
        assert tab.open(view).locator("main [role=alert]").count() == 0


def test_a_key_is_asked_for_and_kept_for_the_tab(browser: Any, store: VectorStore, tmp_path: Path) -> None:
    token = Keys(tmp_path / "keys.json").add("reader", ["read"])
    with served(create_app(store, tmp_path / "keys.json", backups=tmp_path / "backups")) as base:
        tab = Tab(browser, base)
        tab.page.goto(f"{base}/ui")
        for told, given in (("asks for a key", "wrong"), ("refuses this key", token)):
            tab.page.locator("dialog").get_by_text(told).wait_for()
            tab.page.locator("#key").fill(given)
            tab.page.keyboard.press("Enter")
        tab.page.get_by_role("heading", name="What to do next").wait_for()
        assert tab.page.evaluate("sessionStorage.getItem('memevolve-key')") == token
        assert tab.page.evaluate("Object.values(localStorage)") == ["auto"]
        page = tab.open("map")
        assert page.locator("circle.dot").count() > 50
        page = tab.open("unit?id=git-2")
        page.get_by_role("button", name="Delete").click()
        page.locator("dialog").get_by_role("button", name="Delete").click()
        assert "scope 'write'" in page.get_by_role("alert").inner_text()
        assert store.exists("git-2")
        assert page.request.get(f"{base}/ui/api/map").status == 401
        tab.errors = [error for error in tab.errors if "401" not in error and "403" not in error]
        tab.close()


def test_a_key_of_a_namespace_sees_that_alone(browser: Any, store: VectorStore, tmp_path: Path) -> None:
    token = Keys(tmp_path / "keys.json").add("hers", ["read", "write"], "org/alice")
    with served(create_app(store, tmp_path / "keys.json", backups=tmp_path / "backups")) as base:
        tab = Tab(browser, base)
        tab.page.goto(f"{base}/ui")
        tab.page.locator("#key").fill(token)
        tab.page.keyboard.press("Enter")
        tab.page.get_by_role("heading", name="What to do next").wait_for()
        assert tab.open("browse").locator("td a.id").all_inner_texts() == ["hers"]
        for view in ("map", "duplicates", "search?query=rebase", "unit?id=hers"):
            page = tab.open(view)
            assert page.locator("main [role=alert]").count() == 0
            assert "git-" not in page.locator("main").inner_text()
        tab.errors = [error for error in tab.errors if "401" not in error and "403" not in error]
        tab.close()
