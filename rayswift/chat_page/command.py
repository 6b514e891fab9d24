"""Start the page and what it talks to; stop both at the end."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware

from rayswift import private
from rayswift.errors import UserError
from rayswift.generate.media import media_of
from rayswift.generate.types import SamplingParams
from rayswift.serve.gateway.cross_origin import OwnPages
from rayswift.serve.ports import require_free_port
from rayswift.serve.request_body import MAX_BODY_BYTES

if TYPE_CHECKING:
    from rayswift.arguments import AppArguments

#: The browser then asks no other server: neither for a picture that an answer names, nor to share an upload.
_SOURCES = "'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
ONLY_THIS_SERVER = f'<meta http-equiv="Content-Security-Policy" content="default-src {_SOURCES}">'
#: Bytes of a file, which goes to the model as base64 in a body with the rest of the conversation.
LARGEST_UPLOAD = MAX_BODY_BYTES * 2 // 3

logger = logging.getLogger("rayswift.chat_page")


def app(args: AppArguments) -> None:
    """Serve the chat page at ``--server_name:--server_port`` until Ctrl-C, over ``--base_url`` or an own deployment.

    Raises:
        UserError: Gradio is missing, the port is taken, or the model cannot be served or reached.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("rayswift app needs Gradio, which is not installed: pip install 'rayswift[app]'")
    require_free_port(args.server_name, args.server_port, "--server_port")
    # Before Gradio is imported: the page tells nobody that it exists.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from rayswift.generate.model_spec import model_specs
    from rayswift.generate.sources import open_endpoint
    from rayswift.serve.running import running_deployment

    specs = [] if args.base_url else model_specs(args)
    with open_endpoint(args, specs, running_deployment) as engine:
        from rayswift.chat_page.page import build_page

        page = build_page(
            engine,
            SamplingParams.from_arguments(args),
            title=args.studio_title or engine.model,
            lang=args.lang,
            system=args.system,
            media=media_offered(args, specs[0].model if specs else None),
            stream=args.stream is not False,
        )
        serve(page, args)


def media_offered(args: AppArguments, model_dir: str | None) -> tuple[str, ...]:
    """Which files can be uploaded: what the model's configuration says, unless ``--is_multimodal`` does.

    ``model_dir``: the served model's folder, where this machine has it.
    """
    if args.is_multimodal is False:
        return ()
    found: tuple[str, ...] = ()
    if model_dir is not None and os.path.isdir(model_dir):
        from rayswift.modeling.loading import read_config

        found = media_of(read_config(model_dir))
    return found or (("image",) if args.is_multimodal else ())


def serve(page: Any, args: AppArguments) -> None:
    """Show the page until Ctrl-C or SIGTERM."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    private.replace_http_protocol("rayswift.serve.connections:KeylessConnection")
    # Gradio's link comes with the link's name.
    own = Middleware(OwnPages, origins=args.allowed_origins, host=None if args.share else args.server_name)
    _, address, public = page.launch(
        server_name=args.server_name,
        server_port=args.server_port,
        share=args.share,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        footer_links=[],
        head=ONLY_THIS_SERVER,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ssl_verify=False,  # Gradio asks its own page whether it is there, by 127.0.0.1: no certificate is for that
        max_file_size=LARGEST_UPLOAD,
        app_kwargs={"middleware": [own]},
    )
    logger.info("The page is at %s (Ctrl-C stops it)", public or address)
    try:
        stopped.wait()
    except KeyboardInterrupt:
        logger.info("stopping")
    finally:
        page.close(verbose=False)
