"""Drives the host's frontend in Chromium like a person who opens a template and presses Run."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostserver import HostServer

# Settings that say "first-run dialogs were dismissed"; the frontend stores these on the server.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Locale": "en",
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
}
RENDERERS = {"classic": False, "nodes2": True}

# Chromium as root, without a GPU, and without its own calls to hosts that a closed network refuses.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

# What the frontend writes to the console by itself, on an empty host with no pack of ours.
HOST_NOISE = (
    "user.css",
    "userdata",
    "comfy.templates.json",
    "comfyapp graph accessed before initialization",
    "legacy queue/history menu",
    "open_maskeditor is deprecated",
    "content security policy",
    "api.comfy.org",
)

# Collects the pictures and the end of what runs.
LISTEN = """() => {
    app.api.addEventListener('executed', event => {
        // What is inside a subgraph, such as 5:102, has no node in the page.
        const id = event.detail.display_node
        if (event.detail.output?.images && !id.includes(':')) loomPictures.push(id)
    })
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(end, event => { loomEnd = [end, event.detail.exception_message ?? ''] })
}"""

# The page is drawn without a GPU, by default sixty times per second, on the machine that also runs the templates.
FEW_FRAMES = """
window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 250)
window.cancelAnimationFrame = clearTimeout
document.addEventListener('DOMContentLoaded', () => {
    const style = document.createElement('style')
    style.textContent = '* { animation: none !important; transition: none !important }'
    document.head.append(style)
})
"""

POLLING = 50
"""Milliseconds between two looks at what is waited for; a frame is longer."""

SET_WIDGETS = """values => {
    for (const node of app.graph.nodes)
        for (const part of [node, ...(node.subgraph?.nodes ?? [])])
            for (const [name, value] of Object.entries(values[part.type] ?? {}))
                // A subgraph shows some widgets of the nodes in it, and its values count.
                for (const holder of new Set([part, node])) {
                    const widget = holder.widgets?.find(widget => widget.name === name)
                    if (widget) widget.value = value
                }
}"""

INFORMATION = "UNet evaluations:"
"""Part of a text on a node that is good to know, and no advice."""

OVERLAPS = """() => {
    const scale = app.canvas.ds.scale
    const boxes = app.graph.nodes.map(node => {
        // Nodes 2.0 makes its own boxes, of the size that their content needs.
        const shown = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
        if (shown) return [node.title, shown.left / scale, shown.top / scale, shown.right / scale, shown.bottom / scale]
        const [x, y, width, height] = node.boundingRect
        return [node.title, x, y, x + width, y + height]
    })
    return boxes.flatMap((a, i) => boxes.slice(i + 1)
        .filter(b => Math.min(a[3], b[3]) - Math.max(a[1], b[1]) > 4 && Math.min(a[4], b[4]) - Math.max(a[2], b[2]) > 4)
        .map(b => `overlap: ${a[0]}, ${b[0]}`))
}"""

TROUBLE = "[data-testid=error-overlay], [data-testid^=error-group-], [data-testid=missing-node-card]"


def chromium() -> str | None:
    """The path of a Chromium that can be driven, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@contextmanager
