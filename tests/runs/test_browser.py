"""JupyterLab as make lab starts it, in a real browser: the page to begin with, a click, Run All, and the run has its page."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from test_run import put_cell, write_torch
from tornado.websocket import websocket_connect

from csm_nb.paths import STAGES
from csm_nb.processes import end_processes, identify_process

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SHOWN = "[...document.querySelectorAll('{}')].find(e => e.offsetParent && e.textContent.trim() == '{}')"


@contextlib.contextmanager
def started(command, **options):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options)
    try:
        yield process
    finally:
        end_processes([identify_process(process.pid)])
        process.wait()


def wait_for(ask, seconds=60):
    """Return what `ask` returns as soon as that is something."""
    end = time.time() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := ask():
                return found
        assert time.time() < end, f"{ask} found nothing in {seconds} s"
        time.sleep(0.3)


class Tab:
    """A tab of the browser, over the Chrome DevTools protocol."""

    def __init__(self, address):
        self.loop, self.count = asyncio.new_event_loop(), 0
        self.socket = self.loop.run_until_complete(self._connect(address))

    async def _connect(self, address):
        return await websocket_connect(address, max_message_size=2**28)

    def call(self, method, **params):
        async def ask():
            self.count += 1
            await self.socket.write_message(json.dumps({"id": self.count, "method": method, "params": params}))
            while (answer := json.loads(await self.socket.read_message())).get("id") != self.count:
                pass
            return answer["result"]

        return self.loop.run_until_complete(ask())

    def ask(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def click(self, element):
        """Click with the mouse into the middle of what a JavaScript expression finds, once it is there."""
        box = f"(e => {{ if (!e) return null; e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();" \
              f" return [b.x + b.width / 2, b.y + b.height / 2] }})({element})"  # fmt: skip
        wait_for(lambda: self.ask(box))
        time.sleep(0.5)  # it may still move
        x, y = self.ask(box)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@pytest.fixture
def lab(project, tmp_path_factory):
    """Yield a project and a browser's tab with JupyterLab in it, which has nothing of this user's own settings."""
    cell = (project / "notebooks" / "02_synthetic.ipynb").read_text()
    for stage in STAGES[3:]:
        (project / "notebooks" / f"{stage}.ipynb").write_text(cell.replace("02_synthetic", stage))
    put_cell(project, STAGES[0], 'print(f"results in {run.place}")')
    write_torch(project)
    own = tmp_path_factory.mktemp("home")
    environment = dict(os.environ) | {"PYTHONPATH": str(project), "HOME": str(own), "JUPYTER_CONFIG_DIR": str(own / "config")}
    environment |= {f"JUPYTERLAB_{name}_DIR": str(own / name) for name in ("WORKSPACES", "SETTINGS")}
    environment |= {"JUPYTER_CONFIG_PATH": str(project / "csm_nb" / "runs" / "templates" / "jupyter")}
    subprocess.run([sys.executable, "-m", "csm_nb.runs.lab", "--langs", "da", "sv"], cwd=project, env=environment, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.root_dir=.",
               "--IdentityProvider.token=", "--ServerApp.port_retries=0"]  # fmt: skip
    with started(command, cwd=project, env=environment):
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api"))
        address = f"http://127.0.0.1:{port}/lab/tree/runs/lab/mini/START.md"
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={own / 'browser'}",
                   "--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=1400,1000", address]  # fmt: skip
        with started(command):
            door = wait_for(lambda: (own / "browser" / "DevToolsActivePort").read_text().split())[0]
            tabs = wait_for(lambda: [tab for tab in json.load(urllib.request.urlopen(f"http://127.0.0.1:{door}/json"))
                                     if tab["type"] == "page"])  # fmt: skip
            yield project, Tab(tabs[0]["webSocketDebuggerUrl"])


@pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(BROWSERS)} is installed")
def test_from_the_start_page_a_click_and_run_all_lead_to_the_page_of_the_run(lab):
    project, tab = lab
    wait_for(lambda: tab.ask("!!document.querySelector('.jp-MarkdownViewer table')"))
    assert "Where to begin: Danish, Swedish" in tab.ask("document.querySelector('.jp-MarkdownViewer').textContent")
    tab.click(SHOWN.format(".jp-MarkdownViewer a", "open"))
    wait_for(lambda: tab.ask("!!document.querySelector('.jp-NotebookPanel .jp-CodeCell')"))
    wait_for(lambda: tab.ask("document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status == 'idle'"))
    tab.click(SHOWN.format(".lm-MenuBar-itemLabel", "Run"))
    tab.click(SHOWN.format(".lm-Menu-itemLabel", "Run All Cells"))
    page = wait_for(lambda: [*project.glob("runs/da/00_mimi_sanity/*/notebook.html")])[0]  # when Lab saves by itself
    assert "results in runs/da/00_mimi_sanity" in page.read_text()
    wait_for(lambda: f"{page.parent.name}/notebook.html" in (project / "runs" / "index.md").read_text())
    assert (project / "runs" / "index.html").is_file()
