"""Prompts × points to rows, resumable: finished rows come from the store, the others from the decoder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from pipeline.config import Params, Point
from pipeline.decoder import Generation, GuidedDecoder, Request
from pipeline.models import Prompter, load_model, model_digest, resolve_device, resolve_dtype
from pipeline.store import Row, RowStore, digest, file_digest

_VERSION = 1  # of the decoding rule: raise it when the same request would give another row


def stream_key(seed: int, prompt: str, weights: Mapping[str, float], temperature: float, sample: int) -> str:
    """The key of a row's random stream: seed, prompt and point, whatever the point is called."""
    arms = {name: alpha for name, alpha in weights.items() if alpha != 0.0}
    return digest([seed, prompt, arms, temperature, sample])


def point_requests(params: Params, prompts: Sequence[str]) -> Iterator[tuple[str, int, Request]]:
    """(point, sample, request) for every prompt at every point of the sweep."""
    decoding = params.decoding
    for prompt in prompts:
        for name, point in params.sweep.points.items():
            temperature = point_temperature(point, params)
            for sample in range(decoding.samples_per_prompt):
                key = stream_key(params.seed, prompt, point.weights, temperature, sample)
                yield name, sample, Request(prompt, key, decoding.max_new_tokens, point.weights, temperature)


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
    """The rows of the requests, in their order; what the store lacks is generated and kept there as it finishes.

    A row's key is a digest of all that determines it: base, dtype, template, the adapters that have a say, α,
    temperature, prompt, length limit and random stream. A killed run therefore goes on with the batch it was in, and a
    new point costs only itself.
    """
    device = resolve_device(params.decoding.device)
    dtype = resolve_dtype(params.base.dtype, device)
    origin = [_VERSION, model_digest(base), str(dtype), params.base.template]
    used = sorted({name for request in requests for name in request.arms})
    digests = {name: file_digest(adapters[name] / "adapter_model.safetensors") for name in used}

    def key(request: Request) -> str:
        arms = {name: [alpha, digests[name]] for name, alpha in request.arms.items()}
        return digest([*origin, request.prompt, arms, request.temperature, request.max_new_tokens, request.stream])

    store = RowStore(store_path)
    keys = [key(request) for request in requests]
    todo = [index for index, wanted in enumerate(keys) if wanted not in store]
    print(f"{title}: {len(keys) - len(todo)} of {len(keys)} rows are in the store already")
    if todo:
        prompter = Prompter.load(base, params.base.template)
        decoder = GuidedDecoder(
            load_model(base, dtype, device),
            prompter,
            {name: adapters[name] for name in used},
            batch_size=params.decoding.batch_size,
        )
        with tqdm(total=len(todo), desc=title, unit="row", smoothing=0.05) as progress:
            for planned in decoder.plan([requests[index] for index in todo]):
                batch, finished = [todo[index] for index in planned], []
                for index, generation in decoder.generate([requests[place] for place in batch]):
                    finished.append((keys[batch[index]], _row(requests[batch[index]], generation)))
                    progress.update()
                store.add(finished)
    rows = [store[wanted] for wanted in keys]
    store.close()
    return rows


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
        "stream": request.stream,
    }
