"""The page at /admin/ui in a real Chromium, against a real platform: what it shows, does, and does not let act."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flatshare_registry.ids import TenantId
from flatshare_registry.layout import blob_key

from .conftest import Platform, random_rows

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
SHOTS = os.environ.get("FLATSHARE_TEST_SCREENSHOTS")
"""Folder where pictures are left, for the documents."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian's package has one)")
EVIL = "<img src=x onerror=document.title='acted'>"


@pytest.fixture(scope="module")
def filled(platform: Platform) -> Platform:
    for number in range(5):
        platform.add(f"shown-{number}", 400 + number)
    platform.add("shown-0", 420, promote=False)
    for _ in range(4):
        for number in range(5):
            assert platform.predict(f"shown-{number}", random_rows(1)).status_code == 200
    return platform


@pytest.fixture
def said() -> list[str]:
    """Errors and warnings of the page's console; none may be left at the end."""
    return []


@pytest.fixture
def page(filled: Platform, said: list[str]) -> Iterator[playwright.Page]:
    """A page on which nothing may go wrong unnoticed."""
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1200, "height": 1000})
        opened.on(
            "console",
            lambda message: said.append(message.text) if message.type in ("error", "warning") else None,
        )
        opened.on("pageerror", lambda error: said.append(str(error)))
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.set_default_timeout(20_000)
        yield opened
        browser.close()
    # That a key is asked for shows as a 401, which browsers say themselves.
    assert [one for one in said if "401" not in one] == []
    assert all(url.startswith((f"{filled.url}/admin/", "data:")) for url in asked), "nothing from elsewhere"


def opened_with_a_key(page: playwright.Page, platform: Platform) -> None:
    page.goto(f"{platform.url}/admin/ui")
    page.get_by_label("API key of an admin or a viewer").fill("fs_ADMIN.aaaaaaaaaa_" + "a" * 43)
    page.get_by_role("button", name="Open").click()
    playwright.expect(page.get_by_role("status")).to_contain_text("not known here")
    page.get_by_label("API key of an admin or a viewer").fill(
        platform.admin["authorization"].removeprefix("Bearer ")
    )
    page.get_by_role("button", name="Open").click()
    playwright.expect(page.get_by_role("heading", name="Fleet")).to_be_visible()


def shot(page: playwright.Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"ui-{name}.png", full_page=True)


def test_who_looks_sees_the_fleet_a_replica_and_a_tenant(page: playwright.Page, filled: Platform) -> None:
    opened_with_a_key(page, filled)
    fleet = filled.fleet()
    for one in fleet["replicas"]:
        playwright.expect(page.get_by_role("link", name=one["replica"], exact=True).first).to_be_visible()
    held = sum(len(one["models"]) for one in fleet["replicas"])
    assert page.locator(".tiles dd").nth(1).inner_text() == str(held)
    # The last hour is drawn once there are points with requests between: four a minute.
    for number in range(600):
        if page.evaluate("document.querySelector('path.p99')?.getAttribute('d').includes('L')"):
            break
        assert filled.predict(f"shown-{number % 5}", random_rows(1)).status_code == 200
        page.wait_for_timeout(100)
    else:
        pytest.fail("no line was drawn in a minute")
    shot(page, "overview")
    page.emulate_media(color_scheme="dark")
    shot(page, "overview-dark")
    page.emulate_media(color_scheme="light")

    page.get_by_role("link", name=fleet["replicas"][0]["replica"], exact=True).first.click()
    playwright.expect(page.get_by_role("region", name="Models of this replica")).to_be_visible()
    shot(page, "replica")
    # It goes on being drawn, where one is and while one types elsewhere.
    first = page.get_by_role("status").inner_text()
    playwright.expect(page.get_by_role("status")).not_to_have_text(first, timeout=15_000)

    # By keyboard alone: the search, then the tenant.
    page.get_by_role("combobox", name="Tenant").focus()
    page.keyboard.type("shown-0")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("heading", name="Tenant shown-0")).to_be_visible()
    playwright.expect(page.get_by_role("region", name="History")).to_contain_text("version.registered")
    assert "[object" not in page.locator("main").inner_text()
    shot(page, "tenant")


