"""What a result came from: hashes of files, recordings and code; the commit, versions and machine; the JSON records."""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
import weakref
from pathlib import Path

from csm_nb import paths
from csm_nb.clean import EncodingError, find_file, read_lines
from csm_nb.processes import count_cores

PACKAGES = ("torch", "torchaudio", "transformers", "peft", "datasets", "moshi", "numpy", "papermill", "csm-nb")
SETTLED = 2.0  # s; a file that was written to this long ago can not be written to again without a later time of change


def hash_value(value) -> str:
    """Return 12 hex digits of the SHA-256 of a JSON value; the order of a dict's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def hash_file(path: Path, digits: int = 12) -> str:
    """Return the first `digits` hex digits of the SHA-256 of a file's bytes.

    A file whose size and times did not change is read once per process.
    """
    return _hash_content(path, *_read_times(path))[:digits]


def _read_times(path):
    """Return a file's size and times: its time of change is set by hand at will, that of its inode is not."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.cache
def _hash_content(path, *times):
    return _hash_bytes(path)


def _hash_bytes(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> str:
    """Return a hash of a model's or adapter's folder, by the names and contents of its files.

    Its card (any .md) and hidden files do not count.
    """
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".md"]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return hash_value([(p.relative_to(folder).as_posix(), hash_file(p)) for p in files])


def hash_recordings(path: Path) -> str:
    """Return a hash of a folder of audio (names and bytes) or of a manifest (its bytes, and those of its clips).

    So a file whose bytes were changed counts, even if it kept its name and size (hash_files). The recordings that a Kaldi
    folder's wav.scp names count wherever they lie.
    """
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
        if "wav.scp" in files:
            named = [line.split(maxsplit=1)[-1].strip() for line, _ in read_lines(path / "wav.scp") if line.strip()]
            files |= {f"wav.scp {number}": find_file(path / name) for number, name in enumerate(named)}
        return hash_value(list(zip(files, hash_files(files.values()), strict=True)))
    clips = []
    try:
        lines = [line for line, _ in read_lines(path)]
    except EncodingError:  # manifest.read_manifest says so
        lines = []
    for line in lines:
        try:
            clips.append(find_file(path.parent / json.loads(line)["audio_path"]))
        except (ValueError, LookupError, TypeError, OSError):  # a bad line: corpora sets it aside and says so
            clips.append(None)
    return hash_value([hash_file(path), hash_files(clips)])


def hash_files(files) -> list[str | None]:
    """Return a hash of each file's bytes; None for one that is not there or can not be read.

    A hash has 24 hex digits, as clips are many. Where the reading takes over a second, the hashes are kept in
    data/hashes.json, with size and times of each file, and a file is read again when those change. The hash of a run and
    the tokens of its corpus ask for the same clips.
    """
    memory, began, hashes, new = paths.ROOT / "data" / "hashes.json", time.time(), [], False
    try:
        known = read_json(memory)
    except ValueError:  # half a file: it is only a memory
        known = {}
    for file in files:
        try:
            times = _read_times(file)
            mark, kept = "{} {} {} ".format(*times), str(known.get(str(file), ""))
            if not kept.startswith(mark):
                kept = mark + _hash_bytes(file)[:24]
                if began - times[1] / 1e9 > SETTLED:
                    known[str(file)], new = kept, True
            hashes.append(kept[len(mark):])
        except (OSError, TypeError):  # not there, or None
            hashes.append(None)
    if new and time.time() - began > 1:
        with contextlib.suppress(OSError), replace_file(memory) as part:  # a project that can not be written to reads them again
            memory.parent.mkdir(exist_ok=True)
            part.write_text(json.dumps(known), encoding="utf-8")
    return hashes


_TENSORS = {}  # {id: (tensor, its state, hash)} of those that were hashed and are still there


