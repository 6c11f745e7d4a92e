"""Memory that really runs out, as the device's own allocator says it."""

import pytest
import torch

from pipeline.config.errors import UserError
from pipeline.decoding.decoder import GuidedDecoder, Request
from tests.gpu.rows import changed
from tests.reference import POINTS, requests, run


class Exhausting:
    """Asks for more memory than there is, as long as more than `limit` rows of `shortest` tokens go through a module.

    The module is called by Python: not inside a step that is replayed, and `capturing` while it is captured only.
    """

    def __init__(self, module, device, limit, shortest=1, capturing=False):
        total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**50
        self.capturing = capturing
        self.size, self.device, self.limit, self.shortest, self.faults = total + 2**30, device, limit, shortest, 0
        module.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, _module, given, named):
        first = given[0] if given else named["input_ids"]
        if self.capturing and not torch.cuda.is_current_stream_capturing():
            return
        if len(first) > self.limit and first.shape[1] >= self.shortest:
            self.faults += 1
            torch.empty(self.size, dtype=torch.uint8, device=self.device)


def test_an_exhausted_allocator_halves_the_batch_once_and_says_so(backbone_of, device):
    decoder, wanted = GuidedDecoder(backbone_of(), batch_size=8), requests(points=POINTS[:2])
    expected = run(decoder, wanted)
    head = decoder._backbones[0].adapted.model.get_output_embeddings()
    full = Exhausting(head, device, limit=8)  # eight rows are twelve block rows
    with pytest.warns(UserWarning, match="half the batch, 4 rows"):
        assert changed(run(decoder, wanted), expected, "half the batch") <= 1
    assert full.faults == 1
    full.limit = 1
    with pytest.raises(UserError, match=r"batch of 4 rows: lower decoding\.batch_size"):
        run(decoder, wanted)


def test_memory_that_runs_out_while_prompts_are_read_halves_the_batch(backbone_of, device, static):
    decoder = GuidedDecoder(backbone_of(static=static), batch_size=8)
    wanted = [Request(f"Why {n}?", {"one": 1.0}, max_new_tokens=2 + n % 5) for n in range(12)]
    expected = run(decoder, wanted)
    full = Exhausting(decoder._backbones[0].adapted.model.base_model, device, limit=8, shortest=2)
    with pytest.warns(UserWarning, match="half the batch, 4 rows"):
        assert changed(run(decoder, wanted), expected, "half the batch") <= 1
    assert full.faults == 1


def test_memory_that_runs_out_while_a_step_is_captured_halves_the_batch(backbone_of, cuda):
    decoder = GuidedDecoder(backbone_of(static=True), batch_size=8)
    wanted = requests(points=POINTS[:2])
    expected = run(decoder, wanted)
    full = Exhausting(decoder._backbones[0].adapted.model.get_output_embeddings(), cuda, limit=8, capturing=True)
    decoder._backbones[0].idle.clear()  # whose step has been captured
    with pytest.warns(UserWarning, match="half the batch, 4 rows"):
        assert changed(run(decoder, wanted), expected, "half the batch") <= 1
    assert full.faults == 1
