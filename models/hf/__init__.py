"""Exchange with Hugging Face: checkpoints of the Llama family and of flash-linear-attention in, any model of the zoo out.

Importing this package does not import transformers; `LociForCausalLM` and `LociConfig` do, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.hf.exchange import export_run, import_run, load_pretrained

if TYPE_CHECKING:
    from models.hf.modeling import LociConfig, LociForCausalLM

__all__ = ["LociConfig", "LociForCausalLM", "export_run", "import_run", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name in ("LociConfig", "LociForCausalLM"):
        from models.hf import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
