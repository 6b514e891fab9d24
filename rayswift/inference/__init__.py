"""``rayswift infer``: a conversation in the terminal, or answers to a dataset's rows in a result file."""
