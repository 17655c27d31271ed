"""The server's page in a real browser: speak by the keyboard alone, hear it, take it along, read what was heard."""

import json
import urllib.request

import pytest
from serving import make_adapters, make_engine, served
from test_browser import BROWSER, BROWSERS, Tab, started, wait_for

pytestmark = pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(BROWSERS)} is installed")
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    own, engine = tmp_path_factory.mktemp("browser"), make_engine(make_adapters(tmp_path_factory.mktemp("adapters"), ("no",)))
    with served(engine) as address:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={own}",
                   "--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=800,900",
                   "--autoplay-policy=no-user-gesture-required", f"{address}/"]  # fmt: skip
        with started(command):
            door = wait_for(lambda: (own / "DevToolsActivePort").read_text().split())[0]
            tabs = wait_for(lambda: [tab for tab in json.load(urllib.request.urlopen(f"http://127.0.0.1:{door}/json"))
                                     if tab["type"] == "page"])  # fmt: skip
            tab = Tab(tabs[0]["webSocketDebuggerUrl"])
            wait_for(lambda: tab.ask("document.getElementById('language')?.options.length == 2"))
            yield tab


def press(tab, *keys):
    for key in keys:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], text=text)


def read(tab, name):
    return tab.ask(f"document.getElementById('{name}').textContent")


def test_by_the_keyboard_alone_a_text_is_spoken_in_another_language_and_can_be_taken_along(tab):
    tab.ask("document.getElementById('text').focus()")
    press(tab, "Tab", "ArrowDown")  # the language
    assert tab.ask("document.activeElement.value") == "no" and "lora_no" in read(tab, "whose")
    assert "anna" not in read(tab, "whose") and "CC0-1.0" in read(tab, "whose")
    press(tab, "Tab", "Tab", "Tab", " ", "Tab", "Enter")  # speaker, seed, "what a recogniser hears", Speak
    wait_for(lambda: read(tab, "heard").startswith("Heard: "))
    assert read(tab, "state").endswith("s of speech.")
    assert tab.ask("document.getElementById('download').download") == "speech-no-20-0.wav"
    tab.ask("""fetch(document.getElementById('download').href).then(answer => answer.arrayBuffer()).then(
        data => window.taken = [data.byteLength, ...new Uint8Array(data.slice(0, 8))])""")
    size, *head = wait_for(lambda: tab.ask("window.taken"))
    assert bytes(head[:4]) == b"RIFF" and int.from_bytes(bytes(head[4:]), "little") == size - 8


def test_what_goes_wrong_is_said_aloud(tab):
    tab.ask("document.getElementById('text').value = '?!'; document.getElementById('speak').click()")
    wait_for(lambda: "nothing to say" in read(tab, "state"))
    assert tab.ask("document.getElementById('state').getAttribute('aria-live')") == "polite"
    assert tab.ask("document.getElementById('speak').disabled") is False


def test_every_field_has_a_label_and_missing_languages_say_what_makes_them(tab):
    assert tab.ask("[...document.querySelectorAll('textarea, select, input')].every(one => one.labels.length == 1)")
    assert "make run LANGS=da" in read(tab, "missing")
