"""Transformers behind a small OpenAI server, for the comparison of engines. It runs with vLLM's Python.

    python transformers_server.py MODEL_DIR --port 8001                 one request at a time: model.generate()
    python transformers_server.py MODEL_DIR --port 8001 --continuous    Transformers' own continuous batching

It serves /v1/completions only, streams every token as an event and knows `ignore_eos` and `stream_options`, which the
load generator sends and `transformers serve` 5.19 refuses. GET /metrics counts requests that run and that wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

Emit = Callable[[int | None], None]  # one token, or None at the end


@dataclass
class Job:
    """A request: its prompt, what it asks for, and the queue of its tokens (None at the end, or the error)."""

    prompt: list[int]
    tokens: int
    ignore_eos: bool
    answers: asyncio.Queue[int | Exception | None]
    left: bool = False


class Counts:
    """The requests that run and that wait."""

    def __init__(self) -> None:
        self.running = self.waiting = 0

    def text(self) -> str:
        return (
            f"transformers:num_requests_running {float(self.running)}\n"
            f"transformers:num_requests_waiting {float(self.waiting)}\n"
        )


class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
    """Gets the prompt first and then each token from generate()."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.prompt_is_next = emit, True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_is_next:
            self.emit(int(value.reshape(-1)[0]))
        self.prompt_is_next = False

    def end(self) -> None:
        return


class OneAtATime:
    """model.generate() under a lock."""

    def __init__(self, model: Any, counts: Counts) -> None:
        self.model, self.counts, self.lock = model, counts, asyncio.Lock()

    async def run(self, job: Job) -> None:
        self.counts.waiting += 1
        try:
            await self.lock.acquire()
        finally:
            self.counts.waiting -= 1
        self.counts.running += 1
        try:
            await asyncio.to_thread(self.generate, job, asyncio.get_running_loop())
            job.answers.put_nowait(None)
        except Exception as error:
            job.answers.put_nowait(error)
        finally:
            self.counts.running -= 1
            self.lock.release()

    def generate(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        inputs = torch.tensor([job.prompt], device=self.model.device)
        fewest = {"min_new_tokens": job.tokens} if job.ignore_eos else {}

        def emit(token: int | None) -> None:
            loop.call_soon_threadsafe(job.answers.put_nowait, token)

        with torch.inference_mode():
            self.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=job.tokens, do_sample=False,
                streamer=Streamer(emit), pad_token_id=0, stopping_criteria=[lambda *_, **__: job.left], **fewest,
            )  # fmt: skip


class Continuous:
    """Transformers' ContinuousBatchingManager."""

    def __init__(self, model: Any, counts: Counts, options: argparse.Namespace) -> None:
        config_class = transformers.generation.configuration_utils.ContinuousBatchingConfig
        sizes = {"num_blocks": options.num_blocks, "max_batch_tokens": options.max_batch_tokens}
        config = config_class(**{name: value for name, value in sizes.items() if value})
        model.generation_config.do_sample = False
        self.manager = model.init_continuous_batching(model.generation_config, config)
        self.counts, self.eos = counts, model.generation_config.eos_token_id
        self.manager.start()

    async def run(self, job: Job) -> None:
        name, done, sent = uuid.uuid4().hex, asyncio.Event(), 0
        self.counts.waiting += 1

        def result(output: Any) -> None:
            nonlocal sent
            if sent == 0 and output.generated_tokens:
                self.counts.waiting, self.counts.running = self.counts.waiting - 1, self.counts.running + 1
            for token in output.generated_tokens[sent:]:
                job.answers.put_nowait(token)
            sent = max(sent, len(output.generated_tokens))
            if output.is_finished():
                job.answers.put_nowait(RuntimeError(output.error) if output.error else None)
                done.set()

        self.manager.register_result_handler(name, result)
        try:
            self.manager.add_request(
                job.prompt, name, max_new_tokens=job.tokens, streaming=True,
                eos_token_id=-1 if job.ignore_eos else self.eos,
            )  # fmt: skip
            await done.wait()
        except asyncio.CancelledError:
            self.manager.cancel_request(name)
            raise
        finally:
            if sent:
                self.counts.running -= 1
            else:
                self.counts.waiting -= 1


