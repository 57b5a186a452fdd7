"""GKA in Hugging Face ``transformers`` (``gka-ops[transformers]``).

Importing this package registers ``model_type`` "gka", so that ``AutoConfig``, ``AutoModel`` and
``AutoModelForCausalLM`` know :class:`GKAConfig`, :class:`GKAModel` and :class:`GKAForCausalLM`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gka_ops.hf.attention import GKAAttention
from gka_ops.hf.cache import GKACache, GKACacheLayer
from gka_ops.hf.model import GKAConfig, GKAForCausalLM, GKAModel
from gka_ops.hf.replace import replace_attention

AutoConfig.register(GKAConfig.model_type, GKAConfig, exist_ok=True)
AutoModel.register(GKAConfig, GKAModel, exist_ok=True)
AutoModelForCausalLM.register(GKAConfig, GKAForCausalLM, exist_ok=True)

__all__ = [
    "GKAAttention",
    "GKACache",
    "GKACacheLayer",
    "GKAConfig",
    "GKAForCausalLM",
    "GKAModel",
    "replace_attention",
]
