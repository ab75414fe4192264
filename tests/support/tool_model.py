"""A model that knows tools, for tests: the demo model with a chat template in the form that Qwen and Hermes use.

The demo model has not learned to call functions; with a required `tool_choice` the engine holds it to a call.
"""

from __future__ import annotations

from pathlib import Path

import gguf
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

from sollol_nb.models.files import DEMO_MODEL_PATH

TEMPLATE = """{% if tools %}<|im_start|>system
Call functions with <tool_call>{"name": ..., "arguments": ...}</tool_call>:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_tool_model(path: Path, template: str = TEMPLATE) -> Path:
    """Write the demo model with a chat template that uses tools; returns the path."""
    reader = gguf.GGUFReader(DEMO_MODEL_PATH)
    writer = gguf.GGUFWriter(path, arch="llama", use_temp_file=False)
    key = gguf.Keys.Tokenizer.CHAT_TEMPLATE
    copy_with_new_metadata(reader, writer, {key: MetadataDetails(gguf.GGUFValueType.STRING, template)}, [])
    return path
