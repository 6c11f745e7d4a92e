"""vLLM's server with guidance, and the stock openai client; runs in the environment of `make vllm`."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
import xgrammar
from openai import AsyncOpenAI, BadRequestError, OpenAI
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from pipeline.config.errors import UserError
from pipeline.data.files import replacing_folder
from pipeline.decoding.backbone import SideBackbone
from pipeline.decoding.decoder import GuidedDecoder
from pipeline.decoding.request import Request, until_stop
from pipeline.decoding.vllm import compilation, guides
from pipeline.decoding.vllm.adapters import Adapters
from pipeline.decoding.vllm.answers import Answer
from pipeline.decoding.vllm.requests import GuidedChat, Models, read_jobs
from pipeline.decoding.vllm.response import Delta, Responder
from pipeline.decoding.vllm.serve import _chat_template
from pipeline.decoding.vllm.settings import ends_and_marks
from pipeline.decoding.vllm.text import GrowingText
from pipeline.models.loading import Source
from tests.bench.serve import faults, soak
from tests.decoding.fuzz import fuzzed
from tests.decoding.test_vllm import adapters, small, source  # noqa: F401
from tests.tiny import ROOT, write_project

POINTS = [{}, {"positivity": 1.0}, {"conciseness": 0.7}, {"positivity": 1.0, "conciseness": 0.5}]
TEXT = "Why?"
KEY = "none"


@pytest.fixture(scope="module")
def server(started):
    return started[0]


@pytest.fixture(scope="module")
def started(source, adapters, small, tmp_path_factory):  # noqa: F811
    """A server's address, process and log: one ARM is a lane, the other a model of its own.

    Its cache holds few requests at once, so that lanes are preempted under load.
    """
    home = tmp_path_factory.mktemp("project")
    write_project(home, source.folder, {"positivity": adapters["one"], "conciseness": small.folder})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--max-model-len", "256", "--max-num-batched-tokens", "1024", "--block-size", "32"]
    flags += ["--num-gpu-blocks-override", "14", "--no-enable-prefix-caching", "--api-key", KEY]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "serve", "--port", str(port), "--groups", "6", "--", *flags],
            cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=log, stderr=log,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}/v1"
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address.replace("/v1", "/health"))
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    assert process.poll() is None, (home / "log").read_text()[-3000:]
    yield address, process, home / "log"
    process.terminate()
    process.wait(30)


@pytest.fixture
def client(server):
    return OpenAI(base_url=server, api_key=KEY, timeout=120)


@pytest.fixture(scope="module")
def expected(source, adapters, small):  # noqa: F811
    """Greedy texts of each point, by the decoder."""
    arms = {"positivity": adapters["one"], "conciseness": small.folder}
    decoder = GuidedDecoder.load(Source(source.folder, dtype="float32"), arms, device="cpu")
    requests = [Request(TEXT, weights, temperature=0.0, max_new_tokens=60) for weights in POINTS]
    return dict(decoder.generate(requests))


def guidance(weights):
    return {"guidance": {"weights": weights}}


def regex(pattern):
    return {"structured_outputs": {"regex": pattern}}


def schema(content):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": content}}}


@pytest.mark.parametrize("place", range(len(POINTS)))
def test_a_guided_answer_is_the_decoders(client, expected, place):
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": TEXT}], max_tokens=60, temperature=0,
        extra_body=guidance(POINTS[place]),
    )  # fmt: skip
    assert said.choices[0].message.content.strip() == expected[place].text
    assert said.usage.completion_tokens == len(expected[place].tokens)
    assert said.choices[0].finish_reason == {"eos": "stop", "length": "length"}[expected[place].finish]


def test_a_stream_is_the_same_text_in_pieces(client):
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 20, "seed": 5,
        "extra_body": guidance({"positivity": 1.0}),
    }  # fmt: skip
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)]
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert len(pieces) > 3 and "".join(pieces) == whole


def test_a_seed_writes_what_the_decoder_writes(client, source, adapters):  # noqa: F811
    decoder = GuidedDecoder.load(
        Source(source.folder, dtype="float32"), {"positivity": adapters["one"]}, device="cpu"
    )  # fmt: skip
    for seed in range(3):
        how = {"temperature": 0.8, "top_p": 0.9, "seed": seed}
        [(_, generation)] = decoder.generate([Request(TEXT, {"positivity": 0.7}, max_new_tokens=30, **how)])
        said = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": TEXT}], max_tokens=30,
            extra_body=guidance({"positivity": 0.7}), **how,
        )  # fmt: skip
        assert said.choices[0].message.content.strip() == generation.text


def test_a_stop_text_ends_an_answer_before_it(client):
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 60, "seed": 1,
        "extra_body": guidance({"positivity": 1.0}),
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    said = client.chat.completions.create(**asked, stop=stop)
    assert said.choices[0].finish_reason == "stop" and said.choices[0].message.content == whole[: whole.index(stop)]
    chunks = list(
        client.chat.completions.create(**asked, stop=[stop], stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole[: whole.index(stop)] and chunks[-1].usage == said.usage


@given(st.lists(st.integers(0, 511), max_size=30), st.lists(st.integers(1, 4), max_size=8))
def test_pieces_of_a_text_join_to_the_text_before_a_stop(source, tokens, sizes):  # noqa: F811
    tokenizer = source.prompter().tokenizer
    for stops in ([], ["e"], ["th", "e a"]):
        text, told, rest = GrowingText(tokenizer, stops), "", list(tokens)
        for size in sizes:
            if not text.stopped:
                told += text.grow(rest[:size], False)
                del rest[:size]
                assert all(stop not in told for stop in stops)
        if not text.stopped:
            told += text.grow(rest, True)
        assert told == until_stop(tokenizer.decode(tokens, skip_special_tokens=True), stops)


def test_requests_without_guidance_pass_untouched(client, expected):
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": TEXT}], max_tokens=60, temperature=0
    )
    assert said.choices[0].message.content.strip() == expected[0].text
    sampled = client.completions.create(model="positivity", prompt="Hello", max_tokens=4, logprobs=1)
    assert sampled.choices[0].logprobs.token_logprobs


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (guidance({"kindness": 1.0}), "weights name kindness, but the ARMs are positivity, conciseness"),
        (guidance([1.0]), "valid dictionary"),
        ({**guidance({}), "logit_bias": {"5": 1.0}}, "cannot have logit_bias"),
        (
            {
                **guidance({}),
                **regex("("),
            },
            "[Ii]nvalid|[Ff]ailed|cannot",
        ),
        ({**guidance({}), "structured_outputs": {"grammar": "root ::= root"}}, "the format allows no text at all"),
        ({**guidance({}), **regex("a*"), "ignore_eos": True}, "cannot have min_tokens or ignore_eos"),
        ({**guidance({}), **regex("a*"), "min_tokens": 2}, "cannot have min_tokens or ignore_eos"),
        ({**guidance({}), **schema({"type": "integer", "multipleOf": 7})}, "xgrammar does not know: simplify it"),
        ({**guidance({}), "kindness": 1}, "cannot have kindness"),
        ({**guidance({}), "presence_penalty": 3.0}, "presence_penalty must be in"),
        (guidance({"positivity": "much"}), "valid number"),
        (guidance({"positivity": True}), "valid number"),
        (guidance({"positivity": 1001}), "less than or equal to 1000"),
        ({**guidance({}), "model": "positivity"}, "its weights name the ARMs"),
        ({**guidance({}), "top_p": 3.0}, "top_p must be in"),
        ({**guidance({}), "max_tokens": 5000}, "5000"),
        ({**guidance({}), "max_tokens": 2**70}, "max_tokens has more than 32 bits"),
        ({**guidance({}), "n": 7}, "n is 7, and the server writes 6 responses at once"),
        ({**guidance({}), "n": 2**64}, "n has more than 32 bits"),
        ({**guidance({}), "n": 10**6}, "n must be at most"),
        ({**guidance({}), "seed": 2**64}, "less than or equal to 9223372036854775807"),
        ({**guidance({}), "stop_token_ids": [2**64]}, "stop_token_ids"),
        ({**guidance({}), "stop_token_ids": list(range(65))}, "at most 64 stop_token_ids"),
        ({**guidance({}), "logprobs": True, "top_logprobs": 10**6}, "greater than max allowed"),
        ({**guidance({}), "min_tokens": 10**9}, "min_tokens must be less"),
        ({**guidance({}), "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs cannot have tokenize"),
        ({**guidance({}), "chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs cannot have eos_token"),
        ({"guidance": {"weights": {}, "gate": 1.0}}, "Extra inputs are not permitted"),
        (guidance({"positivity": 10**400}), "valid number"),
        ({**guidance({}), "temperature": 10**400}, "temperature has more than 32 bits"),
        ({**guidance({}), "stream_options": True}, "stream_options"),
    ],
)
def test_what_cannot_be_guided_is_refused_with_a_sentence(client, body, said):
    with pytest.raises(BadRequestError, match=said):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": TEXT}], extra_body=body)
    assert client.models.list().data, "the server is gone"


def test_guidance_where_there_is_none_is_refused(server, client):
    """vLLM takes fields that it does not know without a word: the answer would be unguided."""
    with pytest.raises(BadRequestError, match="guidance is for /v1/completions and /v1/chat/completions"):
        client.responses.create(model="tiny", input=TEXT, extra_body=guidance({"positivity": 1.0}))
    asked = {"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, extra_body={"guidance": None}).choices[0].text == plain


def models_of(base, beside=()):
    """What the server knows of a base and of models beside it."""
    ends, marks = ends_and_marks(base)
    described = {
        "base": "tiny", "folder": str(base.folder), "groups": 2, "adapters": {"positivity": "nowhere"}, "ends": ends,
        "guides": guides.to_json(beside), "marks": marks, "template": base.template,
    }  # fmt: skip
    config = SimpleNamespace(
        max_model_len=512, max_logprobs=20, get_vocab_size=lambda: len(base.prompter().tokenizer), is_diffusion=False
    )
    return Models(described, config)


def chat(**fields):
    return GuidedChat(**{"model": "tiny", "messages": [{"role": "user", "content": TEXT}], **fields})


def test_when_a_lane_is_refused_the_answer_does_not_wait_for_it(source):  # noqa: F811
    """A base's lane would wait for the others, which are no more."""

    class Engine:
        async def generate(self, prompt, params, name, lora_request=None):
            if lora_request:
                raise VLLMValidationError("no such adapter")
            await asyncio.Event().wait()
            yield

    models = models_of(source)
    [job] = read_jobs(chat(**guidance({"positivity": 1.0})), models)
    lanes = Adapters({"positivity": LoRARequest("positivity", 1, "nowhere")}, [])
    responder = Responder(Engine(), lanes, models.tokenizer, 1)

    async def write():
        return [delta async for delta in responder.write(job)]

    with pytest.raises(VLLMValidationError, match="no such adapter"):
        asyncio.run(asyncio.wait_for(write(), 20))


