"""Chat templates by name: Jinja texts that put messages in a published format.

Each takes ``messages`` (a list of {role, content}) and ``add_generation_prompt``, and may take the
names of special tokens as transformers passes them.
"""

from __future__ import annotations

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{%- set lead = namespace(text='') -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set lead.text = message['content'] | trim + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + lead.text + message['content'] | trim + ' [/INST]' -}}
{%- set lead.text = '' -%}
{%- else -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] | trim + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' -}}
{%- else -%}
{{- '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}
"""

_EXAONE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '[|user|]' + message['content'] + '\\n' -}}
{%- else -%}
{{- '[|' + message['role'] + '|]' + message['content'] + '[|endofturn|]\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[|assistant|]' -}}
{%- endif -%}
"""

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
