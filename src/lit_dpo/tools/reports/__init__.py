"""A report of what was found in data: on the terminal, as JSON, as a page."""
