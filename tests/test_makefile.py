"""make refuses what it does not know, before it does anything, and hands on what it is given word for word."""

import os
import shlex
import subprocess

import pytest
from conftest import ROOT

from csm_nb.ablate import __main__ as ablate
from csm_nb.runs.__main__ import parse_arguments
from csm_nb.serve import __main__ as serve


def make(*words, **variables):
    """Return (exit status, output) of make in the checkout: what it would do, nothing is run."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(["make", "-n", "-o", ".venv/.csm-nb-setup", *words], cwd=ROOT, env=environment | variables,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    return result.returncode, result.stdout


def read_command(output, module):
    """Return the arguments that the shell would hand to a module of csm_nb."""
    return shlex.split(output.replace("\\\n", " ").split(f"-m csm_nb.{module}")[1])


@pytest.mark.parametrize(("words", "message"), [
    (["run", "LANG=da"], "make run takes no LANG; did you mean LANGS? It takes AUDIO CORPUS FORCE JOBS LANGS PROFILE SET STAGES"),
    (["run", "LANGUAGE=da"], "LANGUAGE; did you mean LANGS?"),
    (["run", "STAGE=00_mimi_sanity"], "STAGE; did you mean STAGES?"),
    (["run", "PROFIL=test"], "PROFIL; did you mean PROFILE?"),
    (["run", "langs=da"], "langs; did you mean LANGS?"),
    (["run", "COPRUS=a"], "COPRUS; did you mean CORPUS?"),
    (["LANG=da"], "LANG; did you mean LANGS?"),
    (["lab", "CORPUS=a"], "make lab takes no CORPUS"),
    (["serve", "PORTS=1"], "PORTS; did you mean PORT?"),
    (["test", "XYZ=1"], "make test takes no XYZ. It takes nothing"),
    (["setup", "EXTRA=gpu"], "EXTRA; did you mean EXTRAS?"),
])  # fmt: skip
def test_a_variable_that_a_target_does_not_take_is_refused_with_the_nearest(words, message):
    code, output = make(*words)
    assert code == 2 and message in output and "csm_nb" not in output


def test_the_environment_s_variables_do_not_matter():
    code, output = make("run", LANG="da_DK.UTF-8", LANGUAGE="da", LANGS="de", STAGE="x", FORCE="1", SET="seed=1")
    options = parse_arguments(read_command(output, "runs"))
    assert code == 0 and (options.langs, options.profile, options.set, options.force) == (["no", "sv", "da"], "mini", {}, False)


def test_values_reach_the_runner_word_for_word():
    given = """codebooks=[1, 8] compare=["no", "da"] corpus_licence="it's free; `no` cost" """
    code, output = make("run", f"SET={given}", "AUDIO=a b/m.jsonl", "LANGS=da no", "FORCE=1", "JOBS=1", "PYTHON=python3")
    assert code == 0
    options = parse_arguments(read_command(output, "runs"))
    assert options.set == {"codebooks": [1, 8], "compare": ["no", "da"], "corpus_licence": "it's free; `no` cost",
                           "audio": "a b/m.jsonl"}
    assert options.langs == ["da", "no"] and options.force and options.jobs == 1


def test_seeds_reach_the_ablation():
    code, output = make("ablate", "SEEDS=0 1 2", "LANGS=no", "SET=sentences=8")
    options = ablate.parse_arguments(read_command(output, "ablate"))
    assert code == 0 and (options.langs, options.seeds, options.set) == (["no"], [0, 1, 2], {"sentences": 8})


def test_where_to_listen_reaches_the_server_and_is_this_machine_alone_by_default():
    code, output = make("serve", "PORT=8080", "ADAPTERS=my adapters", HOST="0.0.0.0", PORT="1")
    options = serve.parse_arguments(read_command(output, "serve"))
    assert code == 0 and (options.host, options.port, options.adapters) == ("127.0.0.1", 8080, "my adapters")


@pytest.mark.parametrize("words", [["help"], ["run", "ablate", "LANGS=da"], ["test"], ["clean"], ["clean-data", "ALL=1"],
                                   ["lab", "LAB=--no-browser", "LANGS=da", "PROFILE=test"]])
def test_what_targets_take_is_taken(words):
    assert make(*words)[0] == 0


def test_jupyter_is_allowed_to_run_as_root_only_where_it_does(tmp_path):
    assert "--allow-root" in make("lab")[1] if os.getuid() == 0 else "--allow-root" not in make("lab")[1]
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    assert "--allow-root" not in make("lab", PATH=f"{tmp_path}:{os.environ['PATH']}")[1]
