"""vLLM's CPU platform with our class to apply adapters; vLLM finds it by entry point where the project is installed.

Nothing of vLLM that asks for its platform may be imported here: this is loaded while it makes up its mind.
"""

from vllm.platforms import cpu_platform_plugin
from vllm.platforms.cpu import CpuPlatform


class LanePlatform(CpuPlatform):
    """The stock platform but for one name."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """The class that applies adapters."""
        return "pipeline.decoding.vllm.lora.LaneLora"


def plugin() -> str | None:
    """The name of the platform where vLLM runs on a CPU; None leaves every other platform as it is."""
    return "pipeline.decoding.vllm.platform.LanePlatform" if cpu_platform_plugin() else None