def test_what_a_guide_has_no_room_for_is_refused(source, small):  # noqa: F811
    """The base reads 512 tokens, the guide 256: behind them it would go on with wrong positions."""
    models, length = models_of(source, [SideBackbone(small, name="small")]), len(small.prompter().prompt_ids(TEXT))
    with pytest.raises(UserError, match=f"max_tokens is 256, and between 1 and {256 - length} fit"):
        read_jobs(chat(**guidance({"small": 1.0}), max_tokens=256), models)
    [job] = read_jobs(chat(**guidance({"small": 1.0})), models)
    assert job.request.max_new_tokens == 256 - length


def test_a_base_with_a_template_is_asked_as_everywhere_else(source, tmp_path):  # noqa: F811
    """With the token that begins a text, and refused more than the template has room for."""
    shutil.copytree(source.folder, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    pair = [("<user>", tokenizer.convert_tokens_to_ids("<user>"))]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<user> $A", special_tokens=pair)
    tokenizer.save_pretrained(tmp_path / "base")
    base = Source(tmp_path / "base", template="Q: {prompt}\nA:")
    expected = base.prompter().prompt_ids(TEXT)
    assert expected[0] == pair[0][1]
    one = [{"role": "user", "content": TEXT}]
    several = [{"role": "system", "content": "Be brief."}, *one]
    options = {"chat_template": _chat_template(base.prompter()), "return_dict": False}
    assert base.prompter().tokenizer.apply_chat_template(one, **options) == expected
    with pytest.raises(TemplateError, match="asked one message"):
        base.prompter().tokenizer.apply_chat_template(several, **options)
    [job] = read_jobs(chat(messages=one, **guidance({})), models_of(base))
    assert job.prompt == expected
    with pytest.raises(UserError, match="has room for one turn"):
        read_jobs(chat(messages=several, **guidance({})), models_of(base))


def test_variables_reach_the_chat_template_of_a_guided_request(source, tmp_path):  # noqa: F811
    shutil.copytree(source.folder, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %} no{% endif %}"
    tokenizer.save_pretrained(tmp_path / "base")
    models, body = models_of(Source(tmp_path / "base")), guidance({"positivity": 1.0})
    [plain] = read_jobs(chat(**body), models)
    [job] = read_jobs(chat(chat_template_kwargs={"enable_thinking": False}, **body), models)
    assert job.prompt == [*plain.prompt, *tokenizer(" no").input_ids]


def test_formats_are_compiled_within_bounds(source, monkeypatch):  # noqa: F811
    """What takes too long is killed, and the next one has a new process."""
    tokenizer = source.prompter().tokenizer
    compiler = compilation.GrammarCompiler(lambda: xgrammar.TokenizerInfo.from_huggingface(tokenizer))

    async def compile_all():
        await compiler.compile("regex", "a*")  # once the process is there
        monkeypatch.setattr(compilation, "_SECONDS", 1.0)
        with pytest.raises(compilation.FormatError, match="more than 1 seconds or too much memory"):
            await compiler.compile("regex", "|".join("a" * length for length in range(1, 3000)))
        monkeypatch.setattr(compilation, "_SECONDS", 60.0)
        for kind, text, sentence in (
            ("regex", "(", "the format cannot be compiled"),
            ("json", "{", "the format cannot be compiled"),
            ("grammar", "root ::= root", "allows no text at all"),
        ):
            with pytest.raises(compilation.FormatError, match=sentence):
                await compiler.compile(kind, text)
        assert json.loads(await compiler.compile("json", '{"type": "integer"}'))
        compiler.close()

    asyncio.run(compile_all())


def test_a_load_of_mixed_weights_and_leaving_clients_gets_every_answer_right(server, expected):
    """More than there is room for: lanes wait, are preempted and begun again; some clients hang up halfway."""

    async def one(client, number):
        place = number % len(POINTS)
        asked = {
            "model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 60, "temperature": 0,
            "extra_body": guidance(POINTS[place]),
        }  # fmt: skip
        if number % 7 == 3:
            stream = await client.chat.completions.create(**asked, stream=True)
            async for _ in stream:
                break
            await stream.close()
            return None
        return place, (await client.chat.completions.create(**asked)).choices[0].message.content

    async def load():
        client = AsyncOpenAI(base_url=server, api_key=KEY, timeout=300)
        return await asyncio.gather(*(one(client, number) for number in range(42)))

    answers = [answer for answer in asyncio.run(load()) if answer is not None]
    assert len(answers) == 36
    assert all(text.strip() == expected[place].text for place, text in answers)
    metrics = urllib.request.urlopen(server.removesuffix("/v1") + "/metrics").read().decode()
    told = {
        line.split("{")[0]: float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("vllm:num_")
    }
    assert told["vllm:num_requests_running"] == told["vllm:num_requests_waiting"] == 0
    preempted = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
    assert preempted and float(preempted[0].split()[-1]) > 0, "nothing was preempted: the test shows nothing"


def post(server, body, path="/completions", key=KEY, kind="application/json"):
    """Status and answer to a body, JSON or bytes, as no client library would send it."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": kind, **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(server + path, body, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def completion(**fields):
    return {"model": "tiny", "prompt": "Hello", "max_tokens": 5, **guidance({"positivity": 1.0}), **fields}


def test_a_plain_curl_body_works(server):
    status, answer = post(server, completion())
    assert status == 200
    answer = json.loads(answer)
    assert answer["object"] == "text_completion" and answer["choices"][0]["text"]


def forged(**fields):
    """What the middleware of old wrote into vllm_xargs, and anybody could."""
    facts = {
        "group": "x", "lanes": 1, "lane": 0, "alpha": 1.0, "mark": 5, "stream": "0" * 32, "first": 0, "last": 4,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    }  # fmt: skip
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    return {**body, "vllm_xargs": {"guidance": json.dumps(facts | fields)}}


@pytest.mark.parametrize(
    ("body", "status", "reply"),
    [
        (completion(top_k=2**63), 400, "top_k has more than 32 bits"),
        (completion(top_k=2**31 - 1), 200, "choices"),
        (completion(guidance=None, top_k=2**40), 400, "top_k has more than 32 bits"),
        (completion(guidance=None, top_k=10**400), 400, "top_k has more than 32 bits"),
        (completion(top_k=-2), 400, "top_k must be"),
        (completion(temperature=1e-320), 200, "choices"),
        (completion(temperature=float("inf")), 400, "finite"),
        (completion(max_tokens=10**9), 400, "max_tokens is 1000000000"),
        (completion(min_p=2), 400, "min_p must be"),
        (completion(min_p=1), 400, "min_p is 1.0, which is out of its range"),
        (completion(seed=2**63), 400, "seed"),
        (completion(prompt=[2**63]), 400, "tokens are below"),
        (completion(prompt=[]), 400, "prompt is empty"),
        (completion(prompt=["a", "b"]), 400, "one prompt"),
        (completion(prompt="\ud83d"), 400, ""),
        (completion(stop=["a"] * 5), 400, "stop"),
        (completion(vllm_xargs={"guidance": "{}"}), 400, "cannot have vllm_xargs"),
        (forged(group={}), 400, "vllm_xargs is internal"),
        (forged(mark=2**63), 400, "vllm_xargs is internal"),
        (forged(last=10**9), 400, "vllm_xargs is internal"),
        (forged(lanes=2), 400, "vllm_xargs is internal"),
        (b"[" * 100_000 + b"]" * 100_000, 400, ""),
        (b'{"model": "tiny", "prompt": "Hello", "logit_bias": ' + b'{"1":' * 900 + b"1" + b"}" * 901, 400, ""),
        (b"", 400, ""),
        (b'{"prompt": ', 400, ""),
        (b"\xff\xfe", 400, ""),
        (b"[]", 400, ""),
        (b'"guidance"', 400, ""),
        (b'{"guidance": {"weights": {}}, "guidance": {"weights": {"kindness": 1}}, "prompt": "a"}', 400, "kindness"),
    ],
)
def test_no_body_ends_the_engine(server, body, status, reply):
    """Each of these once killed it, waited for ever, cost gigabytes or was an internal error."""
    assert (found := post(server, body))[0] == status and reply in found[1]
    assert post(server, completion())[0] == 200


def test_only_json_and_only_with_the_key(server):
    """A page in a browser can send text/plain to loopback without asking; and who has no key has no body read."""
    for path in ("/completions", "/chat/completions"):
        assert post(server, completion(), path, kind="text/plain")[0] == 400
        assert post(server, completion(), path, key=None)[0] == 401
        assert post(server, completion(), path, key="other")[0] == 401
    begun = time.perf_counter()
    try:
        status = post(server, b"[" + b"0," * (16 * 2**20) + b"0]", key=None)[0]
    except (ConnectionError, urllib.error.URLError):  # the server does not wait for the rest of it
        status = 401
    assert status == 401 and time.perf_counter() - begun < 5
    assert post(server, b"[" + b"0," * (5 * 2**20) + b"0]")[0] == 413


@pytest.mark.parametrize("path", ["/responses", "/messages", "/completions/render", "/embeddings"])
def test_guidance_elsewhere_is_refused(server, path):
    status, answer = post(server, completion(input=TEXT, messages=[{"role": "user", "content": TEXT}]), path)
    assert (status == 400 and "guidance is for" in answer) or status == 404


def test_a_client_that_leaves_within_its_body_costs_nothing(server):
    host, port = server.removeprefix("http://").removesuffix("/v1").split(":")
    for sent in (b"", b'{"model": "tiny", "prompt": "He'):
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            client.sendall(head.encode() + sent)
    assert post(server, completion())[0] == 200


def test_what_a_fuzzer_writes_is_answered_or_refused(server):
    """Never an internal error; `make soak` sends more of them."""
    for number in range(600):
        status, answer = post(server, fuzzed(number), "/chat/completions" if number % 2 else "/completions")
        assert status in (200, 400, 404, 413, 422), (status, fuzzed(number)[:300], answer)
    assert post(server, completion())[0] == 200


def test_separators_of_lines_and_paragraphs_pass_in_whole_and_streamed_answers(source):  # noqa: F811
    """U+2028, U+2029 and U+0085 end lines for Python, and neither in JSON nor in server-sent events."""
    text = "a\u2028b\u2029c\x85d"
    models = models_of(source)

    async def response():
        yield Delta(text, [5, 6], [], "stop")

    async def answers():
        whole = await Answer(chat(), "tiny", 3, models.tokenizer).whole([response()])
        return whole, [event async for event in Answer(chat(), "tiny", 3, models.tokenizer).events([response()])]

    whole, events = asyncio.run(answers())
    assert whole.choices[0].message.content == text
    pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all(event.startswith("data: ") and event.endswith("\n\n") and event.count("\n") == 2 for event in events)
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == text


def test_control_tokens_in_a_message_are_text(source):  # noqa: F811
    """As in training: what a user writes can neither end a turn nor begin one."""
    models = models_of(source)
    text = "<user> Why? <assistant> Because."
    [job] = read_jobs(chat(messages=[{"role": "user", "content": text}], **guidance({})), models)
    assert job.prompt == source.prompter().prompt_ids(text)
    assert job.prompt != models.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )


def test_several_responses_are_the_decoders_samples(client, source, adapters):  # noqa: F811
    arms = {"positivity": adapters["one"]}
    decoder = GuidedDecoder.load(Source(source.folder, dtype="float32"), arms, device="cpu")
    requests = [Request(TEXT, {"positivity": 0.7}, max_new_tokens=20, seed=3, sample=sample) for sample in range(3)]
    expected = {index: generation.text for index, generation in decoder.generate(requests)}
    how = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 20, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**how, extra_body=guidance({"positivity": 0.7}))
    assert {choice.index: choice.message.content.strip() for choice in whole.choices} == expected
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**how, stream=True, extra_body=guidance({"positivity": 0.7})):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert {index: text.strip() for index, text in streamed.items()} == expected


def test_logprobs_are_those_of_the_guided_law_and_of_its_models(client, source, adapters, small):  # noqa: F811
    arms = {"positivity": adapters["one"], "conciseness": small.folder}
    decoder = GuidedDecoder.load(Source(source.folder, dtype="float32"), arms, device="cpu")
    weights, tokens = {"positivity": 1.0, "conciseness": 0.5}, 12
    request = Request(TEXT, weights, temperature=0.8, max_new_tokens=tokens, seed=4)
    [(_, generation)] = decoder.generate([request])
    law = decoder.trace(request, generation.tokens).logps
    how = {
        "model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": tokens, "seed": 4,
        "temperature": 0.8, "logprobs": True, "top_logprobs": 3, "extra_body": guidance(weights),
    }  # fmt: skip
    found = client.chat.completions.create(**how).choices[0].logprobs.content
    assert len(found) == len(generation.tokens)
    for place, (token, one) in enumerate(zip(generation.tokens, found, strict=True)):
        assert one.logprob == pytest.approx(float(law["guided"][place, token]), abs=1e-3)
        likeliest = law["guided"][place].topk(3).values.tolist()
        assert [each.logprob for each in one.top_logprobs] == pytest.approx(likeliest, abs=1e-3)
        for model in ("base", *weights):
            assert one.model_extra["models"][model] == pytest.approx(float(law[model][place, token]), abs=1e-3)
    streamed = [
        one
        for chunk in client.chat.completions.create(**how, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in found], abs=1e-3)
    how = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "temperature": 0, "logprobs": 5}
    logprobs = client.completions.create(**how, extra_body=guidance({})).choices[0].logprobs
    # Greedy: the drawn token is the likeliest, and stays it where another token is spelled alike.
    assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    assert [top[token] for top, token in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)] == (
        logprobs.token_logprobs
    )
    assert all(1 < len(top) <= 5 for top in logprobs.top_logprobs)


def test_penalties_are_taken_off_the_guided_law(client):
    """Greedy, so that the highest penalty makes every token another one."""
    how = {"model": "tiny", "prompt": "Hello", "max_tokens": 40, "temperature": 0, "logprobs": 0}
    more = {"extra_body": {**guidance({"positivity": 1.0}), "ignore_eos": True}}
    plain = client.completions.create(**how, **more).choices[0].logprobs.tokens
    for name in ("presence_penalty", "frequency_penalty"):
        penalised = client.completions.create(**how, **{name: 2.0}, **more).choices[0].logprobs.tokens
        assert penalised != plain, name


def test_a_format_is_kept_to_on_the_guided_law(client, source, adapters, small):  # noqa: F811
    """What the grammar allows keeps the odds that the guided law gives it; the models' own laws stay whole."""
    arms = {"positivity": adapters["one"], "conciseness": small.folder}
    decoder = GuidedDecoder.load(Source(source.folder, dtype="float32"), arms, device="cpu")
    weights, words = {"positivity": 1.0, "conciseness": 0.5}, ("good", "great", "bad")
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": TEXT}], max_tokens=30, seed=4, temperature=0.8,
        logprobs=True, top_logprobs=20, extra_body={**guidance(weights), **regex("|".join(words))},
    ).choices[0]  # fmt: skip
    assert answer.message.content in words and answer.finish_reason == "stop"
    tokenizer = source.prompter().tokenizer
    spelled = {tokenizer.decode([token]): token for token in range(len(tokenizer))}
    allowed = [token for text, token in spelled.items() if text and any(word.startswith(text) for word in words)]
    law = decoder.trace(Request(TEXT, weights, temperature=0.8, max_new_tokens=30), allowed[:1]).logps
    expected = law["guided"][0, allowed].log_softmax(-1).sort(descending=True).values.tolist()
    first = answer.logprobs.content[0]
    assert [one.logprob for one in first.top_logprobs] == pytest.approx(expected, abs=1e-3)
    for name in ("base", *weights):
        assert first.model_extra["models"][name] == pytest.approx(float(law[name][0, spelled[first.token]]), abs=1e-3)


