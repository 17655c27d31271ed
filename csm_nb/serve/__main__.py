"""The server: `make serve`, or `python -m csm_nb.serve --profile mini --port 8000`."""

import argparse
import ipaddress
import os
import sys

from csm_nb.recipe import ParameterError
from csm_nb.runs import params

KEY = "CSM_NB_API_KEY"


def parse_arguments(arguments=None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m csm_nb.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini", help="models: mini, csm-1b or a YAML file")
    parser.add_argument("--host", default="127.0.0.1", help=f"address to listen on; any but loopback wants {KEY} to be set")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--adapters", default="", help="the folder of lora_<language>; by default the profile's adapters_dir")
    parser.add_argument("--slots", type=int, default=8, help="utterances that are spoken side by side")
    parser.add_argument("--queue", type=int, default=32, help="requests that may wait; others are told to come back")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--log-texts", action="store_true", help="write what is asked for into the log")
    options = parser.parse_args(arguments)
    for name, least in (("port", 1), ("slots", 1), ("queue", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: at least {least}")
    if not is_loopback(options.host) and not os.environ.get(KEY):
        parser.error(f"--host {options.host} is open to others: set {KEY} to a secret that they have to know, or leave it at "
                     "127.0.0.1, which only this machine reaches")
    return options


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_models(profile: str) -> dict:
    """Return base_model, asr_model and adapters_dir of a profile. Raises ParameterError for one that there is not."""
    given, _ = params.load_params(params.find_params("no", profile))  # of every language the same
    return {key: given.get(key, params.read_cell("04_confusion")[key].default)
            for key in ("base_model", "asr_model", "adapters_dir")}


def main(arguments=None) -> int:
    """Serve until told to end; return 2 for what can not be served."""
    options = parse_arguments(arguments)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        print(f"error: {error.name} is missing, which the server is made with: make setup EXTRAS=serve", file=sys.stderr)
        return 2
    from csm_nb.csm.load import load_base
    from csm_nb.csm.weights import list_weights
    from csm_nb.hub import fetch_model
    from csm_nb.serve.app import create_app
    from csm_nb.serve.engine import Engine
    from csm_nb.serve.voices import read_base_licence

    try:
        models = find_models(options.profile)
        if not list_weights(fetch_model(models["base_model"], "base_model")):
            raise ValueError(f"{models['base_model']} holds no *.safetensors, and other kinds of weights are not served")
        model, processor = load_base(models["base_model"], options.device)
    except (ParameterError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = options.adapters or models["adapters_dir"]
    engine = Engine(model, processor, folder, options.slots, options.queue, read_base_licence(models["base_model"]))
    app = create_app(engine, models["base_model"], options.profile, os.environ.get(KEY, ""), models["asr_model"],
                     options.log_texts)
    allow_many_connections()
    for name, reason in engine.shelf.faults.items():
        print(f"{name} is not served: {reason}")
    print(f"{models['base_model']} reads {', '.join(engine.shelf.readers)}; adapters are looked for in {folder}\n"
          f"open http://{options.host}:{options.port}/ (all routes: /docs)", flush=True)
    uvicorn.run(app, host=options.host, port=options.port, log_level="info" if options.log_texts else "warning",
                timeout_graceful_shutdown=5, timeout_keep_alive=30, backlog=4096)
    return 0


def allow_many_connections() -> None:
    """Let this process have as many open connections as it may: the usual 1,024 are used up by a burst."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())
