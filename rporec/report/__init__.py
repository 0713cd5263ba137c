"""What a person sees of a run: `html` writes the report, `live` draws the terminal."""
