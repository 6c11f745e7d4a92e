"""Prompts × points to rows, resumable: finished rows come from the store, the others from the decoder."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config.errors import UserError
from pipeline.config.points import point_laws
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.files import digest
from pipeline.data.responses import GeneratedRow
from pipeline.data.row_store import RowStore
from pipeline.data.stale_rows import note_asked
from pipeline.decoding.decoder import Generation, Request
from pipeline.decoding.guidance import LAW_VERSION
from pipeline.generation.model_set import Decoder, ModelSet
from pipeline.models.loading import Source, resolve_device


def point_requests(params: Params, base: str, prompts: Sequence[str]) -> Iterator[tuple[str, Request]]:
    """(point, request) for every prompt and sample at every point of the sweep, on a base."""
    decoding, laws = params.decoding, point_laws(params, base)
    for prompt in prompts:
        for name, law in laws.items():
            for sample in range(decoding.samples_per_prompt):
                yield (
                    name,
                    Request(
                        prompt,
                        weights=dict(law.weights),
                        temperature=law.temperature,
                        top_k=decoding.top_k,
                        top_p=decoding.top_p,
                        min_p=decoding.min_p,
                        max_new_tokens=decoding.max_new_tokens,
                        stop=decoding.stop,
                        seed=params.seed,
                        sample=sample,
                    ),
                )


def prompts_with_room(params: Params, workspace: Workspace, bases: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The prompts that leave room for a response in every model that reads them on these bases; prints how many do not.

    Raises:
        UserError: no prompt does.
    """
    sources: list[Source] = []
    for base in bases:
        used = {name for _, request in point_requests(params, base, prompts[:1]) for name in request.arms}
        sources += [source for source, _ in ModelSet(params, workspace, base, used).loaded]
    room = params.decoding.max_new_tokens
    fitting = with_room(sources, prompts, room)
    if len(fitting) < len(prompts):
        print(
            f"generate: {len(prompts) - len(fitting)} of {len(prompts)} prompts left out: with {room} new tokens they "
            "exceed a model's context (decoding.max_new_tokens)"
        )
    if prompts and not fitting:
        raise UserError(f"no prompt leaves room for {room} tokens in every model's context: lower max_new_tokens.")
    return fitting


def with_room(sources: Sequence[Source], prompts: Sequence[str], room: int) -> list[str]:
    """The prompts that leave room for so many tokens in the context of each of the models."""
    readers = [(source.prompter(), source.context) for source in dict.fromkeys(sources)]
    return [
        prompt
        for prompt in prompts
        if all(len(prompter.prompt_ids(prompt)) + room <= context for prompter, context in readers)
    ]


