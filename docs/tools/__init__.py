"""What writes the generated parts of the pages: `python -m docs.tools`."""
