"""Prompts × points to rows, resumable: finished rows come from the store, the others from the decoder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from pipeline.config import Params, Point
from pipeline.decoder import Generation, GuidedDecoder, Request
from pipeline.models import model_digest, resolve_device, resolve_dtype
from pipeline.store import Row, RowStore, digest, file_digest

_VERSION = 2  # of the decoding rule: raise it when the same request would give another row


def point_requests(params: Params, prompts: Sequence[str]) -> Iterator[tuple[str, Request]]:
    """(point, request) for every prompt and sample at every point of the sweep."""
    decoding = params.decoding
    for prompt in prompts:
        for name, point in params.sweep.points.items():
            for sample in range(decoding.samples_per_prompt):
                yield (
                    name,
                    Request(
                        prompt,
                        weights=point.weights,
                        temperature=point_temperature(point, params),
                        top_k=decoding.top_k,
                        top_p=decoding.top_p,
                        min_p=decoding.min_p,
                        max_new_tokens=decoding.max_new_tokens,
                        stop=decoding.stop,
                        seed=params.seed,
                        sample=sample,
                    ),
                )


def point_temperature(point: Point, params: Params) -> float:
    """The point's own temperature, or the decoder's."""
    return params.decoding.temperature if point.temperature is None else point.temperature


def generate_stored(
    requests: Sequence[Request],
    params: Params,
    adapters: Mapping[str, Path],
    base: Path,
    store_path: Path,
    title: str,
) -> list[Row]:
    """The rows of the requests, in their order; what the store lacks is generated and kept there, chunk by chunk.

    A row's key is a digest of all that determines it: base, dtype, template, the adapters that have a say, and the
    request. A killed run therefore goes on with the chunk it was in, and a new point costs only itself.
    """
    device = resolve_device(params.decoding.device)
    dtype = resolve_dtype(params.base.dtype, device)
    origin = [_VERSION, model_digest(base), str(dtype), device.type, params.base.template]
    used = sorted({name for request in requests for name in request.arms})
    digests = {name: _arm_digest(adapters[name]) for name in used}

    def key(request: Request) -> str:
        arms = {name: [alpha, digests[name]] for name, alpha in request.arms.items()}
        return digest([*origin, asdict(request) | {"weights": arms}])

    store = RowStore(store_path)
    keys = [key(request) for request in requests]
    first = {wanted: index for index, wanted in reversed(list(enumerate(keys)))}  # equal requests are one row
    todo = [index for index, wanted in enumerate(keys) if wanted not in store and first[wanted] == index]
    print(f"{title}: {len(first) - len(todo)} of {len(first)} rows are in the store already")
    if todo:
        decoder = GuidedDecoder.load(
            base,
            {name: adapters[name] for name in used},
            template=params.base.template,
            templates={name: params.base.template for name in used if params.base.template},  # they were trained so
            dtype=params.base.dtype,
            device=params.decoding.device,
            batch_size=params.decoding.batch_size,
        )
        asked = [requests[index] for index in todo]
        chunks, finished = decoder.plan(asked), decoder.generate(asked, progress=title)
        for chunk in chunks:
            store.add(
                (keys[todo[place]], _row(asked[place], generation))
                for place, generation in islice(finished, len(chunk))
            )
    rows = [store[wanted] for wanted in keys]
    store.close()
    return rows


def _arm_digest(folder: Path) -> str:
    """All of an ARM's folder that its log-probabilities depend on."""
    return file_digest(*sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]))


def _row(request: Request, generation: Generation) -> Row:
    return {
        "prompt": request.prompt,
        "response": generation.text,
        "prompt_tokens": generation.prompt_tokens,
        "n_tokens": len(generation.tokens),
        "finish": generation.finish,
        "logp": round(generation.logp, 4),
        "logp_base": round(generation.logp_base, 4),
        "kl": round(generation.kl, 4),
        "sample": request.sample,
        "seed": request.seed,
        "stream": request.stream,
    }
