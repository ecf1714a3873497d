"""The web page's files: what is served, with which headers, and that nothing else is."""

import hashlib
import re

import httpx
import pytest
from fastapi import FastAPI

from serve_app.config import ServiceConfig
from serve_app.routes import build_http_app
from serve_app.static_files import CONTENT_TYPES, FOLDER
from tests.unit.test_auth import Behind, key, plain_app

NAMES = sorted(path.name for path in FOLDER.iterdir())
SOURCES = [name for name in NAMES if name.endswith((".html", ".js", ".css"))]


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def location(name: str) -> str:
    return "/" if name == "index.html" else f"/playground/{name}"


async def test_every_file_is_served_as_what_it_is_and_nothing_may_come_from_elsewhere():
    async with client(plain_app((key(),))) as page:
        for name in NAMES:
            found = await page.get(location(name))
            assert found.status_code == 200 and found.content == (FOLDER / name).read_bytes()
            assert found.headers["content-type"] == CONTENT_TYPES["." + name.rpartition(".")[2]]
            assert found.headers["x-content-type-options"] == "nosniff"
            assert found.headers["referrer-policy"] == "no-referrer"
            assert found.headers["cache-control"] == "no-cache"
            policy = dict(part.split(" ", 1) for part in found.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["trusted-types"] == "'none'" and policy["require-trusted-types-for"] == "'script'"
            assert "unsafe" not in str(policy) and "http" not in str(policy)


async def test_a_browser_that_has_a_file_does_not_get_it_again():
    async with client(plain_app(())) as page:
        first = await page.get("/playground/main.js")
        for known in (first.headers["etag"], f'"x", W/{first.headers["etag"]}', "*"):
            again = await page.get("/playground/main.js", headers={"If-None-Match": known})
            assert again.status_code == 304 and again.content == b""
            assert again.headers["etag"] == first.headers["etag"]
        assert (await page.get("/playground/main.js", headers={"If-None-Match": '"x"'})).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/../config.py",
        "/playground/%2e%2e/config.py",
        "/playground/..%2fconfig.py",
        "/playground//main.js",
        "/playground/main.js/",
        "/playground/MAIN.JS",
        "/playground/main.js%00",
        "/index.html",
    ],
)
async def test_only_these_files_can_be_asked_for(path: str):
    async with client(plain_app(())) as page:
        assert (await page.get(path)).status_code == 404
    async with client(plain_app((key(),))) as page:
        assert (await page.get(path)).status_code == 401


async def test_one_key_of_the_configuration_turns_it_off():
    for keys, status in (((), 404), ((key(),), 401)):
        async with client(build_http_app(Behind(ServiceConfig(api_keys=keys, playground=False)))) as page:
            for name in NAMES:
                assert (await page.get(location(name))).status_code == status


async def test_the_status_needs_a_key():
    async with client(plain_app((key(),))) as page:
        assert (await page.get("/status")).status_code == 401
        assert (await page.get("/status", headers={"X-Api-Key": "alices-key"})).status_code == 200


def test_nothing_becomes_markup_or_code_and_the_key_goes_nowhere_else():
    """What the policy would refuse at run time should not be there in the first place."""
    for name in SOURCES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|style=|<style"
        assert not re.search(forbidden, text), name
        if name.endswith(".html"):
            assert not re.search(r"\son\w+=|<script(?![^>]*\ssrc=)|(?:src|href)=\"(?:https?:)?//", text)
        if name != "api.js":
            assert "fetch(" not in text and "sessionStorage" not in text and "XMLHttpRequest" not in text
        assert "localStorage" not in text or name in ("theme.js", "main.js")


def test_the_font_is_the_vendored_one():
    """Source Sans 3, Latin, variable weight; from the npm package @fontsource-variable/source-sans-3 5.3.0."""
    digests = {
        name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in NAMES if name.endswith(".woff2")
    }
    assert digests == {
        "source-sans-3.woff2": "7a19a7027e125257d310c6dbd78ae3a30b5ea1e3794d60b12bb28227a003bfda",
        "source-sans-3-italic.woff2": "9a15dafc2c2b2414aaa9d6c30830d9aab4361329d8495b1574633603b994b411",
    }
    assert "SIL Open Font License" in (FOLDER / "source-sans-3-license.txt").read_text()
