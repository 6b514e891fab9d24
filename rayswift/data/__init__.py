"""From files to token blocks.

In: dataset ids and files (`sources`, `registry`). On the way: standard rows (`rows`), conversations laid out by a
`templates` family or the model's own chat template (`jinja_template`), token ids and labels (`encoding`). Out: Ray
Data blocks of `input_ids` and `labels`, in an order that depends only on files and seed (`pipeline`).
Importing this package or `templates` loads neither torch nor ray nor transformers.
"""