def hash_tensors(tensors: dict) -> str:
    """Return 16 hex digits of the names, types, shapes and bytes of {name: tensor}, as they are in memory.

    A parameter or buffer is read again only when it was written to, by an optimizer's step, copy_ or another type: CSM-1B
    takes 2 s the first time. What is written past autograd, to `tensor.data` in place, is not seen.
    """
    parts = [(name, str(value.dtype), list(value.shape), _hash_tensor(value)) for name, value in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _hash_tensor(value):
    import torch

    state = None if value.is_inference() else (value._version, value.data_ptr(), value.dtype)
    held, known, digest = _TENSORS.get(id(value), (lambda: None, None, ""))
    if state is None or held() is not value or known != state:
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(content).hexdigest()
        place = id(value)
        _TENSORS[place] = weakref.ref(value, lambda _: _TENSORS.pop(place, None)), state, digest
    return digest


def hash_code(source: str, package: Path, given=(), unasked=()) -> str:
    """Return a hash of `source`, of the modules of `package` that it imports, transitively, and of their rooms' data files.

    Docstrings, comments and layout do not count, nor do the `%` and `!` lines of a notebook. `given` names rooms and modules
    that are not followed, as what they make is hashed by its content elsewhere. `unasked` names data files by their stem
    that do not count, such as the sentences of languages that are not asked for. Raises SyntaxError for a source that does
    not parse.
    """
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    trees = {"": ast.parse("\n".join(lines))}
    waiting = [""]
    while waiting:
        place = waiting.pop()
        for name in _find_imports(trees[place], package, place) - trees.keys():
            if not _is_given(name.split("."), given):
                trees[name] = ast.parse(_find_module(package, name).read_text(encoding="utf-8"))
                waiting.append(name)
    rooms = {name.partition(".")[0] for name in trees}
    data = [p.relative_to(package) for p in sorted(package.rglob("*")) if p.is_file() and p.suffix not in (".py", ".pyc")]
    data = [p for p in data if len(p.parts) == 1 or p.parts[0] in rooms]
    data = [p for p in data if p.stem not in unasked and not _is_given(p.parts, given)]
    return hash_value([
        {name: ast.dump(_strip_docstrings(tree)) for name, tree in trees.items()},
        {p.as_posix(): hash_file(package / p) for p in data},
    ])  # fmt: skip


def _is_given(parts, given):
    return any(list(parts[: len(out.split("."))]) == out.split(".") for out in given)


def _strip_docstrings(tree):
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


def _find_module(package, name):
    """Return the file of a module ("judge.intervals") or of a room's own docstring ("judge"), None for any other name."""
    place = package.joinpath(*name.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def _find_imports(tree, package, place):
    """Return the dotted names of the modules below `package` that a module imports, and of their rooms."""
    found = set()
    here = [package.name, *place.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix(f"{package.name}.") for name in found if name.startswith(f"{package.name}.")}
    names |= {name.rpartition(".")[0] for name in names if "." in name}  # its room's __init__ runs first
    return {name for name in names if _find_module(package, name)}


def describe_commit(root: Path) -> dict:
    """Return {"commit", "dirty"} of a git checkout: the hash of HEAD, and whether files differ from it.

    Both are None where there is no git or no commit.
    """
    def ask(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on most."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_host() -> dict:
    """Return what a run's seconds depend on: {"system", "cpu", "cores", "gpu"}.

    `cores` is how many there are to use; `gpu` is None where there is none.
    """
    import torch

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.platform(), "cpu": model, "cores": count_cores(), "gpu": gpu}


def read_json(path: Path) -> dict:
    """Return the content of a JSON file, {} if there is no file. Raises ValueError for one that is not JSON."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextlib.contextmanager
def replace_file(path: Path):
    """Yield a path beside `path` to write to, which takes its place at the end.

    So a reader finds the old file or the new one, never a part. Where the writing fails, the old file stays as it was and
    the part is removed.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write JSON by replace_file: NumPy values as plain ones, paths as text, NaN and infinities as null."""
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replace_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _plain(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