def open_browser(folder: Path) -> Iterator:
    """A browser with a profile of its own below `folder`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder),
            executable_path=chromium(),
            headless=True,
            args=list(FLAGS),
            viewport={"width": 960, "height": 600},
        )
        try:
            yield context
        finally:
            context.close()


@dataclass
class Visit:
    """What was seen while a template was opened and run."""

    problems: list[str] = field(default_factory=list)
    api: dict = field(default_factory=dict)
    ran: dict = field(default_factory=dict)
    pictures: int = 0


class Frontend:
    """The frontend in a page, in which templates are opened one after the other.

    Args:
        renderer: a key of RENDERERS.
    """

    def __init__(self, browser, server: HostServer, renderer: str):
        for name, value in {**SETTINGS, "Comfy.VueNodes.Enabled": RENDERERS[renderer]}.items():
            server.request(f"/settings/{name}", json.dumps(value).encode())
        self.page = browser.new_page()
        self._heard: list[str] = []
        self._refused: list[tuple[int, str]] = []
        self._open, self._last = 0, time.monotonic()
        self._watch()
        self.page.add_init_script(FEW_FRAMES)
        self.page.goto(server.url)
        self.page.wait_for_function(
            "window.app?.vueAppReady && window.app.isGraphReady", timeout=60000, polling=POLLING
        )
        self.page.evaluate(LISTEN)

    def __enter__(self) -> "Frontend":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def _watch(self) -> None:
        """Notes exceptions, console errors and failed requests."""

        def console(message) -> None:
            text = f"{message.text} {message.location.get('url', '')}"
            if message.type == "error" and not any(noise in text.lower() for noise in HOST_NOISE):
                self._heard.append(f"console: {text.strip()}")

        def response(answer) -> None:
            if answer.status >= 400:
                self._refused.append((answer.status, answer.url))

        def request(_) -> None:
            self._open += 1
            self._last = time.monotonic()

        def answered(_) -> None:
            self._open -= 1
            self._last = time.monotonic()

        self.page.on("request", request)
        self.page.on("requestfinished", answered)
        self.page.on("requestfailed", answered)
        self.page.on("pageerror", lambda error: self._heard.append(f"exception: {error}"))
        self.page.on("console", console)
        self.page.on("response", response)

    def _settle(self) -> None:
        """Waits until the frontend has asked for nothing for half a second, at most three times as long: after loading
        it looks for missing models and media."""
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline and (self._open > 0 or time.monotonic() - self._last < 0.5):
            self.page.wait_for_timeout(50)

    def visit(self, pack: str, template: str, widgets: dict | None = None, run: bool = True) -> Visit:
        """Opens a template of a pack by its card and, if `run`, presses Run and waits for the pictures; collects all
        problems since the last visit. Failed requests count for files of the pack.

        `widgets` are values by widget name, by node type, set before the run.
        """
        visit = Visit()
        open_template(self.page, pack, template, visit.problems)
        self._settle()
        # A page that was just opened may still show what the graph before this one lacked.
        deadline = time.monotonic() + 2.0
        while (trouble := seen_trouble(self.page)) and time.monotonic() < deadline:
            self.page.wait_for_timeout(250)
        visit.problems += trouble
        visit.api = self.page.evaluate("app.graphToPrompt().then(result => result.output)")
        if run:
            self.page.evaluate(SET_WIDGETS, widgets or {})
            visit.ran = self.page.evaluate("app.graphToPrompt().then(result => result.output)")
            visit.pictures = press_run(self.page, visit.problems)
        visit.problems += self.page.evaluate(OVERLAPS)
        visit.problems += self._heard
        visit.problems += [f"HTTP {status}: {url}" for status, url in self._refused if f"/{pack}/" in url]
        self._heard.clear()
        self._refused.clear()
        return visit


def open_template(page, pack: str, template: str, problems: list[str]) -> None:
    """Chooses a template's card in the Templates dialog and waits until its graph is loaded."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_test_id("template-workflows-content").wait_for()
    # Listed by the pack's directory, or by the title its locale file gives it.
    page.get_by_role("button", name=re.compile(f"^{re.escape(pack)}$", re.IGNORECASE)).click()
    # Cards and their pictures are loaded when they are scrolled to.
    picture = page.wait_for_function(
        """name => {
            const cards = [...document.querySelectorAll('[data-testid^="template-workflow-"]')]
            const card = cards.find(one => one.dataset.testid === `template-workflow-${name}`)
            ;(card ?? cards.at(-1))?.scrollIntoView()
            const picture = card?.querySelector('img')
            return picture?.naturalWidth > 0 && picture.src
        }""",
        arg=template,
        polling=POLLING,
    ).json_value()
    if "default-template" in picture:
        problems.append(f"the card of {template} shows a placeholder: its .jpg is missing")
    page.get_by_test_id(f"template-workflow-{template}").click()
    page.wait_for_function(
        "path => app.extensionManager.workflow.activeWorkflow?.path === path",
        arg=f"workflows/{template}.json",
        polling=POLLING,
    )
    # Pictures appear on nodes that are drawn, and only those in view are.
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")


def seen_trouble(page) -> list[str]:
    """Error overlays, error groups, nodes marked red, and nodes that show advice."""
    shown = [f"shown: {text}" for text in page.locator(TROUBLE).all_inner_texts()]
    red = page.evaluate("app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")
    advised = page.evaluate(
        """app.graph.nodes.flatMap(node => (node.widgets ?? [])
            .filter(widget => widget.name === '$$node-text-preview')
            .map(widget => `${node.type}: ${widget.value}`))"""
    )
    advised = [f"advised: {text}" for text in advised if INFORMATION not in text]
    return shown + [f"marked red: {kind}" for kind in red] + advised


def press_run(page, problems: list[str]) -> int:
    """Presses Run and waits for the end, until every picture is on its node; returns how many nodes show one."""
    page.evaluate("() => { window.loomEnd = null; window.loomPictures = [] }")
    page.get_by_test_id("queue-button").click()
    page.wait_for_function(
        "window.loomEnd || document.querySelector('[data-testid=error-overlay]')", timeout=300000, polling=POLLING
    )
    end = page.evaluate("loomEnd")
    if not end or end[0] != "execution_success":
        problems.append(f"did not run: {end}")
        problems += seen_trouble(page)
        return 0
    # The classic renderer keeps pictures on the node; Nodes 2.0 has several of one node only in the page.
    page.wait_for_function(
        """() => loomPictures.every(id => {
            const shown = document.querySelector(`[data-node-id="${id}"] img`)
            return (app.graph.getNodeById(id)?.imgs?.[0] ?? shown)?.naturalWidth > 0
        })""",
        timeout=30000,
        polling=POLLING,
    )
    problems += seen_trouble(page)
    return page.evaluate("loomPictures.length")