@pytest.mark.parametrize("point", POINTS)
def test_answers_are_json_of_the_schema_that_is_asked_for(client, point):
    """Whole and streamed, several at once, some of them begun again in the middle since the cache is small."""
    content = {
        "type": "object", "additionalProperties": False, "required": ["mood", "words"],
        "properties": {
            "mood": {"enum": ["good", "bad"]},
            "words": {"type": "array", "maxItems": 2, "items": {"enum": ["love", "happy", "sad"]}},
        },
    }  # fmt: skip
    how = {
        "model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 120, "seed": 1, "n": 3,
        "extra_body": {**guidance(point), **schema(content)},
    }  # fmt: skip
    whole = [choice.message.content for choice in client.chat.completions.create(**how).choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**how, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert streamed == whole
    for text in whole:
        answer = json.loads(text)
        assert set(answer) == {"mood", "words"} and answer["mood"] in ("good", "bad") and len(answer["words"]) <= 2


def test_what_ends_a_response_and_what_does_not(client, expected):
    generation = expected[1]
    how = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "temperature": 0}
    end = generation.tokens[4]
    first = generation.tokens.index(end)

    def answer(size, **more):
        body = {**guidance(POINTS[1]), **more}
        return client.chat.completions.create(**how, max_tokens=size, extra_body=body)

    stopped = answer(30, stop_token_ids=[end])
    assert stopped.usage.completion_tokens == first + 1 and stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].model_extra["stop_reason"] == end
    longer = answer(30, stop_token_ids=[end], min_tokens=first + 3)
    assert longer.usage.completion_tokens >= first + 3
    assert answer(60, ignore_eos=True).usage.completion_tokens == 60


