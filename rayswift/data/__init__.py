"""From files to token rows.

In: dataset ids and files (`sources`, `registry`). On the way: standard rows (`rows`), conversations laid out by a
`templates` family or the model's own chat template (`jinja_template`), token ids and labels (`encoding`), packs
(`packing`). Out: token rows in memory-mapped files (`pipeline`, `token_cache`, `token_rows`) or as a Ray Data stream
(`streaming`), in an order that depends only on files and seed.
Importing this package or `templates` loads neither torch nor ray nor transformers.
"""
