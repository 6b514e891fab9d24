"""The door of a deployment: keys, limits, OpenAI's errors, and streams that outlive the replica that began them."""