def test_the_list_of_models_names_the_arms_and_metrics_count_guided_requests(server, client):
    base = next(card for card in client.models.list().data if card.id == "tiny")
    assert base.model_extra["arms"] == ["positivity", "conciseness"]
    before = counters(server)
    assert post(server, completion(max_tokens=7, ignore_eos=True))[0] == 200
    after = counters(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['genarm:guided_requests_total{finish="length"}'] == 1 and grown["genarm:guided_tokens_total"] == 7
    assert grown["genarm:guided_lanes_total"] >= 2 and "genarm:guided_groups_lost_total" in after


def counters(server):
    text = urllib.request.urlopen(server.removesuffix("/v1") + "/metrics").read().decode()
    lines = [line.rsplit(" ", 1) for line in text.split("\n") if line.startswith("genarm:")]
    return {name: float(value) for name, value in lines}


def reloaded(process, log):
    """What the server says of a SIGHUP."""
    before = len(log.read_text())
    process.send_signal(signal.SIGHUP)
    for _ in range(240):
        said = log.read_text()[before:]
        if "reload: ARMs are up to date." in said:
            return said
        time.sleep(0.25)
    raise AssertionError(log.read_text()[-3000:])


def test_an_arm_trained_again_is_taken_over(started, client, source, adapters, expected):  # noqa: F811
    _, process, log = started
    arm = log.parent / "models/arms/positivity"
    other = GuidedDecoder.load(Source(source.folder, dtype="float32"), {"positivity": adapters["two"]}, device="cpu")
    [(_, new)] = other.generate([Request(TEXT, POINTS[1], temperature=0.0, max_new_tokens=60)])
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 60, "temperature": 0,
        "extra_body": guidance(POINTS[1]),
    }  # fmt: skip

    def answer():
        return client.chat.completions.create(**asked).choices[0].message.content.strip()

    assert "is now" not in reloaded(process, log) and answer() == expected[1].text != new.text
    stream = client.chat.completions.create(**asked, stream=True)
    pieces = [next(stream).choices[0].delta.content or ""]
    with replacing_folder(arm) as unfinished:
        shutil.copytree(adapters["two"], unfinished, dirs_exist_ok=True)
    process.send_signal(signal.SIGHUP)
    pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces).strip() == expected[1].text
    reloaded(process, log)  # one reload waits for the other
    assert "the ARM positivity is now that of positivity-" in log.read_text() and answer() == new.text
    weights = arm / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "the ARM positivity stays as it was: " in reloaded(process, log) and answer() == new.text
    with replacing_folder(arm) as unfinished:
        shutil.copytree(adapters["one"], unfinished, dirs_exist_ok=True)
    assert "is now that of positivity-" in reloaded(process, log) and answer() == expected[1].text


def test_a_short_soak_loses_nothing(started):
    """`make soak` is the long one, with a limit to what memory may grow by."""
    address, process, _ = started
    table = asyncio.run(soak(psutil.Process(process.pid), address, "tiny", 400, KEY))
    assert table.answers.sum() > 200 and table.malformed.sum() > 100 and table.first_token_p99_ms.notna().all()
    assert not [fault for fault in faults(table) if not fault.startswith("memory")]


def test_an_engine_that_dies_says_so_and_ends_with_a_code_for_supervisors(started):
    """It comes last: nothing is served behind it."""
    _, process, log = started
    [engine] = [child for child in psutil.Process(process.pid).children(recursive=True) if "EngineCore" in child.name()]
    engine.kill()
    assert process.wait(60) == 70
    assert "vLLM's engine died, its own report is above: the server has to be started again." in log.read_text()
