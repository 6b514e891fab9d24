"""``rayswift status``: what a Ray cluster has and does, for a person, as JSON, or as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rayswift.arguments.help import Parser
from rayswift.cli.jobs import ADDRESS_HELP, as_user_error, connect_client
from rayswift.cli.status_text import status_lines
from rayswift.console import say
from rayswift.errors import UserError


def status_parser() -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog="rayswift status", allow_abbrev=False,
        description="Show what a Ray cluster has and does: nodes, training runs, deployments, jobs.",
    )  # fmt: skip
    parser.add_argument("--address", metavar="URL", help=ADDRESS_HELP)
    parser.add_argument("--json", action="store_true", help="as one JSON object, with the rows of the runs' logs")
    parser.add_argument("--html", metavar="FILE", help="write one page that needs nothing else: curves and timeline")
    return parser


def status(argv: Sequence[str]) -> int:
    """Run ``rayswift status ...``. Returns 0."""
    options = status_parser().parse_args(list(argv))
    client = connect_client(options.address)
    from rayswift.cli.cluster_state import cluster_state

    with as_user_error("the cluster does not answer"):
        state = cluster_state(client, whole_logs=bool(options.html or options.json))
    if options.html:
        from rayswift.cli.status_page import status_page

        try:
            with open(options.html, "w", encoding="utf-8") as file:
                file.write(status_page(state))
        except OSError as error:
            raise UserError(f"--html {options.html}: cannot be written ({error.strerror})") from None
        say(f"written: {options.html}")
    elif options.json:
        say(json.dumps(state, ensure_ascii=False))
    else:
        for line in status_lines(state):
            say(line)
    return 0
