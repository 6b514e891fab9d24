"""``rayswift app``: a chat page in the browser over an OpenAI endpoint.

In: an endpoint (its own deployment, or ``--base_url``). Out: a Gradio page on 127.0.0.1. ``command`` starts and stops
it, ``page`` is what one sees, ``messages`` turns Gradio's conversation into OpenAI's, ``texts.json`` holds the words of
the page in both languages. Only ``page`` imports Gradio.
"""

from rayswift.chat_page.command import app

__all__ = ["app"]
