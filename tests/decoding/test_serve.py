"""vLLM's server with guidance, and the stock openai client; runs in the environment of `make vllm`."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from omegaconf import OmegaConf
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")
from openai import AsyncOpenAI, BadRequestError, InternalServerError, OpenAI

from pipeline.decoding.backbone import SideBackbone
from pipeline.decoding.decoder import GuidedDecoder
from pipeline.decoding.request import Request, until_stop
from pipeline.decoding.vllm import guides
from pipeline.decoding.vllm.middleware import Guided, _refuse, _respond, _start, _Text
from pipeline.decoding.vllm.serve import _chat_template
from pipeline.decoding.vllm.settings import ends_and_marks
from pipeline.models.loading import Source
from tests.decoding.test_vllm import adapters, small, source  # noqa: F401
from tests.tiny import ROOT

POINTS = [{}, {"positivity": 1.0}, {"conciseness": 0.7}, {"positivity": 1.0, "conciseness": 0.5}]
TEXT = "Why?"


@pytest.fixture(scope="module")
def server(source, adapters, small, tmp_path_factory):  # noqa: F811
    """The address of a server: one ARM is a lane, the other a model of its own.

    Its cache holds few requests at once, so that lanes are preempted under load.
    """
    from hydra import compose, initialize_config_dir

    home = tmp_path_factory.mktemp("project")
    for objective, folder in (("positivity", adapters["one"]), ("conciseness", small.folder)):
        shutil.copytree(folder, home / "models/arms" / objective)
    shutil.copytree(source.folder, home / "models/tiny")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["experiment=smoke", "+models.tiny.dtype=float32"])
    OmegaConf.save(config, home / "params.yaml", resolve=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--max-model-len", "256", "--max-num-batched-tokens", "1024", "--block-size", "32"]
    flags += ["--num-gpu-blocks-override", "14", "--no-enable-prefix-caching"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.decoding.vllm.serve", "--port", str(port), "--groups", "6", "--", *flags],
            cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=log, stderr=log,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}/v1"
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/models")
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    assert process.poll() is None, (home / "log").read_text()[-3000:]
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture
def client(server):
    return OpenAI(base_url=server, api_key="none", timeout=120)


@pytest.fixture(scope="module")
def expected(source, adapters, small):  # noqa: F811
    """Greedy texts of each point, by the decoder."""
    arms = {"positivity": adapters["one"], "conciseness": small.folder}
    decoder = GuidedDecoder.load(Source(source.folder, dtype="float32"), arms, device="cpu")
    requests = [Request(TEXT, weights, temperature=0.0, max_new_tokens=60) for weights in POINTS]
    return dict(decoder.generate(requests))


def guidance(weights):
    return {"guidance": {"weights": weights}}


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
        text, told, rest = _Text(tokenizer, stops), "", list(tokens)
        for size in sizes:
            if not text.stopped:
                told += text.grown(rest[:size], False)
                del rest[:size]
                assert all(stop not in told for stop in stops)
        if not text.stopped:
            told += text.grown(rest, True)
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
        (guidance([1.0]), "guidance has the form"),
        ({**guidance({}), "logprobs": True}, "cannot have logprobs"),
        ({**guidance({}), "presence_penalty": 1.0}, "cannot have presence_penalty"),
        (guidance({"positivity": "much"}), "guidance has the form"),
        ({**guidance({}), "model": "positivity"}, "its weights name the ARMs"),
        ({**guidance({}), "top_p": 3.0}, "out of its range"),
        ({**guidance({}), "max_tokens": 5000}, "5000"),
        ({"guidance": {"weights": {}, "gate": 1.0}}, "guidance has the form"),
        (guidance({"positivity": 10**400}), "guidance has the form"),
        ({**guidance({}), "temperature": 10**400}, "too large"),
        ({**guidance({}), "stream_options": True}, "stream_options has the form"),
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


def test_a_law_that_is_no_number_is_an_error(server):
    client = OpenAI(base_url=server, api_key="none", timeout=120, max_retries=0)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 8}
    with pytest.raises(InternalServerError, match="not finite"):
        client.chat.completions.create(**asked, extra_body=guidance({"positivity": 1e38}))
    assert client.chat.completions.create(**asked, extra_body=guidance({"positivity": 1.0})).choices


class Behind:
    """The application behind the middleware: it counts a prompt as one token, and answers lanes as it is told."""

    def __init__(self, refused=()):
        self.lanes, self._refused = [], refused

    async def __call__(self, scope, receive, send):
        asked = json.loads((await receive())["body"])
        if scope["path"] == "/tokenize":
            await _respond(send, 200, json.dumps({"tokens": [5], "max_model_len": 512}).encode())
            return
        self.lanes.append(asked)
        if asked["model"] in self._refused:
            await _refuse(send, "no such model", 404)
        elif self._refused:
            await receive()  # waits for the others until it is taken back
        else:
            await send(_start(200, b"text/event-stream"))
            said = {"choices": [{"finish_reason": "length", "token_ids": [40]}]}
            await send({"type": "http.response.body", "body": f"data: {json.dumps(said)}\n\n".encode()})


def answered(monkeypatch, base, behind, body, beside=()):
    """Status and answer to a chat request of the middleware in front of an application."""
    told = {
        "base": "tiny", "folder": str(base.folder), "groups": 2, "adapters": ["positivity"],
        "guides": guides.told(beside), "marks": ends_and_marks(base)[1], "template": base.template,
    }  # fmt: skip
    monkeypatch.setenv("GENARM_SERVE", json.dumps(told))
    sent = []
    received = iter([{"type": "http.request", "body": json.dumps({"model": "tiny", **body}).encode()}])

    async def receive():
        for message in received:
            return message
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(asyncio.wait_for(Guided(behind)(scope, receive, send), 20))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_when_a_lane_is_refused_the_answer_does_not_wait_for_it(monkeypatch, source):  # noqa: F811
    body = {"messages": [{"role": "user", "content": TEXT}], **guidance({"positivity": 1.0})}
    status, said = answered(monkeypatch, source, Behind(refused=["positivity"]), body)
    assert status == 404 and said["error"]["message"] == "no such model"


def test_what_a_guide_has_no_room_for_is_refused(monkeypatch, source, small):  # noqa: F811
    """The base reads 512 tokens, the guide 256: behind them it would go on with wrong positions."""
    body = {"messages": [{"role": "user", "content": TEXT}], **guidance({"small": 1.0})}
    beside, behind = [SideBackbone(small, name="small")], Behind()
    status, said = answered(monkeypatch, source, behind, {**body, "max_tokens": 256}, beside)
    assert status == 400 and "a guide has room for" in said["error"]["message"] and not behind.lanes
    status, _ = answered(monkeypatch, source, behind, body, beside)
    assert status == 200 and behind.lanes[0]["max_tokens"] == 256 - len(small.prompter().prompt_ids(TEXT))


def test_a_base_with_a_template_is_asked_as_everywhere_else(monkeypatch, source, tmp_path):  # noqa: F811
    """With the token that begins a text, and refused more than the template has room for."""
    shutil.copytree(source.folder, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    pair = [("<user>", tokenizer.convert_tokens_to_ids("<user>"))]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<user> $A", special_tokens=pair)
    tokenizer.save_pretrained(tmp_path / "base")
    base = Source(tmp_path / "base", template="Q: {prompt}\nA:")
    wanted = base.prompter().prompt_ids(TEXT)
    assert wanted[0] == pair[0][1]
    one = [{"role": "user", "content": TEXT}]
    several = [{"role": "system", "content": "Be brief."}, *one]
    told = {"chat_template": _chat_template(base.prompter()), "return_dict": False}
    assert base.prompter().tokenizer.apply_chat_template(one, **told) == wanted
    with pytest.raises(TemplateError, match="asked one message"):
        base.prompter().tokenizer.apply_chat_template(several, **told)
    behind = Behind()
    assert answered(monkeypatch, base, behind, {"messages": one, **guidance({})})[0] == 200
    assert behind.lanes[0]["prompt"] == wanted
    status, said = answered(monkeypatch, base, behind, {"messages": several, **guidance({})})
    assert status == 400 and "has room for one turn" in said["error"]["message"]


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
        client = AsyncOpenAI(base_url=server, api_key="none", timeout=300)
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


def test_a_plain_curl_body_works(server):
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, **guidance({"positivity": 1.0})}
    asked = urllib.request.Request(
        f"{server}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    said = json.loads(urllib.request.urlopen(asked).read())
    assert said["object"] == "text_completion" and said["choices"][0]["text"]
