"""``rayswift data preview``: a dataset at every stage of its way to the model, as text or as a page."""