def test_a_load_that_failed_says_why_on_the_page(page: playwright.Page, filled: Platform) -> None:
    filled.add("shown-broken", 421)
    (record,) = filled.registry.list_versions(TenantId("shown-broken"))
    filled.registry.store.delete(blob_key(record.digest))
    assert filled.predict("shown-broken", random_rows(1)).status_code == 500
    opened_with_a_key(page, filled)
    page.evaluate("location.hash = '#/tenant/shown-broken'")
    found = page.get_by_role("region", name="Loads that failed")
    playwright.expect(found).to_contain_text("Corrupt: the weights of shown-broken@1 are gone from the store")
    shot(page, "failed-load")


def test_who_may_promotes_pins_and_rolls_back(page: playwright.Page, filled: Platform) -> None:
    opened_with_a_key(page, filled)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("combobox", name="Tenant").fill("shown-0")
    page.get_by_role("button", name="Show").click()
    status = page.get_by_role("status")
    page.get_by_role("button", name="Promote 2").click()
    playwright.expect(status).to_have_text("Promote 2: done.")
    playwright.expect(page.get_by_role("button", name="Promote 1")).to_be_visible()
    playwright.expect(page.get_by_role("button", name="Promote 2")).to_have_count(0)
    assert filled.predict("shown-0", random_rows(1)).headers["x-flatshare-version"] == "2"
    page.get_by_role("button", name="Roll back").click()
    playwright.expect(status).to_have_text("Roll back: done.")
    assert filled.predict("shown-0", random_rows(1)).headers["x-flatshare-version"] == "1"
    page.get_by_role("button", name="Pin", exact=True).click()
    playwright.expect(status).to_have_text("Pin: done.")
    pinned = [model for one in filled.fleet()["replicas"] for model in one["models"] if model["pinned"]]
    assert {model["tenant"] for model in pinned} == {"shown-0"}
    page.get_by_role("button", name="Unpin").click()
    playwright.expect(status).to_have_text("Unpin: done.")


def test_a_tenants_text_cannot_act(page: playwright.Page, filled: Platform, said: list[str]) -> None:
    key = filled.http.post(
        f"{filled.url}/admin/tenants/shown-1/keys", json={"label": EVIL, "scopes": ["predict"]}
    )
    assert key.status_code == 201
    opened_with_a_key(page, filled)
    page.evaluate(f"location.hash = '#/tenant/' + encodeURIComponent({EVIL!r})")
    playwright.expect(page.get_by_role("status")).to_have_class("bad")
    page.evaluate("location.hash = '#/tenant/shown-1'")
    playwright.expect(page.get_by_role("heading", name="Tenant shown-1")).to_be_visible()
    playwright.expect(page.get_by_role("region", name="History")).to_contain_text(EVIL)
    assert page.title() == "flatshare" and page.locator("main img").count() == 0
    # And what came to be markup all the same could do nothing.
    refused = page.evaluate(
        """async () => {
            const seen = new Promise((resolve) => document.addEventListener('securitypolicyviolation', (event) => resolve(event.violatedDirective)));
            document.querySelector('main').insertAdjacentHTML('beforeend', "<img src=x onerror=document.title='acted'>");
            return await seen;
        }"""
    )
    assert refused.startswith(("img-src", "script-src")) and page.title() == "flatshare"
    assert all(
        "400" in one or "Content Security Policy" in one or "violates" in one or "401" in one for one in said
    ), said
    said.clear()


def test_the_files_are_for_everybody_and_what_they_ask_for_is_not(filled: Platform) -> None:
    for path in ("/admin/ui", "/admin/ui/app.js", "/admin/ui/style.css"):
        reply = httpx.get(f"{filled.url}{path}")
        assert reply.status_code == 200
        assert "default-src 'none'" in reply.headers["content-security-policy"]
    for path in ("/admin/history", "/admin/replicas", "/admin/ui/../replicas"):
        assert httpx.get(f"{filled.url}{path}").status_code == 401
