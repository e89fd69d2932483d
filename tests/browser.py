"""A page in Debian's chromium, without a screen."""

import shutil
from contextlib import contextmanager

SIZES = {"desktop": dict(width=1280, height=900), "phone": dict(width=390, height=844)}


@contextmanager
def browser():
    """A playwright Browser. Its contexts hold pages: browser.new_context(viewport=SIZES["phone"]).new_page()."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium as root, which tests in a container are, wants no sandbox; and /dev/shm may be small there.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        try:
            yield chromium
        finally:
            chromium.close()
