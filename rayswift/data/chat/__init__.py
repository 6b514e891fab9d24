"""A standard row as a conversation, laid out by a template: families, derived templates, agents, loss weights."""
