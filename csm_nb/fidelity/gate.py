"""Whether a training may start: what 00_mimi_sanity said of the codec that it uses."""

import os

from csm_nb.codec.mimi import fingerprint_codec, load_codec
from csm_nb.paths import STAGES, resolve_path, show_path
from csm_nb.provenance import read_json
from csm_nb.recipe import ParameterError


def check_verdict(run, ignore_verdict: bool) -> str:
    """Return in words what 00_mimi_sanity said of this run's codec for its language, for a training stage to print.

    Complete runs under `runs_dir` count whose codec has the weights of the one in `base_model` (fingerprint_codec, so that
    kyutai/mimi stands for the one inside sesame/csm-1b) and with all its codebooks: the newest on recordings, else the
    newest on synthetic speech, which is said and forbids nothing: synthetic speech has no stød of a person's. Raises
    ParameterError on "stop" on recordings, unless `ignore_verdict` is set: what the codec loses, no training brings back.
    """
    base = run.params["base_model"]
    codec = load_codec(base)
    used = {"codec": fingerprint_codec(codec), "codebooks": codec.config.num_quantizers}
    place = resolve_path(run.params["runs_dir"])
    done = sorted(place.glob(f"{run.language}/{STAGES[0]}/*/done.json"), key=os.path.getmtime, reverse=True)
    runs = [(path.parent, read_json(path.with_name("run.json"))["params"], read_json(path)["verdict"]) for path in done
            if used.items() <= read_json(path.with_name("metrics.json")).items()]
    if not runs:
        others = f"; {len(done)} runs of it are of other codecs or fewer codebooks" if done else ""
        return (f"no verdict on the codec in {base}: {STAGES[0]} was not run for {run.language} with it at "
                f"{used['codebooks']} codebooks{others}")
    folder, params, verdict = max(runs, key=lambda found: bool(found[1].get("audio")))  # of equals the first, the newest
    heard = f"recordings ({params['audio']})" if params.get("audio") else "synthetic speech, no recordings"
    said = f"{STAGES[0]} says {verdict} of the codec {params.get('codec_model')}, on {heard} ({show_path(folder)})"
    if verdict != "stop":
        return said
    if not params.get("audio"):
        return f"{said}; the training goes on, since recordings may fare otherwise: run {STAGES[0]} on some (AUDIO=...)"
    if not ignore_verdict:
        raise ParameterError(f"{said}: what the codec loses, no training brings back. Look at its report; to train all the "
                             "same, set ignore_verdict=true (make run SET='ignore_verdict=true')")
    return f"{said}; ignore_verdict is set, so the training goes on with a codec that fails its check"
