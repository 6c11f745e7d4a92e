"""ARMs that were trained again, taken over by a running server: `kill -HUP <its process>`.

vLLM identifies an adapter by a number and reads its folder again whenever it has to: what an adapter is must not change
under it. So the engine is given copies, one for each version of an ARM, whose folders are named by their digests.
"""

import asyncio
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from pipeline.config.errors import UserError
from pipeline.decoding.vllm.response import Responder
from pipeline.decoding.vllm.settings import check_adapters, rank_of, version_of
from pipeline.models.loading import Source
from pipeline.models.mixtures import mixture_of


class Reload:
    """Exchanges the adapters of a server for what their folders hold now.

    Responses under way end with the ARMs they began with, and new ones wait for that. An ARM that cannot be loaded
    leaves the former one in its place. ARMs that are models of their own stay: a new one needs a new server.

    Args:
        responder: guides with the adapters.
        models: vLLM's list of models, in which each adapter is one.
        folders: of the ARMs, where training writes.
        versions: where copies are.
        base: what the ARMs are adapters of.
        rank: the most that the engine has room for.
    """

    def __init__(
        self, responder: Responder, models: Any, folders: Mapping[str, Path], versions: Path, base: Source, rank: int
    ) -> None:  # fmt: skip
        self._responder, self._models, self._folders, self._versions = responder, models, folders, versions
        self._base, self._rank, self._one = base, rank, asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def on_hangup(self) -> None:
        """Run at every SIGHUP."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._start)

    def _start(self) -> None:
        task = asyncio.create_task(self.run())
        self._tasks.add(task)  # the loop itself holds no task
        task.add_done_callback(self._tasks.discard)

    async def run(self) -> None:
        """Exchange what has changed, and say so in the log."""
        async with self._one:
            changed: dict[str, dict[str, LoRARequest]] = {}  # those of one mixture together
            for name, folder in self._folders.items():
                try:
                    path = await asyncio.to_thread(self._checked, name, folder)
                except Exception as error:  # a server goes on with what it has
                    _say(f"the ARM {name} stays as it was: {error}")
                    continue
                if str(path) != self._models.lora_requests[name].lora_path:
                    adapter = LoRARequest(name, self._models.lora_id_counter.inc(1), str(path))
                    changed.setdefault(mixture_of(path) or name, {})[name] = adapter
            for adapters in changed.values():
                names = ", ".join(adapters)
                try:
                    await self._responder.exchange(adapters)
                except Exception as error:
                    _say(f"the ARM {names} stays as it was: {error}")
                    continue
                self._models.lora_requests |= adapters
                for name, adapter in adapters.items():
                    _say(f"the ARM {name} is now that of {Path(adapter.lora_path).name}")
            _say("ARMs are up to date")

    def _checked(self, name: str, folder: Path) -> Path:
        """The version that a folder holds, fit for the engine.

        Raises:
            UserError: it is no adapter of the base, or of a higher rank than the server was started with.
        """
        copy = version_of(name, folder, self._versions)
        check_adapters(self._base.prompter(), self._base, {name: copy})
        if (rank := rank_of(name, copy)) > self._rank:
            raise UserError(f"its rank needs room for {rank}, and the server has {self._rank}: start it again.")
        return copy


def _say(what: str) -> None:
    print(f"reload: {what}.", file=sys.stderr, flush=True)