class Server:
    """The HTTP side: completions, models, health and metrics."""

    def __init__(self, engine: OneAtATime | Continuous, tokenizer: Any, name: str, counts: Counts) -> None:
        self.engine, self.tokenizer, self.name, self.counts = engine, tokenizer, name, counts

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", lambda _: JSONResponse({"object": "list", "data": [self.model]})),
            Route("/health", lambda _: Response()),
            Route("/metrics", lambda _: PlainTextResponse(self.counts.text())),
        ]
        return Starlette(routes=routes)

    @property
    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "transformers"}

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        prompt = self.tokenizer(body["prompt"])["input_ids"]
        job = Job(prompt, int(body.get("max_tokens") or 16), bool(body.get("ignore_eos")), asyncio.Queue())
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(self.events(job, usage), media_type="text/event-stream")
        made = [token async for token in self.tokens(job)]
        choice = {"index": 0, "text": self.text(made), "logprobs": None, "finish_reason": finish(job, made)}
        return JSONResponse({**self.head(), "choices": [choice], "usage": self.usage(job, made)})

    async def tokens(self, job: Job) -> AsyncIterator[int]:
        """The tokens of a job as they are made. Raises what the engine raised."""
        task = asyncio.create_task(self.engine.run(job))
        try:
            while (token := await job.answers.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                yield token
        finally:
            job.left = True
            if isinstance(self.engine, Continuous):
                task.cancel()

    async def events(self, job: Job, with_usage: bool) -> AsyncIterator[str]:
        made: list[int] = []
        head, text = self.head(), ""
        async for token in self.tokens(job):
            made.append(token)
            whole = self.text(made)
            reason = finish(job, made) if len(made) == job.tokens else None
            choice = {"index": 0, "text": whole[len(text) :], "logprobs": None, "finish_reason": reason}
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            text = whole
        if len(made) < job.tokens:
            choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
        if with_usage:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': self.usage(job, made)})}\n\n"
        yield "data: [DONE]\n\n"

    def text(self, made: list[int]) -> str:
        return str(self.tokenizer.decode(made, skip_special_tokens=True))

    def head(self) -> dict[str, Any]:
        name = f"cmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": "text_completion", "created": int(time.time()), "model": self.name}

    def usage(self, job: Job, made: list[int]) -> dict[str, int]:
        prompt = len(job.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": len(made), "total_tokens": prompt + len(made)}


def finish(job: Job, made: list[int]) -> str:
    return "length" if len(made) >= job.tokens else "stop"


def load(options: argparse.Namespace) -> Any:
    """The model in bf16; with --random, of its config's shape and without weights to read."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.random:
        return transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device).eval()
    config = transformers.AutoConfig.from_pretrained(options.model)
    torch.set_default_dtype(torch.bfloat16)
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    torch.set_default_dtype(torch.float32)
    for weights in model.parameters():
        torch.nn.init.uniform_(weights, -1e-3, 1e-3)
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory in Hugging Face's format")
    parser.add_argument("--name", default="m", help="the model's name in the API")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--continuous", action="store_true", help="batch continuously")
    parser.add_argument("--num-blocks", type=int, help="blocks of the KV cache (default: as the memory allows)")
    parser.add_argument("--max-batch-tokens", type=int, help="tokens per step (default: as the memory allows)")
    parser.add_argument("--random", action="store_true", help="random weights of the config's shape")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model, counts = load(options), Counts()
    engine = Continuous(model, counts, options) if options.continuous else OneAtATime(model, counts)
    server = Server(engine, tokenizer, options.name, counts)
    uvicorn.run(server.app(), host=options.host, port=options.port, log_level="warning")
    if threading.active_count() > 1:  # the batching thread waits for more requests
        raise SystemExit(0)


if __name__ == "__main__":
    main()
