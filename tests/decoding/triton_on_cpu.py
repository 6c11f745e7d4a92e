"""vLLM's Model Runner V2 on a CPU: Triton's kernels run in its own interpreter, line by line in NumPy.

vLLM has that runner for CPUs too, but asks for a Triton with a backend for them, which no wheel has. The interpreter
(`TRITON_INTERPRET=1`) needs none, and is slow: enough for tiny models. To be imported before vLLM.
"""

from types import SimpleNamespace

from triton.backends import backends

backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False)))
