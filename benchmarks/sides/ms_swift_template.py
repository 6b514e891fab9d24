"""ms-swift plugin: its ``chatml`` template, ending a conversation as RaySwift and ms-swift 3.3 do.

ms-swift 4 ends it with ``<|im_end|>`` and a newline, one more trained token. Without that, ids can be compared.
"""

from swift.template.register import register_template
from swift.template.templates.utils import ChatmlTemplateMeta

register_template(ChatmlTemplateMeta("chatml_same_end", suffix=["<|im_end|>"]))
