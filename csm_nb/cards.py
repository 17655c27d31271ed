"""The card of a trained model: what it is, and an example that speaks with it, run as it stands."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from csm_nb import paths
from csm_nb.hub import find_model, is_hub_id
from csm_nb.languages import LANGUAGES
from csm_nb.paths import resolve_path, show_path
from csm_nb.provenance import describe_commit

# Ids of the hub that a corpus' licence may have; it has no other place for one than "other" and a name
LICENCES = r"cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.[05]|apache-2\.0|mit|odc-by|odbl|pddl|[al]?gpl-[23]\.[01]|unknown|other"
LONGEST = 20  # s; what the example may take, far above its one sentence


def write_card(folder, place, table: dict, base_id: str, adapter: bool, voice: str, tables: tuple[str, str],
               tag: str = "") -> None:
    """Write `folder`/README.md of the adapter or model that will lie in `place`, and whose figures are `table`.

    `voice` is the speaker of the example, `tag` what stands before its text (csm.tags); the text is a probe of the language
    that `table` says it reads, or is of.
    `tables` are the codebook table to tie in the base after loading, and the one to tie it to.
    """
    place, commit = Path(place), describe_commit(paths.ROOT)
    table = table | {"csm-nb commit": f"{commit['commit'] or 'unknown'}{' and uncommitted changes' if commit['dirty'] else ''}"}
    rows = "\n".join(f"| {key} | {_shorten(value, 2) if _is_path(value) else value} |" for key, value in table.items())
    language = table.get("reads", table.get("language"))
    text = LANGUAGES[language if language in LANGUAGES else "en"].probes[0]
    trained = _find("ADAPTER" if adapter else "MODEL", place)
    start, adapter_on_it = (_find("BASE", base_id or "unknown"), trained) if adapter else (trained, "")
    here = "" if "root / " in trained else f" It looks for `{_shorten(place)}` in the folder that it is run in."
    example = write_example(start, adapter_on_it, text, voice, tables, tag)
    save_card(folder, f"""# {place.name}

| what | value |
| --- | --- |
{rows}

The example speaks a sentence into `speech.wav`, with transformers{", peft" if adapter else ""} and soundfile. Run it as it
stands: in the folder of csm-nb, or anywhere with the Python that csm-nb is installed for. Where a folder was moved, name it:
`{"BASE=... ADAPTER=..." if adapter else "MODEL=..."} python example.py`.{here}

On loading, transformers reports `{tables[0]}` as MISSING. Nothing is: the checkpoint holds one of
two equal codebook tables, and transformers 5.17 fills the other with random numbers. The line after it makes them one again.

```python
{example}
```
""", library_name="peft" if adapter else "transformers", language=language if language in LANGUAGES else None,
        **name_licence(table.get("licence", "")), base_model=base_id if is_hub_id(base_id) else None,
        pipeline_tag="text-to-speech", tags=["csm", "lora"] if adapter else ["csm"])


def read_table(folder) -> dict[str, str]:
    """Return the table of the card in `folder`, {what: value}; {} where there is none."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return dict(re.findall(r"^\| (?!what \||---)([^|]+) \| (.*) \|$", text, re.MULTILINE))


def save_card(folder, text: str, **header) -> Path:
    """Write `folder`/README.md of `text` below a header of huggingface_hub.ModelCardData's fields; return its path."""
    path = Path(folder) / "README.md"
    ModelCard(f"---\n{ModelCardData(**header).to_yaml()}\n---\n{text}").save(path)
    return path


def name_licence(said: str) -> dict[str, str]:
    """Return a card's fields `license`, and `license_name` for one that the hub has no id for; "unknown" where none is said.

    `said` is what a corpus calls it: "of the data: CC BY 4.0" is cc-by-4.0 on the hub.
    """
    said = said.removeprefix("of the data: ").strip()
    if said in ("", "not stated", "synthetic speech"):
        return {"license": "unknown"}
    name = re.sub(r"[^\w.]+|_", "-", said.lower()).strip("-")
    name = {"cc0": "cc0-1.0"}.get(name, name)
    return {"license": name} if re.fullmatch(LICENCES, name) else {"license": "other", "license_name": name}


def write_example(base: str, adapter: str, text: str, voice: str, tables: tuple[str, str], tag: str = "") -> str:
    """Return Python that loads `base`, puts `adapter` on it (if any) and speaks; both are Python expressions for a folder."""
    name = "base" if adapter else "folder"
    load, peft, attach = f"{name} = {base}", "", ""
    if adapter:
        load += f"\nadapter = {adapter}"
        peft, attach = "from peft import PeftModel\n", "\nmodel = PeftModel.from_pretrained(model, adapter)"
    missing, kept = (f"model.{table}" for table in tables)
    return f"""import os
from pathlib import Path

import soundfile
{peft}from transformers import AutoProcessor, CsmForConditionalGeneration

try:
    from csm_nb.paths import ROOT as root  # the folder of csm-nb
except (ImportError, FileNotFoundError):  # not installed, or run outside of its folder
    root = Path()
{load}
model = CsmForConditionalGeneration.from_pretrained({name}, dtype="float32")
{missing} = \\
    {kept}{attach}
processor = AutoProcessor.from_pretrained({name})
text = {text!r}
inputs = processor(f"<|begin_of_text|>[{voice}]{tag}{{text}}<|end_of_text|>", return_tensors="pt")
codec = model.codec_model.config
longest = int({LONGEST} * codec.frame_rate)  # frames of {LONGEST} s; it ends by itself before
audio = model.generate(**inputs, output_audio=True, max_new_tokens=longest)
soundfile.write("speech.wav", audio[0].squeeze().numpy(), codec.sampling_rate)
print("speech.wav:", text)"""


def _find(variable, place):
    """Return code for a folder: below csm-nb's, or as it stands (a hub id, one where it runs); the variable overrules."""
    place = find_model(place) or place  # of a hub id there may be a copy
    inside = not Path(show_path(place)).is_absolute() and resolve_path(place).parent.is_dir()
    return f'os.environ.get("{variable}", {"root / " if inside else ""}"{_shorten(place)}")'


def _is_path(value):
    return isinstance(value, Path) or isinstance(value, str) and value.startswith("/")


def _shorten(place, parts=1):
    """Return a folder relative to the project's root, of others the end only: no card tells where its maker keeps things."""
    shown = Path(show_path(place))
    return "/".join(shown.parts[-parts:]) if shown.is_absolute() else str(shown)
