"""``rayswift data preview``: what becomes of a dataset's first rows on their way to the model, printed or as a page."""

from __future__ import annotations

import logging
import os
import sys

from rayswift.arguments import PreviewArguments
from rayswift.data.names import resolve_datasets
from rayswift.data.preview.collect import collect, make_encoder
from rayswift.data.preview.page import render_page
from rayswift.data.preview.text import print_preview
from rayswift.errors import UserError
from rayswift.redaction import mask_known

logger = logging.getLogger("rayswift.data.preview")


def preview(args: PreviewArguments) -> None:
    """Print a preview of every dataset, and write it as a page if ``--output`` names one.

    Raises:
        UserError: unknown dataset or model, a file that is broken among the rows read (names file:line), a dataset
            without a usable row, a page that cannot be written.
    """
    if args.output:
        folder = os.path.dirname(os.path.abspath(args.output))
        if not os.path.isdir(folder):
            raise UserError(f"--output {args.output}: no folder {folder}; make it first")
    datasets = resolve_datasets(args)
    encoder = make_encoder(args) if args.model else None
    previews = [collect(dataset, encoder, args) for dataset in [*datasets.train, *datasets.val]]
    for shown in previews:
        print_preview(shown, sys.stdout)
    if args.output:
        try:
            # What is no text (half a surrogate pair) is shown as its number.
            with open(args.output, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(mask_known(render_page(previews, args.model)))
        except OSError as error:
            raise UserError(f"--output {args.output}: cannot be written ({error.strerror})") from None
        logger.info("%s: written, open it in a browser", args.output)
