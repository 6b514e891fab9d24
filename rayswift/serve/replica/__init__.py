"""One engine of a deployment behind OpenAI's interface, and the leases that let the gateway in."""
