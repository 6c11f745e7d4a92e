"""Guided decoding inside vLLM: needs the environment of `make vllm`, and nothing else imports it.

`decoder` is the face of `GuidedDecoder`, `serve` and `middleware` are the OpenAI-compatible server; `processor`,
`scheduler`, `platform` and `lora` are what vLLM itself loads, each by its name. This file imports none of them, since
vLLM loads some before it is ready for the others.
"""