@dataclass(frozen=True)
class Shard:
    """The part of the prompts that one of several processes generates for: every `count`-th, from `index` on."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `shard=0/4`.

        Raises:
            UserError: it is written otherwise, or there is no such part.
        """
        match = re.fullmatch(r"shard=(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise UserError(f"{text} is no part of the prompts: write shard=0/4, shard=1/4, … shard=3/4.")
        return cls(int(match[1]), int(match[2]))


def generate_sweep(params: Params, workspace: Workspace, base: str, prompts: Sequence[str]) -> list[GeneratedRow]:
    """Every prompt at every point of the sweep on a base, in the order of `point_requests`, each row with its point."""
    requests = list(point_requests(params, base, prompts))
    rows = generate_stored([request for _, request in requests], params, workspace, base, "generate")
    return [replace(row, point=point) for (point, _), row in zip(requests, rows, strict=True)]


def generate_shard(
    params: Params, workspace: Workspace, base: str, prompts: Sequence[str], shard: Shard
) -> tuple[int, Path]:
    """Put the rows of some of the prompts into a store of their own, where `generate_sweep` finds them.

    A file per process, so that processes on several machines need nothing from the file system they share. Returns how
    many rows there are, and the file.
    """
    requests = list(point_requests(params, base, prompts[shard.index :: shard.count]))
    name = f"generate.{shard.index}-of-{shard.count}"
    rows = generate_stored([request for _, request in requests], params, workspace, base, "generate", store=name)
    return len(rows), store_file(workspace, name)


def generate_stored(
    requests: Sequence[Request],
    params: Params,
    workspace: Workspace,
    base: str,
    title: str,
    adapters: Mapping[str, Path] | None = None,
    store: str | None = None,
) -> list[GeneratedRow]:
    """The rows of the requests, in their order; what the store lacks is generated and kept there, chunk by chunk.

    A row's key is a digest of all that determines it: the law's version, base, dtype, the adapters that have a say, the
    request, and its prompt as each model reads it. A killed run therefore goes on with the chunk it was in, and a new
    point costs only itself.

    Args:
        requests: what to generate; they may name the ARMs and the base's policies of the workspace.
        params: the experiment.
        workspace: where models and store are.
        base: the model that is steered.
        title: of the progress bar, and of the store's file.
        adapters: further adapters of the base, by lane.
        store: the name of the file that new rows go to, where that is another.
    """
    device = resolve_device(params.decoding.device)
    used = {name for request in requests for name in request.arms}
    models = ModelSet(params, workspace, base, used, adapters)
    engine = [] if params.decoding.engine == "transformers" else [params.decoding.engine]  # draws by other streams
    origin, lanes = [LAW_VERSION, *models.strong.identity(device), *engine], models.identities(device)
    tokens = prompt_tokens(requests, models.strong, *([models.weak] if models.weak else []))

    def key(request: Request) -> str:
        law = {name: [weight, lanes.get(name)] for name, weight in request.law.items()}
        return digest([*origin, request_key(request) | {"weights": law}, tokens[request.prompt]])

    def decoder() -> Decoder:
        if params.decoding.engine == "vllm":
            return models.vllm_decoder(params.decoding.batch_size)
        longest = max(request.max_new_tokens for request in requests)
        return models.decoder(params.decoding.device, params.decoding.batch_size, longest, stored=True)

    return stored(requests, [key(request) for request in requests], decoder, workspace, title, store)


def request_key(request: Request) -> dict[str, Any]:
    """What a request says, as a JSON value."""
    return asdict(request)


def prompt_tokens(requests: Sequence[Request], *sources: Source) -> dict[str, list[list[int]]]:
    """Every prompt of the requests as each model reads it: templates and tokenizers may put the same text otherwise."""
    prompters = [source.prompter() for source in sources]
    prompts = dict.fromkeys(request.prompt for request in requests)
    return {prompt: [prompter.prompt_ids(prompt) for prompter in prompters] for prompt in prompts}


def store_file(workspace: Workspace, name: str) -> Path:
    """The file of a row store."""
    return workspace.scratch / "store" / f"{name}.jsonl"


def stored(
    requests: Sequence[Request], keys: Sequence[str], load: Callable[[], Decoder], workspace: Workspace, title: str,
    name: str | None = None,
) -> list[GeneratedRow]:  # fmt: skip
    """The rows of the requests, from the store or from a decoder that is loaded only if the store lacks some.

    Args:
        requests: what to generate.
        keys: per request, a digest of all that determines its row.
        load: the decoder.
        workspace: where the store is.
        title: of the progress bar, and of the store's file.
        name: of the store's file, where that is another.
    """
    file = store_file(workspace, name or title)
    whole = store_file(workspace, title)
    known = {*whole.parent.glob(f"{title}.*-of-*.jsonl"), *([whole] if whole.exists() else [])} - {file}
    note_asked(file.parent, title, set(keys))
    store = RowStore(file, keys, sorted(known))
    first = {key: index for index, key in reversed(list(enumerate(keys)))}  # equal requests are one row
    todo = [index for index, key in enumerate(keys) if key not in store and first[key] == index]
    print(f"{title}: {len(first) - len(todo)} of {len(first)} rows are in the store already")
    if todo:
        decoder = load()
        missing = [requests[index] for index in todo]
        chunks, finished = decoder.plan(missing), decoder.generate(missing, progress=title)
        for chunk in chunks:
            store.add(
                (keys[todo[place]], _row(missing[place], generation).to_json())
                for place, generation in islice(finished, len(chunk))
            )
    return [GeneratedRow.from_json(store[key]) for key in keys]


def _row(request: Request, generation: Generation) -> GeneratedRow:
    return GeneratedRow(
        prompt=request.prompt,
        response=generation.text,
        finish=generation.finish,
        prompt_tokens=generation.prompt_tokens,
        tokens=generation.tokens,
        n_tokens=len(generation.tokens),
        logp=round(generation.logp, 4),
        logp_base=round(generation.logp_base, 4),
        kl=round(generation.kl, 4),
        sample=request.sample,
        seed=request.seed,
        stream=request.stream,
        forwards=generation.forwards,
        drafted=generation.drafted,
        accepted=generation.accepted,
        left_out=None if generation.left_out is None else round(generation.left_out, 4),
    )
